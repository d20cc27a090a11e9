"""A mixture: several sources with shares, read as one. It is a YAML file such as

    mixture:
      - {source: texts/, weight: 0.7}
      - {source: code.jsonl, weight: 0.3, field: body}

Weights are shares of tokens. Documents of the sources alternate so that any stretch of them has these shares, and the
mixture ends when one of its sources does. Paths are relative to the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import PositiveFloat

from layersmith.errors import UsageError
from layersmith.records import parse, record
from layersmith.untrusted import read_yaml

Document = TypeVar("Document")


@record()
class Part:
    """One source of a mixture.

    Attributes:
        source: File, folder or hub dataset; see :func:`layersmith.data.read.read_documents`.
        weight: Share of the tokens, relative to the weights of the other sources.
        field: Column that holds the text. By default it is looked for under its usual names.
        split: Split of a dataset.
    """

    source: str
    weight: PositiveFloat = 1.0
    field: str | None = None
    split: str = "train"


def read_mixture(source: str | Path) -> tuple[Part, ...] | None:
    """The parts of a mixture file; None if the source is something else.

    Raises:
        InputError: The file is not YAML.
        UsageError: It has an unknown key, or a value that makes no sense.
    """
    path = Path(source).expanduser()
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return None
    data = read_yaml(path, "mixture")
    if not isinstance(data, dict) or "mixture" not in data:
        return None
    if list(data) != ["mixture"] or not isinstance(data["mixture"], list) or not data["mixture"]:
        raise UsageError(f"{path}: expected one key, mixture, with a list of sources.")
    return tuple(_part(entry, f"{path}: mixture[{i}]", path.parent) for i, entry in enumerate(data["mixture"]))


def _part(entry: Any, where: str, folder: Path) -> Part:
    part = parse(Part, entry, f"{where}.")
    local = folder / Path(part.source).expanduser()
    return replace(part, source=str(local)) if local.exists() else part


def interleave(
    parts: Sequence[Mapping[Any, Document]], weights: Sequence[float], tokens: Sequence[Mapping[Any, float]]
) -> tuple[dict[Any, Document], int | None]:
    """Alternate the documents of all parts: the next one comes from the part that is furthest behind its share.

    Args:
        parts: Documents by digest. One that an earlier part also has is left out of the later part.
        weights: Weight of each part.
        tokens: Number of tokens of each document, by digest.

    Returns:
        The documents in their order, and the index of the part that ended before others did, if one did.
    """
    taken: dict[Any, Document] = {}
    seen: set[Any] = set()
    digests: list[list[Any]] = []
    for part in parts:
        digests.append([digest for digest in part if digest not in seen])
        seen.update(part)
    done, position = [0.0] * len(parts), [0] * len(parts)
    while True:
        i = min(range(len(parts)), key=lambda p: (done[p] / weights[p], p))
        if position[i] == len(digests[i]):
            left = any(position[p] < len(digests[p]) for p in range(len(parts)))
            return taken, i if left else None
        digest = digests[i][position[i]]
        taken[digest] = parts[i][digest]
        done[i] += tokens[i][digest]
        position[i] += 1
