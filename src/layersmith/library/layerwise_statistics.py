"""Importance statistics of one layer after another, for parents whose weights stay on the disk.

All rows go through a layer before the next is read, so each is read once and only one layer's sums are in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from layersmith.execution.hidden_states import StatesOnDisk
from layersmith.execution.layerwise import STREAMED_BYTES, Batch, LayerwiseParent, bytes_within_a_layer
from layersmith.library.statistics import Probe, add_batch
from layersmith.run.progress import Progress


@torch.no_grad()
def gather_layerwise(
    layerwise: LayerwiseParent,
    probes: Sequence[Probe],
    tokens: torch.Tensor,
    batch_sequences: int,
    folder: Path | None,
    progress: Progress,
) -> Iterator[dict[str, torch.Tensor]]:
    """As :func:`layersmith.library.statistics.gather`, layer by layer. An interrupted call starts from the beginning.

    Args:
        layerwise: the parent.
        probes: what to gather.
        tokens: ``[N, T]`` ids.
        batch_sequences: the most rows that run together.
        folder: where hidden states are kept on the disk; default: the folder of temporary files.
        progress: shows rows that went through a layer.

    Yields:
        The means of each layer's probes.
    """
    parent, depth = layerwise.parent, len(layerwise.layers)
    states = StatesOnDisk(folder or Path(tempfile.gettempdir()))
    most = int(STREAMED_BYTES / (bytes_within_a_layer(parent) * tokens.shape[1]))
    batch_sequences = max(1, min(batch_sequences, most))
    batches = [tokens[i : i + batch_sequences] for i in range(0, len(tokens), batch_sequences)]
    started = []
    with progress.stage("statistics", depth * len(tokens), "rows through a layer") as advance:
        for n, rows in enumerate(batches):
            batch = layerwise.start(rows.to(parent.runtime.device))
            states.put(n, batch.embedded)
            started.append(batch.without_embedded())
        for i in range(depth):
            of_layer, sums = [probe for probe in probes if probe.layer == i], dict[str, torch.Tensor]()
            layerwise.read(i)
            for n, batch in enumerate(started):

                def run(batch: Batch = batch, n: int = n, i: int = i) -> None:
                    # Not layerwise.run: while PyTorch counts operations, gradients are rounded differently.
                    states.put(n, batch.calls[i].of(layerwise.layers[i], states.get(n)))

                add_batch(parent, of_layer, batches[n], sums, n, run)
                advance(len(batches[n]))
            yield {name: sums.pop(name).div_(tokens.numel()).float() for name in sorted(sums)}
