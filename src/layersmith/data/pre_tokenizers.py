"""How byte-level BPE splits text before merging, and llama.cpp's names for it, which GGUF files hold.

A GGUF file has the name only; a ``tokenizer.json`` has the steps only. So both directions need this table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE

_DIGITS, _GPT2 = "each digit", "words of GPT-2"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
# What splits the text, and whether a whole word that is a token is taken without merging -> llama.cpp's name.
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_REST}",), True): "tekken",
    ((rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_REST}",), False): "gpt-4o",
}


def steps(part: dict[str, Any] | None, kind: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer of a ``tokenizer.json``.

    Args:
        part: Its entry.
        kind: The key that a sequence has its steps under: ``normalizers`` or ``pretokenizers``.
    """
    if part is not None and part["type"] == "Sequence":
        for step in part[kind]:
            yield from steps(step, kind)
    elif part is not None:
        yield part


def name_of(state: dict[str, Any]) -> str | None:
    """llama.cpp's name for the way in which the BPE of a ``tokenizer.json`` splits text; None if there is none here."""
    if any(step["type"] != "NFC" for step in steps(state["normalizer"], "normalizers")):
        return None
    splits = []
    for step in steps(state["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            splits += [_GPT2] if step["use_regex"] else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            splits.append(_DIGITS)
        elif step["type"] == "Split" and "Regex" in step["pattern"] and not step["invert"]:
            splits.append(step["pattern"]["Regex"] if step["behavior"] == "Isolated" else "")
        else:
            return None
    return NAMES.get((tuple(splits), bool(state["model"].get("ignore_merges"))))


def split_as(name: str, tokenizer: Tokenizer) -> None:
    """Let a byte-level BPE tokenizer split text in the way that llama.cpp calls so, if it is in the table."""
    found = next((key for key, other in NAMES.items() if other == name), None)
    if found is None or not isinstance(tokenizer.model, BPE):
        return
    made: list[Any] = []
    for split in found[0]:
        if split == _DIGITS:
            made.append(pre_tokenizers.Digits(individual_digits=True))
        elif split != _GPT2:
            made.append(pre_tokenizers.Split(Regex(split), "isolated"))
    made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=_GPT2 in found[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(made)
    tokenizer.model.ignore_merges = found[1]
