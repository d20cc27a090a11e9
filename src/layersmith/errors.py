"""What a user can mend. Each message says what is wrong, where, and what to do about it.

Anything else that escapes the command line is a bug of ours (exit code 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LayersmithError(Exception):
    """A problem that the user can mend; ``exit_code`` is what the command line returns for it."""

    exit_code = 2


class UsageError(LayersmithError):
    """An argument, a recipe key or a block config that makes no sense."""


class InputError(LayersmithError):
    """A file or folder that is missing, broken, unreadable, or in the way."""


class UnsupportedModel(LayersmithError):
    """A model that cannot be described, or an alternative that its family cannot take."""


class Infeasible(LayersmithError):
    """A budget that no child of this library can meet."""

    exit_code = 3


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known word, or all of them.

    >>> did_you_mean("dtpye", ["dtype", "seed"])
    "Did you mean 'dtype'?"
    """
    known = sorted(known)
    near = get_close_matches(word, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."


def first_line(error: BaseException) -> str:
    """What an error says, as part of a sentence of ours; its type if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
