"""Proof of the axes of mixers: removing dead heads, or dead numbers of the state, changes nothing.

A head is dead if the output projection ignores it. A number of the state is dead if no weight writes to it or reads it.
Where a norm spans all heads, or all inputs of the state, dead units are first made copies of those that stay. The norm
is then the same before and after.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import HeadsAxis, HeadSizeAxis, StateAxis, largest_part
from layersmith.library.axes.mixers import head_guesses, head_size_guesses, state_guesses
from layersmith.library.axes.trial import (
    Slice,
    Trial,
    copy_units,
    dead_or_copies,
    first_success,
    first_that_holds,
    made_dead,
    others,
    twice,
    ways_that_hold,
    without_small_numbers,
)
from layersmith.library.slicing import (
    channels_of,
    keep_groups,
    keep_head_size,
    keep_query_heads,
    keep_state,
    query_heads_of,
)


def prove_mixer(trial: Trial, i: int, axis: HeadsAxis) -> HeadsAxis:
    """The axis with the layout of its heads and the ways to reduce them that hold."""

    def difference(way: str, guess: HeadsAxis, copies: bool) -> float:
        return twice(trial, partial(_heads_difference, trial, i, way), guess, copies=copies)

    return ways_that_hold(trial, axis, ("fewer_queries", "fewer_groups"), head_guesses(axis), difference)


def _heads_difference(trial: Trial, i: int, way: str, axis: HeadsAxis, copies: bool, others_stay: bool) -> float:
    """The change of the output when dead heads of every group, or dead groups, are removed."""
    group = axis.num_heads // axis.size
    if way == "fewer_queries":
        left = largest_part(group)
        # Every group keeps different heads, which tests the order of heads.
        groups = torch.arange(axis.size)[:, None]
        heads = groups * group + (groups + int(others_stay) + torch.arange(group)) % group
        gone = heads[:, left:].flatten()
        kept = heads[:, :left].flatten().sort().values
        # A removed head is a copy of one of the same group.
        source = heads[:, torch.arange(group - left) % left].flatten()
        fewer = Alternative(i, "attention", "mixer_heads", size=len(kept))
        copied = {"queries": (source, gone)}
        cut: Slice = lambda tensors: keep_query_heads(tensors, axis, kept)  # noqa: E731
    else:
        count = largest_part(axis.size)
        groups = torch.arange(axis.size)[:count] if others_stay else torch.arange(axis.size)[-count:]
        gone_groups = others(axis.size, groups)
        source_groups = groups[torch.arange(len(gone_groups)) % count]
        gone, source = query_heads_of(axis, gone_groups), query_heads_of(axis, source_groups)
        fewer = Alternative(i, "attention", "mixer_groups", size=count, query_heads=count * group)
        copied = {"kv": (source_groups, gone_groups), "queries": (source, gone)}
        cut = lambda tensors: keep_groups(tensors, axis, groups)  # noqa: E731

    kill = made_dead(axis, "queries", gone, copied if copies else {})
    return trial.difference(i, fewer.block_config(trial.parent.blocks[i]), kill, cut)


def prove_head_size(trial: Trial, i: int, axis: HeadSizeAxis) -> HeadSizeAxis:
    """The axis with the layout of the entries of its heads."""

    def difference(guess: HeadSizeAxis, copies: bool) -> float:
        return twice(trial, partial(_head_size_difference, trial, i), guess, copies=copies)

    return dead_or_copies(trial, lambda: head_size_guesses(axis), difference, "dead entries of heads")


def _head_size_difference(trial: Trial, i: int, axis: HeadSizeAxis, copies: bool, others_stay: bool) -> float:
    """The change of the output when dead entries of every head are removed."""
    count = largest_part(axis.size)
    first = torch.arange(count) * (axis.size // count) if others_stay else torch.arange(axis.size - count, axis.size)
    # Where heads may keep different entries they do, which tests that heads are not confused.
    turn = torch.zeros(axis.num_heads, 1, dtype=torch.long) if axis.alike else torch.arange(axis.num_heads)[:, None]
    kept = ((first + turn) % axis.size).sort(-1).values
    gone = torch.stack([others(axis.size, entries) for entries in kept])
    source = kept[:, torch.arange(axis.size - count) % count]
    copied = {
        "channels": (channels_of(axis, source), channels_of(axis, gone)),
        "entries": (source[0], gone[0]),
    }
    fewer = Alternative(i, "attention", "mixer_head_size", size=count)

    kill = made_dead(axis, "channels", copied["channels"][1], copied if copies else {})
    block = fewer.block_config(trial.parent.blocks[i])
    return trial.difference(i, block, kill, lambda tensors: keep_head_size(tensors, axis, kept))


def prove_state(trial: Trial, i: int, axis: StateAxis) -> StateAxis:
    """The axis with the layout of the state."""
    mamba = trial.parent.blocks[i].attention.mamba
    assert mamba is not None
    count = largest_part(axis.size)
    fewer = Alternative(i, "attention", "state_size", size=count).block_config(trial.parent.blocks[i])

    def difference(guess: StateAxis, silent: str, scaled: bool, others_stay: bool) -> float:
        kept = torch.arange(axis.size)[:count] if others_stay else torch.arange(axis.size)[-count:]
        gone = others(axis.size, kept)

        def kill(layer: nn.Module) -> None:
            state = layer.state_dict()
            for w in guess.weights:
                places = w.positions("state", {"state": guess.size})
                if silent:
                    copy_units(state[w.name], w.dim, places, kept, gone)
                if w.name == silent or (not silent and w.dim == 0):
                    state[w.name].index_fill_(w.dim, places[gone].flatten().to(state[w.name].device), 0)

        prepare = without_small_numbers if scaled else None
        return trial.difference(i, fewer, kill, lambda tensors: keep_state(tensors, guess, kept), prepare)

    # Where norms lie between the projections and the state, zeroing the scale of one norm makes its entries dead. Where
    # the output is divided by the root of N, a later norm cancels that except for its epsilon.
    weights = trial.parent.layers[i].state_dict()
    scales = [w.name for w in axis.weights if weights[w.name].ndim == 1 and w.dim == 0]
    return first_success(
        partial(
            first_that_holds,
            trial,
            state_guesses(axis, mamba),
            partial(twice, trial, difference, silent=silent, scaled=scaled),
            "dead numbers of the state",
        )
        for silent, scaled in (("", False), ("", True), *((name, False) for name in scales))
    )
