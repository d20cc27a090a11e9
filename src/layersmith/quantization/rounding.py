"""Round weights to a number format, with the scales that minimize the squared error.

A value of a format is ``scale * level + offset``. Scales and offsets belong to groups of input channels and are
themselves rounded to what the file holds. Each group's are chosen among several starts, each followed by least squares:
with the levels ``q`` of the weights ``x`` fixed and ``h`` the importance of each input channel, the best scale is
``sum(h x q) / sum(h q^2)``, or the solution of the 2 x 2 normal equations where there is an offset.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from layersmith.errors import UsageError
from layersmith.quantization.formats import Format

E2M1 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# NVFP4's scale of scales. One for all tensors where they allow it, since vLLM uses one for all parts of a fused matrix;
# 256 keeps the scales of weights between 4e-4 and 10 in E4M3's normal range.
NVFP4_GLOBAL_SCALE = 256.0
# Weights that are rounded at once, so that what is computed of them stays in the processor's cache.
_CHUNK = 1 << 17
# Largest codes of the scales that k-quants quantize, by the format's bits of a scale.
_K_LEVELS = {4: 15, 6: 63}

Represent = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Grid:
    """The values that the weights of a matrix, or of some of its columns, can have.

    Attributes:
        format: The number format.
        scale: ``[rows, groups]`` in float32; ``[1, 1]`` where the whole matrix has one.
        offset: Of the same shape, or None.
        stored: What the file holds of them where that is not the scale itself: ``scale_codes`` and ``offset_codes``
            ``[rows, groups]``, ``block_scale`` and ``block_offset`` ``[rows, blocks]`` of k-quants, ``global_scale``
            ``[1]`` of NVFP4, ``zeros`` ``[rows, groups]`` of integers.
    """

    format: Format
    scale: Tensor
    offset: Tensor | None
    stored: dict[str, Tensor]

    def levels(self, weight: Tensor) -> Tensor:
        """The nearest level of each weight ``[rows, columns]`` in float32."""
        return nearest(weight, *self._of_columns(self._all_columns(weight)), self.format)

    def values(self, levels: Tensor) -> Tensor:
        """The weights of levels ``[rows, columns]``, in float32."""
        scale, offset = self._of_columns(self._all_columns(levels))
        return levels * scale if offset is None else levels * scale + offset

    def _all_columns(self, weight: Tensor) -> Tensor:
        return torch.arange(weight.shape[-1], device=self.scale.device)

    def by_column(self, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and offset of the weights in some columns: ``[columns, rows]``, or ``[columns, 1]``."""
        scale, offset = self._of_columns(columns)
        shape = len(columns), len(scale)
        return scale.T.expand(shape).contiguous(), None if offset is None else offset.T.expand(shape).contiguous()

    def _of_columns(self, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        size = self.format.group
        if not isinstance(size, int):
            return self.scale, self.offset
        index = columns // size
        return self.scale[:, index], None if self.offset is None else self.offset[:, index]


@dataclass(frozen=True)
class Quantized:
    """A rounded matrix.

    Attributes:
        grid: The values that its weights can have.
        levels: ``[rows, columns]``, which of them each weight has; in bfloat16, which holds the levels of all formats.
    """

    grid: Grid
    levels: Tensor

    @property
    def format(self) -> Format:
        """The number format."""
        return self.grid.format

    def values(self) -> Tensor:
        """The weights in float32."""
        return self.grid.values(self.levels.float())

    def rows(self, rows: Tensor | slice) -> Quantized:
        """Some rows of the matrix. Not for formats in which other rows would change the scale of the whole matrix."""
        grid = self.grid
        if grid.format.group == "tensor":
            return Quantized(grid, self.levels[rows])
        stored = {name: part if name == "global_scale" else part[rows] for name, part in grid.stored.items()}
        offset = None if grid.offset is None else grid.offset[rows]
        return Quantized(Grid(grid.format, grid.scale[rows], offset, stored), self.levels[rows])

    def split(self, sizes: Sequence[int]) -> list[Quantized]:
        """Matrices of ``sizes`` rows that were rounded as one, below each other."""
        starts = [0, *itertools.accumulate(sizes)]
        return [self.rows(slice(start, start + size)) for start, size in zip(starts, sizes, strict=False)]

    def again(self, weight: Tensor) -> Quantized:
        """Another weight with the same scales and offsets."""
        return Quantized(self.grid, self.grid.levels(weight.float()).bfloat16())

    def to(self, device: torch.device) -> Quantized:
        """The same on a device; what only files need stays where it is."""
        grid = self.grid
        offset = None if grid.offset is None else grid.offset.to(device)
        return Quantized(Grid(grid.format, grid.scale.to(device), offset, grid.stored), self.levels.to(device))


@dataclass(frozen=True)
class QuantizedStack:
    """Rounded matrices of equal shape, all in one format.

    Attributes:
        members: The matrices.
    """

    members: tuple[Quantized, ...]

    @property
    def format(self) -> Format:
        """The number format."""
        return self.members[0].format

    def values(self) -> Tensor:
        """The weights ``[E, out, in]`` in float32."""
        return torch.stack([member.values() for member in self.members])

    def again(self, weight: Tensor) -> QuantizedStack:
        """Another weight with the same scales and offsets."""
        return QuantizedStack(tuple(m.again(matrix) for m, matrix in zip(self.members, weight, strict=True)))

    def to(self, device: torch.device) -> QuantizedStack:
        """The same on a device."""
        return QuantizedStack(tuple(member.to(device) for member in self.members))


Rounded = Quantized | QuantizedStack


def fake_quantize(weight: Tensor, format: Format, *, importance: Tensor | None = None) -> Tensor:
    """Round to nearest, with scales that minimize ``sum(importance * (rounded - weight)^2)``.

    Args:
        weight: ``[..., out, in]``.
        format: A number format.
        importance: How much the error of each input channel matters, ``[in]``, e.g. the mean square of what it is
            multiplied by. Default: all alike.

    Returns:
        The rounded weight in float32, as a program that reads the format computes it.

    Raises:
        UsageError: The shape cannot have this format.
    """
    if weight.ndim > 2 and format.storage != "plain":
        return torch.stack([fake_quantize(matrix, format, importance=importance) for matrix in weight])
    if format.storage == "plain":
        return weight.bfloat16().float()
    return quantize(weight, format, importance=importance).values()


@torch.no_grad()
def quantize(weight: Tensor, format: Format, *, importance: Tensor | None = None) -> Quantized:
    """Like :func:`fake_quantize` for a matrix ``[out, in]``; returns levels and scales, which can be stored."""
    grid = fit(weight, format, importance=importance)
    return Quantized(grid, grid.levels(weight.float()).bfloat16())


@torch.no_grad()
def fit(
    weight: Tensor, format: Format, *, importance: Tensor | None = None, shared: dict[str, Tensor] | None = None
) -> Grid:
    """The scales and offsets of a matrix, or of some of its blocks of columns, that round it best.

    Args:
        weight: ``[out, columns]``.
        format: A number format that is not ``bf16``.
        importance: ``[columns]``.
        shared: What :func:`shared_scales` returns for the whole matrix. Default: computed from ``weight``.

    Raises:
        UsageError: The shape cannot have this format.
    """
    if reason := format.refusal(weight.shape):
        raise UsageError(f"{reason}.")
    if format.storage == "plain":
        raise UsageError(f"{format.name} has no scales.")
    stored = shared_scales(weight, format) if shared is None else shared
    if format.group == "tensor":
        everything = weight.float().reshape(1, 1, -1)
        weights = None if importance is None else importance.float().expand(weight.shape).reshape(1, 1, -1)
        return _grids(format, [_fit_groups(everything, weights, format, stored)], stored)
    size = format.group if isinstance(format.group, int) else weight.shape[1]
    weights = None if importance is None else importance.float().reshape(1, -1, size)
    fit_rows = _fit_blocks if format.block_bits else _fit_groups
    parts = [fit_rows(rows.float().unflatten(1, (-1, size)), weights, format, stored) for rows in _chunks(weight)]
    return _grids(format, parts, stored)


def shared_scales(weight: Tensor, format: Format) -> dict[str, Tensor]:
    """What all groups of a matrix share: NVFP4's scale of scales."""
    if format.name != "nvfp4":
        return {}
    largest_scale = max(float(weight.abs().max()) / 6, 1e-30)
    scale = min(NVFP4_GLOBAL_SCALE, 2.0 ** math.floor(math.log2(448 / largest_scale)))
    return {"global_scale": torch.tensor([scale], device=weight.device)}


def nearest(x: Tensor, scale: Tensor, offset: Tensor | None, format: Format) -> Tensor:
    """The levels nearest to weights; where the scale is zero, the level of zero."""
    inverse = inverse_scale(scale)
    return closest(x * inverse if offset is None else (x - offset) * inverse, format)


def inverse_scale(scale: Tensor) -> Tensor:
    """The inverse of scales; 0 for a scale of zero."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def closest(scaled: Tensor, format: Format) -> Tensor:
    """The levels nearest to weights in units of their scale, which may be overwritten."""
    if format.levels in ("signed", "unsigned"):
        return scaled.round_().clamp_(*integer_range(format))
    if format.levels == "e4m3":
        return scaled.clamp_(-448, 448).to(torch.float8_e4m3fn).float()
    cells, first, table = _lookup(format.levels)
    index = scaled.mul_(cells).floor_().clamp_(first, first + len(table) - 1).sub_(first).to(torch.int32)
    return table.to(scaled.device)[index]


@functools.cache
def _lookup(levels: str) -> tuple[int, int, Tensor]:
    """Cells of equal width, none of which has the midpoint of two levels inside.

    Returns:
        Cells in a unit, the number of the first, and the level of each.
    """
    sorted_levels, cells = (E2M1, 4) if levels == "e2m1" else (IQ4_NL, 2)
    first, last = (round(level * cells) for level in (sorted_levels[0], sorted_levels[-1]))
    table = torch.tensor(sorted_levels, dtype=torch.float32)
    centers = (torch.arange(first, last + 1) + 0.5) / cells
    return cells, first, table[torch.bucketize(centers, (table[1:] + table[:-1]) / 2)]


def integer_range(format: Format) -> tuple[int, int]:
    """Smallest and largest integer level."""
    if format.levels == "unsigned" or format.zero_bits:
        return 0, 2**format.bits - 1
    # Q8_0's smallest is not -128: some kernels of llama.cpp negate it in 8 bits.
    return (-127 if format.name == "q8_0" else -(2 ** (format.bits - 1))), 2 ** (format.bits - 1) - 1


# ------------------------------------------------------------------------------------------- of groups


def _chunks(weight: Tensor) -> Iterator[Tensor]:
    return iter(weight.split(max(1, _CHUNK // weight.shape[1])))


def _grids(format: Format, parts: Sequence[dict[str, Tensor]], stored: dict[str, Tensor]) -> Grid:
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    scale, offset = whole.pop("scale"), whole.pop("offset", None)
    return Grid(format, scale, offset, {**whole, **stored})


def _fit_groups(x: Tensor, h: Tensor | None, format: Format, shared: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scales of groups ``x`` ``[rows, groups, size]``, each as the file holds it."""
    represent = partial(_represent, format, shared.get("global_scale"))
    scale, offset = _search(x, h, format, represent)
    out = {"scale": scale[..., 0]}
    if offset is not None:
        out["offset"] = offset[..., 0]
        if format.levels == "signed":
            out["zeros"] = torch.where(scale == 0, 0.0, -offset / scale).round()[..., 0]
    return out


def _represent(
    format: Format, global_scale: Tensor | None, scale: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The nearest scale and offset that the file can hold."""
    if format.levels == "e2m1":
        if global_scale is None:  # a power of two
            return torch.exp2(scale.clamp_min(2.0**-126).log2().round()), None
        return (scale * global_scale).clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float() / global_scale, None
    dtype = torch.float16 if format.storage == "gguf" else torch.bfloat16
    scale = scale.to(dtype).float()
    if offset is not None and format.levels == "signed":  # an integer zero point, among the levels
        inverse = inverse_scale(scale)
        return scale, -(-offset * inverse).round_().clamp_(*integer_range(format)) * scale
    return scale, None if offset is None else offset.to(dtype).float()


def _free(scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """For k-quants, whose scales are rounded later: any scale, and offsets that are not positive."""
    return scale, None if offset is None else offset.clamp_max(0)


def _search(x: Tensor, h: Tensor | None, format: Format, represent: Represent) -> tuple[Tensor, Tensor | None]:
    """The best scale and offset ``[..., 1]`` of each group ``x`` ``[..., size]``."""
    best: tuple[Tensor, Tensor | None] | None = None
    least = torch.empty(0)
    for start in _starts(x, format):
        scale, offset = represent(*start)
        if format.levels in ("signed", "unsigned"):
            levels = nearest(x, scale, offset, format)
            scale, offset = represent(*_least_squares(x, h, levels, offset is not None))
        error = _error(x, h, scale, offset, format)
        if best is None:
            best, least = (scale, offset), error
        else:
            best, least = _better(best, least, (scale, offset), error)
    assert best is not None
    for _ in range(2):
        scale, offset = represent(*_least_squares(x, h, nearest(x, *best, format), best[1] is not None))
        best, least = _better(best, least, (scale, offset), _error(x, h, scale, offset, format))
    return best


def _better(
    old: tuple[Tensor, Tensor | None], least: Tensor, new: tuple[Tensor, Tensor | None], error: Tensor
) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
    take = error < least
    offset = None if old[1] is None or new[1] is None else torch.where(take, new[1], old[1])
    return (torch.where(take, new[0], old[0]), offset), torch.where(take, error, least)


def _error(x: Tensor, h: Tensor | None, scale: Tensor, offset: Tensor | None, format: Format) -> Tensor:
    """Squared error of each group, ``[..., 1]``."""
    error = nearest(x, scale, offset, format).mul_(scale)
    error = (error if offset is None else error.add_(offset)).sub_(x).square_()
    return (error if h is None else error.mul_(h)).sum(-1, keepdim=True)


def _starts(x: Tensor, format: Format) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scales, and offsets, from which the search starts: the range of the group, and parts of it.

    At 8 bits there is nothing to win by clipping; at 4 bits and fewer the largest weights are often worth clipping.
    """
    if format.levels == "unsigned" or format.zero_bits:
        low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True)
        if format.name in ("q4_1", "q5_1"):
            low = x.amin(-1, keepdim=True)
        if format.levels == "signed":
            high = high.clamp_min(0)  # zero is one of the values
        for part in (1.0, 0.9, 0.8, 0.7) if format.bits > 2 else (1.0, 0.85, 0.7, 0.6, 0.5):
            yield (high - low) * (part / (2**format.bits - 1)), low * part
        return
    largest, where = x.abs().max(-1, keepdim=True)
    if (
        format.storage == "gguf" and format.name != "q8_0"
    ):  # its scales can be negative: the largest has the lowest level
        largest = -x.gather(-1, where)
    parts, most = {
        "e4m3": ((1.0, 0.95, 0.9), 448.0),
        "e2m1": ((1.0, 0.75, 0.85, 1.25, 1.5), 6.0),
        "iq4_nl": ((1.0, 0.92, 0.84, 0.76), 127.0),
    }.get(format.levels, (_INTEGER_PARTS[format.bits], 2.0 ** (format.bits - 1)))
    for part in parts:
        yield largest * (part / most), None


# Parts of the range, where 1 gives the largest weight the lowest of the levels, one more than the highest.
_INTEGER_PARTS = {
    8: (1.008, 1.0, 0.97, 0.93),
    6: (1.0, 0.97, 0.93, 0.88),
    5: (1.065, 1.0, 0.95, 0.9, 0.85),
    4: (1.14, 1.05, 0.95, 0.85, 0.75),
    3: (1.33, 1.15, 1.0, 0.85, 0.7),
}


def _least_squares(x: Tensor, h: Tensor | None, q: Tensor, with_offset: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and offset ``[..., 1]`` that bring levels ``q`` nearest to ``x``."""
    hq = q if h is None else q * h
    qq, qx = (hq * q).sum(-1, keepdim=True), (hq * x).sum(-1, keepdim=True)
    if not with_offset:
        return torch.where(qq == 0, 0.0, qx / qq), None
    weights = torch.ones_like(x) if h is None else h.expand_as(x)
    n, sq, sx = weights.sum(-1, keepdim=True), hq.sum(-1, keepdim=True), (weights * x).sum(-1, keepdim=True)
    determinant = n * qq - sq * sq
    scale = torch.where(determinant <= 1e-12 * n * qq, 0.0, (n * qx - sq * sx) / determinant)
    return scale, torch.where(n == 0, 0.0, (sx - scale * sq) / n)


# ------------------------------------------------------------------------------------------- of blocks


def _fit_blocks(x: Tensor, h: Tensor | None, format: Format, shared: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scales of a k-quant: those of groups are small integers times one of the block, which is in float16.

    Args:
        x: ``[rows, groups, size]``.
        h: ``[1, groups, size]`` or None.
    """
    scale, offset = _search(x, h, format, _free)
    of_block = (-1, format.block // x.shape[-1])
    blocks, scale = x.unflatten(1, of_block), scale.unflatten(1, of_block)
    h = None if h is None else h.unflatten(1, of_block)
    offset = None if offset is None else offset.unflatten(1, of_block)
    best: dict[str, Tensor] = {}
    for part in (1.0, 0.97, 0.94):
        best = _keep(best, _block(blocks, h, format, *_codes(scale, offset, format, part)))
    for _ in range(2):
        best = _keep(best, _block(blocks, h, format, *_refined(blocks, h, format, best)))
    del best["error"]
    return {name: value.flatten(1) for name, value in best.items()}


def _codes(scale: Tensor, offset: Tensor | None, format: Format, part: float) -> tuple[Tensor, ...]:
    """Codes of the groups' scales and offsets, and the block's, if the largest code stands for ``part`` of the largest.

    Returns:
        Codes ``[..., groups, 1]`` and block's scale ``[..., 1, 1]`` in float32, both of scales and of offsets.
    """
    if offset is None:
        lowest = -(2 ** (format.scale_bits - 1))
        largest = scale.gather(-2, scale.abs().argmax(-2, keepdim=True)) * part
        whole = (largest / lowest).half().float()
        return _ratio(scale, whole).clamp_(lowest, -lowest - 1), whole
    most = _K_LEVELS[format.scale_bits]
    wholes = [(s.amax(-2, keepdim=True) * part / most).half().float() for s in (scale, -offset)]
    codes = [_ratio(s, w).clamp_(0, most) for s, w in zip((scale, -offset), wholes, strict=True)]
    return codes[0], wholes[0], codes[1], wholes[1]


def _ratio(scale: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole == 0, 0.0, scale / whole).round()


def _refined(x: Tensor, h: Tensor | None, format: Format, best: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The block's scales by least squares, with the groups' codes and all levels fixed."""
    groups = x.shape[:-1]
    scale = best["scale"].reshape(*groups, 1)
    offset = best["offset"].reshape(*groups, 1) if "offset" in best else None
    q = nearest(x, scale, offset, format)
    codes = best["scale_codes"].reshape(*groups, 1)
    a = (codes * q).flatten(-2)
    flat = x.flatten(-2)
    weights = None if h is None else h.flatten(-2)
    if offset is None:
        whole, _ = _least_squares(flat, weights, a, False)
        return codes, whole.half().float()[..., None]
    offset_codes = best["offset_codes"].reshape(*groups, 1)
    b = -offset_codes.expand_as(x).flatten(-2)
    ha, hb = (a, b) if weights is None else (a * weights, b * weights)
    aa, ab, bb = (ha * a).sum(-1), (ha * b).sum(-1), (hb * b).sum(-1)
    ax, bx = (ha * flat).sum(-1), (hb * flat).sum(-1)
    determinant = aa * bb - ab * ab
    solvable = determinant > 1e-9 * aa * bb
    old = [best[name].reshape(*groups[:-1]) for name in ("block_scale", "block_offset")]
    scales = [
        torch.where(solvable, new / determinant, past).clamp_min(0).half().float()[..., None, None]
        for new, past in zip((bb * ax - ab * bx, aa * bx - ab * ax), old, strict=True)
    ]
    return codes, scales[0], offset_codes, scales[1]


def _block(
    x: Tensor, h: Tensor | None, format: Format, codes: Tensor, whole: Tensor, *rest: Tensor
) -> dict[str, Tensor]:
    """What the file holds of blocks, and the error ``[rows, blocks, 1]`` of each."""
    scale, offset = codes * whole, -rest[0] * rest[1] if rest else None
    error = _error(x, h, scale, offset, format).sum(-2)
    out = {"scale": scale, "scale_codes": codes, "block_scale": whole, "error": error[..., None]}
    if offset is not None:
        out |= {"offset": offset, "offset_codes": rest[0], "block_offset": rest[1]}
    return {name: value.squeeze(-1) for name, value in out.items()}


def _keep(old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
    if not old:
        return new
    take = new["error"] < old["error"]
    return {name: torch.where(take, new[name], old[name]) for name in new}
