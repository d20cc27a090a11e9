"""A checkpoint without the tokens that the user's data never have: fewer rows of the embedding and the head."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from layersmith.data.in_memory import Text, source_of
from layersmith.data.read import Document, read_documents
from layersmith.data.splits import load_tokenizer
from layersmith.data.vocabulary import tokens_to_keep, with_tokens
from layersmith.errors import InputError, UnsupportedModel
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.checkpoint import class_of, load
from layersmith.heterogeneous.convert import ordinary_checkpoint
from layersmith.heterogeneous.weight_files import read_tensor, weight_map, write_files
from layersmith.model_descriptor.stock import quiet_transformers
from layersmith.run.artifacts import read_json, refuse_existing, whole_folder, write_json
from layersmith.run.progress import Callback, Progress, progress_of
from layersmith.upstream import model_from_config

# Largest difference of logits, relative to the largest: the head's products are summed in another order at most.
_TOLERANCE = 1e-5
_CONFIGS = ("config.json", "generation_config.json")
_NAMES = ("token_id", "token_ids", "token_index")  # ends of names of settings that are token ids
_AT_ONCE = 64  # documents
_LENGTH = 32  # tokens of the proof


@dataclass(frozen=True)
class Trimmed:
    """A checkpoint with fewer tokens.

    Attributes:
        folder: Where it is.
        tokens_before, tokens: Number of tokens before and now.
        parameters_before, parameters: Number of parameters before and now.
        documents: Number of documents that both tokenizers cut into the same tokens.
        difference: Largest difference of logits of the same tokens, relative to the largest logit.
    """

    folder: Path
    tokens_before: int
    tokens: int
    parameters_before: int
    parameters: int
    documents: int
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.tokens:,} of {self.tokens_before:,} tokens, {self.parameters:,} of "
            f"{self.parameters_before:,} parameters. {self.documents:,} documents are cut into the same tokens, and "
            f"the logits of these tokens are the same (largest difference {self.difference:.1e} of the largest)."
        )


def trim_vocabulary(
    model: str | Path,
    out: str | Path,
    *,
    data: Text,
    progress: Progress | bool = True,
    callback: Callback | None = None,
    trust_remote_code: bool = False,
) -> Trimmed:
    """Write a checkpoint without the tokens that the data never have, and prove that all else is the same.

    Special and added tokens and those of single bytes stay, so every text can still be written.

    Args:
        model: Checkpoint folder, hub id or GGUF file, of a parent or a child.
        out: The new folder.
        data: All texts that the model is to read or write, in the forms that ``compress`` takes.
        progress: Whether to show progress; or a progress that receives it.
        callback: Called with an :class:`~layersmith.run.progress.Event`.
        trust_remote_code: Let Transformers run code from the checkpoint.

    Raises:
        InputError: The folder exists, or files are missing or damaged.
        UnsupportedModel: The tokenizer or the model has another structure than what can be trimmed.
    """
    shown, out = progress_of(progress, callback), Path(out)
    refuse_existing(out)
    path = Path(ordinary_checkpoint(model, trust_remote_code=trust_remote_code))
    if not path.is_dir():
        raise InputError(f"{model}: not a folder. Download it first, for example with `hf download`.")
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise UnsupportedModel(f"{model}: its tokenizer has no tokenizer.json, so its tokens cannot be trimmed.")
    texts = [_as_text(tokenizer, document) for document in read_documents(source_of(data))]
    count = len(texts)
    texts += _around_messages(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    with shown.stage("vocabulary", 2 * len(texts), "documents") as advance:
        used: set[int] = set()
        for batch, ids in _tokenized(tokenizer, texts):
            used.update(*ids)
            advance(len(batch))
        kept = tokens_to_keep(state, used | _ids_of(path, tokenizer))
        with whole_folder(out) as made:
            rows = _write_weights(path, made, kept, trust_remote_code)
            _write_tokenizer(tokenizer, with_tokens(state, kept), kept, made)
            smaller = AutoTokenizer.from_pretrained(made)
            for (batch, before), (_, after) in zip(
                _tokenized(tokenizer, texts), _tokenized(smaller, texts), strict=True
            ):
                if [[kept[id] for id in ids] for ids in after] != before:
                    raise UnsupportedModel(f"{model}: a text would be cut into other tokens, so they are not trimmed.")
                advance(len(batch))
            sizes, difference = _proof(path, made, kept, trust_remote_code)
    return Trimmed(out, rows, len(kept), *sizes, count, difference)


def _as_text(tokenizer: Any, document: Document) -> str:
    return document if isinstance(document, str) else str(tokenizer.apply_chat_template(document, tokenize=False))


def _around_messages(tokenizer: Any) -> list[str]:
    """A chat with all that the chat template adds to messages, such as a system prompt; empty without a template."""
    if not tokenizer.chat_template:
        return []
    messages = [{"role": role, "content": "."} for role in ("user", "assistant", "user")]
    with foreign_code("what does the chat template write?"):
        return [str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))]
    return []


def _tokenized(tokenizer: Any, texts: list[str]) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Token ids of some texts at a time."""
    remaining = iter(texts)
    while batch := list(islice(remaining, _AT_ONCE)):
        yield batch, tokenizer(batch, verbose=False)["input_ids"]


def _write_tokenizer(tokenizer: Any, state: dict[str, Any], kept: list[int], folder: Path) -> None:
    """The tokenizer's files with fewer tokens."""
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)  # forms of the larger vocabulary that tokenizer.json replaces
    write_json(folder / "tokenizer.json", state)
    new = {old: number for number, old in enumerate(kept)}
    settings = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        decoder = settings["added_tokens_decoder"]
        settings["added_tokens_decoder"] = {str(new[int(id)]): token for id, token in decoder.items()}
    write_json(folder / "tokenizer_config.json", settings)


def _write_weights(path: Path, folder: Path, kept: list[int], trust_remote_code: bool) -> int:
    """Config and weights with fewer rows for tokens; returns how many there were."""
    cls, config = class_of(path, None, trust_remote_code)
    rows = int(config.get_text_config().vocab_size)
    if kept[-1] >= rows:
        raise InputError(f"{path}: the tokenizer has token {kept[-1]}, but the model knows {rows}.")
    new = {old: number for number, old in enumerate(kept)}
    for name in _CONFIGS:
        if (path / name).is_file():
            write_json(folder / name, _renumbered(read_json(path / name), new, rows))
    for file in path.glob("*.py"):
        (folder / file.name).write_bytes(file.read_bytes())
    smaller = copy.deepcopy(config)
    smaller.get_text_config().vocab_size = len(kept)
    before, after = _shapes(cls, config), _shapes(cls, smaller)
    dims: dict[str, int] = {}
    for name, shape in before.items():
        changed = [d for d, (a, b) in enumerate(zip(shape, after[name], strict=True)) if a != b]
        if len(changed) > 1 or any((shape[d], after[name][d]) != (rows, len(kept)) for d in changed):
            raise UnsupportedModel(f"{path}: the shape of {name} does not follow from the number of tokens alone.")
        if changed:
            dims[name] = changed[0]
    places, index = weight_map(path), torch.tensor(kept)

    def tensor(name: str) -> torch.Tensor:
        weight = read_tensor(places, name)
        return weight.index_select(dims[name], index) if name in dims else weight

    files: dict[str, list[str]] = {}
    for name, place in places.items():
        files.setdefault(place.name, []).append(name)
    write_files(folder, files, tensor, with_index=len(files) > 1)
    return rows


def _ids_of(path: Path, tokenizer: Any) -> set[int]:
    """Tokens of the tokenizer that the configs name, such as the one that begins a text."""
    found: set[int] = set()

    def look(part: Any, name: str = "") -> None:
        if isinstance(part, dict):
            for key, value in part.items():
                look(value, key)
        elif isinstance(part, list):
            for value in part:
                look(value, name)
        elif name.endswith(_NAMES) and isinstance(part, int) and 0 <= part < len(tokenizer):
            found.add(part)

    for name in _CONFIGS:
        if (path / name).is_file():
            look(read_json(path / name))
    return found


def _renumbered(part: Any, new: dict[int, int], rows: int, name: str = "") -> Any:
    """A config with new token ids; ids that are not there any more become null."""
    if isinstance(part, dict):
        return {key: _renumbered(value, new, rows, key) for key, value in part.items()}
    is_ids = name.endswith(_NAMES)
    if isinstance(part, list):
        ids = [_renumbered(entry, new, rows, name) for entry in part]
        return [id for id in ids if id is not None] if is_ids else ids
    if is_ids and isinstance(part, int) and not isinstance(part, bool):
        return part if part < 0 else new.get(part)
    return len(new) if name == "vocab_size" and part == rows else part


def _shapes(cls: Any, config: Any) -> dict[str, tuple[int, ...]]:
    question = "can a model with fewer tokens be built?"
    shapes: dict[str, tuple[int, ...]] = {}
    with foreign_code(question, refusal_is_answer=True) as attempt, quiet_transformers(), torch.device("meta"):
        model = attempt.call(model_from_config, cls, copy.deepcopy(config))
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if attempt.failed:
        raise UnsupportedModel(f"no model with another number of tokens can be built: {attempt.reason}.")
    return shapes


@torch.no_grad()
def _proof(path: Path, folder: Path, kept: list[int], trust_remote_code: bool) -> tuple[tuple[int, int], float]:
    """Parameters of both models, and the largest difference of their logits relative to the largest.

    Raises:
        UnsupportedModel: The logits differ.
    """
    tokens = torch.randint(0, len(kept), (1, _LENGTH), generator=torch.Generator().manual_seed(0))
    index = torch.tensor(kept)
    before = load(path, dtype=torch.float32, trust_remote_code=trust_remote_code).eval()
    wanted = before(index[tokens]).logits[..., index]
    sizes = [sum(p.numel() for p in before.parameters())]
    del before
    auto: Any = AutoModelForCausalLM
    with quiet_transformers():
        after = auto.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code).eval()
    sizes.append(sum(p.numel() for p in after.parameters()))
    difference = float((after(tokens).logits - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))
    if not difference <= _TOLERANCE:
        raise UnsupportedModel(f"{path}: with fewer tokens its logits differ by {difference:.1e} of the largest.")
    return (sizes[0], sizes[1]), difference
