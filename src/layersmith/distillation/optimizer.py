"""Muon for the matrices of the layers and AdamW for all else, as one optimizer.

Muon's updates have the size of AdamW's (arXiv 2502.16982, section 2.2), so one learning rate serves both.

A sharded matrix has to be whole where its update is made orthogonal. So the matrices are dealt to the processes: each
gets all shards of every n-th matrix, and returns the shards of its update. No two processes compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

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
        kind = ShardedMuon if isinstance(matrices[0], DTensor) else torch.optim.Muon
        muon = kind(
            matrices,
            lr=first["lr"],
            weight_decay=max(group["weight_decay"] for group in groups),
            adjust_lr_fn="match_rms_adamw",
        )
        self.both = (muon, adamw) if adamw.param_groups else (muon,)
        super().__init__([group for optimizer in self.both for group in optimizer.param_groups], {})
        self.share_groups()

    def share_groups(self) -> None:
        """Take the groups of both again, once their states were read.

        They are the same objects, so that a learning rate that is set here is set in both.
        """
        self.param_groups = [group for optimizer in self.both for group in optimizer.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for optimizer in self.both:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"both": [optimizer.state_dict() for optimizer in self.both]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.both, state_dict["both"], strict=True):
            optimizer.load_state_dict(state)
        self.share_groups()


class ShardedMuon(torch.optim.Muon):
    """Muon for matrices whose rows are sharded over all processes, which all call :meth:`step` together."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            matrices = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: p.numel(), reverse=True)
            together = dist.get_world_size()
            for start in range(0, len(matrices), together):  # of similar size, so that no process waits long
                self._step(matrices[start : start + together], group)

    def _step(self, matrices: Sequence[DTensor], group: dict[str, Any]) -> None:
        """A step of as many matrices as there are processes, or fewer."""
        wanted = [self._with_momentum(matrix, group) for matrix in matrices]
        mine = dist.get_rank()
        rows = _rows_of_shards(matrices[mine]) if mine < len(matrices) else []
        width = matrices[mine].shape[1] if rows else 0
        whole = wanted[0].new_empty(sum(rows), width)
        sizes = [n * width for n in rows] or [0] * dist.get_world_size()
        dealt = [w.numel() for w in wanted] + [0] * (dist.get_world_size() - len(wanted))
        flat = torch.cat([w.flatten() for w in wanted])
        dist.all_to_all_single(whole.view(-1), flat, sizes, dealt)
        if rows:
            whole = _orthogonal_step(whole, group)
        dist.all_to_all_single(flat, whole.view(-1), dealt, sizes)
        for matrix, change in zip(matrices, flat.split(dealt[: len(wanted)]), strict=True):
            shard = matrix.to_local()
            shard.mul_(1 - group["lr"] * group["weight_decay"])
            shard.add_(change.view(shard.shape))

    def _with_momentum(self, matrix: DTensor, group: dict[str, Any]) -> torch.Tensor:
        """The shard of what is made orthogonal: gradient and momentum, which is updated."""
        gradient = matrix.grad
        assert isinstance(gradient, DTensor)
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum, shard = state["momentum_buffer"].to_local(), gradient.to_local()
        momentum.lerp_(shard, 1 - group["momentum"])
        return shard.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum


def _rows_of_shards(matrix: DTensor) -> list[int]:
    """How many rows of a matrix each process has, as ``torch.chunk`` divides them."""
    number, count = matrix.shape[0], dist.get_world_size()
    rows = -(-number // count)
    return [max(0, min(rows, number - rows * rank)) for rank in range(count)]


def _orthogonal_step(whole: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """What torch's Muon adds to a matrix for this gradient, without momentum and weight decay."""
    change = nn.Parameter(torch.zeros_like(whole))
    change.grad = whole
    more = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    torch.optim.Muon([change], weight_decay=0.0, momentum=0.0, **more).step()
    return change.detach()
