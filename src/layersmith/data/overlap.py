"""Rows of one split that another split also has, word for word or nearly.

Documents of equal text are never dealt to two splits, but texts are copied with other headers, spaces or letter case.
So rows are compared by runs of letters and digits: two rows overlap if both contain the same 200 of them in a row,
ignoring everything in between. That is about 50 tokens, the length that arXiv 2107.06499, section 4.1, uses. Rows of
token ids without a tokenizer are compared by runs of 50 ids. A run that three or more evaluation rows share, such as a
licence or the frame of a prompt, is boilerplate and does not count.

Shapes: N rows, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from layersmith.errors import InputError
from layersmith.recipe import Overlap

RUN_CHARACTERS = 200
RUN_TOKENS = 50
_OTHER_THAN_LETTERS = re.compile(r"[\W_]+")
_ROWS_AT_ONCE = 256
_FORM_ROWS = 3


@dataclass(frozen=True)
class OverlapRule:
    """What to do with rows that share long runs of text with evaluation.

    Attributes:
        action: Leave them out, use them and warn, refuse, or do not look.
        source: Name of the source, for messages.
        field: Key of the recipe that has the action, for messages.
    """

    action: Overlap
    source: str
    field: str = "data.overlap"


def without_copies(
    splits: Mapping[str, torch.Tensor],
    evaluation: torch.Tensor,
    tokenizer: Any | None,
    rule: OverlapRule,
    warnings: list[str],
) -> tuple[dict[str, torch.Tensor], dict[str, int] | None]:
    """Look for rows that share long runs of text with evaluation, and treat them as the recipe says.

    Args:
        splits: Rows ``[N, T]`` of each split, by its name.
        evaluation: Rows ``[M, T]``.
        tokenizer: Tokenizer that made the rows; None if they were token ids from the start.
        rule: What to do with such rows.
        warnings: List to which warnings are added.

    Returns:
        The rows to use, and how many of each split overlap; None instead of the numbers if the action is ``allow``.

    Raises:
        InputError: Some rows overlap and are refused, or none are left.
    """
    if rule.action == "allow":
        return dict(splits), None
    runs, kept = Runs(evaluation, tokenizer), {}
    counts: dict[str, int] = {}
    for name, rows in splits.items():
        copied = runs.within(rows)
        counts[name], kept[name] = int(copied.sum()), rows
        if not counts[name]:
            continue
        overlap = f"{rule.source}: {counts[name]} of {len(rows)} {name} rows share long runs of text with evaluation"
        if rule.action == "refuse":
            raise InputError(f"{overlap}. Give other text, or set {rule.field} to leave_out or warn in the recipe.")
        if rule.action == "leave_out":
            kept[name] = rows[~copied]
            if not len(kept[name]):
                raise InputError(
                    f"{overlap}, so none is left. Give other text, or set {rule.field} to warn in the recipe."
                )
        outcome = "were left out" if rule.action == "leave_out" else "are used"
        warnings.append(
            f"{rule.source}: {counts[name]} {name} rows that share long runs of text with evaluation {outcome}."
        )
    return kept, counts


class Runs:
    """Hashes of all runs of some rows, to look for them in others."""

    def __init__(self, rows: torch.Tensor, tokenizer: Any | None):
        """Hash the runs of rows ``[N, T]``; ``tokenizer`` turns them into text, if given."""
        self.tokenizer = tokenizer
        spelt = self._spelt(rows)
        # Where half a row is shorter than a run, that is the run.
        half = int(np.median([len(text) for text in spelt])) // 2
        self.length = max(1, min(RUN_TOKENS if tokenizer is None else RUN_CHARACTERS, half))
        hashes_of_rows = np.concatenate([np.unique(_hashes(text, self.length)) for text in spelt])
        self.hashes, rows_with = np.unique(hashes_of_rows, return_counts=True)
        self.hashes = self.hashes[rows_with < _FORM_ROWS]

    def _spelt(self, rows: torch.Tensor) -> list[np.ndarray]:
        """Each row as numbers: code points of its letters and digits in lower case, or token ids."""
        if self.tokenizer is None:
            return list(rows.numpy().astype(np.uint64))
        texts = self.tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True)
        letters = (_OTHER_THAN_LETTERS.sub("", text).casefold() for text in texts)
        return [np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64) for text in letters]

    def within(self, rows: torch.Tensor) -> torch.Tensor:
        """Which of other rows ``[M, T]`` contain one of the runs: ``[M]`` bool."""
        contains: list[bool] = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            for text in self._spelt(rows[start : start + _ROWS_AT_ONCE]):
                hashes = _hashes(text, self.length)
                at = np.searchsorted(self.hashes, hashes).clip(max=max(0, len(self.hashes) - 1))
                contains.append(bool(len(self.hashes)) and bool((self.hashes[at] == hashes).any()))
        return torch.tensor(contains, dtype=torch.bool)


def _hashes(numbers: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of every run of ``length`` numbers; empty if there are fewer numbers.

    Hashes of runs of 1, 2, 4, ... are made from those of half the length, so a run takes a few operations on whole
    arrays. A length that is no power of two is covered by two overlapping runs.
    """
    if len(numbers) < length:
        return np.empty(0, np.uint64)
    hashes, reach = _mixed(numbers), 1
    while 2 * reach <= length:
        hashes = _mixed(hashes[: len(hashes) - reach] + np.uint64(3) * hashes[reach:])
        reach *= 2
    shift = length - reach
    return hashes if not shift else _mixed(hashes[: len(hashes) - shift] + np.uint64(5) * hashes[shift:])


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64."""
    x = numbers + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
