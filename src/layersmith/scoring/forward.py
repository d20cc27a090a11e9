"""The parent's forward pass over many batches, one layer at a time, with its work planned and timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layersmith.execution.hidden_states import States
from layersmith.execution.layerwise import Batch, LayerwiseParent
from layersmith.scoring.work import Plan, Work

# A killed run loses at most this many seconds of work, or more if reading layers would otherwise exceed this share.
_LOST_SECONDS = 60.0
_SHARE_OF_READING = 0.05


def most_seconds(layerwise: LayerwiseParent, work: Work, readings: int) -> float:
    """Limit in seconds of a piece of work that gives results at its end and reads all layers ``readings`` times."""
    reading = work.seconds_of("reading", readings * len(layerwise.layers)) or 0.0
    return max(_LOST_SECONDS, reading / _SHARE_OF_READING)


@torch.no_grad()
def start_all(
    layerwise: LayerwiseParent, batches: Sequence[torch.Tensor], states: States, work: Work
) -> dict[int, Batch]:
    """Run batches through the parent; ``("parent", i, n)`` is the input of layer i, or of the head, for batch n.

    Each layer runs on all batches before the next begins. Processes that a parent is divided between run its layers
    together, each group on its batches; only those are returned, by their numbers.
    """
    with layerwise.arithmetic.needs():
        started = layerwise.start_here(batches, lambda n, embedded: states.put(("parent", 0, n), embedded))
        for i in layerwise.division.here_in_group:
            read(layerwise, i, work)
            for n, batch in started.items():
                with work.doing("forward", layerwise.operations(i, i + 1, *batches[n].shape)):
                    states.put(("parent", i + 1, n), layerwise.run(batch, i, states.get(("parent", i, n))))
    return started


def plan_start(layerwise: LayerwiseParent, shapes: Sequence[torch.Size], plan: Plan) -> None:
    """Plan the work of :func:`start_all` on batches of shapes ``[B, T]``."""
    if layerwise.streamed:
        plan("reading", len(layerwise.layers))
    for shape in shapes:
        plan("forward", layerwise.operations(0, len(layerwise.layers), *shape))


def read(layerwise: LayerwiseParent, i: int, work: Work) -> None:
    """Read a layer's weights into memory if they stay on the disk."""
    if layerwise.streamed:
        with work.doing("reading", 1.0):
            layerwise.read(i)
