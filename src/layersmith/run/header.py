"""``run.json``: what a run was made from, and what each finished stage wrote.

It has a digest of its contents, so that damage is noticed. Where it is damaged it cannot be known what a run holds.
"""

from __future__ import annotations

import platform
import reprlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict

from layersmith.errors import InputError
from layersmith.records import check
from layersmith.run.artifacts import fingerprint, write_json
from layersmith.run.digests import Record
from layersmith.untrusted import MAX_JSON_BYTES, parse_json, read_bytes

# Of the run folder's layout. A run of another format is refused.
FORMAT = 3
HEADER = "run.json"
_RESTORE = "Restore it, or run compress with another folder next to this one: it takes over what both have in common."


class _Parent(TypedDict):
    path: str
    identity: str


class _Data(TypedDict):
    source: str
    digest: str


class _Made(TypedDict):
    inputs: str
    files: Record


class Header(TypedDict):
    """What ``run.json`` holds."""

    parent: _Parent
    first_parent: NotRequired[str]
    data: _Data
    budget: dict[str, Any]
    recipe: dict[str, Any]
    seed: int
    versions: dict[str, str]
    working_directory: str
    descriptor: dict[str, Any] | None
    stages: dict[str, _Made]
    cards: dict[str, dict[str, bool]]


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
        header = parse_json(read_bytes(path, MAX_JSON_BYTES))
    except ValueError:
        header = None
    except InputError as error:
        raise InputError(f"{error} {_RESTORE}") from error
    if isinstance(header, dict):
        if header.get("format") != FORMAT and header.get("format") in range(FORMAT):
            raise InputError(
                f"{folder}: made by another version of layersmith. Choose another folder, or use that version."
            )
        if header.pop("digest", None) == fingerprint(header):
            return cast(dict[str, Any], check(header, Header, path))
    raise InputError(f"{path}: differs from what was written. {_RESTORE}")


def first_parent(header: dict[str, Any]) -> str:
    """Path or hub name of the first parent; after several rounds the parent is the child of the round before."""
    return str(header.get("first_parent") or header["parent"]["path"])


def write_header(folder: Path, header: dict[str, Any]) -> None:
    """Write the header of a run with its digest."""
    write_json(folder / HEADER, header | {"digest": fingerprint(header)})


def changes(old: Any, new: Any, where: str = "") -> list[str]:
    """What differs between two pieces of JSON data, each as the path of a value, its old and its new value.

    >>> changes({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
    ['a.b: 1 => 3']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [c for k in keys for c in changes(old.get(k), new.get(k), f"{where}.{k}" if where else k)]
    before, after = (reprlib.repr(value) for value in (old, new))
    return [] if old == new else [f"{where}: {before} => {after}"]


def refuse_another(folder: Path, header: dict[str, Any]) -> None:
    """Raises: InputError: The run was made from something else, with what differs."""
    before = read_header(folder)
    another = "Choose another folder"
    shares = f"{another}: next to this one it shares the work that both have in common"
    for name, mend in (
        ("recipe", f"{shares}. Or restore the recipe"),
        ("parent", another),
        ("descriptor", f"{shares}. Or give the same descriptor"),
        ("data", another),
        ("budget", f"{shares}. Or ask this run for another budget with `layersmith search`"),
        ("versions", f"{another}, or run with the versions that run.json names"),
    ):
        contents = {"parent": "identity", "data": "digest"}.get(name)  # not where they are
        old, new = ((h.get(name) or {}) if contents is None else h[name][contents] for h in (before, header))
        if old != new:
            what = f" ({'; '.join(changes(old, new)[:3])})" if contents is None else ""
            raise InputError(f"{folder}: holds a run with another {name}{what}. {mend}.")
