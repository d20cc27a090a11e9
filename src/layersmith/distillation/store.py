"""What local distillation has done so far: a file for every layer that is done, one for what is learning."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from layersmith.distillation.student import Student
from layersmith.library.stored_weights import Kept, Tensors, layer_file, read_layer, write_layer
from layersmith.run.artifacts import read_json, read_tensors, write_json, write_tensors

_SAVE_EVERY_SECONDS = 30.0


def layer_name(i: int, group: int | None = None) -> str:
    """Of a layer's results, or of those of a group of its alternatives."""
    return f"layer-{i:03d}" if group is None else f"layer-{i:03d}-{group}"


class Store:
    """Results by name, in a folder or in memory; of those that are being made, what is there so far."""

    def __init__(self, folder: Path | None, inputs: str):
        self.folder, self.inputs = folder, inputs
        self._in_memory: dict[str, tuple[list[dict[str, Any]], dict[str, Tensors]]] = {}
        self._saved = time.monotonic()

    def _file(self, name: str, suffix: str) -> Path:
        assert self.folder is not None
        return layer_file(self.folder, 0).with_name(name + suffix)

    def has(self, name: str) -> bool:
        return self._records(name) is not None

    def _records(self, name: str) -> list[dict[str, Any]] | None:
        if self.folder is None:
            return self._in_memory[name][0] if name in self._in_memory else None
        if not self._file(name, ".json").is_file():
            return None
        found = read_json(self._file(name, ".json"))
        return found["records"] if found["inputs"] == self.inputs else None

    def write(self, name: str, records: list[dict[str, Any]], weights: dict[str, Tensors]) -> None:
        if self.folder is None:
            self._in_memory[name] = records, weights
            return
        if weights:
            write_layer(self._file(name, ".safetensors"), weights)
        write_json(self._file(name, ".json"), {"inputs": self.inputs, "records": records})
        self._file(name, ".partial").unlink(missing_ok=True)

    def merge(self, names: Sequence[str], into: str) -> None:
        """Several results as one, in the place of them."""
        records = [record for name in names for record in self._records(name) or []]
        if self.folder is None:
            own = {k: v for name in names for k, v in self._in_memory.pop(name)[1].items()}
            self._in_memory[into] = records, own
            return
        weights = {
            record["identity"]: read_layer(self._file(name, ".safetensors"), record["identity"])
            for name in names
            for record in self._records(name) or []
            if record["weights"]
        }
        self.write(into, records, weights)
        for name in names:
            for suffix in (".safetensors", ".json"):
                self._file(name, suffix).unlink(missing_ok=True)

    def kept(self, layers: Iterable[int]) -> Kept:
        """Everything that is done of some layers."""
        records = [record for i in layers for record in self._records(layer_name(i)) or []]
        weights = {k: v for _, own in self._in_memory.values() for k, v in own.items()}
        return Kept(tuple(records), weights, self.folder)

    def save(self, name: str, students: Sequence[Student], step: int) -> None:
        """Keep what students have learned so far, at most every so many seconds."""
        if self.folder is None or time.monotonic() - self._saved < _SAVE_EVERY_SECONDS:
            return
        tensors: Tensors = {}
        states = []
        for number, student in enumerate(students):
            own, state = student.state()
            tensors |= {f"{number} {what}": tensor.cpu() for what, tensor in own.items()}
            states.append(state)
        where = {"inputs": self.inputs, "step": step, "students": states}
        write_tensors(self._file(name, ".partial"), tensors, {"state": json.dumps(where)})
        self._saved = time.monotonic()

    def restore(self, name: str, students: Sequence[Student]) -> int:
        """Let students go on from what was kept; the number of steps that they have done."""
        if self.folder is None or not (file := self._file(name, ".partial")).is_file():
            return 0
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            where = json.loads((opened.metadata() or {}).get("state", "{}"))
        if where.get("inputs") != self.inputs:
            return 0
        tensors = read_tensors(file)
        for number, (student, state) in enumerate(zip(students, where["students"], strict=True)):
            start = f"{number} "
            own = {what.removeprefix(start): t for what, t in tensors.items() if what.startswith(start)}
            student.restore(own, state)
        return int(where["step"])
