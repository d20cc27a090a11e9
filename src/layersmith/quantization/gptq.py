"""GPTQ: round the columns of a matrix one after another, and let those that are left make up for the error.

With ``H`` the second moments of the inputs, the error of the outputs is ``tr((Q - W) H (Q - W)^T)``. If column ``j`` is
rounded to ``q``, the best change of the columns after it is ``-(w_j - q) / U_jj * U_j,j+1:``, where ``U`` is the upper
Cholesky factor of the inverse of ``H``, and this raises the error by ``((w_j - q) / U_jj)^2``.

Columns with large inputs are rounded first, while many columns are left. Columns that share a scale stay together:
their groups are sorted by the mean square of the inputs, and the columns within each group.

Source: Frantar et al., GPTQ, https://arxiv.org/abs/2210.17323, algorithm 1, with the order that its authors' code calls
``act-order``, here within groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layersmith.quantization.formats import Format
from layersmith.quantization.rounding import Grid, Quantized, closest, fit, inverse_scale, shared_scales

# Columns between two updates of all columns to the right.
_PANEL = 128
# Columns that share a scale in some format.
_GROUPS = (1, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of the second moment of inputs.

    Attributes:
        order: ``[in]``, the columns in the order in which they are rounded.
        upper: ``[in, in]`` float32, the upper Cholesky factor of the inverse of the second moment in that order.
    """

    order: Tensor
    upper: Tensor

    def scaled(self, scales: Tensor) -> Factor:
        """The factor for inputs divided by ``scales`` ``[in]``."""
        return Factor(self.order, self.upper * scales[self.order])


def gptq(weight: Tensor, second_moment: Tensor, format: Format, *, damping: float = 0.01) -> Tensor:
    """Round a matrix so that its outputs change little.

    Args:
        weight: ``[out, in]``.
        second_moment: Mean or sum of ``x x^T`` over the inputs, ``[in, in]``.
        format: Any format of the table.
        damping: Added to the diagonal of the second moment, as a part of its mean.

    Returns:
        The rounded weight in float32, as a program that reads the format computes it.

    Raises:
        UsageError: The shape cannot have this format.
    """
    if format.storage == "plain":
        return weight.bfloat16().float()
    return gptq_quantize(weight, inverse_factor(second_moment, damping), format).values()


@torch.no_grad()
def gptq_quantize(weight: Tensor, factor: Factor, format: Format) -> Quantized:
    """Like :func:`gptq`, from what :func:`inverse_factor` returns; gives levels and scales, which can be stored.

    The scales of a block of columns are fitted when its turn comes, to the weights as changed by then; those of whole
    channels or tensors before. Each column counts in it as in the error above.
    """
    order, upper = factor.order, factor.upper
    importance = upper.diagonal() ** -2
    rest = weight.float().T[order].contiguous()  # [in, out]: columns are contiguous
    shared, width = shared_scales(weight, format), len(rest)
    size, panel = format.block if isinstance(format.group, int) else width, max(_PANEL, format.block)
    grids: dict[int, Grid] = {}
    levels, errors = torch.empty_like(rest), torch.empty_like(rest)
    for start in range(0, width, panel):
        end = min(start + panel, width)
        for first in range(start, end, min(size, panel)):
            last = min(first + size, end)
            block = int(order[first]) // size
            if block not in grids:
                columns = order[first : first + size].argsort() + first
                grids[block] = fit(rest[columns].T.contiguous(), format, importance=importance[columns], shared=shared)
            scale, offset = grids[block].by_column(order[first:last] % size)
            inverse = inverse_scale(scale)
            for k, j in enumerate(range(first, last)):
                shifted = rest[j] if offset is None else rest[j] - offset[k]
                level = closest(shifted * inverse[k], format)
                levels[j], errors[j] = level, (shifted - level * scale[k]) / upper[j, j]
                rest[j + 1 : end].addr_(upper[j, j + 1 : end], errors[j], alpha=-1)
        rest[end:].addmm_(upper[start:end, end:].T, errors[start:end], alpha=-1)
    levels = torch.empty_like(levels).index_copy_(0, order, levels)
    return Quantized(_joined([grids[block] for block in sorted(grids)]), levels.bfloat16().T.contiguous())


@torch.no_grad()
def inverse_factor(second_moment: Tensor, damping: float = 0.01) -> Factor:
    """The factor of a second moment ``[in, in]``.

    Inputs that are always zero count as if they were not correlated with others.
    """
    moment = second_moment.double()
    order = _order(moment.diagonal())
    moment = moment[order][:, order]
    diagonal = moment.diagonal()
    mean = float(diagonal.mean())
    diagonal.add_(damping * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    return Factor(order, torch.linalg.cholesky(inverse, upper=True).float())


def _order(squares: Tensor) -> Tensor:
    """Columns by mean square, largest first, where each aligned group of 16, 32, ... 256 stays together."""
    order = torch.arange(len(squares), device=squares.device)
    for size in _GROUPS:
        if len(squares) % size == 0:
            place = squares.view(-1, size).mean(1).argsort(descending=True, stable=True).argsort()
            order = order[place.repeat_interleave(size)[order].argsort(stable=True)]
    return order


def _joined(grids: list[Grid]) -> Grid:
    """The grid of all columns."""
    first = grids[0]
    stored = {
        name: part if name == "global_scale" else torch.cat([grid.stored[name] for grid in grids], 1)
        for name, part in first.stored.items()
    }
    offset = None if first.offset is None else torch.cat([g.offset for g in grids if g.offset is not None], 1)
    return Grid(first.format, torch.cat([grid.scale for grid in grids], 1), offset, stored)
