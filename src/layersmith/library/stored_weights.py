"""Weights of alternatives that were refitted or trained, and are therefore not slices of the parent's.

On disk each layer has one safetensors file, read on demand. ``distilled.json`` has a record for each alternative, with
the cost and gain of local distillation and the digest of the weights.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import NonNegativeInt
from typing_extensions import TypedDict

from layersmith.errors import InputError
from layersmith.run.artifacts import fingerprint, read_json, write_json, write_tensors

RECORDS = "distilled.json"
_LAYERS = "layers"

Tensors = dict[str, torch.Tensor]


class Record(TypedDict):
    """A record of ``distilled.json``; see :class:`Kept`."""

    of: str
    identity: str
    layer: NonNegativeInt
    subblock: str
    weights: str | None
    tokens: NonNegativeInt
    before: float | None
    after: float | None
    pruned: NotRequired[float | None]


@dataclass(frozen=True, eq=False)
class Kept:
    """Weights by the identity of an alternative, in memory or in a folder.

    Attributes:
        records: One per alternative: its key ``of``, ``identity``, ``layer``, ``subblock``, the digest ``weights`` or
            None, and the results of local distillation.
        in_memory: Weights by name in the layer, by identity.
        folder: Folder of the other weights.
    """

    records: tuple[dict[str, Any], ...] = ()
    in_memory: Mapping[str, Tensors] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def identity(self) -> str:
        """Digest of all weights; empty if there are none."""
        digests = {record["identity"]: record["weights"] for record in self.records if record["weights"]}
        return fingerprint(digests) if digests else ""

    def layer_of(self, identity: str) -> int | None:
        """The layer of an alternative whose weights are kept; None if they are not."""
        return self._layers.get(identity)

    def __post_init__(self) -> None:
        layers = {record["identity"]: record["layer"] for record in self.records if record["weights"]}
        object.__setattr__(self, "_layers", layers)

    _layers: dict[str, int] = field(default_factory=dict, init=False)

    def of(self, identity: str) -> Tensors:
        """Weights by name in the layer, in the checkpoint's dtype; nothing if none are kept.

        Raises:
            InputError: The file of its layer is missing or damaged.
        """
        layer = self.layer_of(identity)
        if layer is None:
            return {}
        if identity in self.in_memory:
            return self.in_memory[identity]
        assert self.folder is not None
        return read_layer(layer_file(self.folder, layer), identity)

    def write(self, folder: Path) -> None:
        """Write records and weights; files that lie in another folder on the same disk are not copied."""
        if not self.records:
            return
        write_json(folder / RECORDS, list(self.records))
        for layer in sorted(set(self._layers.values())):
            of_layer = [identity for identity, of in self._layers.items() if of == layer]
            target = layer_file(folder, layer)
            if self.folder is not None and not any(identity in self.in_memory for identity in of_layer):
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(layer_file(self.folder, layer), target)
                except OSError:  # another disk, or one without links
                    shutil.copyfile(layer_file(self.folder, layer), target)
            else:
                write_layer(target, {identity: self.of(identity) for identity in of_layer})

    @staticmethod
    def read(folder: Path) -> Kept:
        """What lies in a folder; nothing if there are no records."""
        if not (folder / RECORDS).is_file():
            return Kept()
        return Kept(tuple(read_json(folder / RECORDS, list[Record])), {}, folder)


def layer_file(folder: Path, layer: int) -> Path:
    return folder / _LAYERS / f"layer-{layer:03d}.safetensors"


def write_layer(path: Path, weights: Mapping[str, Tensors], metadata: dict[str, str] | None = None) -> None:
    """Weights of a layer's alternatives, by identity."""
    flat = {f"{identity}.{name}": t.cpu() for identity, tensors in weights.items() for name, t in tensors.items()}
    write_tensors(path, flat, metadata)


def read_layer(path: Path, identity: str) -> Tensors:
    """Raises: InputError: missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path}: missing. Run the same compress command again, which makes it again.")
    start = f"{identity}."
    try:
        with safe_open(path, framework="pt") as file:
            return {n.removeprefix(start): file.get_tensor(n) for n in file.keys() if n.startswith(start)}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"{path}: damaged ({error}). Run the same compress command again, which makes it again."
        ) from error


def digest_of(weights: Mapping[str, torch.Tensor]) -> str | None:
    """Digest of names and bytes; None of nothing."""
    if not weights:
        return None
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
