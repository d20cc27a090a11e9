"""GPTQ is what its paper says, and no worse than rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layersmith.quantization.formats import FORMATS
from layersmith.quantization.gptq import Factor, gptq, gptq_quantize, inverse_factor
from layersmith.quantization.rounding import fake_quantize

QUANTIZED = [name for name, row in FORMATS.items() if row.storage != "plain"]


def correlated(width: int, seed: int = 0) -> Tensor:
    """Second moments of inputs with a few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * width, width, generator=generator)
    inputs += 2 * torch.randn(4 * width, 4, generator=generator) @ torch.randn(4, width, generator=generator)
    return inputs.T @ inputs / len(inputs)


def output_error(rounded: Tensor, weight: Tensor, moment: Tensor) -> float:
    difference = (rounded - weight).double()
    return float(((difference @ moment.double()) * difference).sum())


@pytest.mark.parametrize("name", QUANTIZED)
def test_it_changes_outputs_less_than_rounding_to_nearest(name: str) -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    moment = correlated(256)
    by_gptq = output_error(gptq(weight, moment, FORMATS[name]), weight, moment)
    assert by_gptq < 0.75 * output_error(fake_quantize(weight, FORMATS[name]), weight, moment)


@pytest.mark.parametrize("name", QUANTIZED)
def test_uncorrelated_inputs_of_equal_size_leave_rounding_to_nearest(name: str) -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(gptq(weight, torch.eye(256), FORMATS[name]), fake_quantize(weight, FORMATS[name]))


def test_it_is_greedy_optimal_brain_surgery() -> None:
    """Each column is rounded, and the columns after it are set to the minimum of the error: solved afresh each time."""
    form, width = FORMATS["fp8-channel"], 300  # more columns than a panel
    weight = torch.randn(5, width, generator=torch.Generator().manual_seed(3)).double()
    moment = correlated(width).double()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(width)
    factor = inverse_factor(moment)
    result = gptq_quantize(weight.float(), factor, form)
    order = factor.order
    assert order.tolist() == moment.diagonal().argsort(descending=True).tolist()  # no group has several columns
    rest, damped, levels = weight[:, order], damped[order][:, order], torch.empty(5, width)
    for j in range(width):
        levels[:, j : j + 1] = result.grid.levels(rest[:, j : j + 1].float())
        error = rest[:, j : j + 1] - result.grid.values(levels[:, j : j + 1])
        rest[:, j + 1 :] += error * torch.linalg.solve(damped[j + 1 :, j + 1 :], damped[j + 1 :, j])
    # A weight that lies between two levels may be rounded either way.
    assert (levels == result.levels[:, order]).double().mean() > 0.99


def test_columns_with_large_inputs_come_first_within_groups_and_groups_stay_together() -> None:
    squares = torch.randn(192, generator=torch.Generator().manual_seed(5)).square()
    order = inverse_factor(torch.diag(squares)).order
    assert sorted(order.tolist()) == list(range(192))
    for size in (64, 32, 16):
        groups = (order // size).view(-1, size)
        assert (groups == groups[:, :1]).all()
        of_group = squares.view(-1, size).mean(1)[groups[:, 0]]
        together = of_group.view(-1, 2) if size < 64 else of_group[None]  # in the next larger group, or at all
        assert (together.diff(dim=1) <= 0).all()
    assert (squares[order].view(-1, 16).diff(dim=1) <= 0).all()


def test_the_order_lowers_the_error_where_inputs_differ_in_size() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(6))
    size = torch.exp(torch.randn(256, generator=torch.Generator().manual_seed(7)))
    moment = correlated(256) * torch.outer(size, size)
    factor = inverse_factor(moment)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(256)
    in_turn = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True).float()
    for name in ("int4-g32", "int8", "q4_k"):
        ordered, plain = (
            gptq_quantize(weight, f, FORMATS[name]).values() for f in (factor, Factor(torch.arange(256), in_turn))
        )
        assert output_error(ordered, weight, moment) < 0.97 * output_error(plain, weight, moment)


def test_inputs_that_are_always_zero() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    moment = correlated(64)
    moment[7] = moment[:, 7] = 0
    assert gptq(weight, moment, FORMATS["int4-g32"]).isfinite().all()
    assert gptq(weight, torch.zeros(64, 64), FORMATS["int4-g32"]).isfinite().all()
