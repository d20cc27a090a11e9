"""SliceGPT: fewer dimensions of the hidden states, along their principal components.

Source: Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns" (arXiv 2401.15024). At
the input of every subblock the hidden states are rotated to their principal components, and the components of least
variance are deleted; a matrix on the residual connection goes from the components of one place to those of the next.
Components are those of the states that the layers before, already cut, produce.

The child is computed at full width: deleting all but d components of x is the projection x P with P = Q Q^T, Q being
the first d principal directions ``[D, d]``. A norm divides by sqrt(mean over D) before and after, since rotations keep
the length, so the parent's norms stay as they are. What counts as size is the sliced model's: every matrix has d rows
or columns instead of D, and each layer has two more matrices d x d on its residual connections. The embedding and the
head, which rotations untie, are not counted.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.rivals.problem import Problem
from layersmith.distillation.activations import Rows
from layersmith.execution.exchange import first_tensor
from layersmith.execution.layerwise import split_layers


class Sliced(nn.Module):
    """A layer whose attention and FFN read projected hidden states."""

    def __init__(self, attention: nn.Module, ffn: nn.Module, projections: tuple[torch.Tensor, torch.Tensor]):
        super().__init__()
        self.attention, self.ffn, self.projections = attention, ffn, projections

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        middle = first_tensor(self.attention(hidden_states @ self.projections[0], *args, **kwargs))
        return first_tensor(self.ffn(middle @ self.projections[1], *args, **kwargs))


def dimension_for(problem: Problem, parameters: float) -> int:
    """The largest d of which the layers have at most these parameters."""
    size, layers = problem.library.parent.language_config.hidden_size, len(problem.layers)
    return max(
        d for d in range(1, size + 1) if problem.sizes.total * d / size + 2 * layers * d * d <= parameters or d == 1
    )


@torch.no_grad()
def slicegpt(problem: Problem, parameters: float) -> PreTrainedModel:
    """The child, with the parent's modules in it."""
    d = dimension_for(problem, parameters)
    return sliced(problem, d)


@torch.no_grad()
def sliced(problem: Problem, d: int) -> PreTrainedModel:
    library = problem.library
    layerwise, rows, layers = split_layers(library.parent, library), Rows(problem.calibration, 4096), {}
    for i in range(len(problem.layers)):
        split = layerwise.split(i, *rows.start(layerwise, torch.arange(1)))
        assert split.layout == "sequence"
        projections = []
        for module in (split.attention, split.ffn):
            assert module is not None
            states = [rows.child_input(n, rows.start(layerwise, n)[1]) for n in rows.batches()]
            projection = principal(states, d)
            projections.append(projection)
            for numbers, hidden in zip(rows.batches(), states, strict=True):
                batch, _ = rows.start(layerwise, numbers)
                rows.record_child(numbers, layerwise.run(batch, i, hidden @ projection, module))
            rows.child.advance()
        assert split.attention is not None
        assert split.ffn is not None
        layers[i] = Sliced(split.attention, split.ffn, (projections[0], projections[1]))
    final = principal([rows.child.current] if rows.child.current is not None else [], d)
    problem.work.tokens += problem.calibration.numel()
    child = library.compose([a for a in library.alternatives if a.is_parent])
    parent = library.parent
    for i, layer in layers.items():
        child.set_submodule(parent.descriptor.layer_block_name(i), layer)
    norm = child.get_submodule(parent.descriptor.final_norm_name().removesuffix(".weight"))
    norm.register_forward_pre_hook(lambda module, args: (args[0] @ final, *args[1:]))
    return child


def principal(states: list[torch.Tensor], d: int) -> torch.Tensor:
    """The projection on the first d principal directions of the normed states, ``[D, D]``."""
    flat = [torch.nn.functional.normalize(s.flatten(0, -2).float(), dim=-1) for s in states]
    moment = torch.stack([(x.T @ x).double() for x in flat]).sum(0)
    directions = torch.linalg.eigh(moment).eigenvectors[:, -d:]
    return (directions @ directions.T).float()
