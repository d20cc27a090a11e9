"""Scales of input channels that the norm before linear maps holds.

If the weight of a norm is divided by ``s`` and the columns of all linear maps that read it are multiplied by ``s``, the
layer computes the same. With ``s`` larger where inputs are large, rounding errs less in the columns that matter more.

Source: Lin et al., AWQ, https://arxiv.org/abs/2306.00978, section 3.2. Here the exponent is the same for all norms with
scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from layersmith.quantization.formats import Format
from layersmith.quantization.rounding import quantize

# The scale of an input channel is this power of its mean square, a quarter of the power that makes all inputs alike.
# Of none, a quarter, half and three quarters, it has the least error in 56 of the 60 norms of SmolLM2 (docs/log.md).
_EXPONENT = 0.25 / 2
_LARGEST = 1e3
# Weights keep their scale if rounding them to nearest has less than this share of the square error that it has with
# the scales. On SmolLM2 it has 0.8 to 1.6 of it in nine formats, and 0.001 in q4_1, in which its weights were stored.
_MUCH_LESS = 0.5
_MOST_ROWS = 256


@torch.no_grad()
def norm_before(layer: nn.Module, readers: Sequence[str], run: Callable[[], torch.Tensor]) -> str | None:
    """Name of a norm's weight that can hold scales of the input channels of linear maps; None if none can.

    Found by experiment with factors of 2 and 1/2, which are exact in binary. If only the columns of the linear maps
    change by them, the layer returns something else; if a norm's weight changes by the inverse as well, the same. So
    nothing but the linear maps reads that norm.

    Args:
        layer: A decoder layer.
        readers: Names of the weights of all linear maps with the same inputs.
        run: Returns the layer's output for a few tokens.
    """
    width = layer.get_parameter(readers[0]).shape[1]
    is_doubled = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(0)) > 0
    factors = torch.where(is_doubled, 2.0, 0.5)
    of_readers, before = dict.fromkeys(readers, factors), run()
    with _multiplied(layer, of_readers):
        if torch.equal(run(), before):
            return None
    for name, parameter in layer.named_parameters():
        if parameter.shape == (width,):
            with _multiplied(layer, {**of_readers, name: 1 / factors}):
                if torch.equal(run(), before):
                    return name
    return None


@contextmanager
def _multiplied(layer: nn.Module, factors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    parameters = {name: layer.get_parameter(name) for name in factors}
    before = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = before[name] * factors[name].to(before[name])
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def held_scales(norm: torch.Tensor, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a norm's weight becomes, and the scales that it then holds.

    Args:
        norm: ``[in]``, the weight of the norm.
        squares: ``[in]``, the mean squares of its outputs.

    Returns:
        The weight divided by scales, in numbers that bfloat16 holds, and exactly these scales; both float32 ``[in]``.
        Channels whose weight is zero have a scale of 1.
    """
    wanted = squares.float().clamp_min(1e-12) ** _EXPONENT
    wanted = (wanted / wanted.log().mean().exp()).clamp(1 / _LARGEST, _LARGEST)
    divided = (norm.float() / wanted).bfloat16().float()
    is_usable = (norm != 0) & (divided != 0)
    return torch.where(is_usable, divided, norm.float()), torch.where(is_usable, norm.float() / divided, 1.0)


@torch.no_grad()
def scales_help(weight: torch.Tensor, scales: torch.Tensor, squares: torch.Tensor, format: Format) -> bool:
    """Whether scales of the input channels are of use before a matrix is rounded to a format.

    They are not if its weights are near the format's levels already, as those of a model that was quantized before:
    scaled weights are between them.

    Args:
        weight: ``[out, in]``; some of its rows are tried.
        scales: ``[in]``.
        squares: ``[in]``, the mean squares of the inputs.
        format: A format that fits the weight.
    """
    rows = weight[:: -(-len(weight) // _MOST_ROWS)].float()
    errors = []
    for factor in (torch.ones_like(scales), scales):
        scaled, importance = rows * factor, squares.to(scales) / factor**2
        change = quantize(scaled, format, importance=importance).values() - scaled
        errors.append(float((change.square() * importance).sum()))
    without, with_scales = errors
    return without >= _MUCH_LESS * with_scales
