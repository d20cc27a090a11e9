"""GPTQ: round the columns of a matrix one after another, and let those that are left make up for the error.

With ``H`` the second moments of the inputs, the error of the outputs is ``tr((Q - W) H (Q - W)^T)``. If column ``j`` is
rounded to ``q``, the best change of the columns after it is ``-(w_j - q) / U_jj * U_j,j+1:``, where ``U`` is the upper
Cholesky factor of the inverse of ``H``, and this raises the error by ``((w_j - q) / U_jj)^2``.

Source: Frantar et al., GPTQ, https://arxiv.org/abs/2210.17323, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layersmith.quantization.formats import Format
from layersmith.quantization.rounding import Grid, Quantized, fit, shared_scales

# Columns between two updates of all columns to the right.
_PANEL = 128


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
    return gptq_quantize(weight, second_moment, format, damping=damping).values()


@torch.no_grad()
def gptq_quantize(weight: Tensor, second_moment: Tensor, format: Format, *, damping: float = 0.01) -> Quantized:
    """Like :func:`gptq`; returns levels and scales, which can be stored.

    The scales of a block of columns are fitted when its turn comes, to the weights as changed by then; those of whole
    channels or tensors before. Each column counts in it as in the error above.
    """
    factor = inverse_factor(second_moment, damping)
    importance = factor.diagonal() ** -2
    rest = weight.float().clone()
    shared = shared_scales(rest, format)
    blocks = isinstance(format.group, int)
    width, size = rest.shape[1], format.block if blocks else rest.shape[1]
    grids = [] if blocks else [fit(rest, format, importance=importance, shared=shared)]
    levels, panel = torch.empty_like(rest), max(_PANEL, format.block)
    for start in range(0, width, panel):
        end = min(start + panel, width)
        errors = torch.empty_like(rest[:, start:end])
        for j in range(start, end):
            if j % size == 0 and blocks:
                columns = slice(j, j + size)
                grids.append(fit(rest[:, columns], format, importance=importance[columns], shared=shared))
            group = (j % size) // format.group if isinstance(format.group, int) else 0
            column = rest[:, j : j + 1]
            levels[:, j : j + 1] = grids[-1].levels(column, group)
            errors[:, j - start] = (column - grids[-1].values(levels[:, j : j + 1], group))[:, 0] / factor[j, j]
            rest[:, j + 1 : end] -= errors[:, j - start, None] * factor[j, j + 1 : end]
        rest[:, end:] -= errors @ factor[start:end, end:]
    return Quantized(_joined(grids), levels.bfloat16())


def inverse_factor(second_moment: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of a second moment ``[in, in]``, in float32.

    Inputs that are always zero count as if they were not correlated with others.
    """
    moment = second_moment.double().clone()
    diagonal = moment.diagonal()
    mean = float(diagonal.mean())
    diagonal.add_(damping * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _joined(grids: list[Grid]) -> Grid:
    """The grid of all columns."""
    first = grids[0]
    stored = {
        name: part if name == "global_scale" else torch.cat([grid.stored[name] for grid in grids], 1)
        for name, part in first.stored.items()
    }
    offset = None if first.offset is None else torch.cat([g.offset for g in grids if g.offset is not None], 1)
    return Grid(first.format, torch.cat([grid.scale for grid in grids], 1), offset, stored)
