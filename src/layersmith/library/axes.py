"""What can be made narrower in a layer, found by experiment.

Two models are built on the meta device that differ in one config attribute. The weights whose shapes differ are the
ones that the attribute governs, and along which dimension; that is the slicing plan. Nothing is known by name.
Whether a slice means what it seems to mean is proved later, on the parent's own weights (``library/proof.py``).

Shapes: D hidden, F intermediate channels, H query heads, K key-value heads, d head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PretrainedConfig

from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig
from layersmith.errors import first_line
from layersmith.heterogeneous.build import decoder_layers
from layersmith.heterogeneous.modeling_layersmith import own_layers, with_overrides
from layersmith.heterogeneous.patcher import deci_x_patcher, layer_classes
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.stock import stock_model

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class WeightAxis:
    """One dimension of one weight of a layer that an axis governs.

    Attributes:
        name: of the parameter, in the layer.
        dim: the dimension.
        unit: entries of that dimension for each channel or head.
        channels_inner: whether entry ``j`` of channel ``c`` lies at ``j * channels + c`` rather than ``c * unit + j``.
    """

    name: str
    dim: int
    unit: int = 1
    channels_inner: bool = False

    def entries(self, channels: torch.Tensor, num_channels: int) -> torch.Tensor:
        """The positions along ``dim`` that belong to the given channels, in the same order of layout."""
        offsets = torch.arange(self.unit)
        if self.channels_inner:
            return (offsets[:, None] * num_channels + channels[None, :]).flatten()
        return (channels[:, None] * self.unit + offsets[None, :]).flatten()


@dataclass(frozen=True)
class Axis:
    """A size of a subblock, the weights that it governs, and the projection that its channels end in.

    Attributes:
        size: F, or K.
        weights: what is sliced.
        output: name, in the layer, of the module whose input holds the channels.
        queries: for K: the weights that hold query heads; heads of one KV head are neighbours in them.
        num_heads: for K: H.
        head_dim: for K: d.
    """

    size: int
    weights: tuple[WeightAxis, ...]
    output: str
    queries: tuple[WeightAxis, ...] = ()
    num_heads: int = 0
    head_dim: int = 0


@dataclass(frozen=True)
class LayerAxes:
    """The axes of one layer; where one is None, ``reasons`` says why."""

    ffn: Axis | None
    kv: Axis | None
    reasons: dict[str, str] = field(default_factory=dict)


def find_axes(
    descriptor: type[ModelDescriptor], config: PretrainedConfig, blocks: Sequence[BlockConfig]
) -> list[LayerAxes]:
    """The axes of every layer of a model whose layers are ``blocks``."""
    skeleton = meta_layers(descriptor, config, blocks)
    base = [layer_shapes(layer) for layer in skeleton]
    ffn = _narrowed(descriptor, config, blocks, "ffn")
    kv = _narrowed(descriptor, config, blocks, "attention")
    queries = _more_query_heads(descriptor, config, blocks, base, kv)
    found = []
    for i, block in enumerate(blocks):
        reasons: dict[str, str] = {}
        ffn_axis = _ffn_axis(skeleton[i], base[i], ffn, i, block, reasons)
        kv_axis = _kv_axis(skeleton[i], base[i], kv, queries, i, block, reasons)
        found.append(LayerAxes(ffn_axis, kv_axis, reasons))
    return found


def meta_layers(
    descriptor: type[ModelDescriptor], config: PretrainedConfig, blocks: Sequence[BlockConfig]
) -> list[nn.Module]:
    """Decoder layers of the given blocks on the meta device."""
    with deci_x_patcher(descriptor, list(blocks)):
        return _build_layers(descriptor, config, len(blocks))


def _build_layers(descriptor: type[ModelDescriptor], config: PretrainedConfig, num_layers: int) -> list[nn.Module]:
    return decoder_layers(stock_model(config), descriptor, num_layers)


def layer_shapes(layer: nn.Module) -> Shapes:
    return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}


@dataclass(frozen=True)
class _Experiment:
    """Shapes of every layer with one size changed, and that size; or why it could not be built."""

    shapes: list[Shapes]
    sizes: list[int | None]
    problem: str | None = None


def _narrowed(
    descriptor: type[ModelDescriptor], config: PretrainedConfig, blocks: Sequence[BlockConfig], subblock: str
) -> _Experiment:
    changed, sizes = [], []
    for block in blocks:
        if subblock == "ffn":
            size = _half(block.ffn.intermediate_size)
            new = dataclasses.replace(block, ffn=FFNConfig(intermediate_size=size)) if size else block
        else:
            size = _half(block.attention.num_key_value_heads)
            new = dataclasses.replace(block, attention=AttentionConfig(num_key_value_heads=size)) if size else block
        changed.append(new)
        sizes.append(size)
    try:
        layers = meta_layers(descriptor, config, changed)
    except Exception as error:  # whatever a family's own code raises for a size that it cannot take
        return _Experiment([], sizes, f"a smaller size cannot be built ({first_line(error)})")
    return _Experiment([layer_shapes(layer) for layer in layers], sizes)


def _half(size: int | None) -> int | None:
    """The largest proper divisor, so that whatever must divide still does."""
    if size is None or size < 2:
        return None
    return next(size // divisor for divisor in range(2, size + 1) if size % divisor == 0)


def _more_query_heads(
    descriptor: type[ModelDescriptor],
    config: PretrainedConfig,
    blocks: Sequence[BlockConfig],
    base: list[Shapes],
    kv: _Experiment,
) -> _Experiment:
    """Shapes with twice the query heads of the same size, everything else as it is."""
    language = descriptor.get_language_model_config(config)
    heads = getattr(language, "num_attention_heads", None)
    if type(heads) is not int:
        return _Experiment([], [None] * len(blocks), "the config has no num_attention_heads")
    head_dim = next(
        (
            unit
            for i in range(len(blocks))
            if kv.shapes and (unit := _unit(base[i], kv.shapes[i], blocks[i], kv.sizes[i]))
        ),
        None,
    )
    if head_dim is None:
        return _Experiment([], [None] * len(blocks), "the head size cannot be told from the weights")

    def configure(layer_config: PretrainedConfig, index: int) -> PretrainedConfig:
        overrides = descriptor.block_config_to_layer_overrides(blocks[index]) if index < len(blocks) else {}
        return with_overrides(layer_config, {**overrides, "num_attention_heads": 2 * heads, "head_dim": head_dim})

    try:
        with own_layers(layer_classes(descriptor), configure, lambda layer, index: None):
            layers = _build_layers(descriptor, config, len(blocks))
    except Exception as error:
        return _Experiment([], [None] * len(blocks), f"more query heads cannot be built ({first_line(error)})")
    return _Experiment([layer_shapes(layer) for layer in layers], [heads] * len(blocks))


def _unit(base: Shapes, changed: Shapes, block: BlockConfig, size: int | None) -> int | None:
    full = block.attention.num_key_value_heads
    units = {
        (a - b) // (full - size)
        for name in base.keys() & changed.keys()
        for a, b in zip(base[name], changed[name], strict=False)
        if full and size and a != b
    }
    return units.pop() if len(units) == 1 else None


def _changed_dims(base: Shapes, changed: Shapes) -> dict[str, int] | None:
    """Parameter to the one dimension that differs; None if parameters came, went, or changed in several ways."""
    if base.keys() != changed.keys():
        return None
    dims = {}
    for name, shape in base.items():
        if len(shape) != len(changed[name]):
            return None
        different = [i for i, (a, b) in enumerate(zip(shape, changed[name], strict=True)) if a != b]
        if len(different) > 1:
            return None
        if different:
            dims[name] = different[0]
    return dims


def _weight_axes(
    base: Shapes, changed: Shapes, dims: dict[str, int], full: int, size: int
) -> tuple[WeightAxis, ...] | None:
    """The axes, if along each the whole dimension is ``unit * full`` entries; None where other rows share it."""
    axes = []
    for name, dim in dims.items():
        unit, rest = divmod(base[name][dim] - changed[name][dim], full - size)
        if rest or unit * full != base[name][dim]:
            return None
        axes.append(WeightAxis(name, dim, unit))
    return tuple(axes)


def _output_module(layer: nn.Module, axes: Sequence[WeightAxis]) -> str | None:
    """The one module that reads the channels: its weight is governed along the side of its inputs."""
    readers = []
    for axis in axes:
        name = axis.name.removesuffix(".weight")
        if name == axis.name:
            continue
        module = layer.get_submodule(name)
        input_dim = 0 if type(module).__name__ == "Conv1D" else 1
        if len(tuple(layer.get_parameter(axis.name).shape)) == 2 and axis.dim == input_dim:
            readers.append(name)
    return readers[0] if len(readers) == 1 else None


def _ffn_axis(
    layer: nn.Module, base: Shapes, narrowed: _Experiment, i: int, block: BlockConfig, reasons: dict[str, str]
) -> Axis | None:
    full, size = block.ffn.intermediate_size, narrowed.sizes[i]
    axis, problem = None, narrowed.problem
    if block.ffn.no_op or block.ffn.replace_with_linear:
        problem = "there is no FFN to narrow"
    elif full is None or size is None:
        problem = "the config has no intermediate_size that could be smaller"
    elif problem is None:
        dims = _changed_dims(base, narrowed.shapes[i])
        weights = _weight_axes(base, narrowed.shapes[i], dims, full, size) if dims else None
        output = _output_module(layer, weights) if weights else None
        if dims is not None and not dims:
            problem = "intermediate_size changes no weight of the layer"
        elif weights is None or output is None:
            problem = "its weights do not split evenly into channels"
        else:
            axis = Axis(full, weights, output)
    if axis is None:
        reasons["ffn"] = problem or "unknown"
    return axis


def _kv_axis(
    layer: nn.Module,
    base: Shapes,
    narrowed: _Experiment,
    queries: _Experiment,
    i: int,
    block: BlockConfig,
    reasons: dict[str, str],
) -> Axis | None:
    full, size = block.attention.num_key_value_heads, narrowed.sizes[i]
    axis, problem = None, narrowed.problem
    if block.attention.no_op or block.attention.replace_with_linear:
        problem = "there is no attention to narrow"
    elif full is None:
        problem = "the config has no num_key_value_heads"
    elif size is None:
        problem = "it has one KV head already"
    elif problem is None:
        dims = _changed_dims(base, narrowed.shapes[i])
        weights = _weight_axes(base, narrowed.shapes[i], dims, full, size) if dims else None
        if weights is None:
            problem = "its key and value weights share rows with others"
        elif queries.problem is not None:
            problem = queries.problem
        else:
            heads = queries.sizes[i] or 0
            query_dims = _changed_dims(base, queries.shapes[i])
            query_axes = _weight_axes(base, queries.shapes[i], query_dims, heads, 2 * heads) if query_dims else None
            output = _output_module(layer, query_axes) if query_axes else None
            units = {axis.unit for axis in weights}
            if query_axes is None or output is None or len(units) != 1:
                problem = "its query heads and output projection cannot be told apart"
            else:
                axis = Axis(full, weights, output, query_axes, heads, units.pop())
    if axis is None:
        reasons["attention"] = problem or "unknown"
    return axis
