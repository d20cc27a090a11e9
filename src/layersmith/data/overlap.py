"""Whether rows of one split are in another, word for word or nearly.

Documents of equal text are never dealt to two splits, but texts are copied with other headers, spaces or case. So rows
are compared by runs of letters and digits: two rows overlap if 200 of them on end, whatever stands between them, are in
both. (About 50 tokens, the length of arXiv 2107.06499, section 4.1.) Where there is no text, runs of 50 token ids are
compared. What three evaluation rows or more have in common, such as a licence or the frame of a prompt, is a form that
such texts have, and no copy.

Shapes: N rows, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layersmith.errors import InputError
from layersmith.recipe import Overlap

if TYPE_CHECKING:
    import numpy as np
    import torch

RUN_CHARACTERS = 200
RUN_TOKENS = 50
_OTHER_THAN_LETTERS = re.compile(r"[\W_]+")
_ROWS_AT_ONCE = 256
_FORM_ROWS = 3


def without_copies(
    splits: Mapping[str, torch.Tensor],
    evaluation: torch.Tensor,
    tokenizer: Any | None,
    what: Overlap,
    where: str,
    warnings: list[str],
    field: str = "data.overlap",
) -> tuple[dict[str, torch.Tensor], dict[str, int] | None]:
    """Look for what evaluation shows in other splits, and do about it what the recipe says.

    Args:
        splits: ``[N, T]`` rows by the name of what they are for.
        evaluation: ``[M, T]`` rows.
        tokenizer: that they were made with; None where they never were text.
        what: is to be done.
        where: rows come from, for people.
        warnings: are added to.
        field: of the recipe that says so.

    Returns:
        The rows to go on with, and how many of each split were found; None if nobody looked.

    Raises:
        InputError: some were found and are refused, or nothing is left.
    """
    if what == "allow":
        return dict(splits), None
    runs, kept = Runs(evaluation, tokenizer), {}
    found: dict[str, int] = {}
    for name, rows in splits.items():
        copied = runs.within(rows)
        found[name], kept[name] = int(copied.sum()), rows
        if not found[name]:
            continue
        said = f"{where}: {found[name]} of {len(rows)} {name} rows share long runs of text with evaluation"
        if what == "refuse":
            raise InputError(f"{said}. Give other text, or set {field} to leave_out or warn in the recipe.")
        if what == "leave_out":
            kept[name] = rows[~copied]
            if not len(kept[name]):
                raise InputError(f"{said}, so none is left. Give other text, or set {field} to warn in the recipe.")
        done = "were left out" if what == "leave_out" else "are used all the same"
        warnings.append(f"{where}: {found[name]} {name} rows that share long runs of text with evaluation {done}.")
    return kept, found


class Runs:
    """All runs of the rows that nothing else may hold, as hashes."""

    def __init__(self, rows: torch.Tensor, tokenizer: Any | None):
        """Of rows ``[N, T]``; ``tokenizer`` spells them, if there is one."""
        import numpy as np

        self.tokenizer = tokenizer
        spelt = self._spelt(rows)
        # Where half a row is shorter than a run, that is the run.
        half = int(np.median([len(text) for text in spelt])) // 2
        self.length = max(1, min(RUN_TOKENS if tokenizer is None else RUN_CHARACTERS, half))
        own = np.concatenate([np.unique(_hashes(text, self.length)) for text in spelt])
        self.hashes, rows_with = np.unique(own, return_counts=True)
        self.hashes = self.hashes[rows_with < _FORM_ROWS]

    def _spelt(self, rows: torch.Tensor) -> list[np.ndarray]:
        """Each row as numbers: code points of its letters and digits in lower case, or token ids."""
        import numpy as np

        if self.tokenizer is None:
            return list(rows.numpy().astype(np.uint64))
        texts = self.tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True)
        letters = (_OTHER_THAN_LETTERS.sub("", text).casefold() for text in texts)
        return [np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64) for text in letters]

    def within(self, rows: torch.Tensor) -> torch.Tensor:
        """Which of other rows ``[M, T]`` hold one of the runs: ``[M]`` bool."""
        import numpy as np
        import torch

        found: list[bool] = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            for text in self._spelt(rows[start : start + _ROWS_AT_ONCE]):
                own = _hashes(text, self.length)
                at = np.searchsorted(self.hashes, own).clip(max=max(0, len(self.hashes) - 1))
                found.append(bool(len(self.hashes)) and bool((self.hashes[at] == own).any()))
        return torch.tensor(found, dtype=torch.bool)


def _hashes(numbers: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of every run of so many numbers; none if there are fewer.

    Hashes of runs of 1, 2, 4, ... are made from those of half the length, so a run takes a few operations on whole
    arrays; a length that is no power of two is two of them that overlap.
    """
    import numpy as np

    if len(numbers) < length:
        return np.empty(0, np.uint64)
    own, reach = _mixed(numbers), 1
    while 2 * reach <= length:
        own = _mixed(own[: len(own) - reach] + np.uint64(3) * own[reach:])
        reach *= 2
    shift = length - reach
    return own if not shift else _mixed(own[: len(own) - shift] + np.uint64(5) * own[shift:])


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64."""
    import numpy as np

    x = numbers + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
