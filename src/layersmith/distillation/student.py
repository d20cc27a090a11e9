"""An alternative that learns: its module, what of it is trained, its optimizer, and its best weights so far.

The step of AdamW is measured against each weight's own size: a rate of 0.01 changes a weight matrix by about a
hundredth of its root mean square a step, whatever the width of the model and the scale of its weights. Steps are taken
on float32 copies where the computation's dtype is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

_BETAS = (0.9, 0.95)  # there are tens to thousands of steps, not millions
_WARMUP = 0.05
_LAST_RATE = 0.05
_SMALLEST_SIZE = 1e-3  # of a weight, for the size of its steps


class Student:
    """See the module's docstring.

    Attributes:
        identity: of the alternative, or of the pair.
        module: the layer, or the stage of it, with the alternative in it.
        active: whether it goes on learning.
        tokens: that it has learned from.
        pruned, before, best: its error on held-out rows as pruned, after reconstruction, and at its best.
        curve: tokens and error, each time that it was looked at.
    """

    def __init__(self, identity: str, module: nn.Module, trained: Iterable[str], changed: Iterable[str]):
        self.identity, self.module = identity, module
        names = set(trained)
        self._own: dict[str, nn.Parameter] = {}
        for name in sorted(names | set(changed)):
            holder, _, last = name.rpartition(".")
            parent = module.get_submodule(holder)
            own = nn.Parameter(parent.get_parameter(last).detach().clone(), requires_grad=name in names)
            parent._parameters[last] = own
            self._own[name] = own
        self._trained = {name: own for name, own in self._own.items() if name in names}
        self.active = bool(self._trained)
        self.tokens = 0
        self.pruned = self.before = self.best = math.nan
        self.curve: list[list[float]] = []
        self._masters: dict[str, torch.Tensor] = {}
        self._best: dict[str, torch.Tensor] = {}
        self._optimizer: torch.optim.AdamW | None = None

    # ------------------------------------------------------------------------------------------ before

    @torch.no_grad()
    def take(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights by name in the layer; gives back those that were there."""
        before = {name: self._own[name].detach().clone() for name in weights}
        for name, weight in weights.items():
            self._own[name].copy_(weight)
        return before

    def begin(self, rate: float, pruned: float, before: float) -> None:
        """Ready to learn.

        Args:
            rate: of learning, against the size of each weight.
            pruned, before: errors on held-out rows.
        """
        self.pruned, self.before, self.best = pruned, before, before
        self.curve = [[0, before]]
        if not self._trained:
            return
        self._masters = {
            name: own if own.dtype == torch.float32 else own.detach().float().requires_grad_()
            for name, own in self._trained.items()
        }
        self._best = {name: master.detach().clone() for name, master in self._masters.items()}
        groups = [{"params": [master], "lr": rate * _size(master)} for master in self._masters.values()]
        self._optimizer = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0)
        for group in self._optimizer.param_groups:
            group["peak"] = group["lr"]

    # ------------------------------------------------------------------------------------------ learning

    def learn(self, loss: torch.Tensor, tokens: int, progress: float) -> None:
        """One step.

        Args:
            loss: of a batch, made by this student's module.
            tokens: of the batch.
            progress: share of all steps that are done.
        """
        assert self._optimizer is not None
        grads = torch.autograd.grad(loss, list(self._trained.values()), allow_unused=True)
        for master, grad in zip(self._masters.values(), grads, strict=True):
            master.grad = None if grad is None else grad.float()
        rate = min(1.0, (progress + 1e-9) / _WARMUP) * (_LAST_RATE + (1 - _LAST_RATE) * (1 - progress))
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self._optimizer.step()
        with torch.no_grad():
            for name, master in self._masters.items():
                if master is not self._trained[name]:
                    self._trained[name].copy_(master)
        self.tokens += tokens

    def look(self, error: float, stop_below: float, progress: float) -> None:
        """Note an error on held-out rows; keep the weights if they are the best.

        In the second half of the steps, when they are small, a student stops that hardly improves.
        """
        last = self.curve[-1][1]
        self.curve.append([self.tokens, error])
        if error < self.best:
            self.best = error
            self._best = {name: master.detach().clone() for name, master in self._masters.items()}
        if progress >= 0.5 and not error < (1 - stop_below) * last:
            self.active = False

    # ------------------------------------------------------------------------------------------ after

    def weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The best weights by name, as the checkpoint will hold them; only what was changed."""
        if self._trained and self.best < self.before:
            own = {name: weight.detach() for name, weight in self._own.items() if name not in self._best}
            return {name: weight.to(dtype).cpu() for name, weight in (own | self._best).items()}
        return {}

    def record(self) -> dict[str, Any]:
        return {
            "pruned": self.pruned, "before": self.before, "after": self.best, "tokens": self.tokens,
            "curve": self.curve,
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------ kept for later

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and data from which :meth:`restore` makes the same student."""
        tensors = {f"weight {name}": own.detach() for name, own in self._masters.items()}
        tensors |= {f"best {name}": own for name, own in self._best.items()}
        if self._optimizer is not None:
            for number, own in self._optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer {number} {name}": value for name, value in own.items()}
        data = {"active": self.active, "tokens": self.tokens, "best": self.best, "curve": self.curve}
        return tensors, data

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor], data: Mapping[str, Any]) -> None:
        self.active, self.tokens, self.best = data["active"], data["tokens"], data["best"]
        self.curve = [list(point) for point in data["curve"]]
        for name, master in self._masters.items():
            master.copy_(tensors[f"weight {name}"])
            self._trained[name].copy_(master)
            self._best[name] = tensors[f"best {name}"].to(master.device)
        if self._optimizer is not None:
            kept: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith("optimizer "):
                    _, number, name = key.split(" ", 2)
                    kept.setdefault(int(number), {})[name] = value
            whole = self._optimizer.state_dict()
            self._optimizer.load_state_dict(whole | {"state": kept})


def _size(weight: torch.Tensor) -> float:
    """Its root mean square."""
    return max(_SMALLEST_SIZE, float(weight.detach().float().square().mean().sqrt()))
