"""The results that the command line prints, as tables on standard output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from layersmith import tables
from layersmith.costs.times import Times, Timing
from layersmith.evaluation.compare import closed
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.report.collect import described
from layersmith.report.data import Evaluation, Report
from layersmith.report.words import cost_label, ordered_costs, ratio, workload_in_words
from layersmith.run.artifacts import read_json
from layersmith.search.solution import Solution
from layersmith.stages.inspect import Inspection
from layersmith.stages.verify import Verification
from layersmith.units import format_cost, format_seconds


def print_result(console: Console, result: Any, with_samples: bool = False) -> None:
    """Print the solution, a table of parent against child, and the paths of child and report."""
    solution: Solution = result.solution
    report = Report.from_json(read_json(result.run / "report.json"))
    cells = [
        [(c.parent, None if c.kind == "parent" else c.child) for c in (row.attention, row.ffn)] for row in report.layers
    ]
    print_layers(console, cells)
    table = Table(title="parent and child", title_justify="left")
    for heading in ("", "parent", "child", "child / parent"):
        table.add_column(heading, justify="left" if not heading else "right")
    clock = report.times
    before, after = dict(solution.parent_costs), dict(solution.costs)
    if clock is not None:
        before, after = before | clock.parent, after | clock.child
    for name in ordered_costs(after):
        share = ratio(name, before[name], after[name])
        change = "" if share is None else f"{share:.2f}x"
        if clock is not None and clock.is_busy and name in clock.child:
            change = "busy"
        table.add_row(cost_label(name), format_cost(name, before[name]), format_cost(name, after[name]), change)
    table.add_section()
    table.add_row("", "", "", "child - parent", style="bold")
    shown = ("loss", "perplexity", "kl_divergence", "top_1_agreement")
    for row in result.evaluation["rows"]:
        if row["metric"] not in shown and row.get("task") is None:
            continue
        parent = "" if row["parent"] is None else f"{row['parent']:.4f}"
        change = (
            "" if row["difference"] is None else with_noise(row["difference"], row["difference_standard_error"], "+")
        )
        child = with_noise(row["child"], row["child_standard_error"])
        table.add_row(row["label"], parent, child, change)
    console.print(table)
    tokens = result.evaluation["tokens"]
    console.print(
        f"evaluated on {tokens:,} held-out tokens; ± is one standard error of the mean over rows", style="dim"
    )
    if clock is not None:
        console.print(workload_in_words(clock), style="dim", highlight=False)
    if with_samples:
        print_samples(console, result.evaluation["samples"])
    console.print(f"child:  {result.child}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {result.report}", markup=False, highlight=False, soft_wrap=True)


# The parent's subblock in words, and the child's; None if it is unchanged.
Cell = tuple[str, str | None]


def print_layers(console: Console, layers: Sequence[Sequence[Cell]]) -> None:
    """Print a solution: for each layer its attention and its FFN, of the parent and of the child."""
    table = Table(title="solution", title_justify="left")
    for heading in ("layer", "attention", "FFN"):
        table.add_column(heading)
    for layer, cells in enumerate(layers):
        words = [
            # If only the number format changes, it alone is named.
            Text("unchanged", style="dim") if child is None else f"{parent} => {child.removeprefix(f'{parent}, ')}"
            for parent, child in cells
        ]
        table.add_row(str(layer), *words)
    console.print(table)


def print_samples(console: Console, samples: list[dict[str, str]]) -> None:
    """Print what parent and child write after the same prompt."""
    for sample in samples:
        for who in ("parent", "child"):
            console.rule(f"completion by the {who}", align="left", style="dim")
            console.print(Text(sample["prompt"], style="dim") + Text(sample[who], style="bold"), soft_wrap=True)
    console.rule(style="dim")


def with_noise(value: float, error: float | None, sign: str = "") -> str:
    """A number with its standard error."""
    return f"{value:{sign}.4f}" if error is None else f"{value:{sign}.4f} ± {error:.4f}"


def print_solution(console: Console, library: Library, solution: Solution) -> None:
    """Print a solution and its costs."""
    cells = {(a.layer, a.subblock): (a, *described(library, a)) for a in solution.alternatives}
    layers: list[list[Cell]] = [[] for _ in library.parent.blocks]
    for layer, row in enumerate(layers):
        for subblock in ("attention", "ffn"):
            alternative, parent, child = cells[layer, subblock]
            row.append((parent, None if alternative.is_parent else child))
    print_layers(console, layers)
    for name in ordered_costs(solution.costs):
        before_cost, after_cost = solution.parent_costs[name], solution.costs[name]
        share = ratio(name, before_cost, after_cost) or 0.0
        limit = f", limit {format_cost(name, solution.limits[name])}" if name in solution.limits else ""
        change = f"{format_cost(name, before_cost)} => {format_cost(name, after_cost)} ({share:.2f}x{limit})"
        console.print(f"{cost_label(name)}: {change}", highlight=False)
    proof = "proven optimal for these scores" if solution.proven_optimal else "not proven optimal"
    if not solution.proven_optimal and solution.bound is not None:
        proof += f"; no solution within the limits has a sum below {solution.bound:.4f}"
    console.print(f"sum of scores: {solution.score:.4f} ({proof})", highlight=False)


def print_frontier(console: Console, path: Path) -> None:
    """Print the points of a frontier and the path of its file."""
    data = read_json(path)
    table = Table(
        title=f"frontier: the best solution for each limit on {cost_label(data['cost'])}", title_justify="left"
    )
    for heading in ("", "child / parent", "sum of scores", "measured"):
        table.add_column(heading, justify="right")
    for row in data["points"]:
        measured = with_noise(row["measured"]["mean"], row["measured"]["error"]) if row["measured"] else ""
        table.add_row(
            format_cost(data["cost"], row["cost"]), f"{row['fraction']:.3f}x", f"{row['score']:.4f}", measured
        )
    console.print(table)
    console.print(f"frontier: {path}", markup=False, highlight=False, soft_wrap=True)


def print_times(console: Console, times: Times, alternatives: Sequence[Alternative]) -> None:
    """Print the times of every alternative; layers with equal times share a row."""
    load = times.workload
    title = (
        f"{times.source} on {times.device}: batch {load.batch}, prompt of {load.prompt:,} tokens, "
        f"{load.generated:,} generated"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("layers", "alternative", "time to first token", "time per token"):
        table.add_column(heading, justify="right" if heading.endswith("token") else "left")
    rows: dict[tuple[str, Timing], list[int]] = {}
    for a in alternatives:
        rows.setdefault((a.name, times.by_key[a.key]), []).append(a.layer)
    for (name, timing), layers in rows.items():
        table.add_row(spans(layers), name, format_seconds(timing.prefill), format_seconds(timing.decode))
    table.add_row(
        "", "embedding, head and overhead", format_seconds(times.fixed.prefill), format_seconds(times.fixed.decode)
    )
    whole = times.parent(alternatives)
    table.add_row("", "whole parent", format_seconds(whole.prefill), format_seconds(whole.decode))
    console.print(table)
    if times.checks:
        print_time_checks(console, times, alternatives)


def print_time_checks(console: Console, times: Times, alternatives: Sequence[Alternative]) -> None:
    """Print predicted times of whole children against measured ones, and the calibration that follows from them."""
    table = Table(
        title="whole children, as a share of the parent: sum of their parts, and measured", title_justify="left"
    )
    for heading in ("", "parameters", "first token: sum", "measured", "per token: sum", "measured"):
        table.add_column(heading, justify="right" if heading else "left")
    parent = times.parent(alternatives)
    for c in times.checks:
        cells = [f"{c.parts.prefill / parent.prefill:.3f}x", f"{c.whole.prefill / c.parent.prefill:.3f}x"]
        cells += [f"{c.parts.decode / parent.decode:.3f}x", f"{c.whole.decode / c.parent.decode:.3f}x"]
        table.add_row(c.what, f"{c.fraction:.3f}x", *cells)
    console.print(table)
    curves = times.curves(alternatives)
    for share in (0.25, 0.5, 0.75):
        corrected = f"{curves['prefill'](share):.3f}x (first token), {curves['decode'](share):.3f}x (per token)"
        console.print(f"calibration: predicted {share:.2f}x => corrected {corrected}", highlight=False)


def spans(layers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Print the metrics of an evaluation."""
    for table in evaluation.tables():
        print_table(console, table)


def print_table(console: Console, table: tables.Table) -> None:
    """Print a table of a result."""
    drawn = Table(title=table.title, title_justify="left")
    for i, heading in enumerate(table.headings):
        drawn.add_column(heading, justify="right" if table.is_numeric and i else "left")
    for row in table.rows:
        drawn.add_row(*row)
    console.print(drawn)


def print_distilled(console: Console, made: Any) -> None:
    """Print the finalists, and the child's metrics before and after global distillation."""
    if made.finalists:
        table = Table(title="finalists", title_justify="left")
        for heading in ("solution", "sum of scores", "KL after short distillation", ""):
            table.add_column(heading, justify="right" if heading else "left")
        for row in made.finalists:
            cells = (str(row["number"]), f"{row['score']:.4f}", f"{row['kl']:.4f}", "kept" if row["won"] else "")
            table.add_row(*cells)
        console.print(table)
    table = Table(title=f"evaluated on {made.after['tokens']:,} held-out tokens", title_justify="left")
    for heading in ("", "parent", "child", "distilled"):
        table.add_column(heading, justify="left" if not heading else "right")
    for before, after in zip(made.before["rows"], made.after["rows"], strict=True):
        table.add_row(
            after["label"],
            "" if after["parent"] is None else f"{after['parent']:.4f}",
            with_noise(before["child"], before["child_standard_error"]),
            with_noise(after["child"], after["child_standard_error"]),
        )
    console.print(table)
    loss = next(r for r in made.before["rows"] if r["metric"] == "loss")
    if loss["difference"] > 2 * (loss["difference_standard_error"] or 0.0):
        share, error = closed(made.before, made.after)
        noise = "" if error is None else f" ± {error:.0%}"
        console.print(f"distillation closed {share:z.0%}{noise} of the loss between child and parent", highlight=False)
    console.print(f"child: {made.child}", markup=False, highlight=False, soft_wrap=True)


def print_verification(console: Console, verification: Verification) -> None:
    """Print the checks of ``inspect --verify`` and their results."""
    console.print(
        f"{verification.name}: {verification.architecture}, described by {verification.descriptor}", highlight=False
    )
    console.print(
        f"checked on a small random model with the same kinds of layers: {verification.specimen}, "
        f"{verification.seconds:.1f} s",
        style="dim",
    )
    table = Table(title="whole model", title_justify="left", show_header=False)
    for what, verdict in verification.whole.items():
        table.add_row(what, verdict)
    console.print(table)
    for layers, verdicts in verification.layers:
        table = Table(title=f"layers like {layers}", title_justify="left", show_header=False)
        for what, verdict in verdicts.items():
            table.add_row(what, Text(verdict, style="green" if verdict == "ok" else "yellow"))
        console.print(table)
    for question in verification.refuted:
        console.print(question, markup=False, highlight=False)


def print_inspection(console: Console, inspection: Inspection) -> None:
    """Print a model's blocks, the alternatives of each, and where parameters and memory go."""
    console.print(
        f"{inspection.name}: {inspection.architecture}, described by {inspection.descriptor}", highlight=False
    )
    for table in inspection.tables():
        print_table(console, table)
    for note in inspection.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
