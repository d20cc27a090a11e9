"""Number formats of the weights in a layer: which weights have one, and the weights in it.

A format belongs to a subblock: all linear maps in it have the same one. Norms, biases, routers, convolutions and
stacks of experts stay in the parent's data type, as does a matrix whose shape the format does not allow.

Weights are quantized by GPTQ, from the second moments of what the linear maps are given. Where a linear map was given
nothing, as an expert that no token chose, its weight is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from layersmith.heterogeneous.checkpoint import weight_groups
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import LayerAxes
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.modeling_layersmith import first_tensor as first_argument
from layersmith.quantization.formats import Format, format_named
from layersmith.quantization.gptq import gptq_quantize, inverse_factor
from layersmith.quantization.rounding import Quantized, quantize

# What a solution calls embeddings and head, which have one format together.
EMBEDDINGS = "embeddings"


def embeddings_key(name: str) -> str:
    """Key of embeddings and head in a format among losses and candidates; an empty name is the parent's data type."""
    return f"{EMBEDDINGS}, {name}" if name else EMBEDDINGS


def in_formats(
    shapes: Sequence[Alternative], formats: Sequence[str], kv_formats: Sequence[str] = ()
) -> list[Alternative]:
    """Alternatives in each of some formats, with keys and values in each of others; not those that are as given."""
    pairs = [
        a.in_format(name).with_kv_format(kv) for a in shapes for kv in ("", *kv_formats) for name in ("", *formats)
    ]
    given = set(shapes)
    return [a for a in dict.fromkeys(pairs) if a not in given]


def kv_key(name: str) -> str:
    """What a format of the KV cache is called among those of weights."""
    return f"{name} KV cache"


def with_embeddings(formats: Sequence[str]) -> list[str]:
    """The formats in which a program also runs embeddings and head."""
    return [name for name in formats if format_named(name).embedding_servers]


def embeddings(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights of embeddings and head; one if they are tied."""
    weights: dict[int, nn.Parameter] = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            weights[id(weight)] = weight
    return list(weights.values())


@torch.no_grad()
def quantized_embeddings(model: PreTrainedModel, name: str) -> dict[str, Quantized]:
    """Name of each weight of embeddings and head, if a format's shape allows it, to the weight rounded to nearest."""
    format, wanted = format_named(name), {id(weight) for weight in embeddings(model)}
    return {
        name: quantize(weight.detach(), format)
        for name, weight in model.named_parameters()
        if id(weight) in wanted and format.refusal(weight.shape) is None
    }


@contextmanager
def embeddings_in(model: PreTrainedModel, name: str) -> Iterator[dict[str, Quantized]]:
    """While open, a model has its embeddings and head in a format; yields :func:`quantized_embeddings`.

    An empty name leaves them as they are.
    """
    rounded = quantized_embeddings(model, name) if name else {}
    before = {name: model.get_parameter(name).data for name in rounded}
    for name, weight in rounded.items():
        model.get_parameter(name).data = weight.values().to(before[name])
    try:
        yield rounded
    finally:
        for name, data in before.items():
            model.get_parameter(name).data = data


def matrices(
    descriptor: type[ModelDescriptor], layer: nn.Module, i: int, num_layers: int, axes: LayerAxes
) -> dict[str, list[str]]:
    """Subblock to the names in layer ``i`` of the weights that a format applies to, perhaps on the meta device."""
    prefix = f"{descriptor.layer_block_name(i)}."
    linear = [f"{name}.weight" for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    router = axes.experts.router if axes.experts is not None else ()
    groups = weight_groups(descriptor, [prefix + name for name in linear if name not in router], num_layers)
    return {s: [name.removeprefix(prefix) for name in groups.get(f"block_{i}_{s}", ())] for s in SUBBLOCKS}


class InputMoments:
    """Mean products E[x x^T] ``[in, in]`` of the inputs of linear maps, by the name of their weight."""

    def __init__(self, layer: nn.Module, weights: Sequence[str]):
        self.layer, self.weights = layer, weights
        self._sums: dict[str, torch.Tensor] = {}
        self._first: dict[str, str] = {}  # of linear maps that are given the same tensor
        self._tokens: dict[str, int] = {}
        self._given: dict[str, torch.Tensor] = {}
        self._factors: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, what the layer is given counts."""
        handles = [self._module(w).register_forward_pre_hook(self._hook(w), with_kwargs=True) for w in self.weights]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._given.clear()

    def source(self, weight: str) -> str:
        """Name of the first weight with the same inputs."""
        return self._first.get(weight, weight)

    def of(self, weight: str) -> torch.Tensor | None:
        """The mean product; None if the linear map was given nothing."""
        name = self.source(weight)
        return self._sums[name] / self._tokens[name] if self._tokens.get(name) else None

    def factor(self, weight: str) -> torch.Tensor | None:
        """The mean product's inverse factor, which GPTQ needs; None if the linear map was given nothing."""
        name = self.source(weight)
        if name not in self._factors and (moment := self.of(name)) is not None:
            self._factors[name] = inverse_factor(moment)
        return self._factors.get(name)

    def _module(self, weight: str) -> nn.Module:
        return self.layer.get_submodule(weight.removesuffix(".weight"))

    def _hook(self, weight: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_argument(args, kwargs)
            twin = next((name for name, given in self._given.items() if given is x), None)
            first = self._first.setdefault(weight, twin or weight)
            if first != weight and twin == first:
                return
            self._given[weight] = x
            rows = x.detach().flatten(0, -2).float()
            product = (rows.T @ rows).double()
            self._sums[weight] = self._sums[weight] + product if weight in self._sums else product
            self._tokens[weight] = self._tokens.get(weight, 0) + len(rows)

        return add


@torch.no_grad()
def quantized(layer: nn.Module, formats: Mapping[str, Format], moments: InputMoments) -> dict[str, Quantized]:
    """Weights in their formats.

    Args:
        layer: A decoder layer.
        formats: Name of a weight to its format; a weight whose shape the format does not allow is left out.
        moments: The moments of their inputs.

    Returns:
        Name of a weight to the rounded one.
    """
    together: dict[tuple[Any, ...], list[str]] = {}
    for name, format in formats.items():
        if format.refusal(layer.get_parameter(name).shape) is None:
            alone = name if format.group == "tensor" else None
            together.setdefault((moments.source(name), format, alone), []).append(name)
    result: dict[str, Quantized] = {}
    for (source, format, _), names in together.items():
        weights, factor = [layer.get_parameter(name).detach() for name in names], moments.factor(source)
        if factor is None:
            result |= {name: quantize(weight, format) for name, weight in zip(names, weights, strict=True)}
        elif len(names) == 1:
            result[names[0]] = gptq_quantize(weights[0], factor, format)
        else:  # rows do not depend on each other
            parts = gptq_quantize(torch.cat(weights), factor, format).split([len(weight) for weight in weights])
            result |= zip(names, parts, strict=True)
    return {name: result[name] for name in formats if name in result}
