"""What a child loses, from scores of its parts and children that were seen.

Let s_p be the score of what a choice has in place p (a subblock of a layer), and a_p its root. Were the errors that
the places make directions in one space, the child would lose |sum of them|^2 / 2, that is

    KL(x) = sum_p s_p (1 + d_p) + sum_{p<q} 2 r_pq a_p a_q

with r the cosines between them, and the sum of scores alone if all are 0. Neither r nor d is known; a Gaussian process
has them as

    d_p ~ N(0, 0.3^2),   r_pq = m_pq + r + u_p + u_q + e_pq,   r ~ N(0, 0.3^2), u_p ~ N(0, 0.15^2), e_pq ~ N(0, 0.15^2),

with m = 0 where nothing was seen of how alternatives work together. Where the sweep has seen it
(:mod:`layersmith.scoring.together`), m_pq is 0.9 of its cosine, and the deviations are 0.2, 0.1, 0.1 and 0.1. Each u, e
and d is alike for alternatives of one place as far as these are of one kind: 1 for the same, 0.7 for the same kind, 0.4
for others. Children that are seen have a relative error of 2%.

Shapes: n choices, P places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layersmith.library.alternative import Alternative
from layersmith.scoring.together import Together


@dataclass(frozen=True)
class _Beliefs:
    """Standard deviations of r, u, e and d."""

    common: float
    of_place: float
    of_pair: float
    own: float


_UNSEEN, _SEEN = _Beliefs(0.3, 0.15, 0.15, 0.3), _Beliefs(0.1, 0.1, 0.1, 0.2)
# Of cosines that a sweep saw; large changes add up less than small ones.
_SHARE = 0.9
_NOISE = 0.02
_SAME_KIND, _OTHER_KIND = 0.7, 0.4


class Surrogate:
    """The process after what was seen.

    Args:
        losses: key of an alternative to its score.
        seen: choices, places in one order.
        values: what they lost.
        together: how alternatives work together, if that was seen.
    """

    def __init__(
        self,
        losses: Mapping[str, float],
        seen: Sequence[Sequence[Alternative]],
        values: Sequence[float],
        together: Together | None = None,
    ):
        self.losses, self.seen, self.together = losses, list(seen), together
        self.beliefs = _UNSEEN if together is None else _SEEN
        residuals = np.array(values) - self._before(seen)
        covariance = self._covariance(seen, seen) + np.diag((_NOISE * np.array(values)) ** 2 + 1e-18)
        self._factor = np.linalg.cholesky(covariance)
        self._weights = np.linalg.solve(self._factor.T, np.linalg.solve(self._factor, residuals))

    def predict(self, choices: Sequence[Sequence[Alternative]]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation ``[n]`` of what choices lose."""
        cross = self._covariance(choices, self.seen)
        mean = self._before(choices) + cross @ self._weights
        solved = np.linalg.solve(self._factor, cross.T)
        own = np.array([self._covariance([choice], [choice])[0, 0] for choice in choices])
        return mean, np.sqrt(np.maximum(own - (solved**2).sum(0), 0.0))

    def _before(self, choices: Sequence[Sequence[Alternative]]) -> np.ndarray:
        """``[n]``, what choices are believed to lose before any was run."""
        alone = (self._roots(choices) ** 2).sum(1)
        return alone if self.together is None else alone + _SHARE * self.together.of_pairs(self.losses, choices)

    def _roots(self, choices: Sequence[Sequence[Alternative]]) -> np.ndarray:
        return np.sqrt(np.array([[self.losses[a.key] for a in choice] for choice in choices]))

    def _covariance(self, one: Sequence[Sequence[Alternative]], other: Sequence[Sequence[Alternative]]) -> np.ndarray:
        a, b = self._roots(one), self._roots(other)
        alike = _alike(one, other)
        of_all_a, of_all_b = a.sum(1)[:, None] - a, b.sum(1)[:, None] - b  # sum over the other places
        common = np.outer((a * of_all_a).sum(1), (b * of_all_b).sum(1))
        by_place = (alike * (2 * a * of_all_a)[:, None] * (2 * b * of_all_b)[None]).sum(-1)
        products = alike * a[:, None] * b[None]
        by_pair = 2 * (products.sum(-1) ** 2 - (products**2).sum(-1))
        own = (alike * (a**2)[:, None] * (b**2)[None]).sum(-1)
        beliefs = self.beliefs
        return (
            beliefs.common**2 * common + beliefs.of_place**2 * by_place + beliefs.of_pair**2 * by_pair
            + beliefs.own**2 * own
        )  # fmt: skip


def _alike(one: Sequence[Sequence[Alternative]], other: Sequence[Sequence[Alternative]]) -> np.ndarray:
    """``[n, n', P]``, how far what two choices have in a place is of one kind."""
    names: dict[str, int] = {}
    kinds: dict[str, int] = {}

    def numbers(choices: Sequence[Sequence[Alternative]]) -> tuple[np.ndarray, np.ndarray]:
        own_names = [[names.setdefault(a.key, len(names)) for a in choice] for choice in choices]
        own_kinds = [[kinds.setdefault(a.kind, len(kinds)) for a in choice] for choice in choices]
        return np.array(own_names), np.array(own_kinds)

    (name, kind), (other_name, other_kind) = numbers(one), numbers(other)
    same_kind = kind[:, None] == other_kind[None]
    return np.where(name[:, None] == other_name[None], 1.0, np.where(same_kind, _SAME_KIND, _OTHER_KIND))
