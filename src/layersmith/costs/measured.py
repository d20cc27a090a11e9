"""Times of alternatives, measured in whole models on the device at hand.

A shape is timed as it will run: in a model of its family in which every layer of its kind has it, through
Transformers' own ``generate``. Its saving is the difference to the parent, divided by the number of those layers. So a
child's time lies between times that were measured, whatever runs between the layers is included, and no error is
multiplied by the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layersmith.block_config import BlockConfig
from layersmith.costs.clock import LEAST_ROUNDS, Measurement, device_name, quietly, time_in_turns
from layersmith.costs.counted import layers_alike
from layersmith.costs.measurement_cache import MeasurementCache
from layersmith.costs.savings import Shape, as_times, rescale, shrink
from layersmith.costs.stopwatch import REFERENCE_REPEATS, Stopwatch, no_op_blocks
from layersmith.costs.table import CostTable
from layersmith.costs.times import ZERO, Times, Timing
from layersmith.costs.trial_solutions import time_trial_solutions
from layersmith.errors import LayersmithError, UnsupportedModel, first_line
from layersmith.execution.parent import Parent
from layersmith.foreign import foreign_code
from layersmith.library.alternative import Alternative
from layersmith.run.artifacts import fingerprint
from layersmith.run.progress import SILENT, Progress

# Layers of each kind in the timed models if all of them would take too long or do not fit into memory.
_LEAST_LAYERS = 2
# A first run of the parent that takes longer than this is not repeated.
_LONG_SECONDS = 10.0


def measure(
    watch: Stopwatch,
    alternatives: Sequence[Alternative],
    costs: CostTable,
    progress: Progress = SILENT,
    check_reachable: Callable[[Times], None] = lambda fastest: None,
) -> Times:
    """Time every shape of a search space on this device, except those in the user's cache.

    Args:
        watch: Stopwatch of the parent.
        alternatives: All alternatives of the search space.
        costs: Their counted costs.
        progress: Receives the rounds done, and notes.
        check_reachable: Called with :func:`fastest_times` before the long work, to refuse a budget that no child can
            meet.

    Raises:
        UnsupportedModel: The family cannot generate.
    """
    parent, recipe = watch.parent, watch.recipe
    kinds = kinds_of(parent, alternatives, costs)
    shapes: dict[Shape, list[Alternative]] = {}
    for a in alternatives:
        if not a.is_parent:
            shapes.setdefault(Shape(kinds[a.layer], a.subblock, a.block_config(parent.blocks[a.layer])), []).append(a)
    cached = MeasurementCache(parent, watch.workload, recipe)
    missing = [shape for shape in shapes if shape.name not in cached.savings]
    if missing or cached.parent is None:
        fastest = fastest_times(watch, alternatives)
        if fastest is not None:
            check_reachable(fastest)
        session = _Session(watch, kinds, _parameters_removed(shapes, alternatives, costs), progress)
        earlier = {shape: cached.saving(shape.name) for shape in shapes if shape not in missing}
        whole, savings = session.measure(missing, earlier)
        cached.add(whole, {shape.name: saving for shape, saving in savings.items()})
    assert cached.parent is not None
    savings_by_key = {a.key: cached.saving(shape.name) for shape, members in shapes.items() for a in members}
    times = as_times(alternatives, savings_by_key, cached.parent, device_name(parent.runtime), watch.workload)
    if parent.stream is not None or not recipe.checks:
        return times
    name = fingerprint([sorted(shape.name for shape in shapes), "made-up choices", recipe.checks])
    if name not in cached.checks:
        cached.add_checks(name, time_trial_solutions(watch, times, alternatives, costs, recipe, progress))
    return times.checked(*cached.checks[name])


def fastest_times(watch: Stopwatch, alternatives: Sequence[Alternative]) -> Times | None:
    """A quick lower bound: every alternative takes no time, and the rest what a model of no-ops takes.

    Takes seconds where measuring takes minutes. Returns None if the family does not run without subblocks, if the
    parent is streamed from the disk, or if every model would have to be compiled first.
    """
    parent, empty = watch.parent, no_op_blocks(watch.parent)
    if empty is None or parent.stream is not None or watch.served.backend != "eager":
        return None
    models = [watch.carve(empty)] * LEAST_ROUNDS + [parent.model]
    question = "does a model without subblocks generate?"
    with foreign_code(question) as attempt, quietly(watch.served.backend):
        *empty_runs, whole = [watch.served.once(model) for model in models]
    if attempt.failed:
        return None
    least = Timing(min(t.prefill for t in empty_runs), min(t.decode for t in empty_runs))
    count = sum(a.is_parent for a in alternatives)
    inside = (whole.at_least(least) - least).scaled(1 / count, 1 / count)
    by_key = {a.key: inside if a.is_parent else ZERO for a in alternatives}
    return Times("measured", device_name(parent.runtime), watch.workload, by_key, least)


def kinds_of(parent: Parent, alternatives: Sequence[Alternative], costs: CostTable) -> list[int]:
    """For every layer the index of the first layer that takes the same time with the same alternatives."""
    layers: list[dict[str, dict[str, int]]] = [{} for _ in parent.blocks]
    for a in alternatives:
        if a.is_parent:
            layers[a.layer][a.subblock] = costs.by_key[a.key]
    return layers_alike(parent.descriptor, parent.config, parent.blocks, layers)


def _parameters_removed(
    shapes: Mapping[Shape, Sequence[Alternative]], alternatives: Sequence[Alternative], costs: CostTable
) -> dict[Shape, tuple[str, float]]:
    """Kind of alternative of each shape, and the number of parameters it removes."""
    whole = {(a.layer, a.subblock): costs.by_key[a.key]["parameters"] for a in alternatives if a.is_parent}
    return {
        shape: (a.kind, float(whole[a.layer, a.subblock] - costs.by_key[a.key]["parameters"]))
        for shape, (a, *_) in shapes.items()
    }


@dataclass(frozen=True)
class _Session:
    """One session of timing shapes.

    Attributes:
        watch: Stopwatch of the parent.
        kinds: Kind of each layer.
        removed: Kind of alternative of each shape, and the parameters it removes.
        progress: Receives the rounds done, and notes.
    """

    watch: Stopwatch
    kinds: Sequence[int]
    removed: Mapping[Shape, tuple[str, float]]
    progress: Progress

    def measure(self, shapes: Sequence[Shape], earlier: Mapping[Shape, Timing]) -> tuple[Timing, dict[Shape, Timing]]:
        """Time of the parent, and seconds that each shape saves in one layer.

        Args:
            shapes: Shapes to time.
            earlier: Savings of other shapes, from an earlier session.
        """
        active = self._active_layers(len(shapes), self._first_run())
        empty = no_op_blocks(self.watch.parent)
        models, timed = [self.watch.carve(self._blocks(active, None))], []
        for shape in shapes:
            if (model := self._model_with(shape, active)) is not None:
                models.append(model)
                timed.append(shape)
        repeats = [REFERENCE_REPEATS] + [1] * len(timed)
        if empty is not None:
            models.append(self.watch.carve(empty))
            repeats.append(REFERENCE_REPEATS)
        reference, *measured = self._time(models, repeats)
        savings, errors = {}, {}
        for shape, measurement in zip(timed, measured, strict=False):
            share = 1 / sum(self.kinds[i] == shape.kind for i in active)
            savings[shape] = (reference.time - measurement.time).scaled(share, share)
            errors[shape] = measurement.error.scaled(share, share)
        savings = dict.fromkeys(shapes, ZERO) | shrink(savings, errors, self.removed)
        if empty is None:
            return reference.time, savings
        return rescale(savings, earlier, self.kinds, active, reference.time, measured[-1].time)

    def _model_with(self, shape: Shape, active: set[int]) -> Any:
        """A model in which all active layers of a kind have a shape; None, with a note, if it does not run."""
        question = f"does a model generate in which all layers like {shape.kind} have this {shape.subblock}?"
        model: Any = None
        try:
            with foreign_code(question) as attempt, quietly(self.watch.served.backend):
                model = self.watch.carve(self._blocks(active, shape))
                self.watch.served.once(model)
            reason = attempt.reason
        except LayersmithError as error:  # its shapes do not go together
            reason = first_line(error)
        if not reason:
            return model
        self.progress.note(
            f"{shape.subblock} of layers like {shape.kind}: not timed and counted as saving no time, because a model "
            f"in which all of them have this shape does not run ({reason})."
        )
        return None

    def _time(self, models: Sequence[Any], repeats: Sequence[int]) -> list[Measurement]:
        recipe = self.watch.recipe
        with self.progress.stage("measure", max(recipe.rounds, LEAST_ROUNDS) + 1, "rounds") as advance:
            return time_in_turns(models, self.watch.served, recipe.rounds, recipe.seconds, advance, repeats)

    def _blocks(self, active: set[int], shape: Shape | None) -> list[BlockConfig]:
        """A model whose active layers are the parent's, or of a shape where they are of its kind; the rest no-ops."""
        parent = self.watch.parent
        blocks = list(no_op_blocks(parent) or parent.blocks)
        for i in active:
            blocks[i] = shape.block if shape is not None and self.kinds[i] == shape.kind else parent.blocks[i]
        return blocks

    def _first_run(self) -> Timing | None:
        """Roughly what the whole parent takes; None if it is streamed from the disk.

        Raises:
            UnsupportedModel: The parent does not generate.
        """
        watch, parent = self.watch, self.watch.parent
        if parent.stream is not None:
            return None
        model: Any = parent.model
        question = "does the parent generate?"
        with foreign_code(question) as attempt, quietly(watch.served.backend):
            runs = [watch.served.once(model)]
            if runs[0].prefill <= _LONG_SECONDS:
                runs = [watch.served.once(model) for _ in range(LEAST_ROUNDS)]
        if attempt.failed:
            raise UnsupportedModel(
                f"{parent.path}: its times cannot be measured, because it does not generate here ({attempt.reason})."
            ) from attempt.error
        return Timing(*(float(np.median([getattr(t, phase) for t in runs])) for phase in ("prefill", "decode")))

    def _active_layers(self, shapes: int, once: Timing | None) -> set[int]:
        """Layers that the timed models have: all of them, or of every kind as many as there is time for."""
        recipe, everything = self.watch.recipe, set(range(len(self.kinds)))
        if no_op_blocks(self.watch.parent) is None:
            return everything
        share = 0.0
        if once is not None:
            each = once.prefill + (recipe.decode_steps + 1) * once.decode
            share = recipe.seconds / (each * (shapes + 1) * (LEAST_ROUNDS + 2))
        if share >= 1:
            return everything
        active: set[int] = set()
        for kind in set(self.kinds):
            members = [i for i, k in enumerate(self.kinds) if k == kind]
            count = min(len(members), max(_LEAST_LAYERS, int(share * len(members))))
            active |= {members[j * len(members) // count] for j in range(count)}
        return active
