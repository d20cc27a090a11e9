"""How important each channel of the residual stream is, over all layers at once.

Two scores. By activations: the mean magnitude of a channel in what norms give to the subblocks and the head, summed
over all norms (Minitron, arXiv 2407.14679, section 2.2). By second order: what removing a channel everywhere does to
the loss. With y the output of a norm and g the gradient of the loss of sampled labels for it, the change is about
-sum(y g) over all norms, and half the mean of its square over tokens estimates the KL divergence (the Fisher
information is the mean outer product of such gradients).

Shapes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layersmith.errors import UnsupportedModel
from layersmith.execution.parent import Parent
from layersmith.foreign import foreign_code
from layersmith.hidden_size.config import Carrier
from layersmith.hidden_size.narrowing import layer_of
from layersmith.library.axes.layers import input_dim
from layersmith.run.progress import Advance

# Rows whose gradients are taken; the order of channels hardly depends on more.
_GRADIENT_ROWS = 32


def norms_of(model: nn.Module, carriers: Sequence[Carrier]) -> dict[str, nn.Module]:
    """The modules whose weights are vectors of channels, e.g. norms, by name.

    Raises:
        UnsupportedModel: There are none.
    """
    carrying = {c.name for c in carriers if c.times == c.unit == 1}
    norms = {
        name: module
        for name, module in model.named_modules()
        if (own := dict(module.named_parameters(recurse=False)))
        and all(p.ndim == 1 and f"{name}.{n}" in carrying for n, p in own.items())
        and "weight" in own
    }
    if not norms:
        raise UnsupportedModel("its norms have no weights, so the importance of its channels is not observed.")
    return norms


@contextmanager
def watched(modules: dict[str, nn.Module], see: Callable[[str, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """While open, ``see`` gets the name, input and output of each of the modules when it runs."""

    def hook(name: str) -> Any:
        return lambda module, args, output: see(name, args[0], output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def by_activations(
    parent: Parent, norms: dict[str, nn.Module], batches: Sequence[torch.Tensor], advance: Advance
) -> torch.Tensor:
    """``[D]``: the mean magnitude of each channel in the outputs of norms, summed over the norms.

    Args:
        parent: The model.
        norms: Its norms.
        batches: Rows ``[B, T]`` of tokens.
        advance: Called with the number of rows just done.
    """
    sums: dict[str, torch.Tensor] = {}
    tokens = sum(rows.numel() for rows in batches)

    def see(name: str, given: torch.Tensor, output: torch.Tensor) -> None:
        total = output.flatten(0, -2).float().abs().sum(0).double()
        sums[name] = sums[name] + total if name in sums else total

    with watched(norms, see):
        for rows in batches:
            parent.model(input_ids=rows.to(parent.runtime.device), use_cache=False)
            advance(len(rows))
    return torch.stack(list(sums.values())).sum(0).cpu() / tokens


def by_second_order(
    parent: Parent, norms: dict[str, nn.Module], batches: Sequence[torch.Tensor], seed: int, advance: Advance
) -> torch.Tensor:
    """``[D]``: the estimated KL divergence per token once a channel is removed everywhere.

    Raises:
        UnsupportedModel: The model gives no gradients.
    """
    device = parent.runtime.device
    generator = torch.Generator().manual_seed(seed)
    total, tokens = torch.zeros((), dtype=torch.double), 0
    embedding = parent.model.get_submodule(parent.descriptor.input_embedding_name())
    handle = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        for rows in torch.cat([*batches])[:_GRADIENT_ROWS].split(1):
            changes: list[torch.Tensor] = []

            def see(
                name: str, given: torch.Tensor, output: torch.Tensor, changes: list[torch.Tensor] = changes
            ) -> None:
                output.register_hook(lambda gradient: changes.append(-(output.detach() * gradient).flatten(0, -2)))

            with (
                foreign_code("Does the model give gradients?", refusal_is_answer=True) as attempt,
                torch.enable_grad(),
                watched(norms, see),
            ):
                logits = attempt.call(parent.model, input_ids=rows.to(device), use_cache=False).logits[0].float()
                labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).to(device)
                attempt.call(torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="sum").backward)
            if attempt.failed or not changes:
                raise UnsupportedModel(f"it gives no gradients ({attempt.reason}).")
            total = total + torch.stack(changes).float().sum(0).double().square().sum(0).cpu() / 2
            tokens += rows.numel()
            advance(len(rows))
    finally:
        handle.remove()
    return total / tokens


@torch.no_grad()
def head_importance(
    parent: Parent, carriers: Sequence[Carrier], batches: Sequence[torch.Tensor], advance: Advance
) -> dict[int, torch.Tensor]:
    """Layer to the importance ``[H]`` of its heads: the mean square of what each adds to the residual stream at most.

    That is, the mean square of each input of the map that heads end in, times the square of its column, summed over
    the inputs of a head.
    """
    readers = {
        c.name.removesuffix(".weight"): c
        for c in carriers
        if c.unit > 1 and c.name.endswith(".weight") and input_dim(parent.model, c.name) == c.dim
    }
    sums: dict[str, torch.Tensor] = {}

    def see(name: str, given: torch.Tensor, output: torch.Tensor) -> None:
        total = given.flatten(0, -2).float().square().sum(0)
        sums[name] = sums[name] + total if name in sums else total

    with watched({name: parent.model.get_submodule(name) for name in readers}, see):
        for rows in batches:
            parent.model(input_ids=rows.to(parent.runtime.device), use_cache=False)
            advance(len(rows))
    tensors, importance = parent.tensors(), {}
    for name, c in readers.items():
        columns = tensors[c.name].float().square().sum(1 - c.dim)
        importance[layer_of(name)] = (sums[name] * columns).view(-1, c.unit).sum(1).cpu()
    return importance
