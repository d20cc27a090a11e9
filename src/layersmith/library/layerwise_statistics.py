"""Importance statistics of one layer after another, for parents whose weights stay on disk.

All rows go through a layer before the next is read. Each layer is read once, and only one layer's sums are in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from layersmith.execution.hidden_states import StatesOnDisk
from layersmith.execution.layerwise import STREAMED_BYTES, Batch, LayerwiseParent, bytes_within_a_layer
from layersmith.library.statistics import Calibration, Probe, add_batch


@torch.no_grad()
def gather_layerwise(
    layerwise: LayerwiseParent, probes: Sequence[Probe], calibration: Calibration
) -> Iterator[dict[str, torch.Tensor]]:
    """Gather statistics as :func:`layersmith.library.statistics.gather` does, but layer by layer.

    An interrupted call starts from the beginning. Hidden states are kept on disk in the folder of the checkpoint, or
    in that of temporary files.

    Args:
        layerwise: The parent.
        probes: The sums to gather.
        calibration: The rows; fewer than ``batch_sequences`` run together where memory is short.

    Yields:
        The means of each layer's probes.
    """
    parent, depth, tokens = layerwise.parent, len(layerwise.layers), calibration.tokens
    folder = calibration.checkpoint.parent if calibration.checkpoint else Path(tempfile.gettempdir())
    states = StatesOnDisk(folder)
    most = int(STREAMED_BYTES / (bytes_within_a_layer(parent) * tokens.shape[1]))
    batches = tokens.split(max(1, min(calibration.batch_sequences, most)))
    started = []
    with calibration.progress.stage("statistics", depth * len(tokens), "rows through a layer") as advance:
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
