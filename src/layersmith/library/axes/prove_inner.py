"""Proof of the axes of sizes inside a subblock: removing dead units changes nothing.

A unit is dead if all its weights are zero. A norm over all units then divides by the mean square of more of them, which
its weight makes good for; the epsilon of the norm is zero for this proof. Where another statistic spans all units, they
are first made copies of those that stay, and what reads them ignores them.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import nn

from layersmith.library.axes.axis import REST, InnerAxis, largest_part
from layersmith.library.axes.inner import inner_alternative, inner_guesses
from layersmith.library.axes.trial import (
    Trial,
    first_success,
    first_that_holds,
    others,
    twice,
    without_small_numbers,
)
from layersmith.library.slicing import keep_inner


def prove_inner(trial: Trial, i: int, axis: InnerAxis) -> InnerAxis:
    """The axis with the layout of its units, and with the norms over them."""
    weights = trial.parent.layers[i].state_dict()
    norms = tuple(w.name for w in axis.weights if weights[w.name].ndim == 1 and w.name.endswith(".weight"))
    ways: list[tuple[tuple[str, ...], float, bool]] = [((), 0.0, False)]
    ways += [(norms, 0.0, False), (norms, 1.0, False)] if norms else []
    ways += [((), 0.0, True)] if axis.readers else []

    def attempt(of_norms: tuple[str, ...], offset: float, copies: bool) -> InnerAxis:
        guesses = inner_guesses(dataclasses.replace(axis, norms=of_norms, offset=offset))
        difference = partial(twice, trial, partial(_difference, trial, i, copies))
        return first_that_holds(trial, guesses, difference, f"dead units of {axis.name}")

    return first_success(partial(attempt, *way) for way in ways)


def _difference(trial: Trial, i: int, copies: bool, axis: InnerAxis, others_stay: bool) -> float:
    """The change of the output when dead units of every group are removed."""
    count = largest_part(axis.units)
    first = torch.arange(count) * (axis.units // count) if others_stay else torch.arange(axis.units - count, axis.units)
    # Every group keeps different units, which tests that groups are not confused.
    kept = ((first + torch.arange(axis.groups)[:, None]) % axis.units).sort(-1).values
    before = torch.arange(axis.groups)[:, None] * axis.units
    gone = (torch.stack([others(axis.units, units) for units in kept]) + before).flatten()
    source = (kept[:, torch.arange(axis.units - count) % count] + before).flatten()

    def kill(layer: nn.Module) -> None:
        state = layer.state_dict()
        for w in axis.weights:
            places = w.positions("channels", {**axis.sizes, REST: 1})
            weight = state[w.name]
            if copies and w.name not in axis.readers:
                moved = weight.movedim(w.dim, 0)
                moved[places[gone].to(weight.device)] = moved[places[source].to(weight.device)]
            else:
                weight.index_fill_(w.dim, places[gone].flatten().to(weight.device), 0)

    block = inner_alternative(i, axis.subblock, axis.name, count * axis.step).block_config(trial.parent.blocks[i])
    prepare = without_small_numbers if axis.norms else None
    return trial.difference(i, block, kill, lambda tensors: keep_inner(tensors, axis, kept), prepare)
