"""Decoder layers on the meta device: all their shapes, no memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from layersmith.block_config import BlockConfig
from layersmith.heterogeneous.build import decoder_layers
from layersmith.heterogeneous.patcher import deci_x_patcher
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.experiment import Shapes
from layersmith.model_descriptor.stock import stock_model


def meta_layers(
    descriptor: type[ModelDescriptor], config: PretrainedConfig, blocks: Sequence[BlockConfig]
) -> list[nn.Module]:
    """Decoder layers of the given blocks on the meta device."""
    with deci_x_patcher(descriptor, list(blocks)):
        model = stock_model(config)
    return decoder_layers(model, descriptor, len(blocks))


def layer_shapes(layer: nn.Module) -> Shapes:
    """Shapes of everything in a layer's ``state_dict``."""
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def input_dim(layer: nn.Module, weight: str) -> int | None:
    """The dimension of a projection's weight that its input has; None if its class does not tell."""
    module = layer.get_submodule(weight.rpartition(".")[0])
    if isinstance(module, nn.Linear):
        return 1
    return 0 if isinstance(module, Conv1D) else None
