"""What each of several processes holds, sends, reads and computes in every stage, before a run starts.

A parent that does not fit into the memory of one process is divided: each process holds the layers that are dealt to it
and one more unit at a time, a layer or the head (:mod:`layersmith.execution.division`). Stages that the first process
does alone read the layers of the others from the disk. Counted is the process that takes most.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from layersmith.costs.roofline import Device, device_of
from layersmith.distillation.steps import groups
from layersmith.errors import UsageError
from layersmith.execution.dealing import efficiency
from layersmith.execution.memory import free_memory
from layersmith.recipe import Recipe
from layersmith.run.runtime import DTYPES, Runtime
from layersmith.stages.arithmetic import program_seconds
from layersmith.stages.holding import Held, Holding, Memory, Sizes, held_in
from layersmith.stages.inspect import Outline
from layersmith.units import format_bytes, format_whole_seconds, parse_amount

# A forward pass reaches this share of the dense rate of a data sheet: matrix products reach 0.8 of it on an H200, and
# are 2.5 times as fast as a forward pass (:mod:`.time_plan`).
_OF_DATA_SHEET = 0.8 / 2.5
# Bytes a second: from process to process through the memory of the CPU, from files into memory, checked, and of sums
# from a GPU to those on the CPU.
_LINK, _READ, _ADDED = 1e9, 1e9, 2e9
# How often a process runs the whole parent once, to find out whether its layers run one by one.
_CHECKS = 4
# Stages in which each group of processes takes some batches through all layers; others are those of the first group. So
# is a part of refinement, which is counted as if all of it were.
_IN_GROUPS = ("statistics", "scores")
_RATES = {"G": 1e9, "T": 1e12, "P": 1e15}


@dataclass(frozen=True)
class Machine:
    """Where a run is planned for.

    Attributes:
        processes: Number of processes, each with a device.
        memory: Bytes of each device.
        rate: Operations per second of a forward pass on a device; None for the rate here.
        runtime: Device and dtype of the computation.
    """

    processes: int
    memory: float
    rate: float | None
    runtime: Runtime

    @property
    def is_gpu(self) -> bool:
        return self.runtime.device.type == "cuda"

    def sizes(self, space: Outline, recipe: Recipe, meta: Sequence[nn.Module] = ()) -> Sizes:
        """Sizes of a parent here; of linear replacements those that the recipe asks for."""
        offered = [a for a in space.alternatives if a.kind != "linear" or a.subblock in recipe.library.linear]
        memory = Memory(self.processes, self.memory, self.runtime.dtype.itemsize, self.runtime.device.type)
        return Sizes(dataclasses.replace(space, alternatives=offered), recipe, memory, meta)


@dataclass(frozen=True)
class Asked:
    """What ``--world-size``, ``--device-memory`` and ``--device-rate`` say; None where one was not given."""

    processes: int | None = None
    memory: str | None = None
    rate: str | None = None

    @property
    def is_any(self) -> bool:
        return any(value is not None for value in (self.processes, self.memory, self.rate))

    def machine(self, recipe: Recipe) -> Machine:
        """The machine that is meant. A rate is that of a GPU in bfloat16, unless the recipe says otherwise.

        Raises:
            UsageError: An amount is wrong, or a device is unknown.
        """
        if self.processes is not None and self.processes < 1:
            raise UsageError("--world-size: give the number of processes, at least 1.")
        device, rate = None, None
        if self.rate is not None:
            rate = _rate(self.rate)
            device = None if rate else device_of(self.rate, "--device-rate")
        runtime = Runtime.detect(recipe.device, recipe.dtype) if self.rate is None else _elsewhere(recipe)
        if device is not None:
            rate = _OF_DATA_SHEET * (device.operations if runtime.dtype.itemsize == 2 else device.operations_fp32)
        return Machine(self.processes or 1, self._memory(device, runtime), rate, runtime)

    def _memory(self, device: Device | None, runtime: Runtime) -> float:
        if self.memory is not None:
            memory = float(parse_amount(self.memory, "--device-memory"))
            if memory < 1024**2:
                raise UsageError(f"--device-memory: {self.memory!r} is too little. Give an amount such as 80GiB.")
            return memory
        if device is not None:
            return device.memory
        if self.rate is not None and runtime.device.type != "cpu":
            raise UsageError("--device-rate: give --device-memory as well, or the name of a device, e.g. H100.")
        return free_memory(runtime.device) / (self.processes or 1 if runtime.device.type == "cpu" else 1)


def _rate(text: str) -> float | None:
    """``400TFLOP/s`` in operations per second; None if it is no rate."""
    match = re.fullmatch(r"([0-9.]+)\s*([GTP])FLOPS?(?:/s)?", text.strip(), re.IGNORECASE)
    rate = float(match[1]) * _RATES[match[2].upper()] if match and match[1].count(".") < 2 and match[1] != "." else 0.0
    if match and not rate:
        raise UsageError(
            f"--device-rate: {text!r} is not a rate. Give one such as 400TFLOP/s, or a device such as H100."
        )
    return rate or None


def _elsewhere(recipe: Recipe) -> Runtime:
    """The runtime on a device that need not be here."""
    if recipe.device == "cpu":
        return Runtime.detect("cpu", recipe.dtype)
    dtype = "bfloat16" if recipe.dtype == "auto" else recipe.dtype
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: use one of auto, {', '.join(DTYPES)}.")
    return Runtime(torch.device("cuda"), DTYPES[dtype])


@dataclass(frozen=True)
class Share(Held):
    """What the process that takes most holds and takes in a stage.

    Attributes:
        device, host, disk: Bytes that it holds, as in :class:`.Held`.
        sent: Bytes that it sends to other processes.
        read: Bytes of weights that it reads.
        operations: Floating-point operations.
        seconds: Time of the stage.
        waiting: Time of these in which it waits for processes that have other layers.
    """

    sent: float
    read: float
    operations: float
    seconds: float
    waiting: float = 0.0


def _size(size: float) -> str:
    return format_bytes(size) if size else "0"


@dataclass(frozen=True)
class Placement:
    """The shares of all stages; printed, it is a part of the text of ``--dry-run``.

    Attributes:
        processes: Number of processes.
        memory: Bytes of the device of each.
        is_streamed: Whether weights stay on the disk until a layer runs, or else each process has the whole parent.
        layers: Most layers that one process has.
        groups: Number of groups of processes that each have all layers.
        without_layers: Number of processes that have none, since there are more of them than layers.
        is_held: Whether a process keeps the weights of its layers in memory.
        stages: Stage to the share of the process that takes most.
    """

    processes: int
    memory: float
    is_streamed: bool
    layers: int
    groups: int
    without_layers: int
    is_held: bool
    stages: dict[str, Share]

    @property
    def is_divided(self) -> bool:
        """Whether layers are dealt to the processes."""
        return self.is_streamed and self.processes > 1

    @property
    def seconds(self) -> float:
        return sum(share.seconds for share in self.stages.values())

    @property
    def arrangement(self) -> str:
        """Who has which layers, in words."""
        how = "each has the whole parent"
        if self.is_divided:
            kept = "kept in its memory" if self.is_held else "read from the disk one at a time"
            count = "a layer" if self.layers == 1 else f"{self.layers} layers"
            how = f"each has at most {count}, {kept}"
            how += f", in {self.groups} groups that have all layers each" if self.groups > 1 else ""
            how += f", and {self.without_layers} have none" if self.without_layers else ""
        elif self.is_streamed:
            how = "it reads the parent from the disk, a layer at a time"
        count = f"{self.processes} processes" if self.processes > 1 else "1 process"
        return f"{count} with {_size(self.memory)}; {how}"

    def lines(self) -> Iterator[str]:
        """The text of ``--dry-run``."""
        yield f"{self.arrangement}. Of the process that takes most:"
        for name, share in self.stages.items():
            besides = {"on disk": share.disk, "sent": share.sent, "read": share.read}
            words = [f"{_size(size)} {what}" for what, size in besides.items() if size]
            words += [f"{share.operations / 1e12:,.2f} TFLOP"] if share.operations else []
            yield f"  {name}: {', '.join([*words, format_whole_seconds(share.seconds)])}"
            for where, parts in (("device", share.device), ("host", share.host)):
                if parts:
                    listed = ", ".join(f"{what} {_size(size)}" for what, size in parts.items())
                    yield f"    {where} {_size(sum(parts.values()))}: {listed}"


def place(
    space: Outline,
    recipe: Recipe,
    machine: Machine,
    flops: Mapping[str, float],
    seconds: Mapping[str, float],
    ranking: float = 0.0,
) -> Placement:
    """The shares of all stages.

    Args:
        space: The search space.
        recipe: All settings.
        machine: Where the run is planned for.
        flops: Operations of each stage, in all rounds.
        seconds: Seconds of each stage on one device, in all rounds.
        ranking: Seconds of the statistics in which the first process ranks, alone unless layers are dealt.

    Raises:
        UsageError: Some stage does not fit; the message says what would.
    """
    sizes = machine.sizes(space, recipe)
    _check(sizes, machine, seconds)
    stages, not_run = {}, ("tasks", "clock") if sizes.is_streamed else ()
    undivided = {
        "statistics": 0.0 if sizes.is_streamed else ranking,
        "refine": recipe.rounds.count * program_seconds(space),
    }
    for name, alone in seconds.items():
        if name in not_run:
            continue
        held, (work, time) = held_in(name, sizes), _shares_of(name, sizes)
        by_each = min(alone, undivided.get(name, 0.0))
        sent, read = _sent(name, sizes, flops), recipe.rounds.count * _read(name, sizes)
        works = (alone - by_each) * time
        moved = sent / _LINK + _awaited(name, sizes, read, works) + _added(name, sizes) / _ADDED
        stages[name] = Share(
            device=held.device,
            host=held.host,
            disk=held.disk,
            sent=sent,
            read=read,
            operations=flops.get(name, 0.0) * work,
            seconds=works + by_each + moved,
            waiting=(alone - by_each) * (time - work),
        )
    return Placement(
        processes=machine.processes,
        memory=machine.memory,
        is_streamed=sizes.is_streamed,
        layers=sizes.own,
        groups=sizes.groups,
        without_layers=max(0, machine.processes - sizes.groups * len(sizes.layers)),
        is_held=bool(sizes.held),
        stages=stages,
    )


# ---------------------------------------------------------------------------------------------- work


def _shares_of(stage: str, sizes: Sizes) -> tuple[float, float]:
    """Of a stage's time on one device, what the busiest of all works, and what it takes with waiting for others."""
    n, recipe, data = sizes.memory.processes, sizes.recipe, sizes.recipe.data
    calibration, scoring = sizes.tokens(data.calibration_sequences), sizes.tokens(data.scoring_sequences)
    tokens_and_batch = {
        "statistics": (calibration, sizes.counted_at_once),
        "library": (calibration, sizes.in_batch(recipe.local_distillation.batch_tokens)),
        "scores": (scoring, sizes.scored_at_once),
        "refine": (scoring, sizes.scored_at_once),
        "evaluation": (
            sizes.tokens(data.evaluation_sequences),
            sizes.in_batch(recipe.scoring.batch_tokens, data.evaluation_sequences),
        ),
    }
    if stage not in tokens_and_batch:
        share = 1 / n if stage == "distilled" else 1.0
        return share, share
    tokens, batch = tokens_and_batch[stage]
    batches = -(-tokens // batch)
    if stage == "library" or (sizes.is_streamed and stage != "evaluation"):
        in_groups = stage in _IN_GROUPS
        work = sizes.most / sum(sizes.layers) * (-(-batches // sizes.groups) / batches if in_groups else 1)
        return work, 1 / (n * efficiency(sizes.layers, n, batches, in_groups))
    # Alternatives and children are divided too.
    share = 1 / n if stage in ("scores", "refine") else -(-batches // n) / batches
    return share, share


def _sent(stage: str, sizes: Sizes, flops: Mapping[str, float]) -> float:
    """Bytes that the process that sends most sends."""
    recipe, n = sizes.recipe, sizes.memory.processes
    if n == 1:
        return 0.0
    calibration, scoring = (
        sizes.states(sizes.tokens(rows)) for rows in (recipe.data.calibration_sequences, recipe.data.scoring_sequences)
    )
    if stage in ("statistics", "library"):
        if stage == "library":
            return sizes.own * calibration
        # Groups of processes send the sums of their layers to the first.
        sums = sizes.own * max(map(sizes.sums_of, range(len(sizes.layers)))) if sizes.groups > 1 else 0.0
        return (sizes.own * calibration / sizes.groups + sums if sizes.is_streamed else 0.0) + sizes.own_maps
    if stage in ("scores", "refine") and sizes.is_streamed:
        whole = 2.0 * sizes.whole / sizes.memory.itemsize * sizes.tokens(recipe.data.scoring_sequences)
        groups_at_work = sizes.groups if stage in _IN_GROUPS else 1
        return sizes.own * scoring * flops.get(stage, 0.0) / whole / groups_at_work
    if stage == "distilled":  # gradients in float32, reduced once a step
        parameters, settings = sizes.whole / sizes.memory.itemsize, recipe.distillation
        parts = [tokens for tokens in (settings.tokens, settings.long_tokens) if tokens]
        steps = sum(tokens / settings.step_tokens(tokens) for tokens in parts)
        if not sizes.is_trained_sharded:
            return 2 * 4 * parameters * steps
        # In each pass the parent's weights are gathered once, the child's twice, and its gradients reduced.
        sharing, together = groups(settings, n), settings.tensor_parallel
        passes = sum(parts) / sharing / sizes.in_batch(settings.device_tokens)
        of_weights = (sharing - 1) / sharing * (sizes.memory.itemsize + 3 * 4) * parameters * sizes.of_group * passes
        # A layer's hidden states are added up twice forward, and the child's gradients twice backward.
        sums = 2 * (together - 1) / together * 6 * len(sizes.layers)
        return of_weights + sums * sizes.states(sum(parts) / sharing)
    return 0.0


def _added(stage: str, sizes: Sizes) -> float:
    """Bytes of a GPU's products that are added to the sums of statistics on the CPU, batch by batch."""
    if stage != "statistics" or not sizes.memory.is_gpu:
        return 0.0
    batches = -(-sizes.tokens(sizes.recipe.data.calibration_sequences) // sizes.counted_at_once)
    n, sums = sizes.memory.processes, [sizes.sums_of(i) for i in range(len(sizes.layers))]
    return sizes.own * -(-batches // sizes.groups) * max(sums) if sizes.is_streamed else -(-batches // n) * sum(sums)


def _read(stage: str, sizes: Sizes) -> float:
    """Bytes of weights that the process that reads most reads, where the parent stays on the disk."""
    recipe = sizes.recipe
    if not sizes.is_streamed:
        return 0.0
    others, own = sizes.whole - sizes.held, 0.0 if sizes.held else max(sizes.layers) * sizes.own
    if stage == "statistics":
        return _CHECKS * others + own
    if stage in ("scores", "refine"):
        passes = 4 if stage == "scores" else recipe.search.refine_passes
        return own * passes
    if stage == "distilled":  # of the parent once in each pass, of the child once forward and once backward
        settings = recipe.distillation
        passes = settings.tokens / sizes.in_batch(settings.device_tokens)
        passes += settings.long_tokens / sizes.long_row if settings.long_tokens else 0
        return 3 * sizes.whole * passes if sizes.is_trained_on_disk else 0.0
    if stage == "evaluation":
        batches = -(
            -recipe.data.evaluation_sequences // max(1, recipe.scoring.rows_at_once(recipe.data.sequence_length))
        )
        return 2 * others * -(-batches // sizes.memory.processes)
    return {"library": own, "pairs": others, "child": sizes.whole}.get(stage, 0.0)


def _awaited(stage: str, sizes: Sizes, read: float, seconds: float) -> float:
    """Seconds in which a stage that computes for some seconds waits for what it reads.

    What is read while a layer runs takes no time, as far as running takes longer. The checks of the parent run few
    tokens, and the child is written without running.
    """
    if not sizes.is_read_ahead:
        return read / _READ
    of_checks = _CHECKS * sizes.recipe.rounds.count * (sizes.whole - sizes.held)
    alone = {"statistics": of_checks, "child": read}.get(stage, 0.0)
    return alone / _READ + max(0.0, (read - alone) / _READ - seconds)


# ---------------------------------------------------------------------------------------------- what fits


def _check(sizes: Sizes, machine: Machine, stages: Mapping[str, float]) -> None:
    """Raises: UsageError: Some stage needs more memory than a device has, or another number of processes."""
    is_divided = "distilled" in stages and sizes.recipe.distillation.tensor_parallel > 1
    if is_divided and (why_not := sizes.why_not_sharded) is not None:
        raise UsageError(f"recipe distillation.tensor_parallel: the layers cannot be divided, because {why_not}.")
    is_possible = sizes.is_trained_sharded or sizes.is_trained_on_disk
    if "distilled" in stages and sizes.is_streamed and not is_possible:
        raise UsageError(
            f"--device-memory {_size(machine.memory)}: too little for the whole parent in each process, so it cannot "
            "be distilled globally unless several processes shard it (distillation.sharded), or one process trains "
            "adapters (distillation.lora_rank). Set distillation.tokens to 0."
        )
    stage, held = _fullest(sizes, stages)
    if held.on_device <= machine.memory:
        return
    what, size = max(held.device.items(), key=lambda part: part[1])
    fits = [
        words
        for words, recipe, where in _other_ways(sizes.recipe, machine, len(sizes.layers))
        if _fits(where.sizes(sizes.space, recipe, sizes.meta), stages)
    ]
    mend = f"It would fit with {', or with '.join(fits[:3])}."
    if not fits:
        mend = "Neither another number of processes nor settings make it fit: each has a layer, and one more unit."
    raise UsageError(
        f"--device-memory {_size(machine.memory)}: the stage {stage} needs {_size(held.on_device)} in one of "
        f"{machine.processes} processes, {_size(size)} of it for {what}. {mend}"
    )


def _fits(sizes: Sizes, stages: Mapping[str, float]) -> bool:
    return _fullest(sizes, stages)[1].on_device <= sizes.memory.size


def _fullest(sizes: Sizes, stages: Mapping[str, float]) -> tuple[str, Holding]:
    return max(((name, held_in(name, sizes)) for name in stages), key=lambda entry: entry[1].on_device)


def _other_ways(recipe: Recipe, machine: Machine, num_layers: int) -> Iterator[tuple[str, Recipe, Machine]]:
    """In words, and as a recipe and a machine: settings that need less, and other numbers of processes."""
    nothing_refitted = ["local_distillation.reconstruct=false", "local_distillation.child_refit=0"]
    least = [*nothing_refitted, "local_distillation.coupled_tokens=0"]
    counts = sorted({min(num_layers, 2**k) for k in range(num_layers.bit_length() + 1)} - {machine.processes})
    counts = [count for count in counts if count % recipe.distillation.tensor_parallel == 0]
    by_count = sorted(counts, key=lambda count: (count < machine.processes, abs(count - machine.processes)))
    for settings in (["stream=always"], ["scoring.batch_tokens=512"], ["library.linear=[]"], nothing_refitted[:1]):
        yield _in_words(settings), recipe.with_settings(settings), machine
    for count in by_count:
        yield f"--world-size {count}", recipe, dataclasses.replace(machine, processes=count)
    for settings in (nothing_refitted, least):
        yield _in_words(settings), recipe.with_settings(settings), machine
    for count in by_count:
        changed = recipe.with_settings(least), dataclasses.replace(machine, processes=count)
        yield f"--world-size {count} {_in_words(least)}", *changed


def _in_words(settings: Sequence[str]) -> str:
    return " ".join(f"--set {setting}" for setting in settings)
