"""Call code that layersmith did not write: the forward of a model family, or a config class from a checkpoint.

Such code may raise any exception. That can be the answer to a question ("does this layer run without its attention?"),
but an error of layersmith in the same block is a bug and must not be hidden. So :func:`foreign_code` checks where an
exception was raised: those from foreign frames are logged and reported, those from layersmith's frames propagate.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from layersmith.errors import LayersmithError, first_line

T = TypeVar("T")
logger = logging.getLogger(__name__)

MORE_MEMORY = "Lower scoring.batch_tokens or set stream=always, and run the same command again."

_NO_MEMORY = ("DefaultCPUAllocator", "can't start new thread")
_PACKAGE = str(Path(__file__).parent) + os.sep
# This module runs as part of foreign models.
_PART_OF_MODELS = _PACKAGE + "modeling_layersmith.py"


class Attempt:
    """The result of a block of foreign code.

    Attributes:
        question: The question that the block answers.
        error: The exception that the foreign code raised; None if it raised none.
    """

    def __init__(self, question: str):
        self.question = question
        self.error: Exception | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None

    @property
    def reason(self) -> str:
        """The first line of the error; empty without an error."""
        return "" if self.error is None else first_line(self.error)

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a foreign function, so that a wrong signature counts as an exception of the function.

        Python raises it in the caller's frame, where it would look like an error of layersmith.
        """
        return function(*args, **kwargs)


@contextmanager
def foreign_code(question: str, *, refusal_is_answer: bool = False) -> Iterator[Attempt]:
    """Run a block that calls foreign code, and catch the exceptions of that code.

    Args:
        question: The question that the block answers; logged with the traceback at level DEBUG.
        refusal_is_answer: Whether an exception is an expected outcome of an experiment. Under ``LAYERSMITH_STRICT=1``
            all other exceptions are raised, so that tests see them.

    Yields:
        Attempt: ``failed`` and ``reason`` are set after the block.

    Raises:
        Exception: An exception from layersmith's frames, or one because memory or disk is full.

    >>> with foreign_code("does a list have this key?", refusal_is_answer=True) as attempt:
    ...     _ = attempt.call(int, "seven")
    >>> attempt.failed
    True
    """
    attempt = Attempt(question)
    try:
        yield attempt
    except Exception as error:
        strict = os.environ.get("LAYERSMITH_STRICT") == "1"
        if _is_ours(error) or _is_exhausted(error) or (strict and not refusal_is_answer):
            raise
        logger.debug("%s: %s", question, first_line(error), exc_info=True)
        attempt.error = error


def _is_ours(error: Exception) -> bool:
    """Whether the innermost Python frame of an exception lies in layersmith."""
    if isinstance(error, LayersmithError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code is Attempt.call.__code__:
        return False
    file = trace.tb_frame.f_code.co_filename
    return file.startswith(_PACKAGE) and file != _PART_OF_MODELS


def _is_exhausted(error: Exception) -> bool:
    """Whether memory or disk is full."""
    return is_out_of_memory(error) or (isinstance(error, OSError) and error.errno == errno.ENOSPC)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory of the machine or of a device is full.

    torch is not imported here, so its ``OutOfMemoryError`` is compared by name; on the CPU it raises a RuntimeError, as
    Python does where a thread cannot start.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY))
    )
