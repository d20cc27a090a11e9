"""Findings on disk, so that a model is experimented with once on a machine and not once a process.

A file's name is a digest of all that findings depend on: the config, the code of the model, our own code, and the
versions of PyTorch and Transformers. So nothing has to be told apart or thrown away when it is read. It is JSON, and
classes are stored by name. What cannot be read, or written, is as if it were not there.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import PretrainedConfig

import layersmith
from layersmith import modeling_layersmith
from layersmith.errors import LayersmithError
from layersmith.model_descriptor.stock import stock_class
from layersmith.run.artifacts import file_digest, fingerprint, plain, write_json

T = TypeVar("T")

_NOT_STRUCTURE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def cache_folder() -> Path | None:
    """Where findings are kept: in ``$LAYERSMITH_CACHE``, else in the user's cache; None if the variable is empty."""
    own = os.environ.get("LAYERSMITH_CACHE")
    if own is not None:
        return Path(own).expanduser() / "descriptors" if own else None
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no home
        return None
    return Path(base) / "layersmith" / "descriptors"


def key_of(config: PretrainedConfig) -> str:
    """A digest of all that the findings of a config's model depend on.

    Raises:
        UnsupportedModel: Transformers has no model for the config.
    """
    model_class = stock_class(config)
    return fingerprint(
        {
            "class": [type(config).__module__, type(config).__qualname__],
            "config": plain(config.to_dict(), _NOT_STRUCTURE),
            "model": [model_class.__module__, model_class.__qualname__, _code_of(model_class.__module__)],
            "layersmith": [layersmith.__version__, _own_code()],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
    )


def read(key: str, kind: type[T]) -> T | None:
    """The dataclass that was written under ``key``; None if there is none that can be read whole."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        stored = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        if stored["digest"] != fingerprint(stored["findings"]):
            return None
        return _made(kind, stored["findings"])
    except Exception:  # damaged, not ours, or of classes that are gone; it can be made again
        return None


def write(key: str, value: Any) -> None:
    """Keep a dataclass under ``key``, where that is possible; fields that do not count in comparisons are left out."""
    folder = cache_folder()
    if folder is None:
        return
    try:
        stored = json.loads(json.dumps(_stored(value)))
        if _made(type(value), stored) == value:  # else there is something in it that JSON does not hold
            write_json(folder / f"{key}.json", {"digest": fingerprint(stored), "findings": stored})
    except (LayersmithError, OSError, TypeError, ValueError, ImportError, AttributeError):
        return


# ---------------------------------------------------------------------------------------------- digests of code


@cache
def _own_code() -> str:
    folder = Path(__file__).parents[1]
    files = [*folder.rglob("*.py"), Path(modeling_layersmith.__file__)]
    return fingerprint({os.path.relpath(file, folder): file_digest(file) for file in files})


def _code_of(module_name: str) -> dict[str, str]:
    """Digests of a model's code: its own file, and outside Transformers all that belongs to it."""
    found = {}
    for name in (module_name, *_belonging(module_name)):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and Path(file).is_file():
            found[name] = file_digest(Path(file))
    return found


def _belonging(module_name: str) -> Iterator[str]:
    top = module_name.partition(".")[0]
    if top == "transformers":
        return
    # Below transformers_modules lie the folders of all remote code, each a package.
    package = module_name.rpartition(".")[0] if top == "transformers_modules" else top
    yield from (name for name in sorted(sys.modules) if name == package or name.startswith(f"{package}."))


# ---------------------------------------------------------------------------------------------- dataclasses as JSON


def _stored(value: Any) -> Any:
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    if dataclasses.is_dataclass(value):
        return {f.name: _stored(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
    if isinstance(value, tuple | list):
        return [_stored(part) for part in value]
    return {key: _stored(part) for key, part in value.items()} if isinstance(value, dict) else value


def _made(kind: Any, stored: Any) -> Any:
    """The value of an annotated type that was stored."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _made(hints[name], value) for name, value in stored.items()})  # type: ignore[operator]
    if origin is tuple:
        kinds = [parts[0]] * len(stored) if parts[-1] is Ellipsis else parts
        return tuple(_made(own, part) for own, part in zip(kinds, stored, strict=True))
    if origin in (types.UnionType, typing.Union):
        return None if stored is None else _made(next(own for own in parts if own is not type(None)), stored)
    if origin is type:
        return _class_at(stored)
    return _tuples(stored) if kind is Any else stored


def _class_at(name: str) -> Any:
    module, _, qualname = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
