"""Records: frozen dataclasses that check their values, for settings that people write and files that others read.

A record is a pydantic dataclass. Unknown fields are refused, numbers are not read from strings, and every error is a
:class:`UsageError` that names the field by its full path. ``dataclasses.replace`` checks new values in the same way.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, TypeVar, cast, dataclass_transform, get_args, get_origin, get_type_hints

import pydantic.dataclasses
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

from layersmith.errors import InputError, UsageError, brief, did_you_mean

T = TypeVar("T")

_MOST_PROBLEMS = 10

_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
# Pydantic speaks Python; those who write YAML know these types by other names.
_PLAIN_WORDS = {
    "valid tuple": "list",
    "valid array": "list",
    "a valid dictionary": "a mapping",
    "an object": "a mapping",
    "valid integer": "whole number",
    "valid ": "",
}


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def record(where: str = "") -> Callable[[type[T]], type[T]]:
    """Decorator that makes a class a record.

    Args:
        where: What error messages put before the path of a field, e.g. ``"recipe: search."``. Default: the class's name
            and a dot.
    """

    def decorate(cls: type[T]) -> type[T]:
        made = pydantic.dataclasses.dataclass(frozen=True, config=_CONFIG)(cls)
        validate = made.__init__

        @functools.wraps(validate)
        def checked(self: Any, *args: Any, **fields: Any) -> None:
            try:
                validate(self, *args, **fields)
            except ValidationError as error:
                raise UsageError(_explain(error, made, where or f"{cls.__name__}.")) from error

        made.__init__ = checked  # type: ignore[method-assign]
        return cast(type[T], made)

    return decorate


def parse(cls: type[T], data: object, where: str) -> T:
    """Build a record, or any other dataclass, from plain data.

    Args:
        cls: The dataclass.
        data: A mapping as ``json.load`` or ``yaml.safe_load`` return it.
        where: What error messages put before the path of a field, e.g. ``"recipe.yaml: "``.

    Raises:
        UsageError: an unknown field, a missing one, or a value of the wrong type or outside its range.
    """
    try:
        return cast(T, _adapter(cast(Any, cls)).validate_json(json.dumps(data, default=str)))
    except ValidationError as error:
        raise UsageError(_explain(error, cls, where)) from error
    except (TypeError, ValueError, RecursionError) as error:  # keys or numbers that JSON does not have
        raise UsageError(f"{where.rstrip('.: ')}: not plain data ({error}).") from error


def check(data: T, shape: Any, where: object) -> T:
    """Return JSON data that someone else may have written, if it has a shape.

    Args:
        data: The data.
        shape: A type that pydantic knows, e.g. ``dict[str, float]`` or a ``TypedDict``. Other keys than those of a
            ``TypedDict`` are allowed.
        where: The file.

    Raises:
        InputError: It has not.
    """
    try:
        _adapter(shape).validate_python(data, strict=True)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{brief(step)}" for step in detail["loc"])
        text, end = _problem(detail, None)
        raise InputError(f"{where}: {place.lstrip('.') or 'the data'} {text}{end}") from error
    return data


def to_data(record: Any) -> Any:
    """The JSON data of a dataclass: nested ones become dicts, tuples become lists."""
    return to_jsonable_python(record)


def field_names(record: Any) -> list[str]:
    """Names of a dataclass's fields, in order."""
    return [field.name for field in dataclasses.fields(record)]


@functools.cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _explain(error: ValidationError, cls: type, where: str) -> str:
    """One sentence for every field that is wrong."""
    problems: dict[tuple[str, str], list[str]] = {}  # of one field there are several where its type is a union
    for detail in error.errors(include_url=False):
        path, record = _place(cls, detail["loc"])
        text, end = _problem(detail, record)
        problems.setdefault((where + path if path else where.rstrip(".: "), end), []).append(text)
    more = [f"and {len(problems) - _MOST_PROBLEMS} more problems."] if len(problems) > _MOST_PROBLEMS else []
    lines = [
        f"{place}: {' or '.join(texts).replace(' or must be ', ' or ')}{end}"
        for (place, end), texts in list(problems.items())[:_MOST_PROBLEMS]
    ]
    return "\n".join(lines + more)


def _place(cls: Any, location: tuple[int | str, ...]) -> tuple[str, Any]:
    """The path of a field as users write it, and the record that has, or lacks, that field.

    Pydantic puts the names of a union's members into the path, which nobody wrote; they are left out.
    """
    path, annotation = "", cls
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif annotation is cls or get_origin(annotation) is dict:
            path += f".{step}" if path else step
            annotation = _annotation(cls, step) if step in field_names(cls) else None
            for inner in (annotation, *get_args(annotation)):
                if dataclasses.is_dataclass(inner):
                    cls = annotation = inner
    return path, cls


def _annotation(cls: Any, name: str) -> Any:
    """The type of a field of a record or of a plain dataclass."""
    fields = getattr(cls, "__pydantic_fields__", None)
    return get_type_hints(cls)[name] if fields is None else fields[name].annotation


def _problem(detail: ErrorDetails, record: Any) -> tuple[str, str]:
    """What is wrong with one field of a record, and how that sentence ends."""
    if detail["type"] == "unexpected_keyword_argument":
        name = str(detail["loc"][-1])
        renamed = getattr(record, "RENAMED", {})
        hint = f"It is now called {renamed[name]!r}." if name in renamed else did_you_mean(name, field_names(record))
        return f"unknown field {brief(name)!r}. {hint}", ""
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"]), ""
    if detail["type"] == "missing":
        return "is missing", "."
    if detail["type"] == "literal_error":
        return f"{brief(repr(detail['input']))} is not one of {detail['ctx']['expected']}", "."
    text = detail["msg"].removeprefix("Input ").replace("should be", "must be")
    for pydantic_words, plain in _PLAIN_WORDS.items():
        text = text.replace(pydantic_words, plain)
    return text, f", got {brief(repr(detail['input']))}."
