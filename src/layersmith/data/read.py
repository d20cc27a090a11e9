"""Reading documents: text, JSONL and Parquet files, folders of them, saved datasets and hub datasets.

Documents come one at a time, so a source may be larger than memory. Files are read by ``json`` and ``pyarrow``, saved
and hub datasets through ``datasets``. (``datasets`` could read the files too, but takes four times as long for JSONL,
names no line of a damaged file, and refuses records of different kinds in one file; docs/log.md has the figures.)
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from layersmith.errors import InputError, UsageError, first_line, some_of
from layersmith.foreign import foreign_code

Document = str | list[dict[str, str]]

# Names under which datasets keep what we look for, in the order in which they are tried.
_TEXT_FIELDS = ("text", "content", "document", "code")
_CHAT_FIELDS = ("messages", "conversations")
_PROMPT_FIELDS = ("prompt", "instruction", "question")
_ANSWER_FIELDS = ("completion", "response", "output", "answer")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
# A text file longer than this is several documents, so that there is something to divide among the splits.
_DOCUMENT_CHARACTERS = 16_000
# Text files are read in pieces of this many characters.
_PIECE_CHARACTERS = 1 << 20
# A .json file that is one array is parsed as a whole, which takes several times its size in memory.
_WHOLE_JSON_BYTES = 2 << 30
# Of a folder larger than what is wanted, at least this many files are read, so that the text is not all of one kind.
_FILES_AT_LEAST = 64


def read_documents(
    source: str | Path, *, field: str | None = None, split: str = "train", limit: int | None = None, seed: int = 0
) -> Iterator[Document]:
    """Yield the documents of a file, a folder, or a hub dataset: texts, or chats as lists of messages.

    Args:
        source: A text, JSONL or Parquet file; a folder of such files, or one that ``datasets`` saved; otherwise the
            name of a hub dataset, ``org/name`` or ``org/name:config``.
        field: Column to read. By default it is looked for under its usual names.
        split: Split of a dataset.
        limit: Number of characters after which reading stops. A folder that holds more is read from files chosen by
            ``seed``, an equal share from each.
        seed: Seed of that choice.

    Raises:
        InputError: The source does not exist, holds nothing, or is damaged.
        UsageError: It has no such column.
    """
    path = Path(source).expanduser()
    if path.is_file():
        yield from _first(_read_file(path, field), limit)
    elif path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        yield from _first(_read_saved_dataset(path, field, split), limit)
    elif path.is_dir():
        for file, share in _shares(_files_in(path), limit, seed):
            yield from _first(_read_file(file, field, skip_binary=True), share)
    elif _looks_like_a_path(str(source)):
        raise InputError(f"{source}: no such file or folder.")
    else:
        yield from _first(_read_hub_dataset(str(source), field, split), limit)


def text_of(document: Document) -> str:
    """A document as one string; a chat as JSON."""
    return document if isinstance(document, str) else json.dumps(document, sort_keys=True)


def _first(documents: Iterator[Document], limit: int | None) -> Iterator[Document]:
    """Documents until they hold ``limit`` characters."""
    characters = 0
    for document in documents:
        yield document
        characters += len(text_of(document))
        if limit is not None and characters > limit:
            return


def _looks_like_a_path(text: str) -> bool:
    return text.startswith(("/", ".", "~")) or text.count("/") != 1 or bool(Path(text.split(":")[0]).suffix)


# ---------------------------------------------------------------------------------------------- folders


def _files_in(folder: Path) -> list[Path]:
    """All files below a folder, but for hidden ones."""
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise InputError(f"{folder}: an empty folder. Put text, JSONL or Parquet files there.")
    return files


def _shares(files: Sequence[Path], limit: int | None, seed: int) -> Iterator[tuple[Path, int | None]]:
    """Files to read, and how many characters of each; all of all files where they hold no more than ``limit``.

    Otherwise files are drawn until there are enough of them and they hold enough. The smallest comes first, and each
    gets an equal share of what is left, so that what a small file does not fill goes to the larger ones.
    """
    sizes = {file: file.stat().st_size for file in files}
    if limit is None or sum(sizes.values()) <= limit:
        yield from ((file, None) for file in files)
        return
    drawn: list[Path] = []
    in_turn = list(files)
    random.Random(seed).shuffle(in_turn)
    held = 0
    for file in in_turn:
        if len(drawn) >= _FILES_AT_LEAST and held >= limit:
            break
        drawn.append(file)
        held += sizes[file]
    drawn.sort(key=lambda file: (sizes[file], file))
    left = limit
    for number, file in enumerate(drawn):
        share = left // (len(drawn) - number)
        left -= min(share, sizes[file])
        yield file, share


# ---------------------------------------------------------------------------------------------- files


def _read_file(path: Path, field: str | None, skip_binary: bool = False) -> Iterator[Document]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _documents(_read_parquet(path), field, str(path))
        elif suffix in _LINE_SUFFIXES:
            yield from _documents(_read_json(path), field, str(path))
        elif not (skip_binary and _is_binary(path)):  # a picture or an archive beside the texts
            yield from _read_text(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text, JSONL or Parquet.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error


def _is_binary(path: Path) -> bool:
    """Whether a file is not UTF-8 text."""
    try:
        with open(path, encoding="utf-8") as file:
            while file.read(_PIECE_CHARACTERS):
                pass
    except UnicodeDecodeError:
        return True
    return False


def _read_text(path: Path) -> Iterator[str]:
    """A text file in documents, each cut at a blank line if there is one near, else at the end of a line."""
    with open(path, encoding="utf-8", newline=None) as file:
        text = file.read(_PIECE_CHARACTERS)
        while text:
            if len(text) <= _DOCUMENT_CHARACTERS and (more := file.read(_PIECE_CHARACTERS)):
                text += more
            end = _end_of_document(text)
            yield text[:end]
            text = text[end:]


def _end_of_document(text: str) -> int:
    if len(text) <= _DOCUMENT_CHARACTERS:
        return len(text)
    for separator in ("\n\n", "\n"):
        position = text.rfind(separator, _DOCUMENT_CHARACTERS // 2, _DOCUMENT_CHARACTERS)
        if position >= 0:
            return position + len(separator)
    return _DOCUMENT_CHARACTERS


def _read_json(path: Path) -> Iterator[Any]:
    """The records of a JSONL file, or of a ``.json`` file that is one array or one record."""
    with open(path, encoding="utf-8") as file:
        if path.suffix.lower() == ".json" and path.stat().st_size <= _WHOLE_JSON_BYTES:
            try:
                whole = json.load(file)
            except (ValueError, RecursionError):
                file.seek(0)  # JSON lines under another name
            else:
                yield from whole if isinstance(whole, list) else [whole]
                return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path}, line {number}: not JSON ({first_line(error)}).") from error


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged, or not Parquet ({str(error).splitlines()[0]}).") from error


# ---------------------------------------------------------------------------------------------- datasets


def _read_saved_dataset(path: Path, field: str | None, split: str) -> Iterator[Document]:
    import datasets  # takes more than a second, and most sources are files

    with foreign_code("does the saved dataset load?", refusal_is_answer=True) as attempt:
        loaded = datasets.load_from_disk(str(path))
    if attempt.failed:
        raise InputError(f"{path}: the saved dataset cannot be read ({attempt.reason}).") from attempt.error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UsageError(f"{path}: no split {split!r}. It has {', '.join(loaded)}.")
        loaded = loaded[split]
    yield from _documents(iter(loaded), field, str(path))


def _read_hub_dataset(name: str, field: str | None, split: str) -> Iterator[Document]:
    import datasets  # takes more than a second, and most sources are files

    repository, _, config = name.partition(":")
    with foreign_code("does the hub have this dataset?", refusal_is_answer=True) as attempt:
        records = iter(datasets.load_dataset(repository, config or None, split=split, streaming=True))
        first = next(records, None)
    if attempt.failed:  # offline, gated, or misspelt
        raise InputError(
            f"{name}: neither a file or folder here nor a dataset that the hub gives ({attempt.reason})."
        ) from attempt.error
    if first is not None:
        yield from _documents(chain([first], records), field, name)


# ---------------------------------------------------------------------------------------------- records


def _documents(records: Iterable[Any], field: str | None, where: str) -> Iterator[Document]:
    for record in records:
        if isinstance(record, str):
            yield record
        elif isinstance(record, Mapping):
            yield _document(record, field, where)
        else:
            raise InputError(f"{where}: a record is {type(record).__name__}, not text or a mapping of fields.")


def _document(record: Mapping[str, Any], field: str | None, where: str) -> Document:
    if field is not None:
        if field not in record:
            raise UsageError(f"{where}: no field {field!r}. There are {some_of(record)}.")
        value = record[field]
        return _messages(value, where) if isinstance(value, list | tuple) else str(value or "")
    for name in _CHAT_FIELDS:
        if isinstance(record.get(name), list | tuple):
            return _messages(record[name], where)
    for name in _TEXT_FIELDS:
        if isinstance(record.get(name), str):
            return str(record[name])
    prompt = next((record[name] for name in _PROMPT_FIELDS if isinstance(record.get(name), str)), None)
    answer = next((record[name] for name in _ANSWER_FIELDS if isinstance(record.get(name), str)), None)
    if prompt is not None and answer is not None:
        if isinstance(record.get("input"), str) and record["input"]:
            prompt = f"{prompt}\n\n{record['input']}"
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    raise UsageError(f"{where}: no field with text or messages. There are {some_of(record)}; name one.")


def _messages(turns: Sequence[Any], where: str) -> list[dict[str, str]]:
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise InputError(f"{where}: a chat message is {turn!r}, not a mapping with role and content.")
        role = turn.get("role") or _SHAREGPT_ROLES.get(str(turn.get("from")), turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if role is None or content is None:
            raise InputError(f"{where}: a chat message has no role and content: {dict(turn)!r}.")
        messages.append({"role": str(role), "content": _content(content)})
    return messages


def _content(content: Any) -> str:
    """The text of a message, whose content may be a list of parts of which some are text."""
    if not isinstance(content, list | tuple):
        return str(content)
    return "".join(str(part.get("text") or "") if isinstance(part, Mapping) else str(part) for part in content)
