"""Tensor parallelism: some processes compute the same rows together, each with its part of the matrices of every layer.

Transformers' own plan of an architecture says along which dimension each matrix is divided, and where the processes add
up or exchange what they computed. Plans divide attention by heads and FFNs by channels. An attention whose heads, or an
FFN whose channels, N processes cannot share equally is left whole: each process computes all of it. The same holds for
what a plan does not name. Weights that are whole get the same gradients in all N processes.

Why not through accelerate: its ``ParallelismConfig`` is for GPUs and other accelerators, not for CPUs (accelerate
1.15). Why not by Transformers while it loads: it cannot leave single layers whole.
"""

from __future__ import annotations

from collections import defaultdict

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from layersmith import upstream
from layersmith.heterogeneous.build import num_layers_of
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.conventions import HEAD_COUNTS, HEAD_SIZE

# Names of modules and parameters, and how each is divided.
Plan = dict[str, str]


def divide(model: PreTrainedModel, descriptor: type[ModelDescriptor], mesh: DeviceMesh) -> None:
    """Divide a model on the meta device over the processes of a mesh, in place."""
    whole = whole_parts(model, descriptor, mesh.size())
    divided = {part: styles for part, styles in plan_of(model, descriptor).items() if part not in whole}
    upstream.divide_by_plan(model, mesh, {name: style for styles in divided.values() for name, style in styles.items()})
    # What an embedding returns is a view, and FSDP's hooks are lost when someone changes a view in place.
    embedding = model.get_submodule(descriptor.input_embedding_name())
    embedding.register_forward_hook(lambda module, args, output: output.clone())


def why_not_divided(model: PreTrainedModel, descriptor: type[ModelDescriptor], number: int) -> str | None:
    """Why the layers of a model cannot be divided over a number of processes; None if at least one can."""
    if not upstream.divides_models():
        return "that needs Transformers 5.23 or later"
    layers = tuple(_layers(model, descriptor))
    parts = {part for part in plan_of(model, descriptor) if part.startswith(layers)}
    if not parts:
        return f"Transformers has no plan for the layers of {type(model).__name__}"
    if not parts - set(whole_parts(model, descriptor, number)):
        return f"no attention or FFN of it has parts that {number} processes can share equally"
    return None


def divided_share(model: PreTrainedModel, descriptor: type[ModelDescriptor], number: int) -> float:
    """The share of a model's parameters that is divided over a number of processes; the rest is whole in each."""
    whole, sizes = whole_parts(model, descriptor, number), {n: p.numel() for n, p in model.named_parameters()}
    parts = [styles for part, styles in plan_of(model, descriptor).items() if part not in whole]
    return sum(sizes.get(name, 0) for styles in parts for name in styles) / sum(sizes.values())


def plan_of(model: PreTrainedModel, descriptor: type[ModelDescriptor]) -> dict[str, Plan]:
    """Transformers' plan by the attention, the FFN or the module outside the layers that it is about."""
    layers = _layers(model, descriptor)
    modules = {name for name, _ in model.named_modules()}
    parts: dict[str, Plan] = defaultdict(dict)
    for name, style in upstream.tensor_parallel_plan(model).items():
        layer = next((layer for layer in layers if name.startswith(layer)), None)
        if layer is not None:
            part = layer + name.removeprefix(layer).partition(".")[0]
        else:
            part = name if name in modules else name.rpartition(".")[0]
        parts[part][name] = style
    return dict(parts)


def whole_parts(model: PreTrainedModel, descriptor: type[ModelDescriptor], number: int) -> list[str]:
    """The attentions, FFNs and other modules of a plan that cannot be divided into a number of equal parts."""
    if number == 1:
        return []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    plan = plan_of(model, descriptor)
    return [
        part
        for part, styles in plan.items()
        if not _has_equal_heads(model.get_submodule(part), styles, number)
        or any(
            name in parameters and not _is_equal(model, part, name, style, parameters[name], number)
            for name, style in styles.items()
        )
    ]


def _has_equal_heads(module: nn.Module, styles: Plan, number: int) -> bool:
    """Whether each process gets as many heads of an attention, if the plan divides heads."""
    counts = [getattr(module, name, None) for name in HEAD_COUNTS]
    divides = any(upstream.keeps_output_divided(style) for style in styles.values())
    return not divides or all(count % number == 0 for count in counts if type(count) is int)


def _is_equal(model: PreTrainedModel, part: str, name: str, style: str, parameter: nn.Parameter, number: int) -> bool:
    dimension, pieces = upstream.divided_dimension(style, parameter.ndim)
    if dimension is None:
        return True
    unit = 1
    if upstream.keeps_output_divided(style) and hasattr(model.get_submodule(name.rpartition(".")[0]), "out_features"):
        size = getattr(model.get_submodule(part), HEAD_SIZE, None)
        unit = size if type(size) is int and size > 0 else 1
    return parameter.shape[dimension] % (number * pieces * unit) == 0


def _layers(model: PreTrainedModel, descriptor: type[ModelDescriptor]) -> list[str]:
    return [f"{descriptor.layer_block_name(i)}." for i in range(num_layers_of(model.config, descriptor))]
