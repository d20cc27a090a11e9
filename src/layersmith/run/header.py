"""``run.json``: what a run was made from, and what each finished stage wrote.

It has a digest of its contents, so that damage is noticed. Where it is damaged it cannot be known what a run holds.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from layersmith.errors import InputError
from layersmith.run.artifacts import fingerprint, write_json

# Of the run folder's layout. A run of another format is refused.
FORMAT = 3
HEADER = "run.json"
_RESTORE = "Restore it, or run compress with another folder next to this one: it takes over what both have in common."


def versions() -> dict[str, str]:
    """Versions of everything that numbers depend on."""
    packages = ("layersmith", "torch", "transformers", "scipy", "safetensors")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
    }


def read_header(folder: Path) -> dict[str, Any]:
    """The header of a run.

    Raises:
        InputError: It is missing, differs from what was written, or is of another format.
    """
    path = folder / HEADER
    try:
        header = json.loads(path.read_bytes())
    except ValueError:
        header = None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). {_RESTORE}") from error
    if isinstance(header, dict):
        if header.get("format") != FORMAT and header.get("format") in range(FORMAT):
            raise InputError(
                f"{folder}: made by another version of layersmith. Choose another folder, or use that version."
            )
        if header.pop("digest", None) == fingerprint(header):
            return header
    raise InputError(f"{path}: differs from what was written. {_RESTORE}")


def write_header(folder: Path, header: dict[str, Any]) -> None:
    """Write the header of a run with its digest."""
    write_json(folder / HEADER, header | {"digest": fingerprint(header)})
