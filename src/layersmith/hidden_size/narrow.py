"""A parent with a smaller hidden size: which channels stay, and its weights.

The weights of what stays are the parent's, multiplied as experiments found. The maps that read
norms are then refitted by least squares. With y what a norm of the parent gives, y' what the narrow parent's norm gives
for the channels that stay, and W the parent's map, the new map W' minimises the mean of ``|W y - W' y'|^2``:

    W' = (W E[y y'^T] + r W_K) (E[y' y'^T] + r I)^-1

W_K is W without the columns that go, and r a small ridge.

Shapes: B rows, T tokens, D hidden, D' the smaller hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from layersmith.errors import UnsupportedModel, first_line
from layersmith.execution.parent import Parent, as_stored
from layersmith.hidden_size.channels import norms_of, watched
from layersmith.hidden_size.config import shapes_of
from layersmith.hidden_size.narrowing import Carriers, Kept, Narrowing
from layersmith.model_descriptor.stock import casting, quiet_transformers, restore_buffers, stock_model
from layersmith.run.progress import Advance

# Ridge of the least squares, relative to the mean square of what a norm gives.
_RIDGE = 1e-3


@dataclass(frozen=True)
class Narrower:
    """A parent's smaller form, without its weights.

    Attributes:
        parent: The parent.
        narrowing: How channels are removed.
        config: The config with the smaller hidden size.
        carriers: The dimensions of the parent's weights that carry the residual stream.
        hidden_size, size: D and D'.
        heads: Number of heads of the parent, where it shrinks with the hidden size, else 1.
    """

    parent: Parent
    narrowing: Narrowing
    config: PretrainedConfig
    carriers: Carriers
    hidden_size: int
    size: int
    heads: int = 1

    @staticmethod
    def of(parent: Parent, narrowing: Narrowing, size: int) -> Narrower:
        """Raises: UnsupportedModel: The family has no model of that size with everything else as it is."""
        config = narrowing.hidden_size.narrower(parent.config, size)
        before, after, hidden_size = shapes_of(parent.model), shapes_of(stock_model(config)), hidden_size_of(parent)
        heads = narrowing.hidden_size.number_of_heads(parent.config)
        carriers = narrowing.carriers(before, after, hidden_size, size, hidden_size // heads)
        return Narrower(parent, narrowing, config, carriers, hidden_size, size, heads)

    @property
    def heads_left(self) -> int:
        """Heads that stay in a layer."""
        return self.heads * self.size // self.hidden_size

    def rows_of(self, name: str, kept: Kept) -> torch.Tensor:
        """The weight of a linear map of the parent with the outputs that stay, in float32."""
        weight = self.parent.tensors()[f"{name}.weight"].float()
        for carrier in self.carriers:
            if carrier.name == f"{name}.weight" and carrier.dim == 0:
                weight = weight.index_select(0, carrier.staying(kept.of(carrier), self.hidden_size).to(weight.device))
        return weight

    def model(self, kept: Kept) -> PreTrainedModel:
        """The narrow parent, in the dtype of the computation."""
        runtime = self.parent.runtime
        model = stock_model(self.config, dtype=runtime.dtype)
        tensors = self.narrowing.tensors(self.parent.tensors(), self.carriers, kept, self.hidden_size)
        model.load_state_dict({name: tensors[name] for name in model.state_dict()}, assign=True)
        model.tie_weights()
        restore_buffers(model, runtime)
        return model.eval().requires_grad_(False)


def hidden_size_of(parent: Parent) -> int:
    """D."""
    embedding: Any = parent.model.get_submodule(parent.descriptor.input_embedding_name())
    return int(embedding.weight.shape[1])


def check_narrow(parent: Parent) -> None:
    """Raises: UnsupportedModel: The parent's layers differ, so no config says what a narrower one is."""
    if getattr(parent.config, "block_configs", None) is not None:
        raise UnsupportedModel(
            "its layers differ, and only a parent whose layers do not can get a smaller hidden size."
        )


def why_not(parent: Parent, narrowing: Narrowing, size: int) -> str:
    """Why a parent has no form with this hidden size; empty if it has one."""
    try:
        Narrower.of(parent, narrowing, size)
    except UnsupportedModel as reason:
        return first_line(reason)
    return ""


# ---------------------------------------------------------------------------------------------- refit


@torch.no_grad()
def refit(narrower: Narrower, model: PreTrainedModel, kept: Kept, rows: Sequence[Any], advance: Advance) -> int:
    """Refit the linear maps of a narrow parent that read norms; returns how many were refitted.

    Args:
        narrower: How it was made.
        model: The narrow parent, changed in place.
        kept: What stays.
        rows: Batches ``[B, T]`` of tokens.
        advance: Called with the number of rows just done.
    """
    parent = narrower.parent
    norms = norms_of(parent.model, narrower.carriers)
    readers = _readers(narrower, norms, rows[0][:1, :8])
    norms = {name: module for name, module in norms.items() if name in readers}
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    index = kept.channels.to(parent.runtime.device)

    def see(name: str, given: torch.Tensor, output: torch.Tensor) -> None:
        y = output.flatten(0, -2).float()
        narrow = model.get_submodule(name)(given.index_select(-1, index)).flatten(0, -2).float()
        of_norm = y.T @ narrow, narrow.T @ narrow
        sums[name] = (sums[name][0] + of_norm[0], sums[name][1] + of_norm[1]) if name in sums else of_norm

    with watched(norms, see):
        for batch in rows:
            parent.model(input_ids=batch.to(parent.runtime.device), use_cache=False)
            advance(len(batch))
    for name, (mixed, square) in sums.items():
        ridge = _RIDGE * square.diagonal().mean()
        inverse = torch.linalg.inv(square + ridge * torch.eye(len(square), device=square.device))
        for reader in readers[name]:
            weight, old = _weight(model, reader), narrower.rows_of(reader, kept)
            weight.copy_((old @ mixed + ridge * weight.float()) @ inverse)
    return sum(map(len, readers.values()))


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    return model.get_submodule(name).get_parameter("weight")


@torch.no_grad()
def _readers(narrower: Narrower, norms: Mapping[str, nn.Module], rows: torch.Tensor) -> dict[str, list[str]]:
    """The linear maps that read the output of each norm as it is, and whose weights nothing else uses."""
    model = narrower.parent.model
    inputs = {c.name for c in narrower.carriers if c.dim == 1 and c.times == 1 and c.unit == 1}
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    linear: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in inputs and uses[id(module.weight)] == 1
    }
    given: dict[tuple[int, torch.Size], tuple[str, torch.Tensor]] = {}
    readers: dict[str, list[str]] = {}

    def made(name: str, before: torch.Tensor, output: torch.Tensor) -> None:
        given[output.data_ptr(), output.shape] = name, output  # kept, so that no other tensor gets its place

    def read(name: str, before: torch.Tensor, output: torch.Tensor) -> None:
        if (place := (before.data_ptr(), before.shape)) in given:
            readers.setdefault(given[place][0], []).append(name)

    with watched(dict(norms), made), watched(linear, read):
        model(input_ids=rows.to(narrower.parent.runtime.device), use_cache=False)
    return readers


def write(narrower: Narrower, model: Any, folder: Path, **how: Any) -> None:
    """Write a narrow parent as an ordinary checkpoint in the parent's dtype.

    Afterwards the model is what loading that checkpoint in the dtype of the computation gives.
    """
    dtype, runtime = narrower.parent.dtype, narrower.parent.runtime
    with casting(model, runtime.dtype):
        for _, parameter in model.named_parameters():
            parameter.data = as_stored(parameter.data, dtype)
        model.to(dtype)
        with quiet_transformers():
            model.save_pretrained(folder, **how)
        model.to(runtime.dtype)
