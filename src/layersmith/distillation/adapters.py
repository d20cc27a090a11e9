"""Low-rank adapters (LoRA) that are trained instead of a child's weights, and merged into them at the end.

The weights stay frozen in the data type of the computation, so training needs no gradients, moments or float32 copies
of them. They may stay on the disk too, and are read for a layer when it runs. PEFT makes the adapters.

Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layersmith import upstream
from layersmith.errors import UsageError
from layersmith.execution.files import in_unnamed_file
from layersmith.execution.streaming import WeightStream
from layersmith.heterogeneous.build import decoder_layers, num_layers_of
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.run.artifacts import temporary_folder

# What adapters add is multiplied by this number: PEFT's alpha over the rank.
_SCALE = 2


def require_peft() -> None:
    """Raises: UsageError: PEFT is not installed."""
    if find_spec("peft") is None:
        raise UsageError(
            "recipe distillation.lora_rank: adapters are trained with PEFT, which is not installed: "
            "pip install 'layersmith[lora]'"
        )


def add_adapters(
    child: PreTrainedModel,
    descriptor: type[ModelDescriptor],
    rank: int,
    seed: int,
    device: torch.device = torch.device("cpu"),
) -> None:
    """Freeze all weights, and give every linear map in a decoder layer an adapter in float32 that adds nothing yet.

    Args:
        child: The child; changed in place.
        descriptor: Descriptor of its model family.
        rank: Rank of the adapters.
        seed: Seed of their first factor.
        device: Where the adapters of weights on the disk are put; others are where the weights are.

    Raises:
        UsageError: PEFT is not installed, or no layer has a linear map.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    # Without the config of a model, from which PEFT would also give adapters to stacked experts.
    layers = nn.ModuleList(decoder_layers(child, descriptor, num_layers_of(child.config, descriptor)))
    names = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    if not names:
        raise UsageError("recipe distillation.lora_rank: the child's layers have no linear maps. Set it to 0.")
    child.requires_grad_(False)
    is_transposed = all(isinstance(layers.get_submodule(name), Conv1D) for name in names)
    settings = LoraConfig(r=rank, lora_alpha=_SCALE * rank, target_modules=names, fan_in_fan_out=is_transposed)
    with torch.random.fork_rng(devices=[]), _with_shapes(layers, names, device):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, layers)
    for parameter in child.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def _with_shapes(model: nn.Module, names: list[str], device: torch.device) -> Iterator[None]:
    """While open, weights on the meta device are zeros that take no memory: PEFT puts adapters where weights are."""
    modules: list[Any] = [model.get_submodule(name) for name in names]
    weights = [module.weight for module in modules]
    for module, weight in zip(modules, weights, strict=True):
        if weight.is_meta:
            zeros = torch.zeros((), dtype=weight.dtype, device=device).expand(weight.shape)
            module.weight = nn.Parameter(zeros, requires_grad=False)
    try:
        yield
    finally:
        for module, weight in zip(modules, weights, strict=True):
            module.weight = weight


def has_adapters(model: nn.Module) -> bool:
    """Whether :func:`add_adapters` was called for the model."""
    return any(hasattr(module, "lora_A") for module in model.modules())


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> None:
    """Add what the adapters add to the weights, in float32, and remove the adapters."""
    for name, module in _adapted(model).items():
        module.float().merge()
        model.set_submodule(name, module.get_base_layer())


@torch.no_grad()
def merge_on_disk(
    model: PreTrainedModel, stream: WeightStream, dtype: torch.dtype, near: Path
) -> dict[str, torch.Tensor]:
    """Remove the adapters of a model on the disk; its ``state_dict()`` with what they add.

    No tensor of the result takes memory that the system cannot have back: they are mapped from files, those that
    changed from files without a name.

    Args:
        model: The model.
        stream: Reads its weights.
        dtype: dtype of what changed, as the checkpoint has it.
        near: A folder on the disk that has room for what changed.
    """
    stream.release()
    merged: dict[str, torch.Tensor] = {}
    near.mkdir(parents=True, exist_ok=True)
    with temporary_folder(near, "merged") as folder:
        for name, module in _adapted(model).items():
            of_module = f"{name}.weight"
            whole = stream.files.read(of_module, stream.device).float()
            whole += module.float().get_delta_weight("default")
            merged[of_module] = in_unnamed_file(whole, dtype, folder / f"{len(merged)}")
            model.set_submodule(name, module.get_base_layer())
    state: dict[str, torch.Tensor] = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_meta:
            state[name] = merged[name] if name in merged else stream.files.view(name)
    return state | {name: state[source] for name, source in upstream.tied_in(model).items() if name in state}


def _adapted(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
