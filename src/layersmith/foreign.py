"""The one place where what other people's code raises is caught: a model family's own forward, a remote config.

A family's code may raise anything. That is an answer to the question asked ("does this layer run without its
attention?"), but an error of layersmith itself inside the same block is a bug and must not become one. So
:func:`foreign_code` looks at where an exception was raised: what comes out of foreign frames is logged and reported,
what comes out of layersmith's own frames goes on as it is.
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

_PACKAGE = str(Path(__file__).parent) + os.sep
# Runs inside foreign models as part of them.
_PART_OF_MODELS = _PACKAGE + "modeling_layersmith.py"


class Attempt:
    """What came of a block of foreign code.

    Attributes:
        question: what the block was run to find out.
        error: what the foreign code raised; None if it ran through.
    """

    def __init__(self, question: str):
        self.question = question
        self.error: Exception | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None

    @property
    def reason(self) -> str:
        """The first line of the error; empty if there was none."""
        return "" if self.error is None else first_line(self.error)

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a foreign function. Arguments that Python itself refuses count as the function's refusal.

        A wrong signature raises in the caller's frame, which would look like an error of ours.
        """
        return function(*args, **kwargs)


@contextmanager
def foreign_code(question: str, *, refusal_is_answer: bool = False) -> Iterator[Attempt]:
    """Run a block that calls foreign code, and keep what it raises as an answer.

    Args:
        question: what the block finds out; goes into the log with the traceback (level DEBUG).
        refusal_is_answer: An exception is one of the expected outcomes of an experiment. Only these are kept under
            ``LAYERSMITH_STRICT=1``; everything else is raised there, so that tests see it.

    Yields:
        Attempt: ``failed`` and ``reason`` are known after the block.

    Raises:
        Exception: whatever layersmith's own frames raised, and a memory or disk that is full: neither says anything
            about the foreign code.

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
    """Whether memory or disk ran out; ``torch.OutOfMemoryError`` is known by name, since torch is not imported here."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOSPC)
    )
