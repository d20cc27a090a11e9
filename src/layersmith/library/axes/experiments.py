"""Experiments on the sizes of a model's blocks: which weights a size governs, and along which dimension.

Two models are built on the meta device that differ in one number of their block configs. The weights whose shapes
differ are those that the size governs. The names of weights play no part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PretrainedConfig

from layersmith.block_config import BlockConfig, FFNConfig
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import REST, NoAxis, Segment, WeightAxis, largest_part
from layersmith.library.axes.layers import input_dim, layer_shapes, meta_layers
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.experiment import Effect, LayersByChange, Shapes


@dataclass(frozen=True)
class Resized:
    """A block with another size, that size, and the one before."""

    block: BlockConfig
    other: int
    size: int


# Gives the block of a layer with another size, a smaller or a larger one; None if it has no such size.
Change = Callable[[BlockConfig, int, bool], Resized | None]


@dataclass(frozen=True)
class SizeExperiment:
    """What changing one size does to every layer.

    Attributes:
        effects: One per layer; empty if the family cannot take another size.
        sizes: Per layer the size before and after; None if it has no such size.
        problem: Why there are no effects; empty if there are.
    """

    effects: list[Effect]
    sizes: list[tuple[int, int] | None]
    problem: str = ""


@dataclass(frozen=True)
class Governed:
    """A dimension of a weight that a size governs: ``unit`` entries per unit, and ``rest`` that belong to none."""

    name: str
    dim: int
    unit: int
    rest: int

    def axis(self, part: str) -> WeightAxis:
        """The first guess of a layout: few entries of a channel lie one after another in parts; the rest comes last."""
        is_split = self.unit <= 3 and part == "channels"
        segments = [Segment(part)] * self.unit if is_split else [Segment(part, self.unit)]
        if self.rest:
            segments.append(Segment(REST, self.rest))
        return WeightAxis(self.name, self.dim, tuple(segments))


class ModelExperiments:
    """A model on the meta device and the experiments on it; each runs once, when it is first needed.

    Attributes:
        descriptor: Descriptor of the model's family.
        config: Config of the model.
        blocks: Block config of every layer.
        language: Config of its language model.
        described: Descriptor of this one model, which answers questions about its layers.
        skeleton: The layers on the meta device.
        base: Their shapes.
    """

    def __init__(self, descriptor: type[ModelDescriptor], config: PretrainedConfig, blocks: Sequence[BlockConfig]):
        self.descriptor, self.config, self.blocks = descriptor, config, blocks
        self.language = descriptor.get_language_model_config(config)
        self.described = descriptor.for_config(config)
        self.skeleton = meta_layers(descriptor, config, blocks)
        self.base = [layer_shapes(layer) for layer in self.skeleton]
        self._layers: LayersByChange[list[BlockConfig]] = LayersByChange(self._shapes)
        self._made: dict[str, SizeExperiment] = {}

    def _shapes(self, blocks: list[BlockConfig]) -> list[Shapes]:
        return [layer_shapes(layer) for layer in meta_layers(self.descriptor, self.config, blocks)]

    def experiment(self, name: str, change: Change) -> SizeExperiment:
        """The effects of a smaller size, or of a larger one where the family cannot take that."""
        if name not in self._made:
            smaller = self._tried(change, larger=False)
            larger = self._tried(change, larger=True) if smaller.problem else smaller
            self._made[name] = smaller if larger.problem else larger
        return self._made[name]

    def _tried(self, change: Change, larger: bool) -> SizeExperiment:
        resized = [change(block, i, larger) for i, block in enumerate(self.blocks)]
        sizes = [(r.size, r.other) if r else None for r in resized]
        blocks = [r.block if r else block for r, block in zip(resized, self.blocks, strict=True)]
        shapes = self._layers.shapes(blocks)
        if shapes is None:
            return SizeExperiment([], sizes, f"another size cannot be built ({self._layers.reason(blocks)})")
        effects = [
            Effect.between(base, changed, r.other if r else 0)
            for base, changed, r in zip(self.base, shapes, resized, strict=True)
        ]
        return SizeExperiment(effects, sizes)

    def governed(self, made: SizeExperiment, i: int) -> list[Governed]:
        """The dimensions that a size governs in a layer; experts that came or went are not among them.

        Raises:
            NoAxis: a weight changed in more than one way.
        """
        if made.problem:
            raise NoAxis(made.problem)
        sizes, effect = made.sizes[i], made.effects[i]
        assert sizes is not None
        size, other = sizes
        result = []
        for name, changed in effect.shapes.items():
            shape, dims = effect.before[name], effect.dims(name)
            if len(dims) != 1 or len(shape) != len(changed):
                raise NoAxis(f"{name} changes in more than one dimension with it")
            dim = dims[0]
            unit, odd = divmod(shape[dim] - changed[dim], size - other)
            if odd or unit < 1 or unit * size > shape[dim]:
                raise NoAxis(f"the entries of {name} do not split evenly")
            result.append(Governed(name, dim, unit, shape[dim] - unit * size))
        return result

    def attention_weights(self, i: int) -> set[str]:
        """Names, in the layer, of the weights that belong to its attention."""
        return self._attention_weights[i]

    @cached_property
    def _attention_weights(self) -> list[set[str]]:
        prefix = [f"{self.descriptor.layer_block_name(j)}." for j in range(len(self.blocks))]
        names = [prefix[j] + name for j, shapes in enumerate(self.base) for name in shapes]
        groups = self.descriptor.get_weight_groups(names, len(self.blocks))
        return [
            {name.removeprefix(prefix[j]) for name in groups.get(f"block_{j}_attention", ())}
            for j in range(len(self.blocks))
        ]

    def input_dim(self, i: int, matrix: str) -> int | None:
        """The input dimension of a projection's weight; None if it is no matrix or its class is unknown."""
        return input_dim(self.skeleton[i], matrix) if len(self.base[i][matrix]) == 2 else None


# ---------------------------------------------------------------------------------------------- changes


def other_size(size: int, larger: bool) -> int:
    """Twice a size, or its largest proper divisor."""
    return 2 * size if larger else largest_part(size)


def other_ffn_width(block: BlockConfig, i: int, larger: bool) -> Resized | None:
    """Another width of a dense FFN, or of routed experts."""
    moe = block.ffn.moe
    if moe is None:
        return _resized(block, i, "ffn", "ffn_width", block.ffn.intermediate_size, larger)
    return _resized(block, i, "ffn", "expert_width", moe.expert_intermediate_dim, larger)


def other_shared_width(block: BlockConfig, i: int, larger: bool) -> Resized | None:
    """Another width of shared experts."""
    moe = block.ffn.moe
    size = moe.shared_expert_intermediate_dim if moe is not None else None
    return _resized(block, i, "ffn", "shared_width", size, larger)


def other_experts(block: BlockConfig, i: int, larger: bool) -> Resized | None:
    """Another number of experts."""
    moe = block.ffn.moe
    if moe is None or moe.num_local_experts < 2:
        return None
    # A token cannot use more than there are; the number that it uses changes no shape.
    per_token = min(moe.num_experts_per_tok, other_size(moe.num_local_experts, larger))
    enough = dataclasses.replace(block, ffn=FFNConfig(moe=dataclasses.replace(moe, num_experts_per_tok=per_token)))
    return _resized(enough, i, "ffn", "experts", moe.num_local_experts, larger)


def other_kv_heads(block: BlockConfig, i: int, larger: bool) -> Resized | None:
    """Another number of KV heads."""
    return _resized(block, i, "attention", "kv_heads", block.attention.num_key_value_heads, larger)


def _resized(block: BlockConfig, i: int, subblock: str, kind: str, size: int | None, larger: bool) -> Resized | None:
    if size is None or size < 2:
        return None
    other = other_size(size, larger)
    return Resized(Alternative(i, subblock, kind, size=other).block_config(block), other, size)
