"""Read files that someone else may have made: bounded before memory is taken, and confined to their folder.

Every error is one sentence about the file. What a JSON file must hold is checked by :func:`layersmith.records.check`.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any, NoReturn

import yaml

from layersmith.errors import InputError, brief, first_line

# Scores of ten thousand alternatives on a hundred rows take about 30 MB; a config.json of the Hub under 1 MB.
MAX_JSON_BYTES = 256 * 1024**2
# PyYAML reads about 100 kB in a second.
MAX_YAML_BYTES = 256 * 1024
# Lists and mappings within each other. Python's own limit depends on the caller's stack.
MAX_DEPTH = 100
# As in the safetensors library.
MAX_HEADER_BYTES = 100_000_000


def read_bytes(path: Path, most: int) -> bytes:
    """The contents of a regular file.

    Raises:
        InputError: It is missing, unreadable, no file, or longer than ``most`` bytes.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a file.")
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(data) > most:
        raise InputError(f"{path}: more than {most:,} bytes, which no such file needs.")
    return data


def parse_json(text: str | bytes) -> Any:
    """JSON data.

    Raises:
        ValueError: It is no JSON of finite numbers, or nested too deeply.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from error
    check_depth(data)
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def check_depth(data: Any) -> None:
    """Raises: ValueError: Lists and mappings are nested too deeply."""
    level, depth = [data], 0
    while level := [
        value
        for part in level
        for value in (part.values() if isinstance(part, dict) else part if isinstance(part, list) else ())
        if isinstance(value, dict | list)
    ]:
        depth += 1
        if depth >= MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")


class YAMLLoader(yaml.SafeLoader):
    """Plain YAML data without aliases or repeated keys, of limited depth.

    ``1e-4`` is a number, as in YAML 1.2; not so in YAML 1.1.
    """

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not allowed", self.peek_event().start_mark
            )
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


YAMLLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """YAML data.

    Raises:
        ValueError: It is no YAML, longer than ``MAX_YAML_BYTES``, nested too deeply, or has aliases.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"more than {MAX_YAML_BYTES:,} characters")
    try:
        return yaml.load(text, YAMLLoader)
    except (yaml.YAMLError, RecursionError, OverflowError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())) from error  # PyYAML's constructors let some of these through


def read_yaml(path: Path, what: str) -> Any:
    """The data of a YAML file; ``what`` names its kind in messages, e.g. ``"recipe"``.

    Raises:
        InputError: It is missing, unreadable, too long or deep, has aliases, or is no YAML.
    """
    if not path.exists():
        raise InputError(f"{path}: no such {what}.")
    try:
        return parse_yaml(read_bytes(path, MAX_YAML_BYTES).decode("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not a YAML {what} ({error}).") from error


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the offset of its data in bytes.

    Raises:
        InputError: It is missing or unreadable, or the header is damaged.
    """
    try:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > min(MAX_HEADER_BYTES, path.stat().st_size):
                raise InputError(f"{path}: truncated or damaged (a header of {size:,} bytes). Download it again.")
            header = parse_json(file.read(size))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    except (struct.error, ValueError) as error:
        raise InputError(f"{path}: truncated or damaged ({first_line(error)}). Download it again.") from error
    if not isinstance(header, dict) or not all(_is_tensor(e) for name, e in header.items() if name != "__metadata__"):
        raise InputError(f"{path}: damaged (its header is not a mapping of tensors). Download it again.")
    return header, 8 + size


def _is_tensor(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    lists = entry.get("shape"), entry.get("data_offsets")
    whole = all(isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers) for numbers in lists)
    return whole and len(entry["data_offsets"]) == 2


def inside(folder: Path, name: str, where: object) -> Path:
    """A file that another file names, relative to a folder.

    A link that lies in the folder is followed: the Hub's cache consists of them.

    Args:
        folder: The folder.
        name: The relative path.
        where: The file and field that name it.

    Raises:
        InputError: The name leads out of the folder.
    """
    path = Path(name)
    is_name = name and name.isprintable() and all(len(part.encode()) < 256 for part in path.parts)
    if not is_name or path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where}: names the file {brief(repr(name))}, which is not in {folder}.")
    return folder / path
