"""Children of a parent against the clock, without a checkpoint for any of them.

A child's weights are views into the parent's memory, cut to shape: right in size, not in value. So any number of
children can be timed in turns in the memory of the parent.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from layersmith.block_config import BlockConfig
from layersmith.costs.budget import Workload
from layersmith.costs.clock import Measurement, Served, time_in_turns
from layersmith.costs.times import Check, Times, Timing
from layersmith.execution.exchange import share_buffers
from layersmith.execution.parent import Parent
from layersmith.heterogeneous.build import build
from layersmith.library.alternative import Alternative, child_blocks
from layersmith.recipe import CostsRecipe

# How often the reference of a comparison runs in each round; its error is in every ratio to it.
REFERENCE_REPEATS = 3
_SEED = 0

Blocks = Sequence[BlockConfig]


class Stopwatch:
    """Times children of one parent that differ in shapes."""

    def __init__(self, parent: Parent, workload: Workload, recipe: CostsRecipe):
        self.parent, self.recipe = parent, recipe
        self.workload = workload.within(parent.positions)
        self.served = Served(self.workload, recipe.decode_steps, recipe.backend, parent.language_config.vocab_size)
        self._parent_tensors: dict[str, torch.Tensor] = parent.model.state_dict()
        self._random_tensors: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def time(
        self,
        children: Sequence[Blocks],
        seconds: float | None = None,
        advance: Callable[[float], None] = lambda rounds: None,
    ) -> list[Measurement]:
        """Time children in turns; the first is the reference of the others."""
        models = [self.carve(blocks) for blocks in children]
        limit = self.recipe.seconds if seconds is None else seconds
        others = 1 if len(models) > REFERENCE_REPEATS else REFERENCE_REPEATS
        repeats = [REFERENCE_REPEATS] + [others] * (len(models) - 1)
        return time_in_turns(models, self.served, self.recipe.rounds, limit, advance, repeats)

    def carve(self, blocks: Blocks) -> PreTrainedModel:
        """Build a child of these shapes in the parent's memory."""
        parent = self.parent
        if list(blocks) == list(parent.blocks) and parent.stream is None:
            return parent.model
        child = build(
            parent.config, list(blocks), dtype=parent.runtime.dtype, device="meta", descriptor=parent.descriptor
        )
        tensors = {name: self._tensor(name, tuple(t.shape), t.dtype) for name, t in child.state_dict().items()}
        child.load_state_dict(tensors, strict=True, assign=True)
        share_buffers(parent.model, child)
        child.tie_weights()
        child.generation_config = copy.deepcopy(parent.model.generation_config)
        return child.eval().requires_grad_(False)

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A view into the parent's tensor of this name, or a random tensor if the parent's is missing or too small."""
        tensor = self._parent_tensors.get(name)
        size = int(np.prod(shape, dtype=np.int64))
        if tensor is not None and not tensor.is_meta and tensor.dtype == dtype and tensor.numel() >= size:
            return tensor if tensor.shape == shape else tensor.flatten()[:size].view(shape)
        if (name, shape) not in self._random_tensors:
            made = torch.empty(shape, dtype=torch.float32)
            if dtype.is_floating_point:
                made.normal_(0, 0.02, generator=torch.Generator().manual_seed(_SEED))
            else:
                made.zero_()
            self._random_tensors[name, shape] = made.to(device=self.parent.runtime.device, dtype=dtype)
        return self._random_tensors[name, shape]


def no_op_blocks(parent: Parent) -> list[BlockConfig] | None:
    """Every layer without attention and FFN; None if the family does not support removing both."""
    descriptor = parent.descriptor
    if not (descriptor.attn_no_op_supported() and descriptor.mlp_no_op_supported()):
        return None
    return [BlockConfig(replace(b.attention, no_op=True), replace(b.ffn, no_op=True)) for b in parent.blocks]


def check(
    watch: Stopwatch,
    times: Times,
    children: Mapping[str, tuple[Sequence[Alternative], float]],
    recipe: CostsRecipe,
    advance: Callable[[float], None] = lambda rounds: None,
) -> list[Check]:
    """Time whole children and compare them with the sums of their parts. Takes half of ``recipe.seconds`` at most.

    Args:
        watch: Stopwatch of the parent.
        times: Times of the parts.
        children: Name of each child to its alternatives, and to its parameters as a fraction of the parent's.
        recipe: The recipe's section ``costs``.
        advance: Called with the number of rounds just done.
    """
    blocks = [child_blocks(watch.parent.blocks, chosen) for chosen, _ in children.values()]
    parent, *measured = watch.time([watch.parent.blocks, *blocks], recipe.seconds / 2, advance)
    checks = []
    for (name, (chosen, fraction)), child in zip(children.items(), measured, strict=True):
        error = {}
        for phase in ("prefill", "decode"):
            (c, c_error), (p, p_error) = ((getattr(m.time, phase), getattr(m.error, phase)) for m in (child, parent))
            error[phase] = math.hypot(c_error / c, p_error / p) * c / p
        checks.append(
            Check(
                what=name,
                fraction=fraction,
                parts=times.whole(a.key for a in chosen),
                whole=child.time,
                parent=parent.time,
                error=Timing(**error),
            )
        )
    return checks


def time_models(models: Sequence[Any], workload: Workload, recipe: CostsRecipe, vocab_size: int) -> list[Measurement]:
    """Time models as they are, in turns. Takes a quarter of ``recipe.seconds`` at most."""
    served = Served(workload, recipe.decode_steps, recipe.backend, vocab_size, warm=True)
    repeats = [REFERENCE_REPEATS] * len(models)
    return time_in_turns(models, served, recipe.rounds, recipe.seconds / 4, repeats=repeats)
