"""Means over the calibration rows of what flows through the parent, from one forward pass.

Shapes: N rows, T tokens, D hidden, F units that a projection reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.rivals.problem import Problem, batches
from layersmith.execution.exchange import first_tensor
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.modeling_layersmith import first_tensor as first_argument

Key = tuple[int, str]


@dataclass(eq=False)
class Activations:
    """Means over all tokens.

    Attributes:
        mean, moment: E[a] ``[F]`` and E[a a^T] ``[F, F]`` of what a subblock's last projection reads.
        magnitude: Of each row the mean over tokens of abs(a) for channels ``[N, F]``, of the L2 norm of each head's
            output for heads ``[N, H]``; by layer and subblock.
        hidden: Of each row the mean over tokens of abs(x), summed over all norms, x being a norm's output: ``[N, D]``.
        cosine: Cosine of the input and output of each layer, the mean over tokens.
    """

    mean: dict[Key, torch.Tensor] = field(default_factory=dict)
    moment: dict[Key, torch.Tensor] = field(default_factory=dict)
    magnitude: dict[Key, torch.Tensor] = field(default_factory=dict)
    hidden: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    cosine: dict[int, float] = field(default_factory=dict)

    def square(self, i: int, subblock: str) -> torch.Tensor:
        """E[a^2], ``[F]``."""
        return self.moment[i, subblock].diagonal().double()


@torch.no_grad()
def observe(problem: Problem) -> Activations:
    """Run the calibration rows through the parent."""
    result, total = Activations(), problem.calibration.numel()
    rows: dict[Any, list[torch.Tensor]] = {}

    def add(table: dict[Any, Any], key: Any, value: Any) -> None:
        table[key] = table[key] + value if key in table else value

    def of_reader(key: Key, heads: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            a = first_argument(args, kwargs).float()
            add(result.mean, key, a.sum((0, 1)).double() / total)
            flat = a.flatten(0, 1)
            add(result.moment, key, flat.T @ flat / total)
            size = a.unflatten(-1, (heads, -1)).norm(dim=-1) if heads else a.abs()
            rows.setdefault(key, []).append(size.mean(1))

        return hook

    def of_layer(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x, y = first_argument(args, kwargs).float(), first_tensor(output).float()
            add(result.cosine, i, float(torch.cosine_similarity(x, y, dim=-1).sum()) / total)

        return hook

    def of_norm(module: nn.Module, args: Any, output: Any) -> None:
        rows.setdefault("norm", []).append(output.float().abs().mean(1))

    handles = []
    for i, layer in enumerate(problem.layers):
        handles.append(layer.register_forward_hook(of_layer(i), with_kwargs=True))
        for subblock in SUBBLOCKS:
            module = layer.get_submodule(problem.reader(i, subblock))
            heads = problem.heads(i).num_heads if subblock == "attention" else 0
            handles.append(module.register_forward_pre_hook(of_reader((i, subblock), heads), with_kwargs=True))
        handles += [norm.register_forward_hook(of_norm) for norm in norms_of(problem, layer)]
    try:
        for batch in batches(problem.calibration):
            problem.model(input_ids=batch, use_cache=False, logits_to_keep=1)
            rows.setdefault("hidden", []).append(torch.stack(rows.pop("norm")).sum(0))
    finally:
        for handle in handles:
            handle.remove()
    problem.work.tokens += total
    result.hidden = torch.cat(rows.pop("hidden"))
    result.magnitude = {key: torch.cat(parts) for key, parts in rows.items()}
    return result


def norms_of(problem: Problem, layer: nn.Module) -> list[nn.Module]:
    """The norms over hidden states: modules whose only weight is a vector of the hidden size."""
    size = problem.library.parent.language_config.hidden_size
    return [
        module
        for module in layer.modules()
        if [tuple(p.shape) for p in module.parameters(recurse=False)] == [(size,)] and not list(module.children())
    ]
