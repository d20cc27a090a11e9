"""Runs the command line so that every end has an exit code and, with ``--json``, one JSON object."""

from __future__ import annotations

import errno
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from layersmith.errors import LayersmithError, printable
from layersmith.foreign import MORE_MEMORY, is_out_of_memory
from layersmith.options import FORMER_OPTIONS
from layersmith.screen import JSON, wants_json


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def _command(app: typer.Typer) -> str | None:
    """The command that was given, or None if it is none of ours."""
    names = {c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands}
    return sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in names else None


def run_app(app: typer.Typer) -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0, 2 for what the user can mend, 3 for a budget that cannot be met, 1 for a failed check or a bug of
    layersmith, 130 and 143 after SIGINT and SIGTERM, 141 if the reader of a pipe has gone.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait for each other spin, by libgomp's default for milliseconds, and so hinder the threads that
        # they wait for when cores are shared: small layers took three times as long. On free cores nothing changes.
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    signal.signal(signal.SIGTERM, _terminate)
    if wants_json():
        JSON.open(_command(app))
    try:
        _run(app)
    finally:
        JSON.close()


def _run(app: typer.Typer) -> NoReturn:
    try:
        status = app(standalone_mode=False)
    except LayersmithError as error:
        _fail(str(error), error.exit_code, type(error).__name__)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except _Terminated:
        _fail("terminated. To resume, run the same command again.", 143, "Terminated")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's own flush at exit is silent
        sys.exit(141)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of typer, which has its own click
            error.show()
            instead = FORMER_OPTIONS.get(getattr(error, "option_name", ""))
            advice = "" if instead is None else f" Use {instead} instead."
            if advice:
                print(advice.strip(), file=sys.stderr)
            JSON.write_error("UsageError", str(getattr(error, "message", error)) + advice, error.exit_code)
            sys.exit(error.exit_code)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _fail("no space left on the disk. Free some and run the same command again.", 2, "DiskFull")
        if is_out_of_memory(error):
            _fail(f"out of memory. {MORE_MEMORY}", 1, "OutOfMemory")
        if isinstance(error, OSError) and error.errno is not None:  # a name that is too long, a link to itself, ...
            _fail(f"{str(error.filename or '')[:300]}: {error.strerror}.", 2, "InputError")
        JSON.write_error("Bug", f"{type(error).__name__}: {error}", 1)
        raise
    if status == 130:  # typer returns it for Ctrl-C
        _fail("interrupted. To resume, run the same command again.", 130, "Interrupted")
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, code: int, kind: str) -> NoReturn:
    print(f"layersmith: {printable(message)}", file=sys.stderr)
    JSON.write_error(kind, message, code)
    sys.exit(code)
