"""Patterns that put every weight of a model into one group: embedding, head, or a subblock of a layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from layersmith.model_descriptor.infer.subblocks import LayerKind


def weight_groups(
    layers_name: str, outside: Mapping[str, str], kinds: Sequence[LayerKind], num_layers: int
) -> dict[str, re.Pattern[str]]:
    """The pattern of the weight names of every group.

    Args:
        layers_name: Name of the list of decoder layers.
        outside: Weights outside the layers, each with its group ``"embedding"`` or ``"lm_head"``.
        kinds: The kind of every layer; further layers are of the last kind.
        num_layers: Number of layers that get groups.
    """
    groups: dict[str, list[str]] = {"embedding": [], "lm_head": []}
    for name, group in outside.items():
        groups[group].append(re.escape(name))
    patterns = {group: _any_of(names) for group, names in groups.items()}
    layers = re.escape(layers_name)
    for i in range(num_layers):
        kind = kinds[min(i, len(kinds) - 1)]
        for subblock in ("ffn", "attention"):
            names = "|".join(_prefixes(kind.owners, subblock))
            patterns[f"block_{i}_{subblock}"] = re.compile(rf"^{layers}\.{i}\.(?:{names})$" if names else r"(?!)")
    return patterns


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile(f"^(?:{'|'.join(names)})$" if names else r"(?!)")


def _prefixes(owners: dict[str, str], subblock: str) -> list[str]:
    """Patterns for all weights of a subblock: whole modules where all weights belong to it, else single names."""
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
