"""Importance statistics of one layer after another, for parents whose weights stay on disk.

All rows go through a layer before the next is read. Each layer is read once, and only one layer's sums are in memory.
Several processes pass the rows on to each other, and each gathers the sums of its layers.
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
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Gather statistics as :func:`layersmith.library.statistics.gather` does, but layer by layer.

    An interrupted call starts from the beginning, and one that is not used up must be closed. Hidden states are kept on
    disk in the folder of the checkpoint, or in that of temporary files.

    Args:
        layerwise: The parent.
        probes: The sums to gather.
        calibration: The rows; fewer than ``batch_sequences`` run together where memory is short.

    Yields:
        Each layer of this process, and the means of its probes.
    """
    parent, tokens = layerwise.parent, calibration.tokens
    folder = calibration.checkpoint.parent if calibration.checkpoint else Path(tempfile.gettempdir())
    of_row = bytes_within_a_layer(parent.layers, parent.runtime.dtype.itemsize) * tokens.shape[1]
    most = int(STREAMED_BYTES[parent.runtime.device.type] / of_row)
    batches = tokens.split(max(1, min(calibration.batch_sequences, most)))
    started, total = [], len(layerwise.division.here) * len(tokens)
    with (
        calibration.progress.stage("statistics", total, "rows through a layer") as advance,
        layerwise.division.passing(StatesOnDisk(folder)) as states,
    ):
        for n, rows in enumerate(batches):
            batch = layerwise.start(rows.to(parent.runtime.device))
            if 0 in layerwise.division.here:
                states.put(("input", 0, n), batch.embedded)
            started.append(batch.without_embedded())
        for i in layerwise.division.here:
            of_layer, sums = [probe for probe in probes if probe.layer == i], dict[str, torch.Tensor]()
            layerwise.read(i)
            for n, batch in enumerate(started):

                def run(batch: Batch = batch, n: int = n, i: int = i) -> None:
                    # Not layerwise.run: while PyTorch counts operations, gradients are rounded differently.
                    hidden = batch.calls[i].of(layerwise.layers[i], states.pop(("input", i, n)))
                    states.put(("input", i + 1, n), hidden)

                add_batch(parent, of_layer, batches[n], sums, n, run)
                advance(len(batches[n]))
            yield i, {name: sums.pop(name).div_(tokens.numel()).float() for name in sorted(sums)}
