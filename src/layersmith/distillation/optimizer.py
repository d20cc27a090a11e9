"""Muon for the matrices of the layers and AdamW for all else, as one optimizer.

Muon's updates have the size of AdamW's (arXiv 2502.16982, section 2.2), so one learning rate serves both.

A sharded matrix has to be whole where its update is made orthogonal. So the matrices are dealt to the processes: each
gets all parts of every n-th matrix, and returns the parts of its update. No two processes compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

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


# Consecutive rows or columns, from one number up to another; several where a shard is not in one piece.
_Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class _Part:
    """What a process has of a matrix: all columns of some, in all rows of some."""

    rows: _Ranges
    columns: _Ranges

    @property
    def size(self) -> int:
        return sum(end - start for start, end in self.rows) * sum(end - start for start, end in self.columns)

    def where(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The index of the part in the matrix."""
        return _numbers(self.rows)[:, None], _numbers(self.columns)[None]

    @staticmethod
    def of_this_process(matrix: DTensor) -> _Part:
        return _Part(*(_ranges(_numbers_here(matrix, dimension)) for dimension in (0, 1)))


def _numbers_here(matrix: DTensor, dimension: int) -> torch.Tensor:
    """The numbers of the rows, or columns, of a matrix that this process has."""
    shape = [1, 1]
    shape[dimension] = matrix.shape[dimension]
    numbers = torch.arange(matrix.shape[dimension], device=matrix.device).view(shape)
    placements = [p if getattr(p, "dim", None) == dimension else Replicate() for p in matrix.placements]
    placed = distribute_tensor(numbers, matrix.device_mesh, placements, src_data_rank=None)
    return placed.to_local().flatten().cpu()


def _ranges(numbers: torch.Tensor) -> _Ranges:
    ends = [0, *(torch.nonzero(numbers.diff() != 1).flatten() + 1).tolist(), len(numbers)]
    return [(int(numbers[start]), int(numbers[end - 1]) + 1) for start, end in pairwise(ends) if end > start]


def _numbers(ranges: _Ranges) -> torch.Tensor:
    return torch.cat([torch.arange(*each) for each in ranges] or [torch.arange(0)])


class ShardedMuon(torch.optim.Muon):
    """Muon for matrices that are divided over all processes, which all call :meth:`step` together.

    It does not matter along which dimensions a matrix is divided, nor whether several processes have the same part.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            matrices = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: p.numel(), reverse=True)
            together, parts = dist.get_world_size(), self._parts_of(matrices)
            for start in range(0, len(matrices), together):  # of similar size, so that no process waits long
                some = slice(start, start + together)
                self._step(matrices[some], [of_process[some] for of_process in parts], group)

    def _parts_of(self, matrices: Sequence[DTensor]) -> list[list[_Part]]:
        """By process, its part of each matrix."""
        key = tuple(map(id, matrices))
        if getattr(self, "_known", (None, []))[0] != key:
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, [_Part.of_this_process(matrix) for matrix in matrices])
            self._known: tuple[Any, list[list[_Part]]] = (key, parts)
        return self._known[1]

    def _step(self, matrices: Sequence[DTensor], parts: list[list[_Part]], group: dict[str, Any]) -> None:
        """A step of as many matrices as there are processes, or fewer."""
        wanted = [self._with_momentum(matrix, group) for matrix in matrices]
        mine = dist.get_rank()
        to_me = [of_process[mine] for of_process in parts] if mine < len(matrices) else []
        sizes = [part.size for part in to_me] or [0] * dist.get_world_size()
        dealt = [w.numel() for w in wanted] + [0] * (dist.get_world_size() - len(wanted))
        flat = torch.cat([w.flatten() for w in wanted])
        received = flat.new_empty(sum(sizes))
        dist.all_to_all_single(received, flat, sizes, dealt)
        if to_me:
            received = self._change_of(matrices[mine], to_me, received, group)
        dist.all_to_all_single(flat, received, dealt, sizes)
        for matrix, change in zip(matrices, flat.split(dealt[: len(wanted)]), strict=True):
            shard = matrix.to_local()
            shard.mul_(1 - group["lr"] * group["weight_decay"])
            shard.add_(change.view(shard.shape))

    @staticmethod
    def _change_of(
        matrix: DTensor, parts: Sequence[_Part], received: torch.Tensor, group: dict[str, Any]
    ) -> torch.Tensor:
        """The change of a matrix, part after part, from what all processes sent of it."""
        whole = received.new_empty(matrix.shape)
        places = [part.where() for part in parts]
        for (rows, columns), piece in zip(places, received.split([part.size for part in parts]), strict=True):
            whole[rows, columns] = piece.view(len(rows), columns.shape[1])
        whole = _orthogonal_step(whole, group)
        return torch.cat([whole[rows, columns].flatten() for rows, columns in places])

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


def _orthogonal_step(whole: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """What torch's Muon adds to a matrix for this gradient, without momentum and weight decay."""
    change = nn.Parameter(torch.zeros_like(whole))
    change.grad = whole
    more = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    torch.optim.Muon([change], weight_decay=0.0, momentum=0.0, **more).step()
    return change.detach()
