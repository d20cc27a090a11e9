"""From measured savings of shapes to a time for every alternative.

A saving is the time that a shape saves in one layer, compared with the parent's subblock. Three corrections are made:
noise is shrunk (:func:`shrink`), sums of savings are made to end at the time of a model of no-ops (:func:`rescale`),
and something is always left outside the layers (:func:`as_times`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layersmith.block_config import BlockConfig
from layersmith.costs.budget import Workload
from layersmith.costs.times import ZERO, Times, Timing
from layersmith.library.alternative import Alternative
from layersmith.run.artifacts import fingerprint

# With fewer sizes on an axis there is no estimate of how far savings are from proportional.
_LEAST_POINTS = 3
# A sum of savings is scaled by no more than this, or its inverse: a larger factor is noise.
_MOST_FACTOR = 2.0
# All subblocks together take at most this share of the parent's time. In a large model they take nearly all of it.
_MOST_INSIDE = 0.999
_PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Shape:
    """What alternatives of equal layers turn them into; timed once for all of them.

    Attributes:
        kind: Index of the first of the equal layers.
        subblock: Subblock that changes.
        block: Block config of the layers with the change.
    """

    kind: int
    subblock: str
    block: BlockConfig

    @property
    def name(self) -> str:
        return fingerprint([self.kind, self.subblock, self.block.to_json()])


def shrink(
    savings: Mapping[Shape, Timing], errors: Mapping[Shape, Timing], removed: Mapping[Shape, tuple[str, float]]
) -> dict[Shape, Timing]:
    """Shrink savings towards a line along each axis, as far as their distance from it is noise.

    The solver prefers whatever looks cheapest, so of noisy times it would pick those that are too low by chance (the
    winner's curse). Along an axis savings are nearly proportional to the parameters removed. With s^2 the mean squared
    residual from that line and v the mean squared standard error, a share v / s^2 of each residual is removed. On a
    quiet machine nothing changes.

    Source: James and Stein, "Estimation with Quadratic Loss" (1961).

    Args:
        savings: Measured saving of each shape.
        errors: Their standard errors.
        removed: Kind of alternative (the axis) of each shape, and the parameters it removes.
    """
    axes: dict[tuple[int, str, str], list[Shape]] = {}
    for shape in savings:
        axes.setdefault((shape.kind, shape.subblock, removed[shape][0]), []).append(shape)
    result = dict(savings)
    for shapes in axes.values():
        size = np.array([removed[shape][1] for shape in shapes])
        if len(shapes) < _LEAST_POINTS or not size.any():
            continue
        shrunk = []
        for phase in _PHASES:
            measured = np.array([getattr(savings[shape], phase) for shape in shapes])
            line = size * float(size @ measured) / float(size @ size)
            residual = float(np.square(measured - line).sum()) / (len(shapes) - 1)
            noise = float(np.mean([getattr(errors[shape], phase) ** 2 for shape in shapes]))
            shrunk.append(measured + (line - measured) * (min(1.0, noise / residual) if residual > 0 else 0.0))
        result |= {shape: Timing(float(p), float(d)) for shape, p, d in zip(shapes, *shrunk, strict=True)}
    return result


def rescale(
    savings: Mapping[Shape, Timing],
    earlier: Mapping[Shape, Timing],
    kinds: Sequence[int],
    active: Collection[int],
    reference: Timing,
    empty: Timing,
) -> tuple[Timing, dict[Shape, Timing]]:
    """Scale savings so that the largest ones of all layers lead from the reference to the model of no-ops.

    Args:
        savings: Saving of each shape in one layer.
        earlier: Savings of shapes that were timed in an earlier session; these stay.
        kinds: Kind of each layer.
        active: Indices of the layers that the timed models had.
        reference: Time of the model in which the active layers are the parent's.
        empty: Time of the model of no-ops.

    Returns:
        The time of the whole parent, and the scaled savings.
    """
    largest: dict[tuple[int, str], Timing] = {}
    for shape, saving in (*earlier.items(), *savings.items()):
        place = shape.kind, shape.subblock
        largest[place] = largest.get(place, ZERO).at_least(saving)
    factors, whole = [], []
    for phase in _PHASES:
        of_kind = {kind: sum(getattr(t, phase) for (k, _), t in largest.items() if k == kind) for kind in set(kinds)}
        inside = sum(of_kind[kinds[i]] for i in active)
        difference = getattr(reference, phase) - getattr(empty, phase)
        factor = min(_MOST_FACTOR, max(1 / _MOST_FACTOR, difference / inside)) if inside > 0 else 1.0
        factors.append(factor)
        whole.append(getattr(empty, phase) + factor * sum(of_kind[kind] for kind in kinds))
    return Timing(*whole), {shape: saving.scaled(*factors) for shape, saving in savings.items()}


def as_times(
    alternatives: Sequence[Alternative], savings: Mapping[str, Timing], whole: Timing, device: str, workload: Workload
) -> Times:
    """A time for every alternative: a subblock takes what its cheapest alternative saves, the rest is outside.

    Args:
        alternatives: All alternatives of the search space.
        savings: Saving of each alternative, by its key.
        whole: Time of the parent.
        device, workload: What the times are for.
    """
    largest: dict[tuple[int, str], Timing] = {}
    for a in alternatives:
        place = a.layer, a.subblock
        largest[place] = largest.get(place, ZERO).at_least(savings.get(a.key, ZERO))
    # Because of noise all layers together may seem to save more than the whole time.
    factors = []
    for phase in _PHASES:
        inside, limit = sum(getattr(t, phase) for t in largest.values()), _MOST_INSIDE * getattr(whole, phase)
        factors.append(limit / inside if inside > limit else 1.0)
    by_key = {a.key: (largest[a.layer, a.subblock] - savings.get(a.key, ZERO)).scaled(*factors) for a in alternatives}
    fixed = whole
    for saving in largest.values():
        fixed -= saving.scaled(*factors)
    return Times("measured", device, workload, by_key, fixed)
