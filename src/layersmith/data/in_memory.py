"""Text in memory: datasets and lists are written to the user's cache as files, since everything else reads files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from layersmith.errors import InputError
from layersmith.run.digests import content_digest
from layersmith.run.user_cache import cache_folder

if TYPE_CHECKING:
    import datasets

# A file, a folder or a hub dataset by name; or a dataset, or documents, in memory.
Text: TypeAlias = "str | Path | datasets.Dataset | Sequence[str]"


def source_of(text: Text) -> str:
    """The path or name of a source of text.

    What is in memory is written to the user's cache under the digest of its content, so that a run can be resumed.

    Raises:
        InputError: The text is of another type, or empty.
    """
    if isinstance(text, str | Path):
        return str(text)
    import datasets  # takes more than a second, and most sources are files

    dataset = text if isinstance(text, datasets.Dataset) else None
    if dataset is None and not (isinstance(text, Sequence) and all(isinstance(t, str) for t in text)):
        raise InputError(
            f"the data are a {type(text).__name__}. Give a path, a hub dataset's name, a datasets.Dataset, or a list "
            "of strings."
        )
    if not len(text):
        raise InputError("the data are empty. Give some documents.")
    place = cache_folder("data") or Path(tempfile.mkdtemp(prefix="layersmith-data-"))
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        written = Path(temporary) / ("data.jsonl" if dataset is None else "data.parquet")
        if dataset is not None:
            dataset.to_parquet(str(written))
        else:
            written.write_text("".join(json.dumps({"text": t}) + "\n" for t in text), encoding="utf-8")
        file = place / f"{content_digest(written)}{written.suffix}"
        written.rename(file)
    return str(file)
