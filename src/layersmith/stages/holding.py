"""What one process holds in every stage, counted from a config: the same tensors as the code of the stage allocates.

Counted is the process that holds most: the one with the largest layers, which also does what the first process does
alone. What depends on results, such as the sizes of the child, is counted at its most.

Symbols: D hidden size, K inputs of a projection, s bytes of a number in the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from layersmith.distillation.arguments import trains_on_disk, why_not_sharded
from layersmith.distillation.steps import groups
from layersmith.distillation.train import TRAINED_BYTES
from layersmith.errors import UsageError
from layersmith.execution.dealing import deal, groups_of
from layersmith.execution.layerwise import (
    STREAMED_BYTES,
    bytes_of_a_token_at_once,
    bytes_within_a_layer,
    tokens_that_fit,
)
from layersmith.execution.streaming import SHARE_FOR_TWO, SHARE_OF_MEMORY
from layersmith.execution.tensor_parallel import divided_share, why_not_divided
from layersmith.heterogeneous.build import build
from layersmith.library.alternative import Alternative
from layersmith.library.axes.layers import meta_layers
from layersmith.library.survey import choose_ffn_ranking
from layersmith.model_descriptor.stock import whole_number
from layersmith.recipe import AUTOMATIC, LONGER_ROWS, Recipe
from layersmith.scoring.children import KEPT_SHARE
from layersmith.scoring.exact import SPAN_BYTES
from layersmith.stages.inspect import Outline

# Memory of a token within a layer, as a share of what the code allows for: forward, and with what a gradient needs.
_FORWARD, _BACKWARD = 0.5, 1.3
# Tensors of the size of a span of logits that scoring holds at once: logits, softmax, signs, their product, gradient.
_OF_A_SPAN = 6
# Python's own objects, kernels that are loaded when they are first used, and buffers of messages, on the CPU.
_OF_A_PROCESS = 72 * 1024**2
# Kinds of alternatives whose refit needs moments of their own inputs.
_OWN_MOMENTS = ("kv_heads", "window")
_OF_HEADS = ("kv_heads", "head_groups", "query_heads")

Parts = dict[str, float]


@dataclass(frozen=True)
class Held:
    """Bytes that a process holds.

    Attributes:
        device: Bytes in the memory of the device, by what they are for.
        host: The same for the memory of the CPU, where the device has another.
        disk: Bytes of hidden states in files.
    """

    device: Parts
    host: Parts
    disk: float

    @property
    def on_device(self) -> float:
        return sum(self.device.values())

    @property
    def on_host(self) -> float:
        return sum(self.host.values())


@dataclass(frozen=True)
class Holding(Held):
    """Bytes that a process holds at a moment of a stage."""

    host: Parts = field(default_factory=dict)
    disk: float = 0.0


@dataclass(frozen=True)
class Memory:
    """The memory of each of several processes.

    Attributes:
        processes: Number of processes.
        size: Bytes that each has for weights and all else, on its device.
        itemsize: Bytes of a number in the computation.
        device: ``cpu`` or ``cuda``.
    """

    processes: int
    size: float
    itemsize: int
    device: str

    @property
    def is_gpu(self) -> bool:
        """Whether the device has memory apart from that of the CPU."""
        return self.device == "cuda"

    def needed(self, held: Holding) -> float:
        """Bytes of what is held in the memory of the device; a CPU has only one."""
        return held.on_device + (0 if self.is_gpu else held.on_host)


class Sizes:
    """Sizes of a parent and of its alternatives, from which memory is counted.

    Args:
        space: The search space.
        recipe: All settings.
        memory: The processes.
        meta: The layers on the meta device, if they were made before.

    Attributes:
        layers: Bytes of each layer.
        whole: Bytes of all weights.
        is_streamed: Whether weights stay on the disk until a layer runs.
        owners: The process that has each layer, of the first group of processes.
        groups: Number of groups of processes that each have all layers.
        held: Bytes of the layers that the process with most keeps in memory, of a parent on the disk.
        head, unit: Bytes of the head, and of the largest of head and layers, which are read from the disk one by one.
        own, most: Number of layers of the process that has most, and their bytes.
    """

    def __init__(self, space: Outline, recipe: Recipe, memory: Memory, meta: Sequence[nn.Module] = ()):
        self.space, self.recipe, self.memory, s = space, recipe, memory, memory.itemsize
        self.layers = [0.0] * len(space.axes)
        for a in space.alternatives:
            if a.is_parent:
                self.layers[a.layer] += self.size(a)
        self.whole = sum(self.layers) + s * space.costs.fixed["parameters"]
        is_too_large = self.whole > SHARE_OF_MEMORY * memory.size
        self.is_streamed = recipe.stream == "always" or (recipe.stream == "auto" and is_too_large)
        self.owners = deal(self.layers, memory.processes)
        self.groups = groups_of(len(self.layers), memory.processes)
        mine = [
            [size for size, owner in zip(self.layers, self.owners, strict=True) if owner == p]
            for p in range(min(memory.processes, len(self.layers)))
        ]
        self.own, self.most = max(map(len, mine)), max(map(sum, mine))
        can_hold = memory.processes > 1 and self.most <= SHARE_OF_MEMORY * memory.size
        self.held = self.most if self.is_streamed and can_hold else 0.0
        language = space.descriptor.get_language_model_config(space.config)
        self.hidden, self.vocab = (whole_number(language, name) or 1 for name in ("hidden_size", "vocab_size"))
        self.head = float(self.hidden * self.vocab * s)
        self.unit = max(self.head, *self.layers)
        self.meta = meta or meta_layers(space.descriptor, space.config, space.blocks)
        self.within = bytes_within_a_layer(self.meta, s)
        self.at_once = bytes_of_a_token_at_once(self.meta, s, self.vocab)

    def size(self, a: Alternative) -> float:
        return float(self.space.costs.by_key[a.key]["parameters"]) * self.memory.itemsize

    @cached_property
    def weights(self) -> float:
        """Of the parent: all, or the layers that stay and one more unit, which is a layer or the head, or two."""
        if not self.is_streamed:
            return self.whole
        is_all = self.own == len(self.layers) and self.held
        return self.held + (self.head if is_all else self.unit * (1 + self.is_read_ahead))

    @property
    def is_read_ahead(self) -> bool:
        """Whether a unit is read from the disk while another one runs."""
        return self.is_streamed and not self.held and 2 * self.unit <= SHARE_FOR_TWO * self.memory.size

    @property
    def is_trained_on_disk(self) -> bool:
        """Whether adapters are trained while the weights of parent and child stay on the disk."""
        return self.is_streamed and trains_on_disk(self.recipe.distillation, self.memory.processes)

    @cached_property
    def why_not_sharded(self) -> str | None:
        """Why parent and child cannot be sharded in global distillation; None if they can."""
        settings, has_formats = self.recipe.distillation, bool(set(self.recipe.formats) - {AUTOMATIC})
        return why_not_sharded(settings, self.memory.processes, self.recipe.dtype, has_formats)

    @cached_property
    def is_trained_sharded(self) -> bool:
        """Whether parent and child are sharded over the processes in global distillation."""
        settings = self.recipe.distillation
        if settings.sharded == "never" or self.why_not_sharded is not None:
            return False
        trained = TRAINED_BYTES * self.whole / self.memory.itemsize
        is_too_large = trained > SHARE_OF_MEMORY * (self.memory.size - self.whole)
        return settings.sharded == "always" or settings.tensor_parallel > 1 or self.is_streamed or is_too_large

    @cached_property
    def of_group(self) -> float:
        """The share of both models with which a process computes, of those that compute the same rows together."""
        number = self.recipe.distillation.tensor_parallel
        if number == 1:
            return 1.0
        space = self.space
        model = build(space.config, space.blocks, device="meta", descriptor=space.descriptor)
        if (why_not := why_not_divided(model, space.descriptor, number)) is not None:
            raise UsageError(f"recipe distillation.tensor_parallel: the layers cannot be divided, because {why_not}.")
        return 1 - (1 - 1 / number) * divided_share(model, space.descriptor, number)

    def tokens(self, sequences: int) -> int:
        return sequences * self.recipe.data.sequence_length

    def states(self, tokens: float) -> float:
        """Bytes of the hidden states of tokens, between two layers."""
        return tokens * self.hidden * self.memory.itemsize

    def in_batch(self, batch_tokens: int, sequences: int | None = None) -> int:
        """Tokens of a batch: whole rows with at most ``batch_tokens`` tokens, but at least one row."""
        length = self.recipe.data.sequence_length
        rows = max(1, batch_tokens // length)
        return length * (rows if sequences is None else min(rows, sequences))

    @property
    def long_row(self) -> int:
        """Tokens of a row in the second part of global distillation, at most; 0 without it."""
        settings, data = self.recipe.distillation, self.recipe.data
        default = data.sequence_length * min(LONGER_ROWS, data.evaluation_sequences)
        return (settings.long_sequence_length or default) if settings.long_tokens else 0

    @cached_property
    def scored_at_once(self) -> int:
        """Tokens that scoring takes through a layer at once."""
        of_inputs = 0.0 if self.is_streamed else self.states(len(self.layers) + 1)
        weights = None if self.is_streamed else self.whole
        of_token, most = self.at_once + of_inputs, self.recipe.scoring.batch_tokens
        most = tokens_that_fit(of_token, weights, most, self.memory.device)
        return self.in_batch(most, self.recipe.data.scoring_sequences)

    @cached_property
    def counted_at_once(self) -> int:
        """Tokens of which statistics are gathered at once."""
        most = self.recipe.scoring.batch_tokens
        if self.is_streamed:
            most = min(most, int(STREAMED_BYTES[self.memory.device] / self.within))
        return self.in_batch(most, self.recipe.data.calibration_sequences)

    # ------------------------------------------------------------------------------------------ what layers need

    @cached_property
    def by_layer(self) -> list[list[Alternative]]:
        result: list[list[Alternative]] = [[] for _ in self.layers]
        for a in self.space.alternatives:
            if not a.is_parent:
                result[a.layer].append(a)
        return result

    def width(self, i: int) -> int:
        """Channels of the FFN of a layer; 0 without, or if they are of experts."""
        axes = self.space.axes[i]
        return axes.ffn.size if axes.ffn is not None and not axes.of_experts else 0

    def heads(self, i: int) -> int:
        """Inputs of the projection that reads the heads of a layer."""
        axes = self.space.axes[i]
        heads = axes.kv or axes.mixer
        if heads is None:
            return 0
        return heads.num_heads * heads.together * heads.head_dim

    def inputs(self, a: Alternative) -> int:
        """K of the projection that is refitted; 0 if none is."""
        kv = self.space.axes[a.layer].kv
        if a.kind == "ffn_width":
            return a.size
        if a.kind not in (*_OF_HEADS, "window") or kv is None:
            return 0
        heads = {"head_groups": a.query_heads, "query_heads": a.size}.get(a.kind, kv.num_heads * kv.together)
        return heads * kv.head_dim

    @cached_property
    def is_iterative(self) -> bool:
        """Whether channels of FFNs are ranked by all of their second moments."""
        return choose_ffn_ranking(self.space.axes, self.recipe.library) == "iterative"

    @cached_property
    def maps(self) -> list[float]:
        """Bytes of the linear replacements of each layer, as they will be stored."""
        return [self.space.dtype.itemsize * size for size in self.linear]

    @cached_property
    def linear(self) -> list[float]:
        """Numbers of the linear replacements of each layer."""
        return [float(self.hidden**2 * sum(a.kind == "linear" for a in of_layer)) for of_layer in self.by_layer]

    @cached_property
    def own_maps(self) -> float:
        return self.own * max(self.maps)

    @cached_property
    def read_maps(self) -> float:
        """Of the first process after it wrote the library: all linear replacements, and those that it builds."""
        return sum(self.maps) + (self.own_maps if self.is_streamed else sum(self.maps))

    def sides(self, i: int) -> list[int]:
        """Sides of the matrices of second moments of a layer's statistics, besides those of linear replacements."""
        kinds = {a.kind for a in self.by_layer[i]}
        sides = [self.heads(i)] if kinds & {*_OF_HEADS} else []
        return [*sides, self.width(i)] if "ffn_width" in kinds and self.is_iterative else sides

    def sums_of(self, i: int) -> float:
        """Bytes of the float64 sums of a layer's statistics; where it has experts, of one of their matrices too."""
        experts = self.space.axes[i].experts
        return 8.0 * sum(side**2 for side in (*self.sides(i), experts.size if experts else 0)) + 16.0 * self.linear[i]


# ---------------------------------------------------------------------------------------------- stages


def held_in(stage: str, sizes: Sizes) -> Holding:
    """What a process holds at the fullest moment of a stage; on a CPU all of it on the device."""
    moments = list(_MOMENTS[stage](sizes)) if stage in _MOMENTS else [Holding({})]
    fullest = max(moments, key=sizes.memory.needed)
    on_host = max(moments, key=lambda held: held.on_host) if sizes.memory.is_gpu else fullest
    device, host = {"weights": sizes.weights, **fullest.device}, {"process": _OF_A_PROCESS, **on_host.host}
    device, host = _without_zeros(device), _without_zeros(host)
    if not sizes.memory.is_gpu:
        device, host = device | host, {}
    return Holding(device, host, max(held.disk for held in moments))


def _without_zeros(parts: Parts) -> Parts:
    return {name: float(size) for name, size in parts.items() if size}


def _sums(h: Sizes, i: int) -> tuple[float, float]:
    """Bytes of a layer's sums while some are added, and of what ranks by them; both are on the CPU."""
    sides, sums, D = h.sides(i), h.sums_of(i), h.hidden
    product = 12.0 * max([*sides, D if h.linear[i] else 0]) ** 2
    solving = max([52.0 * D**2 if h.linear[i] else 0.0, *(8.0 * D * side + 24.0 * side**2 for side in sides)])
    return sums + product, sums / 2 + solving


def _gradient_of_experts(h: Sizes, i: int) -> float:
    """Bytes of the gradient of the experts' last projections, a third of their weights."""
    if h.space.axes[i].experts is None:
        return 0.0
    of_ffn = (a for a in h.space.alternatives if (a.layer, a.subblock) == (i, "ffn") and a.is_parent)
    return sum(map(h.size, of_ffn)) / 3


def _statistics(h: Sizes) -> Iterator[Holding]:
    layers, tokens = range(len(h.layers)), h.tokens(h.recipe.data.calibration_sequences)
    device = {
        "activations": _FORWARD * h.within * h.counted_at_once,
        "gradients": max(_gradient_of_experts(h, i) for i in layers),
    }
    sums = [_sums(h, i) for i in layers]
    if h.is_streamed:
        host = {"statistics": max(map(max, sums)), "linear maps": h.own_maps}
        yield Holding(device, host, h.states(tokens))
    else:
        all_sums = min(sum(gathered for gathered, _ in sums), h.recipe.library.statistics_gib * 1024**3)
        host = {"statistics": 1.5 * max(all_sums, *map(max, sums)), "linear maps": sum(h.maps)}
        yield Holding(device, host)
    yield _written(h, is_gathered=h.is_streamed)


def _written(h: Sizes, is_gathered: bool = False) -> Holding:
    """When the first process writes all linear replacements, which it may first get from all others."""
    total = sum(h.maps)
    gathered = 2 * total + 5 * h.own_maps if is_gathered and h.memory.processes > 1 else 0.0
    return Holding({}, {"linear maps": max(3 * total, gathered)})


def _library(h: Sizes) -> Iterator[Holding]:
    local, data = h.recipe.local_distillation, h.recipe.data
    training = min(local.tokens, h.tokens(data.training_sequences))
    if not (local.reconstruct or training):
        yield Holding({})
        return
    host = {"states": 2 * h.states(training + h.tokens(data.calibration_sequences) * local.reconstruct)}
    activations = h.within * h.in_batch(local.batch_tokens)
    for i, of_layer in enumerate(h.by_layer):
        refitted = [a for a in of_layer if h.inputs(a)] if local.reconstruct else []
        gathering, solving = _of_refits(h, i, refitted)
        built = {"alternatives": sum(map(h.size, refitted))}
        yield Holding({**built, "activations": _FORWARD * activations, "moments": gathering}, host)
        yield Holding({**built, "moments": solving}, host)
        if training:
            yield Holding({"activations": _BACKWARD * activations, "optimizer": _trained(h, of_layer)}, host)
    yield _written(h)


def _of_refits(h: Sizes, i: int, refitted: Sequence[Alternative]) -> tuple[float, float]:
    """Bytes of moments while rows pass through a layer, and of the last projections' solutions."""
    kinds, D = {a.kind for a in refitted}, h.hidden
    sides = [h.width(i)] if "ffn_width" in kinds else []
    sides += [h.heads(i)] if kinds & {"head_groups", "query_heads"} else []
    alone = [h.inputs(a) for a in refitted if a.kind in _OWN_MOMENTS]
    sums = 8.0 * (sum(side**2 for side in sides) + sum(k**2 + D * k for k in alone))
    most, k = max([*sides, *alone], default=0), max(map(h.inputs, refitted), default=0)
    results = h.space.dtype.itemsize * D * sum(map(h.inputs, refitted))
    # Of the largest: its moment, with the ridge, and the factor; six matrices of its weight's size.
    return sums + 12.0 * most**2, sums + results + 24.0 * k**2 + 48.0 * D * k


def _of_training(h: Sizes, parameters: float) -> float:
    """Weights, a float32 copy if they are smaller, gradients, two moments, and the best so far."""
    s = h.memory.itemsize
    return parameters * (2 * s + 12 + (8 if s < 4 else 0))


def _trained(h: Sizes, of_layer: Sequence[Alternative]) -> float:
    """All alternatives of a layer, as far as they may be trained at once."""
    sizes = [_of_training(h, h.size(a) / h.memory.itemsize) for a in of_layer if a.traits.has_weights]
    return max(min(sum(sizes), h.recipe.local_distillation.memory_gib * 1024**3), max(sizes, default=0.0))


def _of_scoring(h: Sizes) -> Parts:
    span = SPAN_BYTES[h.memory.device]
    return {
        "activations": _BACKWARD * h.within * h.scored_at_once,
        "logits": float(_OF_A_SPAN * min(span, 4 * h.vocab * h.scored_at_once)),
        "alternatives": max((h.size(a) for of_layer in h.by_layer for a in of_layer), default=0.0),
    }


def _scores(h: Sizes) -> Iterator[Holding]:
    device, samples = _of_scoring(h), h.recipe.scoring.samples
    if not h.is_streamed:
        device["states"] = h.states((len(h.layers) + 1 + samples) * h.scored_at_once)
        yield Holding(device, {"linear maps": h.read_maps})
        return
    # The inputs of every layer wait on the disk, and the gradients.
    limit = h.recipe.scoring.spill_gib * 1024**3 / h.states(len(h.layers) + 1 + samples)
    tokens = min(h.tokens(h.recipe.data.scoring_sequences), max(h.scored_at_once, limit))
    yield Holding(device, {"linear maps": h.read_maps}, h.states((h.own + 1 + samples) * tokens))


def _refine(h: Sizes) -> Iterator[Holding]:
    device = _of_scoring(h)
    if not h.is_streamed:
        device |= {"alternatives": KEPT_SHARE * h.whole, "states": h.states((len(h.layers) + 4) * h.scored_at_once)}
        yield Holding(device, {"linear maps": h.read_maps})
        return
    waiting = h.states((h.own + 4) * h.tokens(h.recipe.data.scoring_sequences))
    yield Holding(device, {"linear maps": h.read_maps}, min(h.recipe.scoring.spill_gib * 1024**3, waiting))


def _pairs(h: Sizes) -> Iterator[Holding]:
    local, data = h.recipe.local_distillation, h.recipe.data
    training = min(local.coupled_tokens, h.tokens(data.training_sequences))
    on_child = local.coupled_on == "child"
    refits = bool(local.child_refit) and on_child
    if not (training or refits):
        yield Holding({})
        return
    more = min(h.tokens(local.child_refit_sequences), h.tokens(data.training_sequences) - training)
    tokens = training + (h.tokens(data.calibration_sequences) + more) * refits
    layer, within = max(h.layers), h.within * h.in_batch(local.batch_tokens)
    host = {"states": (4 if on_child else 2) * h.states(tokens), "linear maps": h.read_maps}
    if refits:
        k = max(max(h.width(i), h.heads(i)) for i in range(len(h.layers)))
        moments = 40.0 * k**2 + 24.0 * h.hidden * k
        yield Holding({"alternatives": layer, "activations": _FORWARD * within, "moments": moments}, host)
    if training:
        optimizer = _of_training(h, layer / h.memory.itemsize)
        yield Holding({"activations": _BACKWARD * within, "optimizer": optimizer}, host)


def _child(h: Sizes) -> Iterator[Holding]:
    """The first process has all that changed in memory, on the CPU where the parent stays on the disk."""
    child, host = {"child": h.whole / h.memory.itemsize * h.space.dtype.itemsize}, {"linear maps": h.read_maps}
    yield Holding({}, child | host) if h.is_streamed else Holding(child, host)


def _evaluation(h: Sizes) -> Iterator[Holding]:
    """Parent and child are held, or read, in the same way."""
    rows, length = h.recipe.data.evaluation_sequences, h.recipe.data.sequence_length
    batch = h.in_batch(h.recipe.scoring.batch_tokens, rows)
    logits = h.vocab * (2.0 * h.memory.itemsize * batch + 20.0 * length)
    device = {"child": h.weights, "activations": _FORWARD * h.within * batch, "logits": logits}
    yield Holding(device, {"linear maps": h.read_maps})


def _distilled(h: Sizes) -> Iterator[Holding]:
    """Every process has the parent and, in float32, the child with its gradients and two moments; or shards of both.

    Of what is sharded, a layer and the head are whole at a time: the parent's, and the child's with its gradients; or,
    with tensor parallelism, the part of these that the process computes with. With adapters the child is frozen; those
    of a matrix have about ``2 rank / hidden size`` of its numbers. On the disk it is held as the parent is, and of each
    layer only the hidden states are kept for the backward pass.
    """
    recipe, parameters = h.recipe.distillation, h.whole / h.memory.itemsize
    is_run_again = recipe.gradient_checkpointing or h.is_trained_on_disk
    # The outputs of an attention and an FFN are whole.
    exchanged = min(h.within, 3.0 * 2 * h.memory.itemsize * h.hidden)
    within = exchanged + h.of_group * (h.within - exchanged)
    within = _BACKWARD * within * (1 if is_run_again else len(h.layers))
    weights, optimizer = h.whole, TRAINED_BYTES * parameters
    if recipe.lora_rank:
        child, weights = (h.weights, h.weights) if h.is_trained_on_disk else (h.whole, h.whole)
        optimizer = child + optimizer * min(1.0, 2 * recipe.lora_rank / h.hidden)
    if h.is_trained_sharded:
        share = h.of_group / groups(recipe, h.memory.processes)
        unit = h.of_group * (max(h.layers) / h.memory.itemsize + h.hidden * h.vocab)
        weights = share * weights + h.memory.itemsize * unit
        optimizer = share * optimizer + 8.0 * unit
    at_once = max(h.in_batch(recipe.device_tokens), h.long_row)
    activations = within * at_once + (h.states(2 * len(h.layers) * at_once) if h.is_trained_on_disk else 0.0)
    yield Holding({"weights": weights, "activations": activations, "optimizer": optimizer})


_MOMENTS: dict[str, Callable[[Sizes], Iterator[Holding]]] = {
    "statistics": _statistics,
    "library": _library,
    "scores": _scores,
    "refine": _refine,
    "pairs": _pairs,
    "child": _child,
    "evaluation": _evaluation,
    "distilled": _distilled,
}
