"""Long rows that end with questions about their beginning: they show what a window or a smaller KV cache forgets.

Ordinary text seldom needs what stood thousands of tokens before, and a row that is shorter than a window never does.
So consecutive rows are joined, and the last quarter of each long row is replaced by spans of its first part, in another
order. A span is a key and a value: once the key is read again, a model that still sees the first part can predict the
value. All tokens are the data's.

Shapes: N rows, T tokens.
"""

from __future__ import annotations

import torch

# The share of a row that repeats spans; no span comes from the second half of what is before.
SHARE = 0.25
# Tokens of a key and of a value.
_KEY, _VALUE = 4, 4
_SPAN = _KEY + _VALUE


def long_rows(rows: torch.Tensor, length: int, seed: int) -> torch.Tensor:
    """Rows ``[N, T]`` joined to about ``length`` tokens, at least two of them, each with its questions at its end.

    Args:
        rows: Token ids; consecutive rows are of consecutive text, or of any.
        length: Tokens that a long row should have.
        seed: Seed of the spans that are asked for.
    """
    together = max(1, min(length // rows.shape[1], len(rows) // 2))
    count = len(rows) // together
    joined = rows[: count * together].reshape(count, -1).clone()
    generator = torch.Generator().manual_seed(seed)
    for row in joined:
        _ask(row, generator)
    return joined


def _ask(row: torch.Tensor, generator: torch.Generator) -> None:
    """Replace the end of a row ``[T]`` by spans of its beginning whose keys occur only once before it."""
    asked = int(len(row) * SHARE) // _SPAN
    before = len(row) - asked * _SPAN
    keys = row[:before].unfold(0, _KEY, 1)
    _, which, times = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    starts = torch.arange(0, before // 2 - _SPAN + 1, _SPAN)
    once = starts[times[which[starts]] == 1]
    chosen = once[torch.randperm(len(once), generator=generator)[:asked]]
    spans = (chosen[:, None] + torch.arange(_SPAN)).flatten()
    if len(spans):
        row[len(row) - len(spans) :] = row[spans]
