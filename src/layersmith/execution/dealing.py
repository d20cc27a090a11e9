"""How the layers of a model are dealt to several processes, and how long these then wait for each other.

Rows go through the layers in batches. Each process finishes one of its layers on all batches before it begins the next,
as one process alone does, and passes each batch on at once. Because neighbouring layers belong to different processes,
all are busy as soon as as many batches are under way as there are processes. Time is lost at the start and the end of a
pass, and where neighbouring layers take different times: a process that has the quicker one waits.

Where there are at least twice as many processes as layers, they form groups. Each group has all layers, and some of the
batches.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def groups_of(num_layers: int, processes: int) -> int:
    """The number of groups of processes that each have all layers; there is always one."""
    return max(1, processes // num_layers)


def group_size(num_layers: int, processes: int) -> int:
    """The number of processes of each group; those that are left over have no layers."""
    return processes // groups_of(num_layers, processes)


def deal(sizes: Sequence[float], processes: int) -> list[int]:
    """The process of a group that has each layer: of as many neighbouring layers as it has processes each has one.

    The largest of the neighbours goes to the process that has least so far, so that a period of attention and mixer
    layers does not give all of one kind to one process. Layers of equal size are dealt out in turn.
    """
    processes = group_size(len(sizes), processes)
    loads, owners = [0.0] * processes, [0] * len(sizes)
    for start in range(0, len(sizes), processes):
        neighbours = sorted(range(len(sizes))[start : start + processes], key=lambda i: -sizes[i])
        for i, owner in zip(neighbours, sorted(range(processes), key=loads.__getitem__), strict=False):
            owners[i] = owner
            loads[owner] += sizes[i]
    return owners


def owners_of(layers: Sequence[nn.Module], processes: int) -> list[int]:
    """The process of the first group that has each layer, by the number of its parameters."""
    return deal([sum(p.numel() for p in layer.parameters()) for layer in layers], processes)


def makespan(costs: Sequence[float], owners: Sequence[int], batches: int) -> float:
    """Time until all batches have left the last layer, in the unit of the costs.

    Args:
        costs: Time of each layer on all batches.
        owners: The process that has each layer.
        batches: Number of batches, which take the same time each.
    """
    left = [0.0] * batches  # when each batch left the layer before
    free = dict.fromkeys(owners, 0.0)
    for cost, owner in zip(costs, owners, strict=True):
        for n in range(batches):
            left[n] = free[owner] = max(left[n], free[owner]) + cost / batches
    return max(left)


def efficiency(costs: Sequence[float], processes: int, batches: int, in_groups: bool = False) -> float:
    """Time of one process divided by ``processes`` times the time of that many processes, including waiting.

    Args:
        costs: Time of each layer on all batches.
        processes: Number of processes.
        batches: Number of batches.
        in_groups: Whether the batches are divided between the groups, or all go through the first.
    """
    groups = groups_of(len(costs), processes) if in_groups else 1
    most = -(-batches // groups)
    of_group = [cost * most / batches for cost in costs]
    return sum(costs) / (processes * makespan(of_group, deal(costs, processes), most))
