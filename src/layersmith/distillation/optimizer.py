"""Muon for the matrices of the layers and AdamW for all else, as one optimizer.

Muon's updates have the size of AdamW's (arXiv 2502.16982, section 2.2), so one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from layersmith.execution.parent import Parent


def matrices_of(model: Parent) -> list[nn.Parameter]:
    """The matrices of a model's decoder layers: weights by which hidden states are multiplied."""
    found = {
        id(parameter): parameter
        for layer in model.layers
        for name, parameter in layer.named_parameters()
        if name.endswith("weight") and parameter.ndim == 2 and min(parameter.shape) > 1
    }
    return list(found.values())


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers that a scheduler, a checkpoint and a step take for one."""

    def __init__(self, matrices: Sequence[nn.Parameter], adamw: torch.optim.Optimizer):
        """Take the matrices out of an AdamW that has all parameters, whose settings remain."""
        taken = {id(p) for p in matrices}
        groups = [{**g, "params": [p for p in g["params"] if id(p) not in taken]} for g in adamw.param_groups]
        adamw.param_groups[:] = [group for group in groups if group["params"]]
        first = groups[0]
        muon = torch.optim.Muon(
            matrices,
            lr=first["lr"],
            weight_decay=max(group["weight_decay"] for group in groups),
            adjust_lr_fn="match_rms_adamw",
        )
        self.both = (muon, adamw) if adamw.param_groups else (muon,)
        super().__init__([group for own in self.both for group in own.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        # The same objects, so that a rate that is set here is set there.
        self.param_groups = [group for own in self.both for group in own.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for own in self.both:
            own.step()

    def state_dict(self) -> dict[str, Any]:
        return {"both": [own.state_dict() for own in self.both]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for own, state in zip(self.both, state_dict["both"], strict=True):
            own.load_state_dict(state)
        self._share_groups()
