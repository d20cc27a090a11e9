"""Errors that a user can mend. Each message says what is wrong, where, and what to do about it.

Any other exception that reaches the command line is a bug of layersmith (exit code 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# How a user lets code run that comes with a model.
ALLOW_CODE = "Read it, then allow it with --trust-remote-code (in Python trust_remote_code=True)."
# Characters of a value, names of a list, and characters of a whole message that are shown.
_VALUE, _NAMES, _MESSAGE = 200, 10, 4000
# What a terminal would obey or a line could hide: control characters, changes of writing direction, lone surrogates.
_UNPRINTABLE = dict.fromkeys(
    [
        *(c for c in range(32) if c not in (9, 10)), *range(127, 160), 0x200E, 0x200F, *range(0x2028, 0x202F),
        *range(0x2066, 0x206A), *range(0xD800, 0xE000),
    ],
    "\N{REPLACEMENT CHARACTER}",
)  # fmt: skip


class LayersmithError(Exception):
    """A problem that the user can mend; ``exit_code`` is what the command line returns for it."""

    exit_code = 2

    def __init__(self, message: str = ""):
        super().__init__(brief(printable(message), _MESSAGE))


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
    near = get_close_matches(word[:_VALUE], known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {some_of(known)}."


def some_of(names: Iterable[object], at_most: int = _NAMES) -> str:
    """Names in a sentence: the first of them, and how many more there are.

    >>> some_of("abcd", 2)
    'a, b and 2 more'
    """
    words = [brief(str(name)) for name in names]
    more = f" and {len(words) - at_most:,} more" if len(words) > at_most else ""
    return ", ".join(words[:at_most]) + more


def whole_reason(error: BaseException | None, at_most: int = 400) -> str:
    """The message of an error of other code on one line, for use in a message of ours, without a closing full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= at_most else f"{text[:at_most]} ...").rstrip(".")


def brief(text: str, most: int = _VALUE) -> str:
    """Text with its middle left out if it is long."""
    return text if len(text) <= most else f"{text[: most // 2]}[...]{text[-most // 2 :]}"


def printable(text: str) -> str:
    """Text without characters that change a terminal or hide what is written."""
    return text.translate(_UNPRINTABLE)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for use in a message of ours; the error's type if it is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
