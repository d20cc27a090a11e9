"""How processes that work on one parent together divide its layers, and pass on what these take and give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from layersmith.execution.dealing import group_size, groups_of
from layersmith.execution.hidden_states import SharedStates, States
from layersmith.run import ranks

# Gives the numbers of the processes that get what is put under a key.
Homes = Callable[[Any], Iterable[int]]


class Division:
    """The layers of this process, and those of others.

    Where there are several groups of processes, work that is done in groups divides batches among them: batch n goes
    through the layers of a single group. The first group does all other work.

    Args:
        owners: The process of the first group that has each layer.
        device: Where hidden states are wanted.
        is_open: Whether all processes run the same loops over layers now, each for its own layers.
    """

    def __init__(self, owners: Sequence[int], device: torch.device, is_open: bool = False):
        self.owners, self.device, self.is_open = owners, device, is_open

    @property
    def mine(self) -> list[int]:
        """The layers that are dealt to this process in the first group; none in the others."""
        return [i for i, owner in enumerate(self.owners) if owner == ranks.number()]

    @property
    def here(self) -> list[int]:
        """The layers that run in this process: :attr:`mine` while the division is open, else all."""
        return self.mine if self.is_open else list(range(len(self.owners)))

    @property
    def groups(self) -> int:
        """The number of groups of processes that each have all layers."""
        return groups_of(len(self.owners), ranks.count())

    @property
    def here_in_group(self) -> list[int]:
        """The layers that run in this process on the batches of its group, while the division is open; else all."""
        if not self.is_open:
            return list(range(len(self.owners)))
        group, place = divmod(ranks.number(), self._size)
        return [i for i, owner in enumerate(self.owners) if owner == place] if group < self.groups else []

    @property
    def _size(self) -> int:
        return group_size(len(self.owners), ranks.count())

    def is_of_group(self, batch: int) -> bool:
        """Whether a batch goes through the layers of this process's group, by its number."""
        return not self.is_open or batch % self.groups == ranks.number() // self._size

    def owner_in_group(self, i: int, batch: int) -> int:
        """The process that runs layer i on a batch."""
        return self.owners[i] + self._size * (batch % self.groups)

    def is_mine(self, number: int) -> bool:
        """Whether this process does a piece of work that is no layer's, by its number."""
        return not self.is_open or number % ranks.count() == ranks.number()

    @contextmanager
    def passing(self, states: States, homes: Homes | None = None) -> Iterator[States]:
        """The same states while the division is closed; otherwise :meth:`shared` ones."""
        if not self.is_open:
            yield states
            return
        with self.shared(states, homes) as shared:
            yield shared

    @contextmanager
    def shared(self, states: States, homes: Homes | None = None) -> Iterator[SharedStates]:
        """States that reach the processes that get them; all processes open theirs together.

        Args:
            states: Where tensors wait that this process will get.
            homes: Gives the processes that get a key. Default: of a key ``(name, i, ...)`` the one of the first group
                that has layer i; of the output of the last layer none.
        """
        with SharedStates(states, homes or (lambda key: self.owners[key[1] :][:1]), self.device).open() as shared:
            yield shared
