"""Rounding: near the best that any scale gives, by importance, and harmless where there is nothing to round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layersmith.errors import UsageError
from layersmith.quantization.formats import FORMATS
from layersmith.quantization.rounding import fake_quantize, fit

QUANTIZED = [name for name, row in FORMATS.items() if row.storage != "plain"]
# Root mean square error of normal weights, relative to their size, that no format with this number of bits exceeds.
LARGEST_ERROR = {8: 0.03, 6: 0.02, 5: 0.045, 4: 0.12, 3: 0.21, 2: 0.3}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", QUANTIZED)
def test_errors_of_normal_weights(name: str) -> None:
    weight = normal(16, 768) * 0.02
    error = (fake_quantize(weight, FORMATS[name]) - weight).square().mean().sqrt() / weight.std()
    assert error < LARGEST_ERROR[FORMATS[name].bits]


@pytest.mark.parametrize("name", QUANTIZED)
def test_importance_lowers_the_error_that_it_weighs(name: str) -> None:
    weight, importance = normal(16, 768), torch.rand(768, generator=torch.Generator().manual_seed(1)) ** 4

    def error(rounded: Tensor) -> float:
        return float(((rounded - weight).square() * importance).sum())

    form = FORMATS[name]
    assert error(fake_quantize(weight, form, importance=importance)) <= error(fake_quantize(weight, form)) * 1.0001


@pytest.mark.parametrize(("name", "most"), [("int4-g32", 1.03), ("q4_0", 1.03), ("int3-g32", 1.06)])
def test_scales_are_nearly_the_best_of_all(name: str, most: float) -> None:
    """All scales that the file can hold are tried on groups, one by one."""
    form, groups = FORMATS[name], normal(24, 32, seed=2)
    dtype = torch.float16 if form.storage == "gguf" else torch.bfloat16
    largest = groups.abs().amax(1, keepdim=True)
    scales = (torch.linspace(0.3, 1.3, 3000) * largest / 2 ** (form.bits - 1)).to(dtype).float()
    scales = torch.cat([scales, -scales], 1) if form.storage == "gguf" else scales
    low, high = -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1
    tried = (groups[:, None] / scales[..., None]).round().clamp(low, high) * scales[..., None]
    best = (tried - groups[:, None]).square().sum(-1).amin(1).sum()
    assert (fake_quantize(groups, form) - groups).square().sum() <= most * best


@pytest.mark.parametrize("name", QUANTIZED)
def test_rounded_weights_are_rounded_to_themselves(name: str) -> None:
    form, weight = FORMATS[name], normal(4, 512, seed=3)
    grid = fit(weight, form)
    rounded = grid.values(grid.levels(weight))
    torch.testing.assert_close(grid.values(grid.levels(rounded)), rounded, rtol=0, atol=0)


@pytest.mark.parametrize("name", QUANTIZED)
def test_zeros_stay_zeros_and_experts_are_rounded_one_by_one(name: str) -> None:
    weight = normal(3, 4, 256, seed=4)
    weight[1] = 0
    rounded = fake_quantize(weight, FORMATS[name])
    assert torch.equal(rounded[1], weight[1])
    assert torch.equal(rounded[2], fake_quantize(weight[2], FORMATS[name]))


def test_refusals() -> None:
    with pytest.raises(UsageError, match="32 do not divide 40"):
        fake_quantize(normal(2, 40), FORMATS["q8_0"])
    with pytest.raises(UsageError, match="bf16 has no scales"):
        fit(normal(2, 32), FORMATS["bf16"])
