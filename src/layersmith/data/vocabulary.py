"""A tokenizer with only some of its tokens, which cuts every text without the dropped ones as before.

What stays is what the data have, all special and added tokens, the tokens of single bytes or characters, and for BPE
every token on the way to one that stays. Then the smaller tokenizer gives the same tokens, with new ids:

- BPE: each merge that was made before is still there and as early in the list as before, since all that lead to a token
  that stays stay too; and there are no new ones.
- Unigram: the segmentation with the largest sum of scores is still there, and there are no new ones.
- WordPiece and WordLevel: the longest match is still there.

Shapes: V tokens before, K after.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from layersmith.errors import UnsupportedModel

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>$")
_KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")


def tokens_to_keep(state: dict[str, Any], used: Iterable[int]) -> list[int]:
    """The ids that stay, ascending.

    Args:
        state: A fast tokenizer as JSON data, as in ``tokenizer.json``.
        used: Ids that the data have.

    Raises:
        UnsupportedModel: The tokenizer is of an unknown kind.
    """
    model = state["model"]
    if model["type"] not in _KINDS:
        raise UnsupportedModel(f"its tokenizer is of the kind {model['type']}; tokens of {', '.join(_KINDS)} can go.")
    vocabulary = _vocabulary(model)
    kept = {token["id"] for token in state["added_tokens"]} | set(_ids_in(state["post_processor"])) | set(used)
    has_bytes = any(_BYTE.match(token) for token in vocabulary)
    single = (lambda token: bool(_BYTE.match(token))) if has_bytes else (lambda token: len(token) == 1)
    kept |= {id for token, id in vocabulary.items() if single(token) or token == model.get("unk_token")}
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        kept.add(model["unk_id"])
    if model["type"] == "BPE":
        kept |= {vocabulary[token] for token in _on_the_way(model, vocabulary, kept)}
    return sorted(kept)


def with_tokens(state: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """The tokenizer with the tokens of some ids, numbered from 0 in their order."""
    new = {old: number for number, old in enumerate(kept)}
    state = copy.deepcopy(state)
    model = state["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for id, entry in enumerate(model["vocab"]) if id in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[id] for token, id in model["vocab"].items() if id in new}
    if model["type"] == "BPE":
        model["merges"] = [
            merge
            for merge in model["merges"]
            if all(token in model["vocab"] for token in (*_pair(merge), _merged(model, merge)))
        ]
    for token in state["added_tokens"]:
        token["id"] = new[token["id"]]
    state["post_processor"] = _renumbered(state["post_processor"], new)
    return state


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {token: id for id, (token, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _merged(model: dict[str, Any], merge: Any) -> str:
    first, second = _pair(merge)
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def _on_the_way(model: dict[str, Any], vocabulary: dict[str, int], kept: set[int]) -> set[str]:
    """Tokens from which merges lead to kept ones."""
    parts: dict[str, list[str]] = {}
    for merge in model["merges"]:
        parts.setdefault(_merged(model, merge), []).extend(_pair(merge))
    found: set[str] = set()
    left = [token for token, id in vocabulary.items() if id in kept]
    while left:
        new = {part for part in parts.get(left.pop(), ()) if part in vocabulary} - found
        found |= new
        left.extend(new)
    return found


def _ids_in(part: Any) -> list[int]:
    """Ids that a post-processor adds."""
    if _is_numbered(part):
        return [part[1]]
    if isinstance(part, dict):
        of_values = [id for key, value in part.items() if key != "ids" for id in _ids_in(value)]
        return [*part.get("ids", []), *of_values]
    return [id for entry in part for id in _ids_in(entry)] if isinstance(part, list) else []


def _renumbered(part: Any, new: dict[int, int]) -> Any:
    if _is_numbered(part):
        return [part[0], new[part[1]]]
    if isinstance(part, dict):
        return {k: [new[id] for id in v] if k == "ids" else _renumbered(v, new) for k, v in part.items()}
    return [_renumbered(entry, new) for entry in part] if isinstance(part, list) else part


def _is_numbered(part: Any) -> bool:
    """Whether this is a token and its id, as in the post-processors of BERT and RoBERTa."""
    return isinstance(part, list) and len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], int)
