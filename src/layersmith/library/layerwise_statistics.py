"""Importance statistics of one layer after another, for parents whose weights stay on disk.

All rows go through a layer before the next is read. Each layer is read once, and only one layer's sums are in memory.
Several processes pass the rows on to each other, and each gathers the sums of its layers. Where they form groups, each
group takes some of the batches, and the first group adds up the sums.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from layersmith.execution.division import Division
from layersmith.execution.hidden_states import States, StatesOnDisk
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
    division = layerwise.division
    here, mine = division.here_in_group, [n for n in range(len(batches)) if division.is_of_group(n)]
    total = len(here) * sum(len(batches[n]) for n in mine)
    with (
        calibration.progress.stage("statistics", total, "rows through a layer") as advance,
        division.passing(StatesOnDisk(folder), partial(_homes, division)) as states,
    ):
        on_device = (rows.to(parent.runtime.device) for rows in batches)
        started = layerwise.start_here(on_device, lambda n, embedded: states.put(("input", 0, n), embedded))
        for i in here:
            of_layer, sums = [probe for probe in probes if probe.layer == i], dict[str, torch.Tensor]()
            layerwise.read(i)
            for n, batch in started.items():

                def run(batch: Batch = batch, n: int = n, i: int = i) -> None:
                    # Not layerwise.run: while PyTorch counts operations, gradients are rounded differently.
                    hidden = batch.calls[i].of(layerwise.layers[i], states.pop(("input", i, n)))
                    states.put(("input", i + 1, n), hidden)

                add_batch(parent, of_layer, batches[n], sums, n, run)
                advance(len(batches[n]))
            if i in division.here:
                _add_up(i, sums, states, range(1, min(division.groups, len(batches))))
                yield i, {name: sums.pop(name).div_(tokens.numel()).float() for name in sorted(sums)}
            else:
                for k, name in enumerate(sorted(sums)):
                    states.put(("sum", i, k, mine[0]), sums.pop(name))


def _add_up(i: int, sums: dict[str, torch.Tensor], states: States, groups: Iterable[int]) -> None:
    """Add the sums of other groups, each of which has the batch of its number."""
    for group in groups:
        for k, name in enumerate(sorted(sums)):
            sums[name] += states.pop(("sum", i, k, group)).cpu()


def _homes(division: Division, key: tuple[Any, ...]) -> list[int]:
    """Inputs go to the process that runs the layer on a batch, sums to that of the first group."""
    name, i = key[:2]
    if i >= len(division.owners):
        return []
    return [division.owners[i] if name == "sum" else division.owner_in_group(i, key[2])]
