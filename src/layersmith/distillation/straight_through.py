"""Quantization-aware training: weights in number formats are rounded in every forward pass.

Gradients pass through the rounding as if it were not there (the straight-through estimator, arXiv 1308.3432). Scales
and offsets of each weight stay those of the quantized child, so that training begins with exactly that child.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from layersmith.quantization.rounding import Rounded


class _OnGrid(nn.Module):
    """Rounds a weight as another one is rounded."""

    def __init__(self, like: Rounded):
        super().__init__()
        self.like = like

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            rounded = self.like.again(weight).values().to(weight.dtype)
        return rounded + (weight - weight.detach())  # exactly the rounded weight, with the gradient of the other


@contextmanager
def rounded_in_forward(model: nn.Module, rounded: Mapping[str, Rounded], device: torch.device) -> Iterator[None]:
    """While open, weights of a model are rounded wherever it reads them; afterwards they are the rounded ones.

    Args:
        model: The model; its parameters are those that are trained.
        rounded: Name of a parameter to its rounded weight, whose scales are used.
        device: Where the model runs.
    """
    likes = {id(model.get_parameter(name)): weight.to(device) for name, weight in rounded.items()}
    holders = [
        (module, name, likes[id(parameter)])
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in likes
    ]
    for module, name, like in holders:
        parametrize.register_parametrization(module, name, _OnGrid(like))
    try:
        yield
    finally:
        for module, name, _ in holders:
            parametrize.remove_parametrizations(module, name)


@torch.no_grad()
def rounded_again(model: nn.Module, rounded: Mapping[str, Rounded]) -> dict[str, Rounded]:
    """The weights of a model after :func:`rounded_in_forward`, as files hold them."""
    cpu = torch.device("cpu")
    return {name: weight.to(cpu).again(model.get_parameter(name).to(cpu)) for name, weight in rounded.items()}
