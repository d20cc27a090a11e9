"""Plain JSON data to frozen dataclasses and back, with errors that name the field.

It knows what our records need and no more: ``bool``, ``int``, ``float``, ``str``, ``Literal``, optional
values, tuples of one type, string-keyed dicts, and dataclasses inside dataclasses.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast

from layersmith.errors import UsageError, did_you_mean

T = TypeVar("T")


def parse(cls: type[T], data: object, where: str) -> T:
    """Build the dataclass ``cls`` from a mapping.

    Args:
        cls: a dataclass type whose field types are of the kinds named above.
        data: what ``json.load`` or ``yaml.safe_load`` gave.
        where: how messages name the place, e.g. ``"recipe.yaml"`` or ``"block_configs[3].ffn"``.

    Raises:
        UsageError: an unknown key, a missing one, or a value of the wrong type.
    """
    if not isinstance(data, dict):
        raise UsageError(f"{where}: expected a mapping with the fields of {cls.__name__}, got {data!r}.")
    field_types = _field_types(cast(Any, cls))
    for key in data:
        if key not in field_types:
            raise UsageError(f"{where}: unknown field {key!r} in {cls.__name__}. {did_you_mean(str(key), field_types)}")
    values = {key: _convert(field_types[key], value, f"{where}.{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise UsageError(f"{where}: {error}.") from error


def check_fields(record: Any) -> None:
    """Check every field of a dataclass instance against its annotation; for ``__post_init__``.

    Raises:
        UsageError: a field holds a value of another type.
    """
    for name, annotation in _field_types(cast(Any, type(record))).items():
        value = getattr(record, name)
        converted = _convert(annotation, value, f"{type(record).__name__}.{name}")
        if converted is not value:
            object.__setattr__(record, name, converted)


def to_data(record: Any) -> Any:
    """The JSON data of a record: dataclasses become dicts, tuples become lists."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {field.name: to_data(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, dict):
        return {key: to_data(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_data(value) for value in record]
    return record


def field_names(record: Any) -> list[str]:
    """The names of a record's fields, in order."""
    return [field.name for field in dataclasses.fields(record)]


@cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cast(Any, cls)) if field.init}


def _convert(annotation: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        problems = []
        for argument in arguments:
            if argument is type(None):
                continue
            try:
                return _convert(argument, value, where)
            except UsageError as error:
                problems.append(error)
        raise problems[-1]
    if origin is Literal:
        if value not in arguments:
            known = ", ".join(map(str, arguments))
            raise UsageError(f"{where}: {value!r} is not one of {known}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{where}: expected a list, got {value!r}.")
        converted = tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        return value if converted == value and isinstance(value, tuple) else converted
    if origin is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{where}: expected a mapping, got {value!r}.")
        return {str(key): _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(annotation):
        return value if isinstance(value, cast(type, annotation)) else parse(cast(type, annotation), value, where)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is int and isinstance(value, bool):
        raise UsageError(f"{where}: expected a whole number, got {value!r}.")
    if not isinstance(value, annotation):
        raise UsageError(f"{where}: expected {annotation.__name__}, got {value!r}.")
    return value
