"""Importance statistics of one layer after the other, for parents whose weights stay on the disk.

All rows go through a layer before the next is read: each is read once, and the sums of one layer lie in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from layersmith.execution.hidden_states import StatesOnDisk
from layersmith.execution.layerwise import (
    STREAMED_BYTES,
    Batch,
    CannotTakeApart,
    StagedParent,
    bytes_within_a_layer,
    take_apart,
)
from layersmith.library.library import Library
from layersmith.library.statistics import Probe, add_batch
from layersmith.run.progress import Progress


def gather_layerwise(
    library: Library,
    probes: Sequence[Probe],
    tokens: torch.Tensor,
    batch_sequences: int,
    near: Path | None,
    progress: Progress,
) -> Iterator[dict[str, torch.Tensor]] | None:
    """As :func:`layersmith.library.statistics.gather`, layer by layer; None where the parent cannot be taken apart.

    An interrupted call begins anew.

    Args:
        library: of the parent; its orders do not matter.
        probes: what to gather.
        tokens: ``[N, T]`` ids.
        batch_sequences: rows that run together, at most.
        near: a file beside which hidden states may wait on the disk.
        progress: told of rows through a layer.

    Returns:
        The means of each layer's probes.
    """
    try:
        staged = take_apart(library, tokens[:1, :32].repeat(2, 1).to(library.parent.runtime.device))
    except CannotTakeApart:
        return None
    most = int(STREAMED_BYTES / (bytes_within_a_layer(library.parent) * tokens.shape[1]))
    batch_sequences = max(1, min(batch_sequences, most))
    folder = near.parent if near else Path(tempfile.gettempdir())
    return _means(staged, probes, tokens, batch_sequences, folder, progress)


@torch.no_grad()
def _means(
    staged: StagedParent,
    probes: Sequence[Probe],
    tokens: torch.Tensor,
    batch_sequences: int,
    folder: Path,
    progress: Progress,
) -> Iterator[dict[str, torch.Tensor]]:
    parent, depth, states = staged.library.parent, len(staged.layers), StatesOnDisk(folder)
    batches = [tokens[i : i + batch_sequences] for i in range(0, len(tokens), batch_sequences)]
    started = []
    with progress.stage("statistics", depth * len(tokens), "rows through a layer") as advance:
        for n, rows in enumerate(batches):
            batch = staged.start(rows.to(parent.runtime.device))
            states.put(n, batch.embedded)
            started.append(batch.without_embedded())
        for i in range(depth):
            own, sums = [probe for probe in probes if probe.layer == i], dict[str, torch.Tensor]()
            staged.read(i)
            for n, batch in enumerate(started):

                def run(batch: Batch = batch, n: int = n, i: int = i) -> None:
                    # Not by staged.run: under the eyes of its counting, gradients are rounded in another way.
                    states.put(n, batch.calls[i].of(staged.layers[i], states.get(n)))

                add_batch(parent, own, batches[n], sums, n, run)
                advance(len(batches[n]))
            yield {name: sums.pop(name).div_(tokens.numel()).float() for name in sorted(sums)}
