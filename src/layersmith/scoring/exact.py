"""Exact replace-one-block scores: the model is run with each alternative in the place of its parent subblock.

Nothing before the replaced layer changes, so each run starts from the parent's hidden state there; the parent's own
logits are computed once a batch. Results are appended to a journal as they come, keyed by what the alternative is and
by the row's place in the data; an interrupted run reads it and goes on.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from layersmith.artifacts import saying_disk_full
from layersmith.execution import forward_with, layer_outputs
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.progress import SILENT, Progress
from layersmith.scoring.metrics import METRICS, PARENT_VALUES, loss_of, measure, reference

_SYNC_EVERY_SECONDS = 5.0


@dataclass(frozen=True)
class Score:
    """One alternative's metrics.

    Attributes:
        alternative: which.
        rows: metric to its value on every scoring row.
    """

    alternative: Alternative
    rows: dict[str, list[float]]

    def mean(self, metric: str) -> float:
        return math.fsum(self.rows[metric]) / len(self.rows[metric])

    def standard_error(self, metric: str) -> float | None:
        """Of the mean over rows; None for a single row."""
        return standard_error(self.rows[metric])


def standard_error(values: Sequence[float]) -> float | None:
    """s / sqrt(n), s the sample standard deviation; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def score_library(
    library: Library,
    tokens: torch.Tensor,
    *,
    batch_sequences: int,
    journal: Path | None = None,
    inputs: str = "",
    progress: Progress = SILENT,
) -> list[Score]:
    """Score every alternative of a library; the parent's own subblocks score as the parent.

    Args:
        library: the alternatives.
        tokens: ``[N, T]`` scoring rows.
        batch_sequences: rows in one forward pass.
        journal: a file that keeps results as they come.
        inputs: digest of everything that scores depend on; a journal of other inputs is started anew.
        progress: told of layers run.

    Returns:
        Scores in the order of the library's alternatives.
    """
    parent = library.parent
    num_layers = len(parent.blocks)
    known = _read_journal(journal, inputs)
    pending = [a for a in library.alternatives if a.kind != "parent"]
    batches = [(i, tokens[i : i + batch_sequences]) for i in range(0, len(tokens), batch_sequences)]
    # Steps are layers run, because an early alternative costs more than a late one.
    work = {a.identity: num_layers - a.layer + 1 for a in pending}
    with (
        progress.stage("score", sum(work.values()) * len(tokens), "layer passes") as advance,
        _Journal(journal, inputs, bool(known)) as write,
    ):
        for start, batch in batches:
            rows = range(start, start + len(batch))
            missing = [a for a in pending if any((a.identity, row) not in known for row in rows)]
            advance(sum(work[a.identity] for a in pending if a not in missing) * len(batch))
            parent_missing = any(("parent", row) not in known for row in rows)
            if not missing and not parent_missing:
                continue
            batch = batch.to(parent.runtime.device)
            logits, hidden, outputs = layer_outputs(parent, batch)
            references = [reference(logits[j], hidden[j], batch[j]) for j in range(len(batch))]
            if parent_missing:
                for j, row in enumerate(rows):
                    write("parent", row, measure(references[j], logits[j], hidden[j]), known)
            del logits
            for alternative in missing:
                layer = library.layer(alternative)
                changed, changed_hidden = forward_with(parent, batch, outputs, alternative.layer, layer)
                for j, row in enumerate(rows):
                    write(alternative.identity, row, measure(references[j], changed[j], changed_hidden[j]), known)
                advance(work[alternative.identity] * len(batch))
    return [_score(alternative, known, len(tokens)) for alternative in library.alternatives]


def _score(alternative: Alternative, known: dict[tuple[str, int], dict[str, float]], num_rows: int) -> Score:
    identity = "parent" if alternative.kind == "parent" else alternative.identity
    rows = {metric: [known[identity, row][metric] for row in range(num_rows)] for metric in METRICS}
    if alternative.kind == "parent":
        # By definition, not by rounding.
        rows |= {metric: [value] * num_rows for metric, value in PARENT_VALUES.items()}
    return Score(alternative, rows)


def losses(scores: Sequence[Score], objective: str) -> dict[str, float]:
    """Key of the alternative to how much worse it is than the parent under an objective; the parent has 0."""
    parent_value = next(s.mean(objective) for s in scores if s.alternative.kind == "parent")
    return {
        s.alternative.key: 0.0
        if s.alternative.kind == "parent"
        else loss_of(objective, s.mean(objective), parent_value)
        for s in scores
    }


# ---------------------------------------------------------------------------------------------- the journal


def _read_journal(path: Path | None, inputs: str) -> dict[tuple[str, int], dict[str, float]]:
    """Results of an interrupted run of the same inputs. A last line that was cut off is as if never written."""
    if path is None or not path.is_file():
        return {}
    known: dict[tuple[str, int], dict[str, float]] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            try:
                record = json.loads(line)
            except ValueError:
                break
            if number == 0:
                if record.get("inputs") != inputs:
                    return {}
                continue
            if not line.endswith(b"\n"):
                break
            known[record["of"], record["row"]] = record["values"]
    return known


class _Journal:
    """Appends results; a no-op without a path."""

    def __init__(self, path: Path | None, inputs: str, resume: bool):
        self.path, self.inputs, self.resume = path, inputs, resume
        self.file: IO[bytes] | None = None
        self.synced = time.monotonic()

    def __enter__(self) -> Any:
        if self.path is not None:
            with saying_disk_full(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if self.resume:
                    self._cut_off_broken_end()
                self.file = open(self.path, "ab" if self.resume else "wb")
                if not self.resume:
                    self._append({"inputs": self.inputs})
        return self.write

    def _cut_off_broken_end(self) -> None:
        assert self.path is not None
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            os.truncate(self.path, whole)

    def _append(self, record: dict[str, Any]) -> None:
        if self.file is not None and self.path is not None:
            with saying_disk_full(self.path):
                self.file.write(json.dumps(record).encode() + b"\n")
                self.file.flush()
                if time.monotonic() - self.synced > _SYNC_EVERY_SECONDS:
                    os.fsync(self.file.fileno())
                    self.synced = time.monotonic()

    def write(
        self, of: str, row: int, values: dict[str, float], known: dict[tuple[str, int], dict[str, float]]
    ) -> None:
        if (of, row) not in known:  # a batch may have been cut off in its middle
            known[of, row] = values
            self._append({"of": of, "row": row, "values": values})

    def __exit__(self, *exc: object) -> None:
        if self.file is not None:
            self.file.close()
