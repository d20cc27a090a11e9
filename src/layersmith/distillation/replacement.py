"""What local distillation trains: a replacement for a subblock or a whole layer of the parent.

AdamW's step is measured against each weight's own size: a rate of 0.01 changes a weight matrix by about a hundredth of
its root mean square a step, whatever the width of the model and the scale of its weights. Steps are taken on float32
copies if the computation's dtype is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layersmith.distillation.activations import BLOCK
from layersmith.distillation.team import Team
from layersmith.execution.parent import as_stored
from layersmith.library.alternative import Alternative, pair_identity
from layersmith.library.stored_weights import Tensors, digest_of

# Moments of AdamW: shorter memories than usual, since there are tens to thousands of steps, not millions.
_BETAS = (0.9, 0.95)
# Share of the steps in which the rate rises, and what it ends at as a share of its peak.
_WARMUP, _LAST_RATE = 0.05, 0.05
# Weights smaller than this in root mean square are stepped as if they had this size, so that zeros can be trained.
_SMALLEST_SIZE = 1e-3


@dataclass(frozen=True)
class Replacement:
    """Alternatives of one layer that are trained together.

    Attributes:
        alternatives: One alternative, or those of both subblocks; none of them the parent's.
        place: Whose output they learn to return: ``attention``, ``ffn`` or ``block``.
    """

    alternatives: tuple[Alternative, ...]
    place: str

    @property
    def identity(self) -> str:
        return pair_identity(self.alternatives) if self.place == BLOCK else self.alternatives[0].identity

    @property
    def key(self) -> str:
        return " + ".join((self.alternatives[0].key, *(a.name for a in self.alternatives[1:])))

    def record(self, weights: Tensors, result: dict[str, Any]) -> dict[str, Any]:
        """What the library and the report keep of its training."""
        a = self.alternatives[0]
        header = {"of": self.key, "identity": self.identity, "layer": a.layer, "subblock": self.place}
        if len(self.alternatives) == 1:
            header |= {"kind": a.kind, "method": a.method, "size": a.size}
        untrained: dict[str, Any] = {"pruned": None, "before": None, "after": None, "tokens": 0, "curve": []}
        return header | {"weights": digest_of(weights)} | untrained | result


class ReplacementTraining:
    """A replacement in training: its module, its trained weights, their optimizer, and the best weights so far.

    Attributes:
        identity: Identity of the replacement.
        module: The layer, or the part of it, with the alternatives in it.
        active: Whether it is still trained.
        tokens: Number of tokens it was trained on.
        pruned, before, best: Error on held-out rows as pruned, after the refit, and at its best.
        curve: Tokens and error each time that the error was taken.
    """

    def __init__(self, identity: str, module: nn.Module, trained: Iterable[str], changed: Iterable[str]):
        self.identity, self.module = identity, module
        names = set(trained)
        self._parameters: dict[str, nn.Parameter] = {}
        for name in sorted(names | set(changed)):
            holder, _, last = name.rpartition(".")
            owner = module.get_submodule(holder)
            parameter = nn.Parameter(owner.get_parameter(last).detach().clone(), requires_grad=name in names)
            owner.register_parameter(last, parameter)  # the parent keeps its own
            self._parameters[name] = parameter
        self._trained = {name: parameter for name, parameter in self._parameters.items() if name in names}
        self.active = bool(self._trained)
        self.tokens = 0
        self.pruned = self.before = self.best = math.nan
        self.curve: list[list[float]] = []
        self._masters: dict[str, torch.Tensor] = {}
        self._best: dict[str, torch.Tensor] = {}
        self._optimizer: torch.optim.AdamW | None = None

    @torch.no_grad()
    def exchange(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Set weights by their names in the layer; returns the previous ones."""
        previous = {name: self._parameters[name].detach().clone() for name in weights}
        for name, weight in weights.items():
            self._parameters[name].copy_(weight)
        return previous

    def begin(self, rate: float, pruned: float, before: float) -> None:
        """Make the optimizer.

        Args:
            rate: Peak learning rate, relative to the size of each weight.
            pruned, before: Errors on held-out rows as pruned, and now.
        """
        self.pruned, self.before, self.best = pruned, before, before
        self.curve = [[0, before]]
        if not self._trained:
            return
        self._masters = {
            name: weight if weight.dtype == torch.float32 else weight.detach().float().requires_grad_()
            for name, weight in self._trained.items()
        }
        self._best = {name: master.detach().clone() for name, master in self._masters.items()}
        groups = [{"params": [master], "lr": rate * _size(master)} for master in self._masters.values()]
        self._optimizer = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0)
        for group in self._optimizer.param_groups:
            group["peak"] = group["lr"]

    def step(self, loss: torch.Tensor, tokens: int, progress: float) -> None:
        """One step of the optimizer.

        Args:
            loss: Loss on a batch, computed by :attr:`module`.
            tokens: Number of tokens of the batch.
            progress: Share of all steps that are done.
        """
        grads = torch.autograd.grad(loss, list(self._trained.values()), allow_unused=True)
        self._step([None if grad is None else grad.float() for grad in grads], tokens, progress)

    def step_together(
        self, error: torch.Tensor | None, size: torch.Tensor, tokens: int, progress: float, team: Team
    ) -> None:
        """The same for a loss whose terms several processes have: the sum of errors over the sum of sizes.

        Args:
            error: Sum over the rows of this process, computed by :attr:`module`; None if it has none.
            size: Sum over the rows of this process, float64.
            tokens: Number of tokens of the batch, with those of other processes.
            progress: Share of all steps that are done.
            team: The processes.
        """
        trained = list(self._trained.values())
        found = [None] * len(trained) if error is None else torch.autograd.grad(error, trained, allow_unused=True)
        # A weight that no row uses has no gradient in any process: whether it is used depends on no row.
        grads = [
            torch.zeros_like(w, dtype=torch.float32) if g is None else g.float()
            for w, g in zip(trained, found, strict=True)
        ]
        team.add_up(grads)
        team.add_up([size])
        scale = float(size.clamp_min(torch.finfo(torch.float32).tiny))
        self._step([grad / scale for grad in grads], tokens, progress)

    def _step(self, grads: Sequence[torch.Tensor | None], tokens: int, progress: float) -> None:
        assert self._optimizer is not None
        for master, grad in zip(self._masters.values(), grads, strict=True):
            master.grad = grad
        rate = min(1.0, (progress + 1e-9) / _WARMUP) * (_LAST_RATE + (1 - _LAST_RATE) * (1 - progress))
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self._optimizer.step()
        with torch.no_grad():
            for name, master in self._masters.items():
                if master is not self._trained[name]:
                    self._trained[name].copy_(master)
        self.tokens += tokens

    def evaluated(self, error: float, stop_below: float, progress: float) -> None:
        """Note an error on held-out rows, and keep the weights if they are the best so far.

        In the second half of the steps, when these are small, training stops if the error fell by less than
        ``stop_below`` of its last value.
        """
        last = self.curve[-1][1]
        self.curve.append([self.tokens, error])
        if error < self.best:
            self.best = error
            self._best = {name: master.detach().clone() for name, master in self._masters.items()}
        if progress >= 0.5 and not error < (1 - stop_below) * last:
            self.active = False

    def weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The best weights by name, in the checkpoint's dtype; empty if training did not improve them."""
        if not self._trained or not self.best < self.before:
            return {}
        changed = {name: weight.detach() for name, weight in self._parameters.items() if name not in self._best}
        return {name: as_stored(weight, dtype).cpu() for name, weight in (changed | self._best).items()}

    def result(self) -> dict[str, Any]:
        """Errors, tokens and curve, as in the records of :class:`Replacement`."""
        errors = {"pruned": self.pruned, "before": self.before, "after": self.best}
        return errors | {"tokens": self.tokens, "curve": self.curve}

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and data from which :meth:`restore` resumes with the same bits."""
        tensors = {f"weight {name}": master.detach() for name, master in self._masters.items()}
        tensors |= {f"best {name}": weight for name, weight in self._best.items()}
        if self._optimizer is not None:
            for number, moments in self._optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer {number} {name}": value for name, value in moments.items()}
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
            moments: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith("optimizer "):
                    _, number, name = key.split(" ", 2)
                    moments.setdefault(int(number), {})[name] = value
            self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})


def _size(weight: torch.Tensor) -> float:
    """Root mean square of a weight, and at least ``_SMALLEST_SIZE``."""
    return max(_SMALLEST_SIZE, float(weight.detach().float().square().mean().sqrt()))
