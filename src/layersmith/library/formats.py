"""Number formats of the weights in a layer: which weights have one, and the weights in it.

A format belongs to a subblock: all linear maps in it, and all experts, have the same one. Norms, biases, routers and
convolutions stay in the parent's data type. A matrix whose shape the format does not allow has the one that
:meth:`.Format.fitting` names, or stays as well.

Weights are quantized by GPTQ, from the second moments of what the linear maps are given, with input channels scaled
where the norm before can hold the scales and they help (:mod:`.norm_scales`). Where a linear map was given nothing, as
an expert that no token chose, its weight is rounded to nearest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from layersmith.foreign import foreign_code
from layersmith.heterogeneous.checkpoint import weight_groups
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import LayerAxes
from layersmith.library.norm_scales import held_scales, norm_before, scales_help
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.modeling_layersmith import first_tensor as first_argument
from layersmith.quantization.formats import Format, format_named
from layersmith.quantization.gptq import Factor, gptq_quantize, inverse_factor
from layersmith.quantization.rounding import Quantized, QuantizedStack, Rounded, quantize
from layersmith.upstream import is_stack_of_experts, one_expert_at_a_time, rows_on_disk

# What a solution calls embeddings and head, which have one format together.
EMBEDDINGS = "embeddings"
# Bytes of the second moments of a stack's experts, each apart.
_MOST_MOMENTS = 2**30


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


def embeddings(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The weights of embeddings and head by name; one if they are tied."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    wanted = {id(getattr(module, "weight", None)) for module in modules}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in wanted}


def head_weight(model: PreTrainedModel) -> str | None:
    """Name of the head's weight, if the head is a linear map; where it is tied, the embeddings have it too."""
    head = model.get_output_embeddings()
    names = (name for name, module in model.named_modules() if module is head and isinstance(head, nn.Linear))
    return next((f"{name}.weight" for name in names), None)


@torch.no_grad()
def quantized_embeddings(
    model: PreTrainedModel, name: str, head_moment: torch.Tensor | None = None
) -> dict[str, Quantized]:
    """Name of each weight of embeddings and head, if a format's shape allows it, to the rounded weight.

    Args:
        model: The model.
        name: Name of the format; an empty one rounds nothing.
        head_moment: Mean product of the head's inputs, as of :meth:`InputMoments.of`. With it the head is quantized by
            GPTQ, also where its weight is that of the embeddings. Embeddings alone are rounded to nearest, since they
            multiply nothing.
    """
    result: dict[str, Quantized] = {}
    if not name:
        return result
    head, format = head_weight(model), format_named(name)
    factor = None if head is None or head_moment is None else inverse_factor(head_moment)
    for of_weight, weight in embeddings(model).items():
        if (fits := format.fitting(weight.shape)) is not None:
            is_heads = head is not None and weight is model.get_parameter(head)
            result[of_weight] = _rounded(weight.detach(), factor if is_heads else None, fits)
    return result


@contextmanager
def embeddings_in(model: PreTrainedModel, rounded: Mapping[str, Quantized]) -> Iterator[None]:
    """While open, a model has its embeddings and head as :func:`quantized_embeddings` returns them."""
    before = {name: model.get_parameter(name).data for name in rounded}
    for name, weight in rounded.items():
        model.get_parameter(name).data = weight.values().to(before[name])
    try:
        yield
    finally:
        for name, data in before.items():
            model.get_parameter(name).data = data


def matrices(
    model: PreTrainedModel,
    descriptor: type[ModelDescriptor],
    layer: nn.Module,
    i: int,
    num_layers: int,
    axes: LayerAxes,
) -> dict[str, list[str]]:
    """Subblock to the names in layer ``i`` of the weights that a format applies to, perhaps on the meta device.

    These are the weights of linear maps, and stacks of experts whose matrices the files of ``model`` have one by one.
    """
    prefix = f"{descriptor.layer_block_name(i)}."
    router = axes.experts.router if axes.experts is not None else ()
    names = [f"{name}.weight" for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in names if name not in router]
    names += [name for name in _stacks(layer) if rows_of_matrices(model, prefix + name, layer.get_parameter(name))]
    groups = weight_groups(descriptor, [prefix + name for name in names], num_layers)
    return {s: [name.removeprefix(prefix) for name in groups.get(f"block_{i}_{s}", ())] for s in SUBBLOCKS}


def _stacks(layer: nn.Module) -> list[str]:
    return [
        f"{name}.{last}"
        for name, module in layer.named_modules()
        if is_stack_of_experts(module)
        for last, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


# Kind of model, name of a weight without numbers, and its first dimensions to the rows of its matrices in files.
_written: dict[tuple[Any, ...], tuple[int, ...]] = {}


def rows_of_matrices(model: PreTrainedModel, name: str, weight: torch.Tensor) -> tuple[int, ...]:
    """Rows of each matrix that a model's files have a weight in; none for a stack that they have as it is."""
    if weight.ndim == 2:
        return (len(weight),)
    key = (type(model), re.sub(r"\d+", "#", name), weight.shape[:2])
    if key not in _written:
        with foreign_code(f"how is {name} written?", refusal_is_answer=True) as attempt:
            _written[key] = tuple(len(rows) for rows in rows_on_disk(model, name, weight.shape).values())
        if attempt.failed:
            _written[key] = ()
    return _written[key]


def saved_bytes(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], format: Format) -> int:
    """The bytes that weights take less in a format, where one fits their shapes, than in their data type.

    Args:
        model: Has weights of these names; theirs may have other shapes.
        weights: Name in the model to a weight, perhaps on the meta device.
        format: The format.
    """
    saved = 0
    for name, weight in weights.items():
        for rows in rows_of_matrices(model, name, weight):
            shape = rows, weight.shape[-1]
            if (fitting := format.fitting(shape)) is not None:
                saved += rows * weight.shape[-1] * weight.element_size() - fitting.bytes_of(shape)
    return saved


def as_written(model: PreTrainedModel, rounded: Mapping[str, Rounded]) -> dict[str, Quantized]:
    """Rounded weights by their names in the files of a model, instead of in the model itself."""
    result: dict[str, Quantized] = {}
    for name, weight in rounded.items():
        if isinstance(weight, Quantized):
            result[name] = weight
            continue
        count = len(weight.members[0].levels)
        for written, rows in rows_on_disk(model, name, (len(weight.members), count, 1)).items():
            expert = rows[0] // count
            result[written] = weight.members[expert].rows(torch.tensor(rows) - expert * count)
    return result


class InputMoments:
    """Mean products E[x x^T] ``[in, in]`` of the inputs of linear maps, by the name of their weight.

    Each expert of a stack has its own, under the name ``stack:number``, unless they would take too much memory; then
    the experts of a stack share theirs.
    """

    def __init__(self, layer: nn.Module, weights: Sequence[str]):
        self.layer = layer
        self.linear = [name for name in weights if layer.get_parameter(name).ndim == 2]
        self.stacks = [name for name in weights if name not in self.linear]
        self._sums: dict[str, torch.Tensor] = {}
        self._first: dict[str, str] = {}  # of linear maps that are given the same tensor
        self._tokens: dict[str, int] = {}
        self._given: dict[str, torch.Tensor] = {}
        self._factors: dict[str, Factor] = {}
        self._norms: dict[str, str | None] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, what the layer is given counts."""
        modules = {name: self.layer.get_submodule(name.rpartition(".")[0]) for name in (*self.linear, *self.stacks)}
        hooks = [modules[w].register_forward_pre_hook(self._hook(w), with_kwargs=True) for w in self.linear]
        try:
            products = _Products(self._of_expert) if self.stacks else nullcontext()
            with one_expert_at_a_time(modules[w] for w in self.stacks), products:
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self._given.clear()
            self._factors.clear()

    def source(self, weight: str) -> str:
        """Name of the first weight with the same inputs."""
        stack = weight.partition(":")[0]
        name = weight if stack == weight or self._is_apart(self.layer.get_parameter(stack)) else stack
        return self._first.get(name, name)

    def of(self, weight: str) -> torch.Tensor | None:
        """The mean product; None if the linear map was given nothing."""
        name = self.source(weight)
        return self._sums[name] / self._tokens[name] if self._tokens.get(name) else None

    def factor(self, weight: str) -> Factor | None:
        """The mean product's factor, which GPTQ needs; None if the linear map was given nothing."""
        name = self.source(weight)
        if name not in self._factors and (moment := self.of(name)) is not None:
            self._factors[name] = inverse_factor(moment)
        return self._factors.get(name)

    def readers(self, weight: str) -> list[str]:
        """Names of the linear maps with the same inputs."""
        return [name for name in self.linear if self.source(name) == self.source(weight)]

    def norm(self, weight: str, run: Callable[[], torch.Tensor]) -> str | None:
        """Name of the norm's weight that can hold scales of these inputs, found once for all formats."""
        name = self.source(weight)
        if name not in self._norms:
            self._norms[name] = norm_before(self.layer, self.readers(name), run)
        return self._norms[name]

    @staticmethod
    def _is_apart(stack: torch.Tensor) -> bool:
        return 8 * len(stack) * stack.shape[-1] ** 2 <= _MOST_MOMENTS

    def _hook(self, weight: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_argument(args, kwargs)
            twin = next((name for name, given in self._given.items() if given is x), None)
            first = self._first.setdefault(weight, twin or weight)
            if first != weight and twin == first:
                return
            self._given[weight] = x
            self._add(weight, x)

        return add

    def _of_expert(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Count what a linear map was given, if its weight is a matrix of a stack."""
        for name in self.stacks:
            stack = self.layer.get_parameter(name)
            if weight.untyped_storage().data_ptr() != stack.untyped_storage().data_ptr():
                continue
            number, rest = divmod(int(weight.storage_offset() - stack.storage_offset()), int(stack.stride(0)))
            if weight.shape == stack.shape[1:] and rest == 0 and 0 <= number < len(stack):
                self._add(self.source(f"{name}:{number}"), x)

    def _add(self, name: str, x: torch.Tensor) -> None:
        rows = x.detach().flatten(0, -2).float()
        product = (rows.T @ rows).double()
        self._sums[name] = self._sums[name] + product if name in self._sums else product
        self._tokens[name] = self._tokens.get(name, 0) + len(rows)


class _Products(TorchFunctionMode):
    """While open, a callback is given the input and the weight of every linear map."""

    def __init__(self, callback: Callable[[torch.Tensor, torch.Tensor], None]):
        super().__init__()
        self.callback = callback

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and len(args) > 1:
            with torch.no_grad():
                self.callback(args[0], args[1])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Quantization:
    """Weights of a layer in formats.

    Attributes:
        rounded: Name of a weight to the rounded one.
        norms: Name of the weight of a norm that holds scales to what it becomes.
    """

    rounded: dict[str, Rounded]
    norms: dict[str, torch.Tensor]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All weights that change, in float32."""
        return {name: weight.values() for name, weight in self.rounded.items()} | self.norms

    def add(self, other: Quantization) -> None:
        """Add what became of other weights; kept in the memory of the CPU."""
        cpu = torch.device("cpu")
        self.rounded.update({name: weight.to(cpu) for name, weight in other.rounded.items()})
        self.norms.update({name: weight.to(cpu) for name, weight in other.norms.items()})


@torch.no_grad()
def quantized(
    layer: nn.Module,
    formats: Mapping[str, Format],
    moments: InputMoments,
    run: Callable[[], torch.Tensor] | None = None,
) -> Quantization:
    """Weights in their formats.

    Args:
        layer: A decoder layer.
        formats: Name of a weight to its format; a weight whose shape has no fitting one is left out.
        moments: The moments of their inputs.
        run: Returns the layer's output for a few tokens, which shows what norms can hold. Default: no norm changes.
    """
    together: dict[tuple[Any, ...], list[str]] = {}
    result = Quantization({}, {})
    for name, wanted in formats.items():
        weight = layer.get_parameter(name).detach()
        if (format := wanted.fitting(weight.shape)) is None:
            continue
        if weight.ndim == 3:
            factors = (moments.factor(f"{name}:{number}") for number in range(len(weight)))
            members = zip(weight, factors, strict=True)
            result.rounded[name] = QuantizedStack(tuple(_rounded(matrix, factor, format) for matrix, factor in members))
        else:
            alone = name if format.group == "tensor" else None
            together.setdefault((moments.source(name), format, alone), []).append(name)
    for (source, format, _), names in together.items():
        weights = [layer.get_parameter(name).detach() for name in names]
        # Rows do not depend on each other.
        whole, factor = torch.cat(weights) if len(weights) > 1 else weights[0], moments.factor(source)
        norm = moments.norm(source, run) if run is not None and names == moments.readers(source) else None
        if norm is not None and factor is not None and (moment := moments.of(source)) is not None:
            divided, scales = held_scales(layer.get_parameter(norm).detach(), moment.diagonal())
            if scales_help(whole, scales, moment.diagonal(), format):
                result.norms[norm], whole, factor = divided, whole.float() * scales, factor.scaled(scales)
        parts = _rounded(whole, factor, format).split([len(weight) for weight in weights])
        result.rounded.update(zip(names, parts, strict=True))
    return result


def _rounded(weight: torch.Tensor, factor: Factor | None, format: Format) -> Quantized:
    return quantize(weight, format) if factor is None else gptq_quantize(weight, factor, format)
