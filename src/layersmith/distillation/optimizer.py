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
    """Weight matrices of a model's decoder layers."""
    by_id = {
        id(parameter): parameter
        for layer in model.layers
        for name, parameter in layer.named_parameters()
        if name.endswith("weight") and parameter.ndim == 2 and min(parameter.shape) > 1
    }
    return list(by_id.values())


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers as one, for schedulers, checkpoints and steps."""

    def __init__(self, matrices: Sequence[nn.Parameter], adamw: torch.optim.Optimizer):
        """Take the matrices out of an AdamW that has all parameters; its settings stay."""
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
        super().__init__([group for optimizer in self.both for group in optimizer.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        # The same objects, so that a learning rate that is set here is set in both.
        self.param_groups = [group for optimizer in self.both for group in optimizer.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for optimizer in self.both:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"both": [optimizer.state_dict() for optimizer in self.both]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.both, state_dict["both"], strict=True):
            optimizer.load_state_dict(state)
        self._share_groups()
