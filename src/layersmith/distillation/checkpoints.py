"""Weights and optimizer states of an interrupted training, which any number of processes resumes from.

They are written by ``torch.distributed.checkpoint``: every process writes what it has, a shard or its part of what all
have, and reads what it needs, whoever wrote it. A sharded training can go on unsharded, and the other way round.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, Shard

from layersmith.execution.sharded import let_go
from layersmith.run import ranks

STATES = "states"
# Weights that are not trained, as those below adapters, are in the child's own files.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_states(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], checkpoint: Path) -> None:
    """Write weights and optimizer states into the folder of a checkpoint; all processes call this."""
    with _first_failure():
        # Not synced: what a power failure damages gives way to the checkpoint before, as the digests of files tell.
        writer = dcp.FileSystemWriter(checkpoint / STATES, sync_files=False)
        states = _with_tensors(_in_one_piece, _states(model, optimizers))
        dcp.save(states, storage_writer=writer, no_dist=not ranks.are_several())


def load_states(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], checkpoint: Path) -> None:
    """Read weights and optimizer states from the folder of a checkpoint; all processes call this."""
    as_divided = _states(model, optimizers)
    states = _with_tensors(_in_one_piece, as_divided)
    with _first_failure():
        dcp.load(states, checkpoint_id=checkpoint / STATES, no_dist=not ranks.are_several())
    states = _with_tensors(_divided_like, states, as_divided)
    set_state_dict(
        model, optimizers, model_state_dict=states["model"], optim_state_dict=states["optimizer"], options=_OPTIONS
    )


def _states(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    let_go(model)
    weights, states = get_state_dict(model, optimizers, options=_OPTIONS)
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {"model": {n: weight for n, weight in weights.items() if n not in frozen}, "optimizer": states}


def _with_tensors(change: Callable[..., DTensor], *states: Any) -> Any:
    """Nested states with all tensors that are divided over processes changed, by those in the same place of others."""
    first = states[0]
    if isinstance(first, dict):
        return {name: _with_tensors(change, *(state[name] for state in states)) for name in first}
    return change(*states) if isinstance(first, DTensor) else first


def _in_one_piece(tensor: DTensor) -> DTensor:
    """A tensor of which this process has one piece, not a piece of each of several matrices that are stored as one.

    ``torch.distributed.checkpoint`` takes what a process has for one piece.
    """
    last: Any = tensor.placements[-1]
    if not hasattr(last, "split_factor"):
        return tensor
    return tensor.redistribute(placements=[*tensor.placements[:-1], Shard(last.dim)])


def _divided_like(tensor: DTensor, other: DTensor) -> DTensor:
    if tensor.placements == other.placements:
        return tensor
    return tensor.redistribute(placements=other.placements)


@contextmanager
def _first_failure() -> Iterator[None]:
    """Raise what failed first, instead of torch's list of failures by process, which is no ``Exception``."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as failed:
        error, _ = next(iter(failed.failures.values()))
        raise error from failed
