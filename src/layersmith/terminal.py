"""What the command line prints when a command has done its work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from layersmith.costs.times import Times, Timing
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.report.collect import described
from layersmith.report.words import cost_label, load_in_words, ordered_costs, ratio
from layersmith.run.artifacts import read_json
from layersmith.search.problem import Solution
from layersmith.stages.inspect import Inspection
from layersmith.stages.verify import Verification
from layersmith.units import format_cost, format_seconds


def print_result(console: Console, result: Any, with_samples: bool = False) -> None:
    """Parent against child, and where everything lies."""
    solution: Solution = result.solution
    report = read_json(result.run / "report.json")
    print_layers(console, report["layers"])
    table = Table(title="parent against child", title_justify="left")
    for heading in ("", "parent", "child", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    measured = report["times"]
    for name in ordered_costs(solution.costs):
        if measured and name in measured["child"]:
            continue
        before, after = solution.parent_costs[name], solution.costs[name]
        left = ratio(name, before, after)
        share = "" if left is None else f"{left:.2f}x"
        table.add_row(cost_label(name), format_cost(name, before), format_cost(name, after), share)
    for name in ordered_costs(measured["child"]) if measured else ():
        before, after = measured["parent"][name], measured["child"][name]
        left = ratio(name, before, after)
        share = "" if left is None else f"{left:.2f}x"
        table.add_row(cost_label(name), format_cost(name, before), format_cost(name, after), share)
    for metric in ("loss", "perplexity", "kl_divergence", "top_1_agreement"):
        row = result.metric(metric)
        parent = "" if row["parent"] is None else f"{row['parent']:.4f}"
        change = (
            "" if row["difference"] is None else with_noise(row["difference"], row["difference_standard_error"], "+")
        )
        child = with_noise(row["child"], row["child_standard_error"])
        table.add_row(row["label"], parent, child, change)
    console.print(table)
    tokens = result.evaluation["tokens"]
    console.print(f"evaluated on {tokens:,} tokens that nothing else has seen; ± is one standard error", style="dim")
    if measured:
        console.print(f"timed on {load_in_words(measured)}", style="dim", highlight=False)
    if with_samples:
        print_samples(console, result.evaluation["samples"])
    console.print(f"child:  {result.child}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {result.report}", markup=False, highlight=False, soft_wrap=True)


def print_layers(console: Console, layers: list[dict[str, Any]]) -> None:
    """A solution, layer by layer: what was, what is."""
    table = Table(title="solution", title_justify="left")
    for heading in ("layer", "attention", "FFN"):
        table.add_column(heading)
    for row in layers:
        cells = [row["attention"], row["ffn"]]
        words = [c["child"] if c["kind"] == "parent" else f"{c['parent']} => {c['child']}" for c in cells]
        table.add_row(str(row["layer"]), *words)
    console.print(table)


def print_samples(console: Console, samples: list[dict[str, str]]) -> None:
    """What parent and child write after the same prompt."""
    for sample in samples:
        for who in ("parent", "child"):
            console.rule(f"{who} completes", align="left", style="dim")
            console.print(Text(sample["prompt"], style="dim") + Text(sample[who], style="bold"), soft_wrap=True)
    console.rule(style="dim")


def with_noise(value: float, error: float | None, sign: str = "") -> str:
    """A number with its standard error, to the digits that mean something."""
    return f"{value:{sign}.4f}" if error is None else f"{value:{sign}.4f} ± {error:.4f}"


def print_solution(console: Console, library: Library, solution: Solution) -> None:
    """A solution and its costs."""
    layers: list[dict[str, Any]] = [{"layer": i} for i in range(len(library.parent.blocks))]
    for alternative in solution.alternatives:
        was, now = described(library, alternative)
        layers[alternative.layer][alternative.subblock] = {"kind": alternative.kind, "parent": was, "child": now}
    print_layers(console, layers)
    for name in ordered_costs(solution.costs):
        before_cost, after_cost = solution.parent_costs[name], solution.costs[name]
        share = ratio(name, before_cost, after_cost) or 0.0
        limit = f", limit {format_cost(name, solution.limits[name])}" if name in solution.limits else ""
        change = f"{format_cost(name, before_cost)} => {format_cost(name, after_cost)} ({share:.2f}x{limit})"
        console.print(f"{cost_label(name)}: {change}", highlight=False)
    how = "proven optimal for these scores" if solution.proven_optimal else "the best found"
    if not solution.proven_optimal and solution.bound is not None:
        how += f"; none within the limits is below {solution.bound:.4f}"
    console.print(f"sum of scores: {solution.score:.4f}, {how}", highlight=False)


def print_frontier(console: Console, path: Path) -> None:
    """What a frontier has, and where it lies."""
    data = read_json(path)
    table = Table(title=f"frontier by {data['cost'].replace('_', ' ')}", title_justify="left")
    for heading in ("", "of the parent", "sum of scores", "measured"):
        table.add_column(heading, justify="right")
    for row in data["points"]:
        measured = with_noise(row["measured"]["mean"], row["measured"]["error"]) if row["measured"] else ""
        table.add_row(
            format_cost(data["cost"], row["cost"]), f"{row['fraction']:.3f}x", f"{row['score']:.4f}", measured
        )
    console.print(table)
    console.print(f"frontier: {path}", markup=False, highlight=False, soft_wrap=True)


def print_times(console: Console, times: Times, alternatives: Sequence[Alternative]) -> None:
    """What each alternative takes, layers in which that is the same together."""
    load = times.workload
    title = (
        f"{times.source} on {times.device}: batch {load.batch}, prompt {load.prompt:,}, then {load.generated:,} tokens"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("layers", "alternative", "to first token", "per token"):
        table.add_column(heading, justify="right" if heading.endswith("token") else "left")
    rows: dict[tuple[str, Timing], list[int]] = {}
    for a in alternatives:
        rows.setdefault((a.name, times.by_key[a.key]), []).append(a.layer)
    for (name, own), layers in rows.items():
        table.add_row(spans(layers), name, format_seconds(own.prefill), format_seconds(own.decode))
    table.add_row("", "outside the layers", format_seconds(times.fixed.prefill), format_seconds(times.fixed.decode))
    whole = times.parent(alternatives)
    table.add_row("", "the whole parent", format_seconds(whole.prefill), format_seconds(whole.decode))
    console.print(table)
    if times.checks:
        print_time_checks(console, times, alternatives)


def print_time_checks(console: Console, times: Times, alternatives: Sequence[Alternative]) -> None:
    """Sums of parts against whole children, and what sums are taken for because of it."""
    table = Table(title="sums of parts against whole children, of the parent", title_justify="left")
    for heading in ("", "parameters", "to first token: sum", "whole", "per token: sum", "whole"):
        table.add_column(heading, justify="right" if heading else "left")
    parent = times.parent(alternatives)
    for c in times.checks:
        cells = [f"{c.parts.prefill / parent.prefill:.3f}x", f"{c.whole.prefill / c.parent.prefill:.3f}x"]
        cells += [f"{c.parts.decode / parent.decode:.3f}x", f"{c.whole.decode / c.parent.decode:.3f}x"]
        table.add_row(c.what, f"{c.fraction:.3f}x", *cells)
    console.print(table)
    curves = times.curves(alternatives)
    for share in (0.25, 0.5, 0.75):
        own = f"{curves['prefill'](share):.3f}x to the first token, {curves['decode'](share):.3f}x per token"
        console.print(f"a sum of {share:.2f}x is taken for {own}", highlight=False)


def spans(layers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    found: list[list[int]] = []
    for layer in sorted(layers):
        if found and layer == found[-1][1] + 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def print_evaluation(console: Console, evaluation: dict[str, Any]) -> None:
    """The table of an evaluation."""
    table = Table(title=f"{evaluation['tokens']:,} tokens", title_justify="left")
    for heading in ("", "parent", "model", "difference"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in evaluation["rows"]:
        table.add_row(
            row["label"],
            "" if row["parent"] is None else f"{row['parent']:.4f}",
            with_noise(row["child"], row["child_standard_error"]),
            "" if row["difference"] is None else with_noise(row["difference"], row["difference_standard_error"], "+"),
        )
    console.print(table)


def print_distilled(console: Console, made: Any) -> None:
    """What was tried, and parent against child before and after."""
    from layersmith.evaluation.compare import closed  # it takes torch

    if made.finalists:
        table = Table(title="finalists", title_justify="left")
        for heading in ("solution", "sum of scores", "KL after a short while", ""):
            table.add_column(heading, justify="right" if heading else "left")
        for row in made.finalists:
            cells = (str(row["number"]), f"{row['score']:.4f}", f"{row['kl']:.4f}", "goes on" if row["won"] else "")
            table.add_row(*cells)
        console.print(table)
    table = Table(title=f"{made.after['tokens']:,} tokens that nothing else has seen", title_justify="left")
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
        console.print(f"{share:z.0%}{noise} of the loss between child and parent is closed", highlight=False)
    console.print(f"child: {made.child}", markup=False, highlight=False, soft_wrap=True)


def print_verification(console: Console, found: Verification) -> None:
    """What was tried of a model, and what came out."""
    console.print(f"{found.name}: {found.architecture}, described by {found.descriptor}", highlight=False)
    console.print(f"tried on a random model of the same kinds: {found.specimen}, {found.seconds:.1f} s", style="dim")
    table = Table(title="the whole model", title_justify="left", show_header=False)
    for what, verdict in found.whole.items():
        table.add_row(what, verdict)
    console.print(table)
    for layers, verdicts in found.layers:
        table = Table(title=f"layers like {layers} of it", title_justify="left", show_header=False)
        for what, verdict in verdicts.items():
            table.add_row(what, Text(verdict, style="green" if verdict == "ok" else "yellow"))
        console.print(table)


def print_inspection(console: Console, found: Inspection) -> None:
    """A model's blocks, what can be changed, and where parameters and memory go."""
    console.print(f"{found.name}: {found.architecture}, described by {found.descriptor}", highlight=False)
    table = Table(title="blocks", title_justify="left")
    for heading in ("layers", "attention", "can become", "FFN", "can become"):
        table.add_column(heading)
    for row in found.blocks:
        table.add_row(row.layers, row.attention, row.attention_alternatives, row.ffn, row.ffn_alternatives)
    console.print(table)
    costs = Table(title=f"where it goes (batch {found.batch}, context {found.context:,})", title_justify="left")
    costs.add_column("")
    for name in ("parameters", "weight_bytes", "kv_cache_bytes"):
        costs.add_column(cost_label(name), justify="right")
        costs.add_column("", justify="right")
    for label, part in found.parts.items():
        cells = []
        for name in ("parameters", "weight_bytes", "kv_cache_bytes"):
            whole = found.total[name]
            cells += [format_cost(name, part[name]), f"{part[name] / whole:.0%}" if whole else ""]
        costs.add_row(label, *cells)
    console.print(costs)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
