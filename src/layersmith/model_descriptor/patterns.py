"""Patterns that put every weight of a model into one group: embedding, head, or a subblock of a layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from layersmith.model_descriptor.infer.subblocks import LayerKind


def weight_groups(
    layers_name: str, outside: Mapping[str, str], kinds: Sequence[LayerKind], num_layers: int
) -> dict[str, re.Pattern[str]]:
    """The pattern of every group's names.

    Args:
        layers_name: of the list of decoder layers.
        outside: name outside the layers to ``"embedding"`` or ``"lm_head"``.
        kinds: of every layer; further layers are of the last one's.
        num_layers: for how many there are to be groups.
    """
    groups: dict[str, list[str]] = {"embedding": [], "lm_head": []}
    for name, group in outside.items():
        groups[group].append(re.escape(name))
    patterns = {group: _any_of(names) for group, names in groups.items()}
    layers = re.escape(layers_name)
    for i in range(num_layers):
        kind = kinds[min(i, len(kinds) - 1)]
        for subblock in ("ffn", "attention"):
            own = _prefixes(kind.owners, subblock)
            patterns[f"block_{i}_{subblock}"] = re.compile(rf"^{layers}\.{i}\.(?:{'|'.join(own)})$" if own else r"(?!)")
    return patterns


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile(f"^(?:{'|'.join(names)})$" if names else r"(?!)")


def _prefixes(owners: dict[str, str], subblock: str) -> list[str]:
    """Patterns for all names of one owner: whole modules where a module has one owner, single names elsewhere."""
    tree: dict[str, set[str]] = {}
    for name, owner in owners.items():
        parts = name.split(".")
        for length in range(1, len(parts)):
            tree.setdefault(".".join(parts[:length]), set()).add(owner)
    patterns: list[str] = []
    for name, owner in owners.items():
        if owner != subblock:
            continue
        parts = name.split(".")
        whole = next((p for n in range(1, len(parts)) if tree[p := ".".join(parts[:n])] == {subblock}), None)
        pattern = re.escape(name) if whole is None else rf"{re.escape(whole)}\..+"
        if pattern not in patterns:
            patterns.append(pattern)
    return patterns
