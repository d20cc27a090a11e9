"""Errors that a user can mend. Each message says what is wrong, where, and what to do about it.

Any other exception that reaches the command line is a bug of layersmith (exit code 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LayersmithError(Exception):
    """A problem that the user can mend; ``exit_code`` is what the command line returns for it."""

    exit_code = 2


class UsageError(LayersmithError):
    """An argument, a recipe key or a block config is invalid."""


class InputError(LayersmithError):
    """A file or folder is missing, broken, unreadable, or would be overwritten."""


class UnsupportedModel(LayersmithError):
    """A model cannot be described, or its family does not support an alternative."""


class OutOfMemory(LayersmithError):
    """The memory of the machine or of a device is full."""

    exit_code = 1


class Infeasible(LayersmithError):
    """No child of this library meets the budget."""

    exit_code = 3


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known word, or some of them.

    >>> did_you_mean("dtpye", ["dtype", "seed"])
    "Did you mean 'dtype'?"
    """
    known = sorted(known)
    near = get_close_matches(word, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {some_of(known)}."


def some_of(names: Iterable[object], at_most: int = 20) -> str:
    """Names in a sentence: the first of them, and how many more there are.

    >>> some_of("abcd", 2)
    'a, b and 2 more'
    """
    words = list(map(str, names))
    more = f" and {len(words) - at_most:,} more" if len(words) > at_most else ""
    return ", ".join(words[:at_most]) + more


def whole_reason(error: BaseException | None, at_most: int = 400) -> str:
    """The message of an error of other code on one line, for use in a message of ours, without a closing full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= at_most else f"{text[:at_most]} ...").rstrip(".")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for use in a message of ours; the error's type if it is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
