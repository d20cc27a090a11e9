"""Compare the child with its parent: quality on held-out rows, sample texts, and times."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from layersmith.costs.aiconfigurator import ask_whole
from layersmith.costs.budget import Workload
from layersmith.costs.clock import device_name
from layersmith.costs.stopwatch import time_models
from layersmith.costs.times import Times, costs_of
from layersmith.errors import UnsupportedModel
from layersmith.evaluation.compare import Comparison, RowsToCompare, complete
from layersmith.evaluation.tasks import task_rows
from layersmith.execution.streaming import load_streamed
from layersmith.export.decilm import VLLM, why_not_llama
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.checkpoint import load
from layersmith.library.alternative import child_blocks
from layersmith.run.artifacts import read_json, write_json
from layersmith.run.progress import Progress
from layersmith.run.stage import Making, Stage
from layersmith.stages.costs import COSTS, shape_of
from layersmith.stages.data import DATA, digest_of_split
from layersmith.stages.describe import DESCRIBE
from layersmith.stages.job import Job
from layersmith.stages.realize import CHILD
from layersmith.stages.refine import SOLUTION
from layersmith.stages.search import SEARCH
from layersmith.stages.tasks import kept_shares, task_inputs, task_results

_FILE = "evaluation.json"


def _inputs(job: Job) -> Any:
    recipe = job.recipe
    settings = [
        recipe.completion_tokens,
        list(recipe.prompts),
        recipe.scoring.batch_tokens,
        *task_inputs(job),
        job.recipe.evaluation.keep,
    ]
    return [job.made_from(CHILD), digest_of_split(job, "evaluation"), *settings, job.dtype]


def _load_child(job: Job, folder: Path) -> Any:
    """A child, as it is on the disk."""
    parent, trusts = job.parent, job.trust_remote_code
    if parent.stream is None:
        runtime = parent.runtime
        return load(folder, dtype=runtime.dtype, device=runtime.device, trust_remote_code=trusts).eval()
    return load_streamed(folder, parent.runtime, parent.descriptor, job.run.folder, trusts)[0]


def _samples(job: Job, child: Any, tokens: Any) -> list[dict[str, str]]:
    """Texts that parent and child write; none if each token would read all weights from the disk."""
    length, parent, tokenizer = job.recipe.completion_tokens, job.first_parent, job.tokenizer
    if not length or parent.stream is not None:
        return []
    prompts = job.recipe.prompts or (tokenizer.decode(tokens[0][: min(48, len(tokens[0]) // 2)]),)
    return [
        {
            "prompt": prompt,
            "parent": complete(parent.model, tokenizer, prompt, length),
            "child": complete(child, tokenizer, prompt, length),
        }
        for prompt in prompts
    ]


def rows_of_tasks(job: Job, child: Any, child_digest: str | None, progress: Progress) -> list[dict[str, Any]]:
    """Rows of the recipe's tasks; results are kept in the user's cache.

    Args:
        job: The job.
        child: The child, or the distilled one.
        child_digest: Digest of what it was made from.
        progress: Receives requests that were answered.
    """
    if not job.recipe.evaluation.tasks:
        return []
    if job.parent.stream is not None:
        progress.note("tasks are not evaluated: the parent does not fit in memory.")
        return []
    models = ((job.first_parent.model, job.first_parent.identity), (child, child_digest))
    parent, of_child = (task_results(job, model, digest, progress) for model, digest in models)
    kept = kept_shares(job.recipe.evaluation.keep, parent, of_child)
    return [*task_rows(parent, of_child), *(share.row() for share in kept)]


def compared_with_parent(job: Job, folder: Path, progress: Progress) -> tuple[Any, Comparison]:
    """The child in a folder and its comparison with the parent; all processes work on it together."""
    tokens, child = job.read(DATA).evaluation, _load_child(job, folder)
    rows = RowsToCompare(tokens, job.recipe.scoring.rows_at_once(tokens.shape[1]), job.tokenizer)
    return child, rows.compare_in_all(job.first_parent.model, child, progress)


def _compared(job: Job, making: Making) -> tuple[Any, Comparison]:
    return compared_with_parent(job, job.read(CHILD), making.progress)


def _make(job: Job, making: Making) -> None:
    child, compared = _compared(job, making)
    table = compared.to_dict()
    table["rows"] += rows_of_tasks(job, child, job.made_from(CHILD), making.progress)
    write_json(making.folder / _FILE, table | {"samples": _samples(job, child, job.read(DATA).evaluation)})


EVALUATION: Stage[Job, dict[str, Any]] = Stage(
    name="evaluation",
    inputs=_inputs,
    make=_make,
    read=lambda job, folder: read_json(folder / _FILE),
    meanwhile=_compared,
)


# ---------------------------------------------------------------------------------------------- times


def _workload(job: Job) -> Workload:
    workload = job.workload.within(job.parent.positions)
    if not job.limits.has_times:  # only informative, so it has to be quick
        workload = workload.within(job.recipe.data.sequence_length)
    return workload


def _is_wanted(job: Job) -> bool:
    """Times of another machine are asked for where a server's layout holds whole children; no other can be timed here.

    A parent that is not in memory is not timed.
    """
    times = job.read(COSTS).times
    if times is not None and times.source == "predicted" and job.recipe.costs.server is not None:
        return not why_not_llama(VLLM, job.parent.config, job.parent.descriptor)
    is_possible = not job.is_streamed and (times is None or times.source == "measured")
    return is_possible and (job.limits.has_times or job.recipe.costs.time_child)


def _time(job: Job, making: Making) -> None:
    times = job.read(COSTS).times
    if times is not None and times.source == "predicted":
        _ask(job, making, times)
    else:
        _measure(job, making)


def _ask(job: Job, making: Making, times: Times) -> None:
    """The times of the whole parent and child on the server that the recipe names."""
    parent, solution = job.parent, job.read(SOLUTION)
    if solution.has_formats:
        making.progress.note("the whole child is not asked for: its layers have number formats. Its times are sums.")
        return
    shape, source = shape_of(parent, job.read(DESCRIBE)), job.recipe.costs
    children = [list(job.first_parent.blocks), child_blocks(parent.blocks, solution.alternatives)]
    with making.progress.stage("clock", 1, "pair") as advance:
        try:
            asked = [ask_whole(str(source.device), str(source.server), shape, c, times.workload) for c in children]
        except UnsupportedModel as reason:
            making.progress.note(f"{reason}. Its predicted times are sums over its parts.")
            return
        advance(1)
    before, after = (costs_of(timing, times.workload) for timing in asked)
    _write_times(making, times.workload, before, after, {"device": times.device, "predicted": True})


def _write_times(making: Making, workload: Workload, before: Any, after: Any, more: dict[str, Any]) -> None:
    how = {"batch": workload.batch, "prompt": workload.prompt, "generated": workload.generated}
    write_json(making.folder / "times.json", {"parent": before, "child": after, **how, **more})


def _measure(job: Job, making: Making) -> None:
    parent, workload, child = job.first_parent, _workload(job), _load_child(job, job.read(CHILD))
    with making.progress.stage("clock", 1, "pair") as advance:
        with foreign_code("do parent and child generate?") as attempt:
            measured = time_models([parent.model, child], workload, job.recipe.costs, parent.language_config.vocab_size)
        advance(1)
    if attempt.failed:
        making.progress.note(f"parent and child are not timed: they do not generate here ({attempt.reason}).")
        return
    before, after = (costs_of(measurement.time, workload) for measurement in measured)
    noise = {
        name: {"error": dataclasses.asdict(m.error), "spread": dataclasses.asdict(m.spread), "busy": m.busy}
        for name, m in zip(("parent", "child"), measured, strict=True)
    }
    if any(m.busy for m in measured):
        widest = max(max(m.spread.prefill, m.spread.decode) for m in measured)
        making.progress.note(
            f"the machine was busy while parent and child were timed: repeats of one time differ by {widest:.0%}. "
            "Do not read a speed-up from these times; time them again on a quiet machine."
        )
    _write_times(making, workload, before, after, {"device": device_name(parent.runtime), "noise": noise})


CLOCK = Stage(
    name="clock",
    inputs=lambda job: [
        job.made_from(CHILD),
        job.made_from(SEARCH),
        job.settings("costs"),
        job.settings("data")["sequence_length"],
        dataclasses.asdict(job.workload),
        job.limits.has_times,
        job.dtype,
    ],
    make=_time,
    read=lambda job, folder: read_json(folder / "times.json"),
    is_wanted=_is_wanted,
)
