"""Results and state of local distillation: a file for every finished layer, and one for the layer in training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from layersmith.distillation.replacement import ReplacementTraining
from layersmith.distillation.team import ALONE, Team
from layersmith.library.stored_weights import Kept, Record, Tensors, layer_file, read_layer, write_layer
from layersmith.run.digests import read_sealed, write_sealed
from layersmith.run.journal import Checkpoint

# An interruption loses at most this much training; saving more often costs more writing.
_SAVE_EVERY_SECONDS = 30.0


def layer_name(i: int, group: int | None = None) -> str:
    """Name of the results of a layer, or of a group of its alternatives."""
    return f"layer-{i:03d}" if group is None else f"layer-{i:03d}-{group}"


class _Stored(TypedDict):
    """What the file of a finished group or layer holds."""

    inputs: str
    records: list[Record]


class Store:
    """Results by name, in a folder or in memory, and the state of what is in training.

    Args:
        folder: Where they are; None for in memory.
        inputs: Digest of what they depend on.
        team: The processes that make the same results. The first of them writes, and the others wait for its files.
    """

    def __init__(self, folder: Path | None, inputs: str, team: Team = ALONE):
        self.folder, self.inputs, self.team = folder, inputs, team
        self._in_memory: dict[str, tuple[list[dict[str, Any]], dict[str, Tensors]]] = {}
        self._on_disk: dict[str, list[dict[str, Any]]] = {}  # records that were read and whose weights are intact
        self._checkpoints: dict[str, Checkpoint] = {}

    def _file(self, name: str, suffix: str) -> Path:
        assert self.folder is not None
        return layer_file(self.folder, 0).with_name(name + suffix)

    def has(self, name: str) -> bool:
        return self._records(name) is not None

    def _records(self, name: str) -> list[dict[str, Any]] | None:
        if self.folder is None:
            return self._in_memory[name][0] if name in self._in_memory else None
        if name not in self._on_disk:
            data = read_sealed(self._file(name, ".json"), _Stored)
            if data is None or data["inputs"] != self.inputs:
                return None
            self._on_disk[name] = data["records"]
        return self._on_disk[name]

    def write(self, name: str, records: list[dict[str, Any]], weights: dict[str, Tensors]) -> None:
        if self.folder is None:
            self._in_memory[name] = records, weights
            return
        if self.team.writes:
            files = [self._file(name, ".safetensors")] if weights else []
            if weights:
                write_layer(files[0], weights)
            write_sealed(self._file(name, ".json"), {"inputs": self.inputs, "records": records}, files)
            self._file(name, ".partial").unlink(missing_ok=True)
        self.team.wait()

    def merge(self, names: Sequence[str], into: str) -> None:
        """Replace several results by one."""
        records = [record for name in names for record in self._records(name) or []]
        if self.folder is None:
            in_memory = {k: v for name in names for k, v in self._in_memory.pop(name)[1].items()}
            self._in_memory[into] = records, in_memory
            return
        weights = {
            record["identity"]: read_layer(self._file(name, ".safetensors"), record["identity"])
            for name in names
            for record in self._records(name) or []
            if record["weights"]
        }
        self.write(into, records, weights)
        for name in names:
            self._on_disk.pop(name, None)
            for suffix in () if not self.team.writes else (".safetensors", ".json"):
                self._file(name, suffix).unlink(missing_ok=True)

    def kept(self, layers: Iterable[int]) -> Kept:
        """The finished results of some layers."""
        records = [record for i in layers for record in self._records(layer_name(i)) or []]
        weights = {k: v for _, by_identity in self._in_memory.values() for k, v in by_identity.items()}
        return Kept(tuple(records), weights, self.folder)

    def save(self, name: str, trainings: Sequence[ReplacementTraining], step: int) -> None:
        """Write the state of a group after ``step`` steps, at most every ``_SAVE_EVERY_SECONDS``."""
        checkpoint = self._checkpoint(name)
        if not self.team.writes or not checkpoint.is_due:
            return
        tensors: Tensors = {}
        states = []
        for number, training in enumerate(trainings):
            state_tensors, state = training.state()
            tensors |= {f"{number} {what}": tensor.cpu() for what, tensor in state_tensors.items()}
            states.append(state)
        checkpoint.save(tensors, {"step": step, "trainings": states})

    def restore(self, name: str, trainings: Sequence[ReplacementTraining]) -> int:
        """Resume a group from its written state; returns the number of steps that it has done."""
        saved = self._checkpoint(name).load()
        if saved is None:
            return 0
        tensors, data = saved
        for number, (training, state) in enumerate(zip(trainings, data["trainings"], strict=True)):
            start = f"{number} "
            of_training = {what.removeprefix(start): t for what, t in tensors.items() if what.startswith(start)}
            training.restore(of_training, state)
        return int(data["step"])

    def _checkpoint(self, name: str) -> Checkpoint:
        if name not in self._checkpoints:
            path = None if self.folder is None else self._file(name, ".partial")
            self._checkpoints[name] = Checkpoint(path, self.inputs, _SAVE_EVERY_SECONDS)
        return self._checkpoints[name]
