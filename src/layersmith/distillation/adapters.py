"""Low-rank adapters (LoRA) that are trained instead of a child's weights, and merged into them at the end.

The weights stay frozen in the data type of the computation, so training needs no gradients, moments or float32 copies
of them. PEFT makes the adapters.

Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layersmith.errors import UsageError
from layersmith.heterogeneous.build import decoder_layers, num_layers_of
from layersmith.model_descriptor.base import ModelDescriptor

# What adapters add is multiplied by this number: PEFT's alpha over the rank.
_SCALE = 2


def require_peft() -> None:
    """Raises: UsageError: PEFT is not installed."""
    if find_spec("peft") is None:
        raise UsageError(
            "recipe distillation.lora_rank: adapters are trained with PEFT, which is not installed: "
            "pip install 'layersmith[lora]'"
        )


def add_adapters(child: PreTrainedModel, descriptor: type[ModelDescriptor], rank: int, seed: int) -> None:
    """Freeze all weights, and give every linear map in a decoder layer an adapter in float32 that adds nothing yet.

    Args:
        child: The child; changed in place.
        descriptor: Descriptor of its model family.
        rank: Rank of the adapters.
        seed: Seed of their first factor.

    Raises:
        UsageError: PEFT is not installed, or no layer has a linear map.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    layers = decoder_layers(child, descriptor, num_layers_of(child.config, descriptor))
    inside = {id(module) for layer in layers for module in layer.modules() if isinstance(module, nn.Linear | Conv1D)}
    names = [name for name, module in child.named_modules() if id(module) in inside]
    if not names:
        raise UsageError("recipe distillation.lora_rank: the child's layers have no linear maps. Set it to 0.")
    child.requires_grad_(False)
    is_transposed = all(isinstance(child.get_submodule(name), Conv1D) for name in names)
    settings = LoraConfig(r=rank, lora_alpha=_SCALE * rank, target_modules=names, fan_in_fan_out=is_transposed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, child)
    for parameter in child.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def has_adapters(model: nn.Module) -> bool:
    """Whether :func:`add_adapters` was called for the model."""
    return any(hasattr(module, "lora_A") for module in model.modules())


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> None:
    """Add what the adapters add to the weights, in float32, and remove the adapters."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            adapted: Any = module.float()
            adapted.merge()
            model.set_submodule(name, adapted.get_base_layer())
    vars(model).pop("peft_config", None)
