"""A cache of the parent's predictions on training rows: its k most likely next tokens, the others' total probability.

It pays if rows are repeated, since the parent then runs once for each row. Each safetensors file holds a fixed number
of rows; files that an interrupted run has written are reused. The folder is named by everything its contents depend on.

Shapes: M rows, T tokens, k tokens whose probability is cached.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from layersmith.distillation.losses import FromTop, span_tokens
from layersmith.distillation.tap import Tap
from layersmith.execution.parent import Parent
from layersmith.run.artifacts import fingerprint, read_tensors, write_tensors
from layersmith.run.digests import read_sealed, write_sealed

# Rows of one file: what an interruption loses at most.
_FILE_ROWS = 64


class ParentLogits:
    """The parent's predictions on rows, by row."""

    def __init__(self, ids: torch.Tensor, log_p: torch.Tensor, log_rest: torch.Tensor):
        self.ids, self.log_p, self.log_rest = ids, log_p, log_rest

    def target(self, rows: torch.Tensor, device: torch.device) -> FromTop:
        """Predictions on whole rows, by their numbers ``[B]``."""
        rows = rows.cpu()
        parts = (self.ids, self.log_p, self.log_rest)
        ids, log_p, log_rest = (part[rows].flatten(0, 1).to(device) for part in parts)
        return FromTop(ids, log_p, log_rest)

    @staticmethod
    def bytes_for(num_tokens: int, k: int) -> int:
        """Bytes on the disk and in memory."""
        return num_tokens * (8 * k + 4)


@dataclass(frozen=True)
class TopTokens:
    """How many of the most likely tokens are kept, and the temperature of their probabilities."""

    k: int
    temperature: float


def cache_folder(under: Path, parent: Parent, rows: torch.Tensor, top: TopTokens) -> Path:
    """Folder for the predictions of this parent on these rows."""
    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    return under / fingerprint(
        [parent.identity, str(parent.runtime.dtype), digest, list(rows.shape), top.k, top.temperature]
    )


@torch.no_grad()
def remember(
    parent: Parent,
    rows: torch.Tensor,
    top: TopTokens,
    folder: Path,
    batch_rows: int,
    advance: Callable[[float], None],
) -> ParentLogits:
    """Run the parent on every row ``[M, T]`` that ``folder`` does not have; ``advance`` is called with rows done."""
    tap = Tap(parent)
    top = dataclasses.replace(top, k=min(top.k, tap.vocab_size))
    span = span_tokens(tap.vocab_size)
    parts: list[dict[str, torch.Tensor]] = []
    try:
        for start in range(0, len(rows), _FILE_ROWS):
            file = folder / f"{start:09d}.safetensors"
            some = rows[start : start + _FILE_ROWS]
            seal = file.with_suffix(".json")
            if read_sealed(seal, int) is None:
                write_tensors(file, _of_rows(tap, some, top, span, batch_rows))
                write_sealed(seal, len(some), [file])
            parts.append(read_tensors(file))
            advance(len(some))
    finally:
        tap.close()
    ids, log_p, log_rest = (torch.cat([part[name] for part in parts]) for name in ("ids", "log_p", "log_rest"))
    return ParentLogits(ids, log_p, log_rest)


def _of_rows(tap: Tap, rows: torch.Tensor, top: TopTokens, span: int, batch_rows: int) -> dict[str, torch.Tensor]:
    parts: list[FromTop] = []
    for start in range(0, len(rows), batch_rows):
        batch = rows[start : start + batch_rows].long().to(tap.model.model.device)
        read = tap.run(batch, with_layers=False).read.flatten(0, 1)
        parts += [FromTop.of(tap.head(read[s : s + span]), top.k, top.temperature) for s in range(0, len(read), span)]
    shape = rows.shape
    return {
        "ids": torch.cat([part.ids for part in parts]).int().view(*shape, top.k).cpu(),
        "log_p": torch.cat([part.log_p for part in parts]).view(*shape, top.k).cpu(),
        "log_rest": torch.cat([part.log_rest for part in parts]).view(*shape).cpu(),
    }
