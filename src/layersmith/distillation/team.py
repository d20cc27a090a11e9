"""Processes that train the same weights, each on some of the rows, and add up what these give.

All have the same sums, to the bit, and so the same weights. Another number of processes adds in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from layersmith.run import ranks


@dataclass(eq=False)
class Team:
    """The first ``count`` processes.

    Attributes:
        count: Their number.
        group: Their process group; None if there is one process.
    """

    count: int = 1
    group: Any = None

    @property
    def is_divided(self) -> bool:
        return self.count > 1

    @property
    def writes(self) -> bool:
        """Whether this process writes results and states, which are the same in all."""
        return not self.is_divided or ranks.is_first()

    def mine(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of some rows that this process has: every n-th."""
        return rows[ranks.number() :: self.count] if self.is_divided else rows

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors of one dtype by their sums over the team.

        Raises:
            FailedElsewhere: Another process of the team failed.
        """
        if not self.is_divided or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _lost():
            dist.all_reduce(flat, group=self.group)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view(tensor.shape))

    def wait(self) -> None:
        """Wait until all are here."""
        if self.is_divided:
            with _lost():
                dist.barrier(group=self.group)

    def part(self) -> None:
        """Close the connections: others that wait for this process fail."""
        if self.group is not None:
            group, self.group = self.group, None
            dist.destroy_process_group(group)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """While open, an error in this process ends the others' waiting for it."""
        try:
            yield
        except Exception:
            self.part()
            raise


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as lost:
        raise ranks.FailedElsewhere("another process of the team failed") from lost


ALONE = Team()


@contextmanager
def team_of(count: int) -> Iterator[Team | None]:
    """A team of the first processes; None in those that do not belong to it. All processes call this."""
    if count == 1:
        yield ALONE if ranks.is_first() else None
        return
    group = dist.new_group(range(count))
    if ranks.number() >= count:
        yield None
        return
    team = Team(count, group)
    del group  # it closes its connections once nobody holds it
    try:
        yield team
    finally:
        team.part()
