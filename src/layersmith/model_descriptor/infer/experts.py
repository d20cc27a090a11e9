"""Which experts a token uses, counted in gradients.

Experts are members of a list of modules, lie along the first dimension of stacks ``[E, ., .]``, or lie flat, one after
another, along the first dimension of matrices ``[E * F, D]``.

Shapes: E experts, F intermediate channels, D hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from layersmith.foreign import foreign_code
from layersmith.model_descriptor.infer.specimen import Specimen


@dataclass(frozen=True)
class FFNExperts:
    """The weights and integers of an FFN that depend on its number of experts.

    It is needed where one config attribute sets the number of experts of attention and FFN. Then the config cannot
    change the FFN alone, and the layer is changed after it is built.

    Attributes:
        weights: Weights of the FFN, and the dimension of each that has an entry for every expert.
        counts: Modules of the FFN, and the integer attribute of each that is the number of experts.
        uses: The same for the number of experts per token.
    """

    weights: tuple[tuple[str, int], ...] = ()
    counts: tuple[tuple[str, str], ...] = ()
    uses: tuple[tuple[str, str], ...] = ()


def before_digit(name: str) -> str:
    """The part of a name before its first number; empty if it has no number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:at]) if at < len(parts) else ""


def experts_used(
    specimen: Specimen, prefix: str, members: Collection[str], flat: Collection[str] = (), count: int = 0
) -> int:
    """How many experts get a gradient from one token.

    Args:
        specimen: A small model that has run.
        prefix: Prefix of the names of the layer's weights.
        members: Names, in the layer, of the weights of experts.
        flat: Those of them in which experts lie flat.
        count: E, where some lie flat.
    """
    named = dict(specimen.model.named_parameters())
    weights = {n: named[prefix + n] for n in sorted(members)}
    used: set[tuple[str, str]] = set()
    counts = []
    for (name, parameter), grad in zip(weights.items(), _gradients(specimen, list(weights.values()), 0), strict=True):
        if not grad.any():
            continue
        if name in flat:
            counts.append(len(_blocks(grad, count)))
        elif parameter.ndim == 3:
            counts.append(int(grad.flatten(1).any(1).sum()))
        else:
            before = before_digit(name)
            used.add((before, name.removeprefix(f"{before}.").split(".")[0]))
    return max([*counts, len(used)])


def lie_flat(specimen: Specimen, prefix: str, names: Sequence[str], count: int) -> bool:
    """Whether matrices are ``count`` experts each: every token uses the same blocks of rows of all, and not all."""
    named = dict(specimen.model.named_parameters())
    weights = [named[prefix + name] for name in names]
    seen = []
    for token in range(specimen.ids.shape[1]):
        blocks = [_blocks(grad, count) for grad in _gradients(specimen, weights, token)]
        if len(set(blocks)) != 1:
            return False
        seen.append(len(blocks[0]))
    return len(set(seen)) == 1 and 0 < seen[0] < count


def _gradients(specimen: Specimen, weights: Sequence[torch.Tensor], token: int) -> list[torch.Tensor]:
    """Gradients of weights from one token alone; zeros where the model gives none."""
    grads: Sequence[torch.Tensor | None] = [None] * len(weights)
    with torch.enable_grad(), foreign_code("Does one token give gradients?"):
        total = specimen.forward(specimen.ids[:, token : token + 1]).square().sum()
        grads = torch.autograd.grad(total, list(weights), allow_unused=True)
    return [torch.zeros_like(w) if grad is None else grad for w, grad in zip(weights, grads, strict=True)]


def _blocks(grad: torch.Tensor, count: int) -> tuple[int, ...]:
    """Which of ``count`` blocks of rows have a gradient."""
    return tuple(grad.unflatten(0, (count, -1)).flatten(1).any(1).nonzero().flatten().tolist())
