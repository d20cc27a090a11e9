"""Text, chat and token data: read, split by document, tokenized, packed.

Rows are full: documents follow each other, each closed by the end token, cut every T tokens. Splits are dealt whole
documents, so no document is in two of them, and documents of equal text count as one.

Shapes: N rows, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layersmith import schema
from layersmith.data.mixture import interleave, read_mixture
from layersmith.data.overlap import without_copies
from layersmith.errors import InputError, UsageError
from layersmith.recipe import Overlap

if TYPE_CHECKING:
    import torch

_TEXT_FIELDS = ("text", "content", "document", "code")
_CHAT_FIELDS = ("messages", "conversations")
_PROMPT_FIELDS = ("prompt", "instruction", "question")
_ANSWER_FIELDS = ("completion", "response", "output", "answer")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_TOKEN_SUFFIXES = (".npy", ".safetensors")
# A text file longer than this is several documents, so that splits have something to deal.
_DOCUMENT_CHARACTERS = 16_000
# Of a streamed dataset no more is read than this many characters a token that is wanted.
_CHARACTERS_PER_TOKEN = 12
_SPLITS = ("evaluation", "calibration", "scoring", "training")

Document = str | list[dict[str, str]]


@dataclass(frozen=True, eq=False)
class TokenSplits:
    """Rows of token ids ``[N, T]`` int64 for each purpose; no document is in two of them.

    Attributes:
        training: for distillation; it may have no rows.
        description: where they come from, their sizes and digests, and warnings.
    """

    calibration: torch.Tensor
    scoring: torch.Tensor
    evaluation: torch.Tensor
    training: torch.Tensor
    description: dict[str, Any]


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # every tokenizer library has errors of its own for a missing or broken file
        raise InputError(
            f"{path}: its tokenizer cannot be loaded. Put tokenizer.json and tokenizer_config.json beside the weights."
        ) from error
    if len(tokenizer) == 0:
        raise InputError(f"{path}: its tokenizer is empty. Put the model's tokenizer.json beside the weights.")
    return tokenizer


def check_vocabulary(num_tokens: int, vocab_size: int) -> None:
    """Raises: InputError: the data has token ids that the model has no embedding for."""
    if num_tokens > vocab_size:
        raise InputError(
            f"the data has token id {num_tokens - 1}, but the model knows {vocab_size}. "
            "Use the tokenizer that belongs to the model."
        )


# ---------------------------------------------------------------------------------------------- reading


def read_documents(source: str | Path, *, field: str | None = None, split: str = "train") -> Iterator[Document]:
    """The documents of a file, a folder, or a hub dataset: texts, or chats as lists of messages.

    Args:
        source: a text, JSONL or Parquet file; a folder of them, or one that ``datasets`` saved; else a hub name,
            ``org/name`` or ``org/name:config``.
        field: the column to read; default: found by its usual names.
        split: of a dataset.

    Raises:
        InputError: nothing there, nothing in it, or it is damaged.
        UsageError: no such column.
    """
    path = Path(source).expanduser()
    if path.is_file():
        yield from _read_file(path, field)
    elif path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        yield from _read_saved_dataset(path, field, split)
    elif path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not files:
            raise InputError(f"{source}: an empty folder. Put text, JSONL or Parquet files there.")
        for file in files:
            yield from _read_file(file, field, in_folder=True)
    elif _looks_like_a_path(str(source)):
        raise InputError(f"{source}: no such file or folder.")
    else:
        yield from _read_hub_dataset(str(source), field, split)


def _looks_like_a_path(text: str) -> bool:
    return text.startswith(("/", ".", "~")) or text.count("/") != 1 or bool(Path(text.split(":")[0]).suffix)


def _read_file(path: Path, field: str | None, in_folder: bool = False) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _records(_read_parquet(path), field, str(path))
    elif suffix in _RECORD_SUFFIXES:
        yield from _records(_read_json_lines(path), field, str(path))
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            if in_folder:
                return  # a picture or an archive beside the texts
            raise InputError(f"{path}: not UTF-8 text, JSONL or Parquet.") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
        yield from _cut(text)


def _cut(text: str) -> Iterator[str]:
    """A long text in pieces, cut at a blank line if there is one near, else at a line's end."""
    start = 0
    while start < len(text):
        end = start + _DOCUMENT_CHARACTERS
        if end < len(text):
            for separator in ("\n\n", "\n"):
                found = text.rfind(separator, start + _DOCUMENT_CHARACTERS // 2, end)
                if found >= 0:
                    end = found + len(separator)
                    break
        yield text[start:end]
        start = end


def _read_json_lines(path: Path) -> Iterator[Any]:
    with open(path, encoding="utf-8") as file:
        try:
            if path.suffix.lower() == ".json" and (whole := _whole_json(file.read())) is not None:
                yield from whole
                return
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise InputError(f"{path}, line {number}: not JSON ({error}).") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8.") from error


def _whole_json(text: str) -> list[Any] | None:
    try:
        data = json.loads(text)
    except ValueError:
        return None
    return data if isinstance(data, list) else [data]


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged, or not Parquet ({str(error).splitlines()[0]}).") from error


def _read_saved_dataset(path: Path, field: str | None, split: str) -> Iterator[Document]:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UsageError(f"{path}: no split {split!r}. It has {', '.join(loaded)}.")
        loaded = loaded[split]
    yield from _records(iter(loaded), field, str(path))


def _read_hub_dataset(name: str, field: str | None, split: str) -> Iterator[Document]:
    import datasets

    repository, _, config = name.partition(":")
    try:
        stream = datasets.load_dataset(repository, config or None, split=split, streaming=True)
        records = iter(stream)
        first = next(records, None)
    except Exception as error:  # offline, gated, misspelt: each layer below has its own error
        raise InputError(
            f"{name}: neither a file or folder here nor a dataset that the hub gives ({error})."
        ) from error
    if first is not None:
        yield from _records(_chain(first, records), field, name)


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _records(records: Iterable[Any], field: str | None, where: str) -> Iterator[Document]:
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
            raise UsageError(f"{where}: no field {field!r}. There are {', '.join(map(str, record))}.")
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
    raise UsageError(f"{where}: no field with text or messages. There are {', '.join(map(str, record))}; name one.")


def _messages(value: Sequence[Any], where: str) -> list[dict[str, str]]:
    messages = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise InputError(f"{where}: a chat message is {turn!r}, not a mapping with role and content.")
        role = turn.get("role") or _SHAREGPT_ROLES.get(str(turn.get("from")), turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if role is None or content is None:
            raise InputError(f"{where}: a chat message has no role and content: {dict(turn)!r}.")
        messages.append({"role": str(role), "content": str(content)})
    return messages


# ---------------------------------------------------------------------------------------------- rows


def prepare(
    source: str | Path,
    tokenizer: Any,
    *,
    sequence_length: int,
    calibration_sequences: int,
    scoring_sequences: int,
    evaluation_sequences: int,
    seed: int,
    training_sequences: int = 0,
    evaluation_source: str | Path | None = None,
    overlap: Overlap = "allow",
    field: str | None = None,
    split: str = "train",
) -> TokenSplits:
    """Rows of ``sequence_length`` tokens for calibration, scoring, evaluation and training.

    Documents are put in an order that the seed and their text decide, then dealt: evaluation first and training last,
    so that their rows do not change when another's grow. Training takes what the others leave; where that is nothing,
    or there is too little text even for them, every split gets its share, training no more than calibration asks for.

    Args:
        source: see :func:`read_documents`; also ``.npy`` or ``.safetensors`` (``tokens``) files of token ids.
        tokenizer: of the parent.
        sequence_length: T.
        calibration_sequences, scoring_sequences, evaluation_sequences: rows of each.
        seed: of the order.
        training_sequences: rows of training; 0 for none.
        evaluation_source: where the evaluation rows come from instead; its documents are taken out of the source.
        overlap: what to do about rows that are copied from evaluation's; see :mod:`layersmith.data.overlap`.
        field, split: see :func:`read_documents`.

    Raises:
        InputError: nothing there, damaged, or too little for a row each; rows that are copied from evaluation's, if
            they are refused.
        UsageError: no such field; chats for a tokenizer without a chat template.
    """
    wanted = {
        "evaluation": evaluation_sequences,
        "calibration": calibration_sequences,
        "scoring": scoring_sequences,
        "training": training_sequences,
    }
    warnings: list[str] = []
    if is_tokens := holds_tokens(source):
        rows = _deal_rows(_read_tokens(Path(source), sequence_length), wanted, seed, str(source), warnings)
    else:
        budget = sum(wanted.values()) * sequence_length * _CHARACTERS_PER_TOKEN
        documents = _ordered(source, tokenizer, seed, field, split, budget, warnings)
        held_out: dict[bytes, Document] = {}
        if evaluation_source is not None:
            held_out = _ordered(evaluation_source, tokenizer, seed, None, split, budget, warnings)
        documents = {digest: text for digest, text in documents.items() if digest not in held_out}
        rows = _deal(documents, held_out, tokenizer, wanted, sequence_length, str(source), warnings)
    others = {name: rows[name] for name in _SPLITS if name != "evaluation"}
    spelling = None if is_tokens else tokenizer
    kept, copied = without_copies(others, rows["evaluation"], spelling, overlap, str(source), warnings)
    rows |= kept
    description = {
        "source": str(source),
        "evaluation_source": None if evaluation_source is None else str(evaluation_source),
        "mixture": schema.to_data(read_mixture(source)),
        "sequence_length": sequence_length,
        "seed": seed,
        "sequences": {name: len(rows[name]) for name in _SPLITS},
        "sha256": {name: _digest(rows[name]) for name in _SPLITS},
        "overlap": copied,
        "warnings": warnings,
    }
    return TokenSplits(rows["calibration"], rows["scoring"], rows["evaluation"], rows["training"], description)


def holds_tokens(source: str | Path) -> bool:
    """Whether a source is a file of token ids."""
    return Path(source).suffix in _TOKEN_SUFFIXES and Path(source).is_file()


def evaluation_rows(
    source: str | Path,
    tokenizer: Any,
    *,
    sequence_length: int,
    sequences: int,
    seed: int,
    field: str | None = None,
    split: str = "train",
) -> torch.Tensor:
    """The rows that :func:`prepare` deals to evaluation, ``[N, T]``; all of the source may be used.

    Raises:
        InputError: nothing there, damaged, or too little for one row.
        UsageError: no such field; chats for a tokenizer without a chat template.
    """
    budget = sequences * sequence_length * _CHARACTERS_PER_TOKEN
    documents = _ordered(source, tokenizer, seed, field, split, budget, [])
    rows, _ = _fill(_encoded(documents.values(), tokenizer, str(source)), sequences, sequence_length)
    if not len(rows):
        raise InputError(f"{source}: too little text for one row of {sequence_length} tokens. Give more text.")
    return rows


def _digest(rows: torch.Tensor) -> str:
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def _ordered(
    source: str | Path,
    tokenizer: Any,
    seed: int,
    field: str | None,
    split: str,
    budget: int,
    warnings: list[str],
) -> dict[bytes, Document]:
    """Distinct documents by digest, in an order that depends on the seed and the texts alone; those of a mixture
    alternate.
    """
    mixture = read_mixture(source)
    if mixture is None:
        return _ordered_part(source, seed, field, split, budget)
    parts = [_ordered_part(part.source, seed, part.field, part.split, budget) for part in mixture]
    tokens = [_estimated_tokens(part, tokenizer, str(source)) for part in parts]
    documents, ended = interleave(parts, [part.weight for part in mixture], tokens)
    if ended is not None:
        warnings.append(f"{source}: {mixture[ended].source} ends first, and the mixture with it.")
    return documents


def _estimated_tokens(documents: Mapping[bytes, Document], tokenizer: Any, where: str) -> dict[bytes, float]:
    """Tokens of each document, from its length and what the first few have for theirs."""
    sample = list(islice(documents.values(), 64))
    characters = sum(len(_text_of(document)) for document in sample)
    rate = sum(map(len, _encoded(sample, tokenizer, where))) / max(1, characters)
    return {digest: rate * len(_text_of(document)) for digest, document in documents.items()}


def _text_of(document: Document) -> str:
    return document if isinstance(document, str) else json.dumps(document, sort_keys=True)


def _ordered_part(source: str | Path, seed: int, field: str | None, split: str, budget: int) -> dict[bytes, Document]:
    is_local = Path(source).expanduser().exists()
    documents: dict[bytes, Document] = {}
    characters = 0
    for document in read_documents(source, field=field, split=split):
        text = _text_of(document)
        if not text.strip():
            continue
        documents.setdefault(hashlib.sha256(text.encode()).digest(), document)
        characters += len(text)
        if not is_local and characters > 4 * budget:
            break
    if not documents:
        raise InputError(f"{source}: no text in it. Give a file or folder with text.")
    digests = sorted(documents)
    random.Random(seed).shuffle(digests)
    return {digest: documents[digest] for digest in digests}


def _deal(
    documents: dict[bytes, Document],
    held_out: dict[bytes, Document],
    tokenizer: Any,
    wanted: Mapping[str, int],
    length: int,
    where: str,
    warnings: list[str],
) -> dict[str, torch.Tensor]:
    pending = dict(wanted)
    rows: dict[str, torch.Tensor] = {}
    if held_out:
        encoded = _encoded(held_out.values(), tokenizer, where)
        rows["evaluation"] = _fill(encoded, pending.pop("evaluation"), length)[0]
    encoded = _encoded(documents.values(), tokenizer, where)
    used: list[list[int]] = []
    for name, count in pending.items():
        rows[name], taken = _fill(encoded, count, length)
        used += taken
    needed = [name for name in pending if name != "training"]
    if any(len(rows[name]) < wanted[name] for name in needed) or len(rows["training"]) < min(1, wanted["training"]):
        # Too little: deal again, to each split its share of the tokens that there are.
        counts = pending | {"training": min(pending["training"], pending["calibration"])}
        share = sum(map(len, used)) / (sum(counts.values()) * length)
        again = iter(used)
        for name, count in counts.items():
            rows[name] = _fill(again, max(1, int(count * share * 0.98)) if count else 0, length)[0]
    short = [name for name in _SPLITS if name != "training" and not len(rows[name])]
    if short or len(documents) < len(needed):
        tokens = sum(map(len, used))
        raise InputError(
            f"{where}: {tokens:,} tokens in {len(documents)} documents are too few for {len(_SPLITS)} splits of "
            f"{length}-token rows ({', '.join(short) or 'a split'} would be empty). Give more text, or a smaller "
            "data.sequence_length in the recipe."
        )
    for name, count in wanted.items():
        if len(rows[name]) < count:
            warnings.append(f"{where} has text for {len(rows[name])} of {count} {name} rows.")
    return rows


def _encoded(documents: Iterable[Document], tokenizer: Any, where: str) -> Iterator[list[int]]:
    """Token ids of each document, closed by the end token; tokenized in batches, as they are asked for."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    remaining = iter(documents)
    while batch := list(islice(remaining, 16)):
        texts = [document if isinstance(document, str) else _render(document, tokenizer, where) for document in batch]
        for ids in tokenizer(texts, verbose=False)["input_ids"]:
            yield ids if ids[-1:] == end else ids + end


def _render(messages: list[dict[str, str]], tokenizer: Any, where: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"{where}: holds chats, but the tokenizer has no chat template. Give plain text instead.")
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _fill(documents: Iterator[list[int]], count: int, length: int) -> tuple[torch.Tensor, list[list[int]]]:
    """Up to ``count`` full rows from the next documents, and the documents that went into them."""
    import torch

    taken: list[list[int]] = []
    have = 0
    while have < count * length and (ids := next(documents, None)) is not None:
        taken.append(ids)
        have += len(ids)
    flat = torch.tensor([token for ids in taken for token in ids], dtype=torch.long)
    full = min(count, len(flat) // length)
    return flat[: full * length].view(full, length), taken


def _read_tokens(path: Path, length: int) -> torch.Tensor:
    """Rows of token ids from a file that holds nothing else."""
    import numpy as np
    import torch

    if path.suffix == ".npy":
        try:
            ids = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.int64))
        except (ValueError, OSError, TypeError) as error:
            raise InputError(f"{path}: not an array of token ids ({error}).") from error
    else:
        from layersmith.run.artifacts import read_tensors

        tensors = read_tensors(path)
        if "tokens" not in tensors:
            raise InputError(f"{path}: no tensor named 'tokens'.")
        ids = tensors["tokens"].long()
    flat = ids.flatten()
    if len(flat) and int(flat.min()) < 0:
        raise InputError(f"{path}: has negative token ids.")
    full = len(flat) // length
    return flat[: full * length].view(full, length)


def _deal_rows(
    rows: torch.Tensor, wanted: Mapping[str, int], seed: int, where: str, warnings: list[str]
) -> dict[str, torch.Tensor]:
    import torch

    asked = sum(map(bool, wanted.values()))
    if len(rows) < asked:
        raise InputError(f"{where}: {len(rows)} full rows are too few for {asked} splits. Give more tokens.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    left = len(rows) - sum(count for name, count in wanted.items() if name != "training")
    training = wanted["training"] if left >= 1 else min(wanted["training"], wanted["calibration"])
    counts = {**wanted, "training": min(training, max(1, left))}
    share = min(1.0, len(rows) / sum(counts.values()))
    dealt, start = {}, 0
    for name, count in wanted.items():
        size = max(1, int(counts[name] * share)) if count else 0
        dealt[name] = rows[order[start : start + size]]
        start += size
        if size < count:
            warnings.append(f"{where} has tokens for {size} of {count} {name} rows.")
    return dealt
