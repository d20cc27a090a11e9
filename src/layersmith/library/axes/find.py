"""Finds the axes of a model's layers by building layers that differ in one size.

Two models are built on the meta device that differ in one number of their block configs. The weights whose shapes
differ are the ones that the size governs, and along which dimension; that is the slicing plan. Nothing is known by
name. What lies along a dimension in which order is a guess here; ``library/proof.py`` tries the guesses on weights.

Shapes: D hidden, F intermediate channels, H query heads, K key-value heads, E experts, d head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from layersmith.block_config import BlockConfig
from layersmith.errors import first_line
from layersmith.heterogeneous.build import decoder_layers
from layersmith.heterogeneous.patcher import deci_x_patcher
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import (
    REST,
    Bundle,
    ExpertsAxis,
    LayerAxes,
    NoAxis,
    Segment,
    WeightAxis,
    WidthAxis,
)
from layersmith.library.axes.changes import Change, fewer_experts, narrower_ffn, narrower_shared
from layersmith.library.axes.heads import attention_heads
from layersmith.library.axes.mixers import mixer_head_size, mixer_heads, mixer_state
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.infer.descriptor import InferredDescriptor
from layersmith.model_descriptor.stock import stock_model

Shapes = dict[str, tuple[int, ...]]

# Transformers' own words for what an attention sees.
_FULL, _SLIDING = "full_attention", "sliding_attention"


def find_axes(
    descriptor: type[ModelDescriptor], config: PretrainedConfig, blocks: Sequence[BlockConfig]
) -> list[LayerAxes]:
    """The axes of every layer of a model whose layers are ``blocks``."""
    finder = Finder(descriptor, config, blocks)
    return [finder.layer(i) for i in range(len(blocks))]


def meta_layers(
    descriptor: type[ModelDescriptor], config: PretrainedConfig, blocks: Sequence[BlockConfig]
) -> list[nn.Module]:
    """Decoder layers of the given blocks on the meta device."""
    with deci_x_patcher(descriptor, list(blocks)):
        model = stock_model(config)
    return decoder_layers(model, descriptor, len(blocks))


def layer_shapes(layer: nn.Module) -> Shapes:
    """Shapes of all that a ``state_dict`` of the layer holds."""
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def input_dim(layer: nn.Module, weight: str) -> int | None:
    """The dimension of a projection's weight that its input has; None if its class does not tell."""
    module = layer.get_submodule(weight.rpartition(".")[0])
    if isinstance(module, nn.Linear):
        return 1
    return 0 if isinstance(module, Conv1D) else None


@dataclass(frozen=True)
class Experiment:
    """Shapes of every layer with one size changed.

    Attributes:
        shapes: of every layer.
        sizes: for every layer the size as it was and as it is; None if it has no such size.
        problem: why there are none.
    """

    shapes: list[Shapes]
    sizes: list[tuple[int, int] | None]
    problem: str = ""


@dataclass(frozen=True)
class Governed:
    """A dimension that changes with a size: ``unit`` entries for each, and ``rest`` that do not belong to any."""

    name: str
    dim: int
    unit: int
    rest: int


class Finder:
    """The experiments on one model; each is made once, when it is first wanted."""

    def __init__(self, descriptor: type[ModelDescriptor], config: PretrainedConfig, blocks: Sequence[BlockConfig]):
        self.descriptor, self.config, self.blocks = descriptor, config, blocks
        self.language = descriptor.get_language_model_config(config)
        self.described = descriptor.of(config) if issubclass(descriptor, InferredDescriptor) else None
        self.skeleton = meta_layers(descriptor, config, blocks)
        self.base = [layer_shapes(layer) for layer in self.skeleton]
        self._made: dict[str, Experiment] = {}
        self._owned: list[set[str]] | None = None

    def layer(self, i: int) -> LayerAxes:
        reasons: dict[str, str] = {}

        def tried(name: str, find: Callable[[int], Any]) -> Any:
            try:
                return find(i)
            except NoAxis as reason:
                reasons[name] = str(reason)
                return None

        experts, of_experts = None, ()
        if self.blocks[i].ffn.moe is not None:
            experts = tried("experts", self.experts)
            members = tried("experts", self._members)
            of_experts = (*members.stacks, *members.lists) if members else ()
        ffn = tried("ffn", self.width)
        if self.blocks[i].ffn.moe is None and (stacks := self._stacks_of(i)):
            reasons["experts"] = stacks
        shared = tried("shared", self.shared_width) if self._has_own_shared_width(i) else None
        heads = tried("attention", lambda j: attention_heads(self, j, reasons))
        window = tried("window", self.window) or ""
        mixer = tried("mixer", lambda j: mixer_heads(self, j)) if self.keeps_state(i) else None
        state = tried("state", lambda j: mixer_state(self, j)) if self.keeps_state(i) else None
        size = tried("mixer_size", lambda j: mixer_head_size(self, j)) if self.keeps_state(i) else None
        return LayerAxes(ffn, heads, experts, shared, reasons, window, of_experts, mixer, state, size)

    def keeps_state(self, i: int) -> bool:
        """Whether a layer has a mixer with a state of fixed size."""
        own = self.blocks[i].attention
        if own.no_op or own.replace_with_linear:
            return False
        return own.mamba is not None or (self.described is not None and self.described.has_mixer(i))

    # ------------------------------------------------------------------------------------------ experiments

    def experiment(self, name: str, change: Change) -> Experiment:
        """Layers with another size: a smaller one, or twice as large where a family cannot take that."""
        if name not in self._made:
            problem = ""
            for larger in (False, True):
                changed, sizes = [], []
                for i, block in enumerate(self.blocks):
                    made = change(block, i, larger)
                    changed.append(made[0] if made else block)
                    sizes.append((made[2], made[1]) if made else None)
                try:
                    layers = meta_layers(self.descriptor, self.config, changed)
                    self._made[name] = Experiment([layer_shapes(layer) for layer in layers], sizes)
                    break
                except Exception as error:  # whatever a family's own code raises for a size that it cannot take
                    problem = problem or f"another size cannot be built ({first_line(error)})"
                    self._made[name] = Experiment([], sizes, problem)
        return self._made[name]

    def governed(self, made: Experiment, i: int) -> list[Governed]:
        """What changed in a layer; experts that came or went are not in it.

        Raises:
            NoAxis: a weight changed in more than one way.
        """
        if made.problem:
            raise NoAxis(made.problem)
        sizes = made.sizes[i]
        assert sizes is not None
        size, other = sizes
        found = []
        for name, shape in self.base[i].items():
            changed = made.shapes[i].get(name, shape)
            if changed == shape:
                continue
            dims = [d for d, (a, b) in enumerate(zip(shape, changed, strict=False)) if a != b]
            if len(dims) != 1 or len(shape) != len(changed):
                raise NoAxis(f"{name} changes in more than one dimension with it")
            dim = dims[0]
            unit, odd = divmod(shape[dim] - changed[dim], size - other)
            if odd or unit < 1 or unit * size > shape[dim]:
                raise NoAxis(f"the entries of {name} do not split evenly")
            found.append(Governed(name, dim, unit, shape[dim] - unit * size))
        return found

    # ------------------------------------------------------------------------------------------ widths

    def width(self, i: int) -> WidthAxis:
        """The width of a dense FFN, or of experts."""
        block = self.blocks[i]
        if block.ffn.no_op or block.ffn.replace_with_linear:
            raise NoAxis("there is no FFN to narrow")
        moe = block.ffn.moe
        size = block.ffn.intermediate_size if moe is None else moe.expert_intermediate_dim
        if size is None:
            raise NoAxis("its config has no width")
        if size < 2:
            raise NoAxis("it has one channel already")
        return self._width_axis(i, self.experiment("width", narrower_ffn), size)

    def shared_width(self, i: int) -> WidthAxis:
        """The width of shared experts."""
        moe = self.blocks[i].ffn.moe
        assert moe is not None
        size = moe.shared_expert_intermediate_dim
        assert size is not None
        return self._width_axis(i, self.experiment("shared", narrower_shared), size)

    def _has_own_shared_width(self, i: int) -> bool:
        """Whether shared experts have a width that the others do not go with."""
        moe = self.blocks[i].ffn.moe
        if moe is None or (moe.shared_expert_intermediate_dim or 0) < 2:
            return False
        made, experts = self.experiment("shared", narrower_shared), self.experiment("width", narrower_ffn)
        if made.problem or made.shapes[i] == self.base[i]:
            return False
        changed = {n for n, shape in made.shapes[i].items() if shape != self.base[i].get(n)}
        others = {
            n for n, shape in (experts.shapes[i] if experts.shapes else {}).items() if shape != self.base[i].get(n)
        }
        return not changed & others

    def _width_axis(self, i: int, made: Experiment, size: int) -> WidthAxis:
        governed = self.governed(made, i)
        if not governed:
            raise NoAxis("its width changes no weight of the layer")
        experts = self._members(i)
        stacked = [g for g in governed if g.name in experts.stacks and g.name not in experts.flat]
        flat = [
            dataclasses.replace(g, dim=1, unit=g.unit // experts.count)
            for g in governed
            if g.name in experts.flat and g.dim == 0 and g.unit % experts.count == 0
        ]
        listed = [g for g in governed if experts.number_of(g.name) is not None]
        single = [g for g in governed if g not in stacked and g not in listed and g.name not in experts.flat]
        # Stacks of another number, as of shared experts: every matrix in one has channels of its own.
        others: dict[int, list[Governed]] = {}
        for g in [g for g in single if len(self.base[i][g.name]) == 3 and g.dim > 0]:
            others.setdefault(self.base[i][g.name][0], []).append(g)
            single.remove(g)
        bundles = []
        if stacked:
            bundles.append(_bundle(size, stacked, experts.count, stacked=True))
        if flat:
            bundles.append(dataclasses.replace(_bundle(size, flat, experts.count, stacked=True), flat=True))
        if listed:
            first = [
                dataclasses.replace(g, name=experts.template(g.name)) for g in listed if experts.number_of(g.name) == 0
            ]
            bundles.append(_bundle(size, first, experts.count, stacked=False))
        if single:
            bundles.append(_bundle(size, single, 0, stacked=False))
        bundles += [_bundle(size, own, members, stacked=True) for members, own in others.items()]
        return WidthAxis(size, tuple(self._with_reader(i, bundle) for bundle in bundles))

    def _stacks_of(self, i: int) -> str:
        """Why experts are not understood of which no number is known, though weights of the FFN are stacks of them."""
        shapes = {n: s for n, s in self.base[i].items() if len(s) == 3 and n not in self.attention_weights(i)}
        numbers = " and ".join(f"{shape[0]} in {name}" for name, shape in shapes.items())
        several = len(shapes) > 1 and all(min(shape) > 1 for shape in shapes.values())
        return f"its experts are stacks ({numbers}), and no attribute is the number of all" if several else ""

    def _with_reader(self, i: int, bundle: Bundle) -> Bundle:
        """The bundle with the only weight whose input the channels are, if its modules' classes tell."""
        readers = []
        for w in bundle.weights:
            name = w.name.format(0)
            if bundle.stacked or len(self.base[i][name]) != 2 or not name.endswith(".weight"):
                continue
            if input_dim(self.skeleton[i], name) == w.dim:
                readers.append(w)
        if len(readers) != 1:
            return bundle
        return dataclasses.replace(bundle, reader=readers[0].name)

    # ------------------------------------------------------------------------------------------ experts

    def experts(self, i: int) -> ExpertsAxis:
        moe = self.blocks[i].ffn.moe
        if moe is None or self.blocks[i].ffn.no_op or self.blocks[i].ffn.replace_with_linear:
            raise NoAxis("there are no experts")
        if self.described is not None and self.described.experts_of_both(i) and not self.described.own_experts(i):
            raise NoAxis("its attention has experts too, and their numbers are the same attributes")
        members = self._members(i)
        made = self.experiment("experts", fewer_experts)
        governed = [g for g in self.governed(made, i) if members.number_of(g.name) is None]
        if not members.stacks and not members.lists:
            raise NoAxis("no stack or list of weights has one for each expert")
        weights = tuple(_weight_axis(g, "experts") for g in governed)
        shapes = self.base[i]
        matrices = [g.name for g in governed if len(shapes[g.name]) == 2 and min(shapes[g.name]) > 1]
        router = tuple(name for name in matrices if name not in members.stacks)
        per_token = moe.num_experts_per_tok
        return ExpertsAxis(
            moe.num_local_experts, weights, members.lists, router, per_token, fewer_per_token=self._fewer_per_token(i)
        )

    def _fewer_per_token(self, i: int) -> bool:
        """Whether the number of experts that a token uses is said in a config at all."""
        moe = self.blocks[i].ffn.moe
        assert moe is not None
        if moe.num_experts_per_tok < 2:
            return False
        fewer = Alternative(i, "ffn", "experts_per_token", size=moe.num_experts_per_tok - 1)
        block = fewer.block_config(self.blocks[i])
        own, other = (self.descriptor.block_config_to_layer_overrides(b) for b in (self.blocks[i], block))
        return own != other or (self.described is not None and bool(self.described.own_experts(i)))

    def _members(self, i: int) -> _Members:
        """Which weights of a layer belong to experts."""
        moe = self.blocks[i].ffn.moe
        if moe is None:
            return _Members(0, (), ())
        count = moe.num_local_experts
        if self.described is not None and self.described.experts_of_both(i) and not self.described.own_experts(i):
            owned = self.attention_weights(i)
            own = {name: shape for name, shape in self.base[i].items() if name not in owned}
            return _Members(count, tuple(n for n, s in own.items() if len(s) == 3 and s[0] == count), ())
        made = self.experiment("experts", fewer_experts)
        if made.problem:
            raise NoAxis(made.problem)
        gone = self.base[i].keys() ^ made.shapes[i].keys()
        lists = tuple(sorted({_before_numbers(name) for name in gone} - {""}))
        sizes = made.sizes[i]
        assert sizes is not None
        fewer = sizes[0] - sizes[1]
        stacks = tuple(
            name
            for name, shape in self.base[i].items()
            if shape[:1] != (changed := made.shapes[i].get(name, shape))[:1]
            and len(shape) >= 2 and shape[0] >= count and shape[0] - changed[0] == fewer
            and (len(shape) == 3 or self._is_stack_of_vectors(i, name, made))
        )  # fmt: skip
        flat = () if self.described is None else self.described.flat_experts(i)
        return _Members(count, (*stacks, *flat), lists, flat)

    def _is_stack_of_vectors(self, i: int, name: str, made: Experiment) -> bool:
        """Whether a matrix holds a bias for each of a stack of matrices beside it, rather than rows of a router."""
        module = name.rpartition(".")[0]
        beside = [n for n, shape in self.base[i].items() if n.rpartition(".")[0] == module and len(shape) == 3]
        return any(made.shapes[i].get(n) != self.base[i][n] for n in beside)

    # ------------------------------------------------------------------------------------------ heads

    def window(self, i: int) -> str:
        """The type of attention with a window, where the model has both and this layer has none."""
        types = getattr(self.language, "layer_types", None)
        own = self.blocks[i].attention
        if own.no_op or own.replace_with_linear:
            raise NoAxis("there is no attention")
        if not types or not {_FULL, _SLIDING} <= set(types):
            raise NoAxis("its model does not have both kinds of attention")
        if (own.layer_type or types[i]) != _FULL:
            raise NoAxis("it does not see everything as it is")

        def narrowed(block: BlockConfig, j: int, larger: bool) -> tuple[BlockConfig, int, int] | None:
            if types[j] != _FULL or block.attention.no_op or block.attention.replace_with_linear:
                return None
            return Alternative(j, "attention", "window", _SLIDING).block_config(block), 0, 1

        made = self.experiment("window", narrowed)
        if made.problem or made.shapes[i] != self.base[i]:
            raise NoAxis(made.problem or "attention with a window has other weights")
        return _SLIDING

    def attention_weights(self, i: int) -> set[str]:
        if self._owned is None:
            prefix = [f"{self.descriptor.layer_block_name(j)}." for j in range(len(self.blocks))]
            names = [prefix[j] + name for j, shapes in enumerate(self.base) for name in shapes]
            groups = self.descriptor.get_weight_groups(names, len(self.blocks))
            self._owned = [
                {name.removeprefix(prefix[j]) for name in groups.get(f"block_{j}_attention", ())}
                for j in range(len(self.blocks))
            ]
        return self._owned[i]

    def takes(self, i: int, w: WeightAxis) -> bool:
        """Whether what lies along a weight is what a projection takes."""
        return w.name.endswith(".weight") and self.input_dim(i, w.name) == w.dim

    def input_dim(self, i: int, matrix: str) -> int | None:
        """The dimension of a projection's weight that its input has; None if it is none or its class is silent."""
        return input_dim(self.skeleton[i], matrix) if len(self.base[i][matrix]) == 2 else None

    def heads_readers(self, i: int, weights: Sequence[WeightAxis]) -> list[tuple[str, int]]:
        """Projections whose input heads are, or else a stack of them: name, entries a head."""
        own = [w for w in weights if len(w.segments) == 1 and w.segments[0].part == "queries"]
        found = [w for w in own if self.takes(i, w)]
        # Whether what lies along the last dimension of a stack is what it takes, its proof tells.
        stacks = [w for w in own if len(self.base[i][w.name]) == 3 and w.dim == 2 and w.name.endswith(".weight")]
        return [(w.name, w.segments[0].unit) for w in found or stacks]

    def heads_reader(self, i: int, weights: Sequence[WeightAxis]) -> tuple[str, int]:
        """The only such projection."""
        readers = self.heads_readers(i, weights)
        if len(readers) > 1:
            names = " and ".join(name for name, _ in readers)
            raise NoAxis(f"it has several attentions, whose heads end in {names}, and one number of heads for all")
        if not readers:
            raise NoAxis("the projection that its heads end in cannot be told")
        return readers[0]


@dataclass(frozen=True)
class _Members:
    """Experts: how many, weights that are stacks of them, lists of modules, and stacks with no dimension for them."""

    count: int
    stacks: tuple[str, ...]
    lists: tuple[str, ...]
    flat: tuple[str, ...] = ()

    def number_of(self, name: str) -> int | None:
        """Which expert of a list a weight belongs to."""
        for prefix in self.lists:
            if name.startswith(f"{prefix}."):
                number = name.removeprefix(f"{prefix}.").split(".")[0]
                return int(number) if number.isdigit() else None
        return None

    def template(self, name: str) -> str:
        """The name with ``{}`` for the number of the expert."""
        prefix = next(p for p in self.lists if name.startswith(f"{p}."))
        _, _, own = name.removeprefix(f"{prefix}.").partition(".")
        return f"{prefix}.{{}}.{own}"


def _before_numbers(name: str) -> str:
    """What stands before the last part of a name that is a number."""
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1]]) if numbers else ""


def _bundle(size: int, governed: Sequence[Governed], members: int, stacked: bool) -> Bundle:
    """Weights with the same channels; what has several entries a channel of the config has as many channels more."""
    least = min(g.unit for g in governed)
    weights = tuple(_weight_axis(dataclasses.replace(g, unit=g.unit // least), "channels") for g in governed)
    return Bundle(size * least, weights, members=members, stacked=stacked)


def _weight_axis(governed: Governed, part: str) -> WeightAxis:
    """The first guess: several entries of a unit are one after another in parts, and what is no unit's comes last."""
    segments = (
        [Segment(part)] * governed.unit if governed.unit <= 3 and part == "channels" else [Segment(part, governed.unit)]
    )
    if governed.rest:
        segments.append(Segment(REST, governed.rest))
    return WeightAxis(governed.name, governed.dim, tuple(segments))
