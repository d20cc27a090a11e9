"""Ranks channels and heads by importance.

With the error of :mod:`layersmith.library.statistics`, removing the set S of channels costs the sum over S x S of
M_ij = (w_i . w_j) C_ij. Heads are blocks of channels, so their M is the same with blocks summed.

Source: channel contribution is arXiv 2411.19146, appendix; here it is squared and includes the interactions of
channels that are removed together.
"""

from __future__ import annotations

import torch

from layersmith.library.axes.axis import HeadsAxis, HeadSizeAxis

# In float64, which takes twice the memory of the weight or more.
_ROWS_AT_ONCE = 256
# Columns of a product that a GPU has in memory at once.
_COLUMNS_AT_ONCE = 1024


def as_matrix(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """A weight as ``[outputs, inputs]``, where ``dim`` counts inputs; of a stack of matrices, all outputs."""
    return weight.detach().movedim(dim, -1).flatten(0, -2)


def channel_costs(weight: torch.Tensor, moment: torch.Tensor, unit: int = 1) -> torch.Tensor:
    """M for the input channels of a projection.

    Args:
        weight: ``[D, F]``, outputs by inputs.
        moment: ``[F, F]``, E[a a^T]; or ``[F]``, its diagonal.
        unit: Number of consecutive channels that form one head; 1 for channels of an FFN.

    Returns:
        ``[F / unit, F / unit]`` in float64, or ``[F]`` if only the diagonal is known.
    """
    if moment.ndim == 1:
        squares = torch.zeros(weight.shape[1], dtype=torch.float64)
        for rows in weight.split(_ROWS_AT_ONCE):
            squares += rows.double().square().sum(0).cpu()
        return squares * moment.double().cpu()
    costs = _inner_products(weight.double()).mul_(moment.cpu())
    if unit > 1:
        heads = costs.shape[0] // unit
        costs = costs.view(heads, unit, heads, unit).sum((1, 3))
    return costs


def _inner_products(weight: torch.Tensor) -> torch.Tensor:
    """W^T W, ``[F, F]`` on the CPU; a GPU multiplies some columns at a time, as it may not have memory for all."""
    if weight.device.type == "cpu":
        return weight.T @ weight
    return _by_columns(weight)


def _by_columns(weight: torch.Tensor) -> torch.Tensor:
    size = weight.shape[1]
    result = torch.empty(size, size, dtype=weight.dtype)
    for start in range(0, size, _COLUMNS_AT_ONCE):
        columns = slice(start, start + _COLUMNS_AT_ONCE)
        result[:, columns] = (weight.T @ weight[:, columns]).cpu()
    return result


def by_contribution(costs: torch.Tensor) -> torch.Tensor:
    """Channels from the one whose removal alone costs most to the one whose removal costs least."""
    alone = costs if costs.ndim == 1 else costs.diagonal()
    return by_cost(alone)


def by_cost(costs: torch.Tensor) -> torch.Tensor:
    """The indices along the last dimension, most expensive first."""
    return torch.sort(costs, dim=-1, descending=True, stable=True).indices


def by_iterative_removal(costs: torch.Tensor) -> torch.Tensor:
    """Channels in the reverse of the order in which they are best removed one at a time.

    Each step removes the channel that adds least to the cost of what is removed already: for S removed so far,
    adding j costs M_jj + 2 * sum over i in S of M_ij.
    """
    marginal = costs.diagonal().clone().numpy()
    rows = costs.numpy()
    order = []
    for _ in range(len(marginal)):
        j = int(marginal.argmin())
        order.append(j)
        marginal += 2 * rows[j]
        marginal[j] = float("inf")  # and stays so: it is never removed twice
    return torch.tensor(order[::-1])


def by_method(costs: torch.Tensor, method: str) -> torch.Tensor:
    """By iterative removal where that is requested and all of M is known, else by contribution."""
    if method == "iterative" and costs.ndim == 2:
        return by_iterative_removal(costs.double())
    return by_contribution(costs)


def error_curve(costs: torch.Tensor, order: torch.Tensor, points: int = 32) -> list[tuple[int, float]]:
    """The cost of removing the least important units, as a share of the cost of removing all.

    Args:
        costs: M, ``[n, n]``; or ``[n]``, its diagonal, where units are counted one by one.
        order: ``[n]``, most important first.
        points: Number of points of the curve between its two ends.

    Returns:
        Pairs of the number of units that stay and the share, from all units and 0.0 to no unit and 1.0.
    """
    n = len(order)
    counts = torch.tensor(sorted({round(n * p / (points + 1)) for p in range(points + 2)}))
    # Units that go between two points are summed first: that reads M once, in its order.
    part, number = torch.empty(n, dtype=torch.int64), len(counts) - 1
    part[order.flip(0)] = torch.searchsorted(counts, torch.arange(n), right=True) - 1
    if costs.ndim == 1:
        steps = costs.new_zeros(number, dtype=torch.float64).index_add_(0, part, costs.double())
        total = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    else:
        rows = costs.new_zeros(number, n, dtype=torch.float64).index_add_(0, part, costs.double())
        blocks = rows.new_zeros(number, number).index_add_(1, part, rows)
        total = torch.stack([blocks[:k, :k].sum() for k in range(number + 1)])
    share = total / total[-1].clamp_min(torch.finfo(torch.float64).tiny)
    return [(n - k, max(0.0, float(s))) for k, s in zip(counts.tolist(), share, strict=True)]


def within_groups(costs: torch.Tensor, groups: int) -> torch.Tensor:
    """``[groups, units / groups]``: the units of every group of consecutive units, most important first."""
    size = len(costs) // groups
    rows = []
    for g in range(groups):
        members = slice(g * size, (g + 1) * size)
        rows.append(by_iterative_removal(costs[members, members].contiguous()) + g * size)
    return torch.stack(rows)


def head_orders(
    weight: torch.Tensor, heads: HeadsAxis, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KV heads and the query heads of each group, both most important first, and the costs of KV heads.

    Args:
        weight: ``[D, F]``, outputs by inputs of the reader.
        heads: The axis.
        moment: ``[F, F]``, E[a a^T]; ``[blocks * F, blocks * F]`` for a block-diagonal reader.
    """
    width = weight.shape[1]
    # The blocks compute different outputs, so heads of different blocks do not interact.
    costs = torch.block_diag(
        *(
            channel_costs(rows, moment[at : at + width, at : at + width], width * heads.blocks // heads.num_heads)
            for rows, at in zip(weight.chunk(heads.blocks), range(0, len(moment), width), strict=True)
        )
    )
    group = heads.num_heads // heads.size
    by_kv = costs.view(heads.size, group, heads.size, group).sum((1, 3))
    return by_method(by_kv, "iterative"), within_groups(costs, heads.shares), by_kv


def head_size_order(weight: torch.Tensor, axis: HeadSizeAxis, moment: torch.Tensor) -> torch.Tensor:
    """``[H, P]``: the entries of every head, most important first."""
    costs = channel_costs(weight, moment)
    heads = costs.view(axis.num_heads, axis.size, axis.num_heads, axis.size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    if axis.alike:
        return by_iterative_removal(heads.sum(0)).repeat(axis.num_heads, 1)
    return torch.stack([by_iterative_removal(head.contiguous()) for head in heads])


def least_squares(input_moment: torch.Tensor, output_moment: torch.Tensor, ridge: float = 1e-4) -> torch.Tensor:
    """The map W ``[D, D]`` that minimises E|W x - y|^2 + lambda |W|^2.

    Args:
        input_moment: ``[D, D]``, E[x x^T].
        output_moment: ``[D, D]``, E[x y^T].
        ridge: lambda as a fraction of the mean of E[x_i^2]; it suppresses directions without data.
    """
    A, B = input_moment.double(), output_moment.double()
    strength = ridge * A.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.linalg.solve(A + strength * torch.eye(len(A), dtype=A.dtype), B).T.contiguous()
