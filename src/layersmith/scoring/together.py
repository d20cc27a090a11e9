"""How alternatives of different places work together, as the sweep of second-order scores sees it.

For every alternative a and token t the sweep has p_at = g_t . delta_at, and its score is s_a = 1/2 E[p_at^2]; see
:mod:`layersmith.scoring.second_order`. To the same order a child of several alternatives loses

    1/2 E[(sum over a of p_at)^2] = sum over a, b of r_ab sqrt(s_a s_b),

with r_ab the cosine of the products of a and b over tokens: the sum of scores, and pairs beside it that say how errors
add up or cancel. Unit vectors of the products are kept, so that pairs need no matrix of all alternatives.

Shapes: A alternatives, T tokens, n choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from layersmith.library.alternative import Alternative
from layersmith.scoring.second_order import Products, estimate, look
from layersmith.scoring.states import States
from layersmith.staged import StagedParent

# So many tokens are kept, evenly; a cosine of that many is known within a few hundredths.
_MOST_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Together:
    """What pairs add.

    Attributes:
        directions: ``[A, T]`` float32, of length 1 (or 0).
        place: key of an alternative to its row.
    """

    directions: np.ndarray
    place: Mapping[str, int]

    def of_pairs(self, losses: Mapping[str, float], choices: Sequence[Sequence[Alternative]]) -> np.ndarray:
        """``[n]``, the sum over pairs of two places of r_ab sqrt(s_a s_b); parents and places of loss 0 add nothing."""
        found = []
        for choice in choices:
            own = [a for a in choice if a.key in self.place and losses[a.key] > 0]
            roots = np.sqrt(np.array([losses[a.key] for a in own]))
            directions = self.directions[[self.place[a.key] for a in own]]
            whole = float(np.square(roots.astype(np.float32) @ directions, dtype=np.float64).sum())
            alone = float((roots**2) @ np.square(directions).sum(1))
            found.append(whole - alone)
        return np.array(found)


def together(
    staged: StagedParent,
    alternatives: Sequence[Alternative],
    batches: Sequence[torch.Tensor],
    seed: int,
    states: States | None = None,
) -> Together:
    """Sweep rows for how alternatives work together.

    Args:
        staged: the parent.
        alternatives: without the parent's own.
        batches: rows of token ids, ``[B, T]`` each.
        seed: of the signs.
        states: where hidden states wait; default: in memory.
    """
    found = look(staged, alternatives, batches[0][:1])
    total = sum(rows.numel() for rows in batches)
    products = Products(every=max(1, -(-total // _MOST_TOKENS)))
    numbers = iter(range(total))
    seeds = [[[seed * 1_000_003 + next(numbers) for _ in rows]] for rows in batches]
    estimate(staged, alternatives, found, batches, seeds, states or States(), products=products)
    values = products.by_identity()
    own = np.stack([values[a.identity] for a in alternatives])
    own /= np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-30)
    return Together(own, {a.key: i for i, a in enumerate(alternatives)})
