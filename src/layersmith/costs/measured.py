"""Times of alternatives, measured in whole models on the device at hand.

A shape is timed as it will run: in a model of its family in which every layer of its kind has it, through
Transformers' own ``generate``. What it saves is the difference to the parent, over the number of those layers. So a
child's time lies between those of models that were timed, whatever runs between the layers is in it, and no error is
multiplied by the number of layers.

The weights are the parent's memory, cut to shapes (:meth:`Stopwatch.carve`): models that are timed take none of their
own.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from layersmith.block_config import BlockConfig
from layersmith.costs.clock import LEAST_ROUNDS, Served, device_name, in_turns, quietly
from layersmith.costs.counted import Workload, layers_alike
from layersmith.costs.table import CostTable
from layersmith.costs.times import ZERO, Check, Times, Timing
from layersmith.errors import LayersmithError, UnsupportedModel, first_line
from layersmith.execution.exchange import share_buffers
from layersmith.execution.parent import Parent
from layersmith.heterogeneous.build import build
from layersmith.library.alternative import Alternative
from layersmith.model_descriptor.infer.findings_cache import cache_folder, key_of
from layersmith.model_descriptor.stock import own_config
from layersmith.recipe import CostsRecipe
from layersmith.run.artifacts import fingerprint, read_json, write_json
from layersmith.run.progress import SILENT, Progress

# Layers of a kind that are timed where all would take too long or do not fit into memory.
_LEAST_LAYERS = 2
# How often a model beside which others are told runs in each round.
_REPEATS = 3
# Sizes of one axis by which noise is told.
_LEAST_POINTS = 3
# A sum of savings is not scaled by more, so that it ends at a model of no-ops.
_MOST_FACTOR = 2.0
# Steps to the price of time at which a made-up choice takes what it should.
_HALVINGS = 60
# The share of a parent's time that all its subblocks may take; of a large model they take nearly all of it.
_MOST_INSIDE = 0.999
_SEED = 0
# Of what is kept in the cache; another where times are taken in another way.
_METHOD = 2

Blocks = Sequence[BlockConfig]


# ---------------------------------------------------------------------------------------------- models to time


class Stopwatch:
    """Times children of a parent that differ in shapes."""

    def __init__(self, parent: Parent, workload: Workload, recipe: CostsRecipe):
        self.parent, self.recipe = parent, recipe
        self.workload = workload.within(parent.positions)
        self.served = Served(self.workload, recipe.decode_steps, recipe.backend, parent.language_config.vocab_size)
        self._own: dict[str, torch.Tensor] = parent.model.state_dict()
        self._more: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def time(
        self,
        children: Sequence[Blocks],
        seconds: float | None = None,
        advance: Callable[[float], None] = lambda x: None,
    ) -> tuple[list[Timing], list[Timing]]:
        """Times of children, timed in turns, and their standard errors; the first is the one that others are beside."""
        models = [self.carve(blocks) for blocks in children]
        limit = self.recipe.seconds if seconds is None else seconds
        repeats = [_REPEATS] + [1 if len(models) > _REPEATS else _REPEATS] * (len(models) - 1)
        return in_turns(models, self.served, self.recipe.rounds, limit, advance, repeats)

    def carve(self, blocks: Blocks) -> PreTrainedModel:
        """A child of these shapes whose weights are cut from the parent's memory: right in size, not in value."""
        parent = self.parent
        if list(blocks) == list(parent.blocks) and parent.stream is None:
            return parent.model
        child = build(
            parent.config, list(blocks), dtype=parent.runtime.dtype, device="meta", descriptor=parent.descriptor
        )
        tensors = {name: self._tensor(name, tuple(t.shape), t.dtype) for name, t in child.state_dict().items()}
        child.load_state_dict(tensors, strict=True, assign=True)
        share_buffers(parent.model, child)
        child.tie_weights()
        child.generation_config = copy.deepcopy(parent.model.generation_config)
        return child.eval().requires_grad_(False)

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        own = self._own.get(name)
        size = int(np.prod(shape, dtype=np.int64))
        if own is not None and not own.is_meta and own.dtype == dtype and own.numel() >= size:
            return own if own.shape == shape else own.flatten()[:size].view(shape)
        if (name, shape) not in self._more:
            made = torch.empty(shape, dtype=torch.float32)
            if dtype.is_floating_point:
                made.normal_(0, 0.02, generator=torch.Generator().manual_seed(_SEED))
            else:
                made.zero_()
            self._more[name, shape] = made.to(device=self.parent.runtime.device, dtype=dtype)
        return self._more[name, shape]


# ---------------------------------------------------------------------------------------------- all alternatives


@dataclass(frozen=True)
class _Shape:
    """What some alternatives of layers that are alike become: timed once.

    Attributes:
        kind: the first of the layers that are alike.
        subblock: that changes.
        block: their block config with it.
    """

    kind: int
    subblock: str
    block: BlockConfig

    @property
    def name(self) -> str:
        return fingerprint([self.kind, self.subblock, self.block.to_json()])


def measure(
    parent: Parent,
    alternatives: Sequence[Alternative],
    costs: CostTable,
    workload: Workload,
    recipe: CostsRecipe,
    progress: Progress = SILENT,
    possible: Callable[[Times], None] = lambda least: None,
) -> Times:
    """Time every shape of a search space here, those that are known from before excepted.

    Args:
        parent, alternatives, costs, workload, recipe: what is timed, and how.
        progress: told of rounds.
        possible: given, before the long work, times that are below those of any child (:func:`least_times`); it raises
            what it has to say of them.

    Raises:
        UnsupportedModel: the family cannot generate.
    """
    kinds = kinds_of(parent, alternatives, costs)
    shapes: dict[_Shape, list[Alternative]] = {}
    for a in alternatives:
        if a.kind != "parent":
            shapes.setdefault(_Shape(kinds[a.layer], a.subblock, a.block_config(parent.blocks[a.layer])), []).append(a)
    watch = Stopwatch(parent, workload, recipe)
    known = _Known(parent, watch.workload, recipe)
    missing = [shape for shape in shapes if shape.name not in known.savings]
    if missing or known.parent is None:
        least = least_times(watch, alternatives)
        if least is not None:
            possible(least)
        before = {
            shape: known.savings[shape.name].scaled(known.whole.prefill, known.whole.decode)
            for shape in shapes
            if shape not in missing
        }
        own = {(a.layer, a.subblock): costs.by_key[a.key]["parameters"] for a in alternatives if a.kind == "parent"}
        removed = {
            shape: (a.kind, float(own[a.layer, a.subblock] - costs.by_key[a.key]["parameters"]))
            for shape, (a, *_) in shapes.items()
        }
        timing, found = _savings(watch, kinds, missing, before, removed, recipe, progress)
        known.add(timing, {s.name: t.scaled(1 / timing.prefill, 1 / timing.decode) for s, t in found.items()})
    whole = known.whole
    saved = {
        a.key: known.savings[shape.name].scaled(whole.prefill, whole.decode)
        for shape, members in shapes.items()
        for a in members
    }
    times = _as_times(alternatives, saved, whole, device_name(parent.runtime), watch.workload)
    if parent.stream is not None or not recipe.checks:
        return times
    # Sums for the same shapes are checked once.
    name = fingerprint([sorted(shape.name for shape in shapes), "made-up choices", recipe.checks])
    checks = known.checked(name)
    if checks is None:
        checks = _checks(watch, times, alternatives, costs, recipe, progress)
        known.keep_checks(name, checks)
    return times.checked(*checks)


def least_times(watch: Stopwatch, alternatives: Sequence[Alternative]) -> Times | None:
    """The parent's times, and of everything else those of a model of no-ops; seconds where all of it takes minutes.

    None where the family cannot be without subblocks or does not generate, where the parent does not lie in memory,
    and where each model would be compiled for that.
    """
    parent, resting = watch.parent, no_op_blocks(watch.parent)
    if resting is None or parent.stream is not None or watch.served.backend != "eager":
        return None
    try:
        with quietly(watch.served.backend):
            seen = [watch.served.once(model) for model in [watch.carve(resting)] * LEAST_ROUNDS + [parent.model]]
    except Exception:  # of which measuring tells
        return None
    *some, whole = seen
    least = Timing(min(t.prefill for t in some), min(t.decode for t in some))
    own = [a for a in alternatives if a.kind == "parent"]
    inside = (whole.at_least(least) - least).scaled(1 / len(own), 1 / len(own))
    by_key = {a.key: inside if a.kind == "parent" else ZERO for a in alternatives}
    return Times("measured", device_name(parent.runtime), watch.workload, by_key, least)


def kinds_of(parent: Parent, alternatives: Sequence[Alternative], costs: CostTable) -> list[int]:
    """For every layer the first that takes the same time with the same alternatives."""
    layers: list[dict[str, dict[str, int]]] = [{} for _ in parent.blocks]
    for a in alternatives:
        if a.kind == "parent":
            layers[a.layer][a.subblock] = costs.by_key[a.key]
    return layers_alike(parent.descriptor, parent.config, parent.blocks, layers)


def _savings(
    watch: Stopwatch,
    kinds: Sequence[int],
    shapes: Sequence[_Shape],
    before: Mapping[_Shape, Timing],
    removed: Mapping[_Shape, tuple[str, float]],
    recipe: CostsRecipe,
    progress: Progress,
) -> tuple[Timing, dict[_Shape, Timing]]:
    """The parent's time, and what each shape saves in one layer; of others that is known from before."""
    parent = watch.parent
    try:
        with quietly(recipe.backend):
            once = _first_run(watch)
    except LayersmithError:
        raise
    except Exception as error:  # whatever a family's own code raises
        raise UnsupportedModel(
            f"{parent.path}: its times cannot be measured, because it does not generate here ({first_line(error)})."
        ) from error
    active = _active(watch, kinds, len(shapes), once, recipe)
    resting = no_op_blocks(parent)

    def blocks_with(shape: _Shape | None) -> list[BlockConfig]:
        blocks = list(parent.blocks) if resting is None else list(resting)
        for i in active:
            blocks[i] = shape.block if shape is not None and kinds[i] == shape.kind else parent.blocks[i]
        return blocks

    children, timed = [watch.carve(blocks_with(None))], []
    for shape in shapes:
        try:
            child = watch.carve(blocks_with(shape))
            with quietly(recipe.backend):
                watch.served.once(child)
        except Exception as error:  # it cannot be everywhere at once; then it counts as saving nothing
            progress.note(f"no time for {shape.subblock} of layers like {shape.kind}: {first_line(error)}.")
        else:
            children.append(child)
            timed.append(shape)
    repeats = [_REPEATS] + [1] * len(timed)
    if resting is not None:  # all sums end there
        children.append(watch.carve(resting))
        repeats.append(_REPEATS)
    with progress.stage("measure", max(recipe.rounds, LEAST_ROUNDS) + 1, "rounds") as advance:
        (reference, *seconds), (_, *errors) = in_turns(
            children, watch.served, recipe.rounds, recipe.seconds, advance, repeats
        )
    saved, noise = dict.fromkeys(shapes, ZERO), {}
    for k, shape in enumerate(timed):
        count = sum(kinds[i] == shape.kind for i in active)
        saved[shape] = (reference - seconds[k]).scaled(1 / count, 1 / count)
        noise[shape] = errors[k].scaled(1 / count, 1 / count)
    saved |= steadied({shape: saved[shape] for shape in timed}, noise, removed)
    if resting is None:
        return reference, saved
    return _between(kinds, active, saved, before, reference, seconds[-1])


def steadied(
    saved: Mapping[_Shape, Timing], noise: Mapping[_Shape, Timing], removed: Mapping[_Shape, tuple[str, float]]
) -> dict[_Shape, Timing]:
    """Savings drawn to the line on which those of one axis lie, as far as what they are off it is noise.

    The program takes what seems cheapest, so of noisy times it takes those that are too low. Along an axis savings are
    near proportional to what is removed; with s^2 the mean square off that line and v that of the errors, a share
    v / s^2 of what each is off is taken away (James and Stein, 1961). Where noise is small nothing changes.

    Args:
        saved: by shape.
        noise: standard errors.
        removed: the axis on which a shape lies, and what it removes.
    """
    axes: dict[tuple[int, str, str], list[_Shape]] = {}
    for shape in saved:
        axes.setdefault((shape.kind, shape.subblock, removed[shape][0]), []).append(shape)
    result = dict(saved)
    for shapes in axes.values():
        size = np.array([removed[shape][1] for shape in shapes])
        if len(shapes) < _LEAST_POINTS or not size.any():
            continue
        drawn = []
        for phase in ("prefill", "decode"):
            own = np.array([getattr(saved[shape], phase) for shape in shapes])
            line = size * float(size @ own) / float(size @ size)
            off = float(np.square(own - line).sum()) / (len(shapes) - 1)
            error = float(np.mean([getattr(noise[shape], phase) ** 2 for shape in shapes]))
            drawn.append(own + (line - own) * (min(1.0, error / off) if off > 0 else 0.0))
        result |= {shape: Timing(float(p), float(d)) for shape, p, d in zip(shapes, *drawn, strict=True)}
    return result


def _between(
    kinds: Sequence[int],
    active: set[int],
    saved: Mapping[_Shape, Timing],
    before: Mapping[_Shape, Timing],
    reference: Timing,
    rest: Timing,
) -> tuple[Timing, dict[_Shape, Timing]]:
    """The whole parent's time, and savings that lead from it to a model of no-ops.

    Args:
        kinds: of all layers.
        active: layers that were there.
        saved: by a shape in one layer.
        before: by shapes that were timed before; these stay.
        reference: of the model with the active layers as they are.
        rest: of the model in which every layer is without attention and FFN.
    """
    most: dict[tuple[int, str], Timing] = {}
    for shape, own in (*before.items(), *saved.items()):
        other = most.get((shape.kind, shape.subblock), ZERO)
        most[shape.kind, shape.subblock] = other.at_least(own)
    factors, whole = [], []
    for phase in ("prefill", "decode"):
        of_kind = {kind: sum(getattr(t, phase) for (k, _), t in most.items() if k == kind) for kind in set(kinds)}
        inside = sum(of_kind[kinds[i]] for i in active)
        between = getattr(reference, phase) - getattr(rest, phase)
        factor = min(_MOST_FACTOR, max(1 / _MOST_FACTOR, between / inside)) if inside > 0 else 1.0
        factors.append(factor)
        whole.append(getattr(rest, phase) + factor * sum(of_kind[kind] for kind in kinds))
    return Timing(*whole), {shape: own.scaled(*factors) for shape, own in saved.items()}


def _first_run(watch: Stopwatch) -> Timing | None:
    """About what the whole parent takes; None where it does not lie in memory."""
    if watch.parent.stream is not None:
        return None
    model: Any = watch.parent.model
    first = watch.served.once(model)
    seen = [first] if first.prefill > 10 else [watch.served.once(model) for _ in range(LEAST_ROUNDS)]
    return Timing(*(float(np.median([getattr(t, phase) for t in seen])) for phase in ("prefill", "decode")))


def _active(watch: Stopwatch, kinds: Sequence[int], shapes: int, once: Timing | None, recipe: CostsRecipe) -> set[int]:
    """Layers that run when shapes are timed: all, or of every kind as many as there is time for."""
    everything = set(range(len(kinds)))
    if no_op_blocks(watch.parent) is None:
        return everything
    if once is None:
        share = 0.0
    else:
        each = once.prefill + (recipe.decode_steps + 1) * once.decode
        share = recipe.seconds / (each * (shapes + 1) * (LEAST_ROUNDS + 2))
    if share >= 1:
        return everything
    active: set[int] = set()
    for kind in set(kinds):
        own = [i for i, k in enumerate(kinds) if k == kind]
        count = min(len(own), max(_LEAST_LAYERS, int(share * len(own))))
        active |= {own[j * len(own) // count] for j in range(count)}
    return active


def no_op_blocks(parent: Parent) -> list[BlockConfig] | None:
    """Every layer without attention and FFN; None if the family cannot be without them."""
    descriptor = parent.descriptor
    if not (descriptor.attn_no_op_supported() and descriptor.mlp_no_op_supported()):
        return None
    return [BlockConfig(replace(b.attention, no_op=True), replace(b.ffn, no_op=True)) for b in parent.blocks]


def _as_times(
    alternatives: Sequence[Alternative], saved: dict[str, Timing], whole: Timing, device: str, workload: Workload
) -> Times:
    """From savings to times: a subblock takes what its cheapest alternative saves, the rest is outside the layers."""
    most: dict[tuple[int, str], Timing] = {}
    for a in alternatives:
        place = a.layer, a.subblock
        most[place] = most.get(place, ZERO).at_least(saved.get(a.key, ZERO))
    # Noise may say that all layers together save more than everything; something is always left outside of them.
    shares = []
    for phase in ("prefill", "decode"):
        inside, limit = sum(getattr(own, phase) for own in most.values()), _MOST_INSIDE * getattr(whole, phase)
        shares.append(limit / inside if inside > limit else 1.0)
    by_key = {
        a.key: (most[a.layer, a.subblock] - saved.get(a.key, ZERO)).scaled(shares[0], shares[1]) for a in alternatives
    }
    fixed = whole
    for own in most.values():
        fixed -= own.scaled(shares[0], shares[1])
    return Times("measured", device, workload, by_key, fixed)


def _checks(
    watch: Stopwatch,
    times: Times,
    alternatives: Sequence[Alternative],
    costs: CostTable,
    recipe: CostsRecipe,
    progress: Progress,
) -> list[Check]:
    """Children as a search would choose them, from small to large, timed whole."""
    chosen = made_up_choices(times, alternatives, costs, recipe.checks)
    whole = costs.parent["parameters"]
    children = {}
    for k, own in enumerate(chosen, 1):
        parameters = costs.fixed["parameters"] + sum(costs.by_key[a.key]["parameters"] for a in own)
        children[f"made-up choice {k}"] = own, parameters / whole
    with progress.stage("check times", max(recipe.rounds, LEAST_ROUNDS) + 1, "rounds") as advance:
        return check(watch, times, children, recipe, advance)


def made_up_choices(
    times: Times, alternatives: Sequence[Alternative], costs: CostTable, count: int
) -> list[list[Alternative]]:
    """What the integer program would choose at evenly spaced times if scores were drawn at random.

    It takes what seems cheap beside its score, for all layers alike, so what its choices take differs from their sums
    in another way than what children at random do. A score here is the square of what is removed, times a random
    number of the layer and one of the alternative; the choice is that of the relaxed program.
    """
    rng = random.Random(_SEED)
    whole = times.parent(alternatives)
    share = {
        a.key: (times.by_key[a.key].prefill / whole.prefill + times.by_key[a.key].decode / whole.decode) / 2
        for a in alternatives
    }
    places: dict[tuple[int, str], list[Alternative]] = {}
    for a in alternatives:
        places.setdefault((a.layer, a.subblock), []).append(a)
    own = {place: next(a for a in members if a.kind == "parent") for place, members in sorted(places.items())}
    outside = 1 - sum(share[a.key] for a in own.values())
    found = []
    for k in range(count):
        wanted = outside + (1 - outside) * (k + 0.5) / count
        loss = {}
        for place in own:
            hard = rng.lognormvariate(0, 1)
            most = costs.by_key[own[place].key]["parameters"]
            for a in places[place]:
                removed = 1 - costs.by_key[a.key]["parameters"] / most if most else 1.0
                loss[a.key] = 0.0 if a is own[place] else hard * removed**2 * rng.lognormvariate(0, 0.5)
        low, high = 1e-9, 1e9
        for _ in range(_HALVINGS):
            price = math.sqrt(low * high)
            chosen = [
                min(members, key=lambda a: (loss[a.key] + price * share[a.key], a.key)) for members in places.values()
            ]
            taken = outside + sum(share[a.key] for a in chosen)
            low, high = (price, high) if taken > wanted else (low, price)
        found.append(chosen)
    return found


def check(
    watch: Stopwatch,
    times: Times,
    children: Mapping[str, tuple[Sequence[Alternative], float]],
    recipe: CostsRecipe,
    advance: Callable[[float], None] = lambda rounds: None,
) -> list[Check]:
    """Time children as whole models beside their parent.

    Args:
        watch: of the parent.
        times: that say what the children should take.
        children: by name what they are made of, and their parameters as a fraction of the parent's.
        recipe: how long that may take: half of what measuring may.
        advance: told of rounds.
    """
    blocks = [watch.parent.blocks_with(chosen) for chosen, _ in children.values()]
    (parent, *own), (noise, *errors) = watch.time([watch.parent.blocks, *blocks], recipe.seconds / 2, advance)
    checks = []
    for (name, (chosen, fraction)), seen, error in zip(children.items(), own, errors, strict=True):
        relative = Timing(
            math.hypot(error.prefill / seen.prefill, noise.prefill / parent.prefill) * seen.prefill / parent.prefill,
            math.hypot(error.decode / seen.decode, noise.decode / parent.decode) * seen.decode / parent.decode,
        )
        checks.append(Check(name, fraction, times.whole(a.key for a in chosen), seen, parent, relative))
    return checks


def time_models(models: Sequence[Any], workload: Workload, recipe: CostsRecipe, vocab_size: int) -> list[Timing]:
    """Time models as they are, in turns; they may take a quarter of what measuring may."""
    served = Served(workload, recipe.decode_steps, recipe.backend, vocab_size, warm=True)
    return in_turns(models, served, recipe.rounds, recipe.seconds / 4, repeats=[_REPEATS] * len(models))[0]


# ---------------------------------------------------------------------------------------------- kept


class _Known:
    """Times that were measured before, by all that they depend on; in the user's cache, if there is one."""

    def __init__(self, parent: Parent, workload: Workload, recipe: CostsRecipe):
        self.parent: Timing | None = None
        self.savings: dict[str, Timing] = {}
        self._checks: dict[str, list[Check]] = {}
        config = own_config(parent.config)
        key = fingerprint(
            [
                _METHOD,
                key_of(config),
                [b.to_json() for b in parent.blocks],
                device_name(parent.runtime),
                str(parent.runtime.dtype),
                [workload.batch, workload.prompt, workload.generated],
                [recipe.backend, recipe.decode_steps],
                parent.stream is not None,
            ]
        )
        folder = cache_folder()
        self._path = folder.parent / "times" / f"{key}.json" if folder is not None else None
        if self._path is not None and self._path.is_file():
            try:
                data = read_json(self._path)
                self.savings = {name: Timing(*own) for name, own in data["savings"].items()}
                self._checks = {name: [Check.from_dict(c) for c in own] for name, own in data["checks"].items()}
                self.parent = Timing(*data["parent"])
            except Exception:  # damaged; it is made again
                self.parent, self.savings, self._checks = None, {}, {}

    @property
    def whole(self) -> Timing:
        if self.parent is None:
            raise RuntimeError("nothing was measured")
        return self.parent

    def add(self, parent: Timing, savings: dict[str, Timing]) -> None:
        """Keep what was measured now; savings are shares of the parent's time, so that of two sessions the later one
        says how fast the machine is."""
        self.parent = parent
        self.savings |= savings
        self._write()

    def checked(self, shapes: str) -> list[Check] | None:
        """Whole children that were timed for these shapes."""
        return self._checks.get(shapes)

    def keep_checks(self, shapes: str, checks: list[Check]) -> None:
        self._checks[shapes] = checks
        self._write()

    def _write(self) -> None:
        if self._path is None or self.parent is None:
            return
        with suppress(OSError, LayersmithError):  # a cache that cannot be written is none
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(
                self._path,
                {
                    "parent": [self.parent.prefill, self.parent.decode],
                    "savings": {name: [t.prefill, t.decode] for name, t in self.savings.items()},
                    "checks": {name: [asdict(c) for c in own] for name, own in self._checks.items()},
                },
            )
