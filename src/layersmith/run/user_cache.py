"""Results that are computed once on a machine and kept in the user's cache folder, as JSON under a digest.

The key is a digest of everything that a result depends on, so that nothing has to be compared or thrown away when it
is read. A file that is missing, damaged or cannot be written is no error: the result is computed again.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from layersmith.errors import LayersmithError
from layersmith.run.artifacts import fingerprint, remove_leftovers, write_json

logger = logging.getLogger(__name__)


def cache_folder(kind: str) -> Path | None:
    """The folder for one kind of results; None if there is to be none.

    ``$LAYERSMITH_CACHE`` names the cache folder, and turns the cache off if it is empty. Otherwise it is
    ``layersmith`` in the user's cache.
    """
    chosen = os.environ.get("LAYERSMITH_CACHE")
    if chosen is not None:
        return Path(chosen).expanduser() / kind if chosen else None
    with suppress(RuntimeError):  # the user has no home folder
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(base) / "layersmith" / kind
    return None


def folder_for(kind: str) -> Path:
    """:func:`cache_folder`, or a folder that is removed when this process ends if there is to be no cache."""
    return cache_folder(kind) or _until_exit(kind)


@cache
def _until_exit(kind: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"layersmith-{kind}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def read(kind: str, key: str) -> Any:
    """The JSON data kept under ``key``; None if there are none, or they are not those that were written."""
    folder = cache_folder(kind)
    if folder is None:
        return None
    path = folder / f"{key}.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        payload = stored["payload"]
        return payload if stored["digest"] == fingerprint(payload) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.debug("%s: damaged, it is made again (%s)", path, error)
        return None


def write(kind: str, key: str, payload: Any) -> None:
    """Keep JSON data under ``key``, if the cache can be written."""
    folder = cache_folder(kind)
    if folder is None:
        return
    try:
        _clean(folder)
        write_json(folder / f"{key}.json", {"digest": fingerprint(payload), "payload": payload})
    except (OSError, LayersmithError) as error:
        logger.debug("%s: cannot be written (%s)", folder, error)


@cache
def _clean(folder: Path) -> None:
    """Remove what killed processes were writing; once in a process."""
    remove_leftovers(folder)
