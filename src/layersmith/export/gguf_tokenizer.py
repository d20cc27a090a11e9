"""A Hugging Face tokenizer as the metadata of a GGUF file.

llama.cpp knows by a name how text is split before byte-pair encoding. So a tokenizer can be
written only where its normalizer and pre-tokenizer are among those with a name; others are refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from layersmith.data.pre_tokenizers import name_of, steps
from layersmith.errors import UnsupportedModel, brief

_SPACE = "▁"  # SentencePiece's sign for a space
# Kinds of tokens in a GGUF file.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_MEND = "Serve the child with a server that reads its tokenizer.json"


@dataclass(frozen=True)
class GGUFTokenizer:
    """What a GGUF file holds of a tokenizer.

    Attributes:
        model: ``gpt2`` for byte-level BPE, ``llama`` for SentencePiece.
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: The text of every row of the embeddings.
        types: The kind of every token.
        merges: Pairs of tokens in the order of merging; only for ``gpt2``.
        scores: Priority of every token in merging; only for ``llama``.
        flags: ``add_bos_token``, ``add_eos_token``, ``add_space_prefix``.
        special: Ids by role: ``bos``, ``eos``, ``unknown``, ``padding``.
        chat_template: A Jinja template.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    flags: dict[str, bool]
    special: dict[str, int]
    chat_template: str | None

    def metadata(self) -> dict[str, Any]:
        """Keys and values of the file, without those that do not apply."""
        values = {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.types,
            "tokenizer.ggml.merges": self.merges,
            "tokenizer.ggml.scores": self.scores,
            **{f"tokenizer.ggml.{name}": value for name, value in self.flags.items()},
            **{f"tokenizer.ggml.{role}_token_id": value for role, value in self.special.items()},
            "tokenizer.chat_template": self.chat_template,
        }
        return {key: value for key, value in values.items() if value is not None}


def gguf_tokenizer(tokenizer: Any, vocab_size: int, eos: int | None = None) -> GGUFTokenizer:
    """A tokenizer in llama.cpp's terms.

    Args:
        tokenizer: A fast tokenizer of Transformers.
        vocab_size: Number of rows of the embeddings; rows without a token are marked as unused.
        eos: The model's end-of-sequence token, if the tokenizer has none.

    Raises:
        UnsupportedModel: llama.cpp has no name for the way in which it splits text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(f"{type(tokenizer).__name__} has no tokenizer.json, which a GGUF file is made from.")
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("end_of_word_suffix"):
        raise UnsupportedModel(f"llama.cpp has no tokenizer like this one ({model['type']}). {_MEND}.")
    tokens, types = _tokens(state, vocab_size)
    pairs = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
    pre, scores, space = "default", None, False
    if model.get("byte_fallback"):
        space = _sentencepiece_space(state)
        scores = _scores(tokens, pairs)
    else:
        pre = _pre_tokenizer(state)
    bos, ids = tokenizer.bos_token_id, tokenizer("a").input_ids
    special = {"bos": bos, "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id}
    special["padding"] = tokenizer.pad_token_id
    if special["eos"] is None:
        special["eos"] = eos
    flags = {
        "add_bos_token": len(ids) > 1 and ids[0] == bos,
        "add_eos_token": len(ids) > 1 and ids[-1] == special["eos"],
        "add_space_prefix": space,
    }
    template = tokenizer.chat_template
    return GGUFTokenizer(
        model="gpt2" if scores is None else "llama",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[" ".join(pair) for pair in pairs] if scores is None else None,
        scores=scores,
        flags=flags,
        special={role: int(number) for role, number in special.items() if number is not None},
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def _tokens(state: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and kind of every token."""
    model = state["model"]
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    # Transformers adds tokens of a family that a checkpoint may have no embeddings for.
    added = {entry["content"]: entry for entry in state["added_tokens"] if entry["id"] < vocab_size}
    numbers = model["vocab"] | {text: entry["id"] for text, entry in added.items()}
    if max(numbers.values()) >= vocab_size:
        raise UnsupportedModel(
            f"The tokenizer has {max(numbers.values()) + 1:,} tokens and the embeddings {vocab_size:,} rows. "
            "Give the model a row for each token first (resize_token_embeddings)."
        )
    for text, number in numbers.items():
        tokens[number] = text
        if text in added:
            types[number] = CONTROL if added[text]["special"] else USER_DEFINED
        elif model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            types[number] = BYTE
        else:
            types[number] = NORMAL
        if text == model.get("unk_token") and model.get("byte_fallback"):
            types[number] = UNKNOWN
    return tokens, types


def _pre_tokenizer(state: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which byte-level BPE splits text."""
    name = name_of(state)
    if name is None:
        how = json.dumps({key: state[key] for key in ("normalizer", "pre_tokenizer")}, ensure_ascii=False)
        raise UnsupportedModel(
            f"llama.cpp has no name that is known here for this pre-tokenizer: {brief(how)}. {_MEND}."
        )
    return name


def _sentencepiece_space(state: dict[str, Any]) -> bool:
    """Whether SentencePiece puts a space before the text."""
    space = False
    for step in (*steps(state["normalizer"], "normalizers"), *steps(state["pre_tokenizer"], "pretokenizers")):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            space = True
        elif step["type"] == "Metaspace" and step["replacement"] == _SPACE and not step.get("split", True):
            space = step["prepend_scheme"] != "never"
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE:
            pass
        elif (
            step["type"] == "Split" and step["pattern"] == {"String": " "} and step["behavior"] == "MergedWithPrevious"
        ):
            pass  # the spaces are gone by then
        else:
            how = json.dumps(step, ensure_ascii=False)
            raise UnsupportedModel(f"llama.cpp has no such step before SentencePiece: {brief(how)}. {_MEND}.")
    return space


def _scores(tokens: list[str], pairs: list[list[str]]) -> list[float]:
    """SentencePiece's scores, from the order of merges: llama.cpp merges the pair whose result has the highest score.

    Raises:
        UnsupportedModel: Two merges with the same result have others between them, so that no score says their order.
    """
    scores: dict[str, float] = {}
    last = None
    for left, right in pairs:
        if (text := left + right) != last and text in scores:
            raise UnsupportedModel(
                f"The order of merges is not that of a SentencePiece vocabulary ({text!r}). {_MEND}."
            )
        scores.setdefault(text, -float(len(scores) + 1))
        last = text
    return [scores.get(text, 0.0) for text in tokens]
