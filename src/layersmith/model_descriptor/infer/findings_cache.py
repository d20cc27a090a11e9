"""Findings on disk, so that the experiments on a model run once on each machine and not in every process.

The key is a digest of the config, the code of the model, the code of layersmith, and the versions of PyTorch and
Transformers. Findings are stored as JSON, with classes by name.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import sys
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

from layersmith import modeling_layersmith, upstream
from layersmith.model_descriptor.conventions import NOT_STRUCTURE
from layersmith.model_descriptor.infer.findings import Findings
from layersmith.model_descriptor.stock import stock_class
from layersmith.run import user_cache
from layersmith.run.artifacts import file_digest, fingerprint, plain

logger = logging.getLogger(__name__)

_KIND = "descriptors"


def key_of(config: PretrainedConfig) -> str:
    """A digest of everything that the findings about a config's model depend on.

    Raises:
        UnsupportedModel: Transformers has no model for the config.
    """
    model_class = stock_class(config)
    return fingerprint(
        {
            "class": [type(config).__module__, type(config).__qualname__],
            "config": plain(config.to_dict(), NOT_STRUCTURE),
            "model": [model_class.__module__, model_class.__qualname__, _code_of(model_class.__module__)],
            "layersmith": _code_of_layersmith(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
    )


def read(key: str) -> Findings | None:
    """The findings under ``key``; None if nothing is stored or a class in it no longer exists."""
    stored = user_cache.read(_KIND, key)
    if stored is None:
        return None
    try:
        findings: Findings = _from_data(Findings, stored)
    except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        logger.debug("findings %s cannot be read: %s", key, error)
        return None
    return findings


def write(key: str, findings: Findings) -> None:
    """Store findings under ``key``, unless JSON cannot represent them."""
    try:
        stored = json.loads(json.dumps(_to_data(findings)))
        whole = _from_data(Findings, stored) == findings
    except (TypeError, ValueError, AttributeError, ImportError) as error:  # e.g. a class defined inside a function
        logger.debug("findings %s cannot be kept: %s", key, error)
        return
    if whole:
        user_cache.write(_KIND, key, stored)


# ---------------------------------------------------------------------------------------------- digests of code


@cache
def _code_of_layersmith() -> str:
    folder = Path(__file__).parents[1]
    files = [*folder.rglob("*.py"), Path(modeling_layersmith.__file__), Path(upstream.__file__)]
    return fingerprint({os.path.relpath(file, folder): file_digest(file) for file in files})


def _code_of(module_name: str) -> dict[str, str]:
    """Digests of a model's code: its file, and outside Transformers all loaded modules of the same package."""
    digests = {}
    for name in (module_name, *_same_package(module_name)):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and Path(file).is_file():
            digests[name] = file_digest(Path(file))
    return digests


def _same_package(module_name: str) -> Iterator[str]:
    top = module_name.partition(".")[0]
    if top == "transformers":
        return
    # transformers_modules has one package for each folder of remote code.
    package = module_name.rpartition(".")[0] if top == "transformers_modules" else top
    yield from (name for name in sorted(sys.modules) if name == package or name.startswith(f"{package}."))


# ---------------------------------------------------------------------------------------------- dataclasses as JSON


def _to_data(value: Any) -> Any:
    """Convert dataclasses to JSON data, without fields that are not compared."""
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    if dataclasses.is_dataclass(value):
        return {f.name: _to_data(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
    if isinstance(value, tuple | list):
        return [_to_data(part) for part in value]
    return {key: _to_data(part) for key, part in value.items()} if isinstance(value, dict) else value


def _from_data(kind: Any, stored: Any) -> Any:
    """Convert JSON data to a value of an annotated type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _from_data(hints[name], value) for name, value in stored.items()})  # type: ignore[operator]
    if origin is tuple:
        kinds = [parts[0]] * len(stored) if parts[-1] is Ellipsis else parts
        return tuple(_from_data(part_kind, part) for part_kind, part in zip(kinds, stored, strict=True))
    if origin in (types.UnionType, typing.Union):
        some = next(part for part in parts if part is not type(None))
        return None if stored is None else _from_data(some, stored)
    if origin is type:
        return _class_at(stored)
    return _tuples(stored) if kind is Any else stored


def _class_at(name: str) -> Any:
    module, _, qualname = name.partition(":")
    value: Any = importlib.import_module(module)
    for part in qualname.split("."):
        value = getattr(value, part)
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
