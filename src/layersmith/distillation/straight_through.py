"""Quantization-aware training: weights in number formats are rounded in every forward pass.

Gradients pass through the rounding as if it were not there (the straight-through estimator, arXiv 1308.3432). Scales
and offsets of each weight stay those of the quantized child, so that training begins with exactly that child.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from layersmith.quantization.rounding import Grid, Quantized


class _OnGrid(nn.Module):
    """Rounds a weight to its grid."""

    def __init__(self, grid: Grid, device: torch.device):
        super().__init__()
        offset = None if grid.offset is None else grid.offset.to(device)
        self.grid = dataclasses.replace(grid, scale=grid.scale.to(device), offset=offset)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            rounded = self.grid.values(self.grid.levels(weight.float())).to(weight.dtype)
        return rounded + (weight - weight.detach())  # exactly the rounded weight, with the gradient of the other


@contextmanager
def rounded_in_forward(model: nn.Module, rounded: Mapping[str, Quantized], device: torch.device) -> Iterator[None]:
    """While open, weights of a model are rounded wherever it reads them; afterwards they are the rounded ones.

    Args:
        model: The model; its parameters are those that are trained.
        rounded: Name of a parameter to its rounded weight, whose grid is used.
        device: Where the model runs.
    """
    grids = {id(model.get_parameter(name)): weight.grid for name, weight in rounded.items()}
    holders = [
        (module, name, grids[id(parameter)])
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in grids
    ]
    for module, name, grid in holders:
        parametrize.register_parametrization(module, name, _OnGrid(grid, device))
    try:
        yield
    finally:
        for module, name, _ in holders:
            parametrize.remove_parametrizations(module, name)


@torch.no_grad()
def rounded_again(model: nn.Module, rounded: Mapping[str, Quantized]) -> dict[str, Quantized]:
    """The weights of a model after :func:`rounded_in_forward`, with the levels that they have now."""
    result = {}
    for name, weight in rounded.items():
        values = model.get_parameter(name).to(weight.grid.scale.device, torch.float32)
        result[name] = Quantized(weight.grid, weight.grid.levels(values).bfloat16())
    return result
