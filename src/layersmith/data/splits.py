"""From documents to rows of tokens, in splits that share no document.

Rows are full: documents follow each other, each closed by the end token, and are cut every T tokens. Whole documents
are dealt to the splits, so that no document is in two of them, and documents of equal text count as one.

Shapes: N rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import torch
from pydantic import NonNegativeInt
from transformers import AutoTokenizer
from typing_extensions import TypedDict

from layersmith.data.mixture import interleave, read_mixture
from layersmith.data.overlap import OverlapRule, without_copies
from layersmith.data.read import Document, read_documents, text_of
from layersmith.errors import ALLOW_CODE, InputError, UsageError
from layersmith.foreign import foreign_code
from layersmith.recipe import DataRecipe
from layersmith.run.artifacts import read_json, read_tensors
from layersmith.untrusted import inside

SPLITS = ("evaluation", "calibration", "scoring", "training")
_TOKEN_SUFFIXES = (".npy", ".safetensors")
# Documents are read until there are this many characters for each token that is wanted.
_CHARACTERS_PER_TOKEN = 48
# Local files are read up to this many characters at least: a larger sample of a large source, in 256 MiB of memory.
_READ_AT_LEAST = 1 << 28


class Description(TypedDict):
    """What ``data.json`` holds, as far as others read it."""

    source: str
    sequences: dict[str, NonNegativeInt]
    sequence_length: NonNegativeInt
    sha256: dict[str, str]
    overlap: NotRequired[dict[str, NonNegativeInt] | None]
    warnings: NotRequired[list[str]]


@dataclass(frozen=True, eq=False)
class TokenSplits:
    """Rows of token ids ``[N, T]`` int64 for each purpose; no document is in two of them.

    Attributes:
        calibration: Rows for importance statistics and local distillation.
        scoring: Rows on which alternatives are scored.
        evaluation: Rows on which parent and child are compared.
        training: Rows for distillation; it may have none.
        description: Source, sizes and digests of the rows, and warnings.
    """

    calibration: torch.Tensor
    scoring: torch.Tensor
    evaluation: torch.Tensor
    training: torch.Tensor
    description: dict[str, Any]


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises:
        InputError: The checkpoint has no tokenizer, or it cannot be read.
    """
    settings = Path(path) / "tokenizer_config.json"
    if settings.is_file():
        for name, value in read_json(settings, dict[str, Any]).items():
            if name.endswith("_file") and value is not None:  # which Transformers would open wherever it is
                inside(Path(path), str(value), f"{settings}: {name}")
    with foreign_code("does the tokenizer load?", refusal_is_answer=True) as attempt:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if "trust_remote_code" in attempt.reason:
        raise InputError(f"{path}: its tokenizer runs code from the checkpoint. {ALLOW_CODE}") from attempt.error
    if attempt.failed:
        raise InputError(
            f"{path}: its tokenizer cannot be loaded. Put tokenizer.json and tokenizer_config.json beside the weights."
        ) from attempt.error
    if len(tokenizer) == 0:
        raise InputError(f"{path}: its tokenizer is empty. Put the model's tokenizer.json beside the weights.")
    return tokenizer


def check_vocabulary(num_tokens: int, vocab_size: int) -> None:
    """Raises: InputError: The data has token ids for which the model has no embedding."""
    if num_tokens > vocab_size:
        raise InputError(
            f"the data has token id {num_tokens - 1}, but the model knows {vocab_size}. "
            "Use the tokenizer that belongs to the model."
        )


def prepare(source: str | Path, tokenizer: Any, recipe: DataRecipe, seed: int) -> TokenSplits:
    """Make rows of tokens for calibration, scoring, evaluation and training.

    Documents are put in an order that depends on the seed and their text alone, then dealt: evaluation first and
    training last, so that the rows of a split do not change when a later one grows. Training takes what the others
    leave. Where that is nothing, or there is too little text even for the others, each split gets its share, and
    training no more than calibration asks for.

    Args:
        source: See :func:`layersmith.data.read.read_documents`; also ``.npy`` or ``.safetensors`` (tensor ``tokens``)
            files of token ids.
        tokenizer: Tokenizer of the parent.
        recipe: Numbers of rows and their length, fields, and what to do about rows that are copied from evaluation's.
        seed: Seed of the order of documents.

    Raises:
        InputError: The source does not exist, is damaged, or has too little text for one row of each split; or rows are
            copied from evaluation's and the recipe refuses that.
        UsageError: It has no such field, or holds chats and the tokenizer has no chat template.
    """
    wanted = {name: getattr(recipe, f"{name}_sequences") for name in SPLITS}
    warnings: list[str] = []
    if is_tokens := holds_tokens(source):
        rows = _deal_rows(_read_tokens(Path(source), recipe.sequence_length), wanted, seed, str(source), warnings)
    else:
        tokens = sum(wanted.values()) * recipe.sequence_length
        documents = _ordered(source, tokenizer, recipe, seed, tokens, warnings)
        held_out: dict[bytes, Document] = {}
        if recipe.evaluation_source is not None:
            unnamed = dataclasses.replace(recipe, field=None)
            held_out = _ordered(recipe.evaluation_source, tokenizer, unnamed, seed, tokens, warnings)
        documents = {digest: text for digest, text in documents.items() if digest not in held_out}
        rows = _deal(_Text(documents, tokenizer, str(source)), held_out, wanted, recipe.sequence_length, warnings)
    others = {name: rows[name] for name in SPLITS if name != "evaluation"}
    spelling = None if is_tokens else tokenizer
    rule = OverlapRule(recipe.overlap, str(source))
    kept, copied = without_copies(others, rows["evaluation"], spelling, rule, warnings)
    rows |= kept
    mixture = read_mixture(source)
    description = {
        "source": str(source),
        "evaluation_source": None if recipe.evaluation_source is None else str(recipe.evaluation_source),
        "mixture": None if mixture is None else [dataclasses.asdict(part) for part in mixture],
        "sequence_length": recipe.sequence_length,
        "seed": seed,
        "sequences": {name: len(rows[name]) for name in SPLITS},
        "sha256": {name: digest_of_rows(rows[name]) for name in SPLITS},
        "overlap": copied,
        "warnings": warnings,
    }
    return TokenSplits(description=description, **{name: rows[name] for name in SPLITS})


def digest_of_rows(rows: torch.Tensor) -> str:
    """SHA-256 of token ids ``[N, T]``."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def evaluation_rows(source: str | Path, tokenizer: Any, recipe: DataRecipe, seed: int) -> torch.Tensor:
    """The rows that :func:`prepare` deals to evaluation, ``[N, T]``; all of the source may be used for them.

    Raises:
        InputError: The source does not exist, is damaged, or has too little text for one row.
        UsageError: It has no such field, or holds chats and the tokenizer has no chat template.
    """
    count, length = recipe.evaluation_sequences, recipe.sequence_length
    if holds_tokens(source):
        rows = _read_tokens(Path(source), length)[:count]
    else:
        documents = _ordered(source, tokenizer, recipe, seed, count * length, [])
        rows, _ = _fill(_Text(documents, tokenizer, str(source)).encoded(), count, length)
    if not len(rows):
        raise InputError(f"{source}: too little text for one row of {length} tokens. Give more text.")
    return rows


# ---------------------------------------------------------------------------------------------- documents in order


def _ordered(
    source: str | Path, tokenizer: Any, recipe: DataRecipe, seed: int, tokens: int, warnings: list[str]
) -> dict[bytes, Document]:
    """Distinct documents by digest, in an order that depends on the seed and the texts alone; those of the sources of a
    mixture alternate.
    """
    mixture = read_mixture(source)
    if mixture is None:
        return _ordered_part(source, recipe.field, recipe.split, seed, tokens)
    parts = [_ordered_part(part.source, part.field, part.split, seed, tokens) for part in mixture]
    lengths = [_Text(part, tokenizer, str(source)).estimated_tokens() for part in parts]
    documents, ended = interleave(parts, [part.weight for part in mixture], lengths)
    if ended is not None:
        warnings.append(f"{source}: {mixture[ended].source} ends first, and the mixture with it.")
    return documents


def _ordered_part(source: str | Path, field: str | None, split: str, seed: int, tokens: int) -> dict[bytes, Document]:
    limit = tokens * _CHARACTERS_PER_TOKEN
    if Path(source).expanduser().exists():
        limit = max(limit, _READ_AT_LEAST)
    documents: dict[bytes, Document] = {}
    for document in read_documents(source, field=field, split=split, limit=limit, seed=seed):
        text = text_of(document)
        if text.strip():
            try:
                digest = hashlib.sha256(text.encode()).digest()
            except UnicodeEncodeError as error:
                raise InputError(f"{source}: a text has half of a surrogate pair, which is not Unicode.") from error
            documents.setdefault(digest, document)
    if not documents:
        raise InputError(f"{source}: no text in it. Give a file or folder with text.")
    digests = sorted(documents)
    random.Random(seed).shuffle(digests)
    return {digest: documents[digest] for digest in digests}


@dataclass(frozen=True)
class _Text:
    """Documents by digest, and how they become tokens.

    Attributes:
        documents: Documents in their order.
        tokenizer: Tokenizer of the parent.
        where: Name of the source, for messages.
    """

    documents: Mapping[bytes, Document]
    tokenizer: Any
    where: str

    def encoded(self) -> Iterator[list[int]]:
        """Token ids of each document, closed by the end token; tokenized in batches, as they are asked for."""
        yield from self._encode(self.documents.values())

    def estimated_tokens(self) -> dict[bytes, float]:
        """Tokens of each document, from its characters and the tokens a character of the first few documents."""
        sample = list(islice(self.documents.values(), 64))
        characters = sum(len(text_of(document)) for document in sample)
        rate = sum(map(len, self._encode(sample))) / max(1, characters)
        return {digest: rate * len(text_of(document)) for digest, document in self.documents.items()}

    def _encode(self, documents: Iterable[Document]) -> Iterator[list[int]]:
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        remaining = iter(documents)
        while batch := list(islice(remaining, 16)):
            texts = [document if isinstance(document, str) else self._render(document) for document in batch]
            for ids in self.tokenizer(texts, verbose=False)["input_ids"]:
                yield ids if ids[-1:] == end else ids + end

    def _render(self, messages: list[dict[str, str]]) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                f"{self.where}: holds chats, but the tokenizer has no chat template. Give plain text instead."
            )
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))


# ---------------------------------------------------------------------------------------------- rows


def _deal(
    text: _Text, held_out: dict[bytes, Document], wanted: Mapping[str, int], length: int, warnings: list[str]
) -> dict[str, torch.Tensor]:
    """Rows of each split from whole documents, evaluation's from ``held_out`` where that has any."""
    pending = dict(wanted)
    rows: dict[str, torch.Tensor] = {}
    if held_out:
        encoded = dataclasses.replace(text, documents=held_out).encoded()
        rows["evaluation"] = _fill(encoded, pending.pop("evaluation"), length)[0]
    encoded = text.encoded()
    used: list[list[int]] = []
    for name, count in pending.items():
        rows[name], taken = _fill(encoded, count, length)
        used += taken
    needed = [name for name in pending if name != "training"]
    if any(len(rows[name]) < wanted[name] for name in needed) or len(rows["training"]) < min(1, wanted["training"]):
        # Too little text: deal again, to each split its share of the tokens that there are.
        counts = pending | {"training": min(pending["training"], pending["calibration"])}
        share = sum(map(len, used)) / (sum(counts.values()) * length)
        again = iter(used)
        for name, count in counts.items():
            rows[name] = _fill(again, max(1, int(count * share * 0.98)) if count else 0, length)[0]
    short = [name for name in SPLITS if name != "training" and not len(rows[name])]
    if short or len(text.documents) < len(needed):
        tokens = sum(map(len, used))
        raise InputError(
            f"{text.where}: {tokens:,} tokens in {len(text.documents)} documents are too few for {len(SPLITS)} splits "
            f"of {length}-token rows ({', '.join(short) or 'a split'} would be empty). Give more text, or a smaller "
            "data.sequence_length in the recipe."
        )
    for name, count in wanted.items():
        if len(rows[name]) < count:
            warnings.append(f"{text.where} has text for {len(rows[name])} of {count} {name} rows.")
    return rows


def _fill(documents: Iterator[list[int]], count: int, length: int) -> tuple[torch.Tensor, list[list[int]]]:
    """Up to ``count`` full rows from the next documents, and the documents that went into them."""
    taken: list[list[int]] = []
    tokens = 0
    while tokens < count * length and (ids := next(documents, None)) is not None:
        taken.append(ids)
        tokens += len(ids)
    return _cut_into_rows(
        torch.tensor([token for ids in taken for token in ids], dtype=torch.long), length, count
    ), taken


def _cut_into_rows(ids: torch.Tensor, length: int, at_most: int | None = None) -> torch.Tensor:
    full = len(ids) // length
    full = full if at_most is None else min(full, at_most)
    return ids[: full * length].view(full, length)


# ---------------------------------------------------------------------------------------------- files of token ids


def holds_tokens(source: str | Path) -> bool:
    """Whether a source is a file of token ids."""
    return Path(source).suffix in _TOKEN_SUFFIXES and Path(source).is_file()


def _read_tokens(path: Path, length: int) -> torch.Tensor:
    """Rows ``[N, length]`` of token ids from a file that holds nothing else."""
    if path.suffix == ".npy":
        with foreign_code("is it a NumPy array?", refusal_is_answer=True) as attempt:
            # Mapped, because its header may claim any size.
            array = attempt.call(np.load, path, mmap_mode="r", allow_pickle=False).reshape(-1)
        if attempt.failed:
            raise InputError(f"{path}: not an array of token ids ({attempt.reason}).") from attempt.error
        if array.dtype.kind not in "iu":
            raise InputError(f"{path}: not an array of token ids, which are whole numbers, but of {array.dtype}.")
        if array.size and array.max() >= 2**31:
            raise InputError(f"{path}: has the token id {array.max()}, which no vocabulary has.")
        ids = torch.from_numpy(array.astype(np.int64))
    else:
        tensors = read_tensors(path)
        if "tokens" not in tensors:
            raise InputError(f"{path}: no tensor named 'tokens'.")
        if tensors["tokens"].dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            raise InputError(f"{path}: tokens are {tensors['tokens'].dtype}, not whole numbers.")
        ids = tensors["tokens"].long()
    ids = ids.flatten()
    if len(ids) and int(ids.min()) < 0:
        raise InputError(f"{path}: has negative token ids.")
    return _cut_into_rows(ids, length)


def _deal_rows(
    rows: torch.Tensor, wanted: Mapping[str, int], seed: int, where: str, warnings: list[str]
) -> dict[str, torch.Tensor]:
    """Deal rows in an order that the seed decides; where they are too few, to each split its share."""
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
