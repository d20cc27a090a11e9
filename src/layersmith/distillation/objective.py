"""The objective of global distillation on a batch: what the parent returns, and the child's loss against it.

The child's ``forward`` is exchanged for one that returns the loss, so that whatever wraps the child (DDP, FSDP,
autocast) wraps the loss too.

Shapes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from layersmith import upstream
from layersmith.distillation.losses import FromHidden, Mixture, Target, cosine_distance, head_losses, span_tokens
from layersmith.distillation.parent_logits import ParentLogits
from layersmith.distillation.tap import Taken, Tap
from layersmith.errors import UsageError
from layersmith.execution.parent import Parent
from layersmith.execution.sharded import is_sharded, let_go, with_head


@dataclass(frozen=True, eq=False)
class ParentOutputs:
    """What the parent returns on some rows.

    Attributes:
        target: Its predictions; None if KL has no weight.
        layers: ``[B, T, D]`` of every decoder layer; empty if hidden states have no weight.
    """

    target: Target | None
    layers: Sequence[torch.Tensor]


class ParentTargets:
    """The parent's outputs, computed or read from the cache of its logits."""

    def __init__(self, parent: Parent, mixture: Mixture, cache: ParentLogits | None = None):
        self.mixture, self.cache = mixture, cache
        self.tap = Tap(parent)

    @torch.no_grad()
    def outputs(self, inputs: dict[str, torch.Tensor], from_cache: bool) -> ParentOutputs:
        """Outputs on rows ``input_ids`` ``[B, T]``, whose numbers in the cache are ``row`` ``[B]``."""
        if self.cache is not None and from_cache:
            return ParentOutputs(self.cache.target(inputs["row"], inputs["input_ids"].device), [])
        if not (self.mixture.kl or self.mixture.hidden):
            return ParentOutputs(None, [])
        taken = self._run(inputs["input_ids"])
        target = FromHidden(taken.read.flatten(0, 1), self.tap.head) if self.mixture.kl else None
        return ParentOutputs(target, taken.layers)

    def _run(self, input_ids: torch.Tensor) -> Taken:
        model, with_layers = self.tap.model.model, bool(self.mixture.hidden)
        if not is_sharded(model):
            return self.tap.run(input_ids, with_layers)
        # Called as a module, so that FSDP sees a pass begin and gathers a layer while the one before runs.
        model.forward = lambda input_ids: self.tap.run(input_ids, with_layers)
        try:
            taken: Taken = model(input_ids)
        finally:
            upstream.restore_forward(model)
        return taken

    def let_go(self) -> None:
        """Free what the parent's head needs, once the losses are known."""
        let_go(self.tap.model.model)


class ChildLosses:
    """The child's losses against the parent's outputs."""

    def __init__(self, child: Parent, mixture: Mixture):
        self.mixture, self.tap = mixture, Tap(child)
        self.span = span_tokens(self.tap.vocab_size)

    def losses(self, input_ids: torch.Tensor, parent: ParentOutputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss to minimize, and its parts ``[3]``: KL, distance of hidden states, LM loss."""
        taken = self.tap.run(input_ids, with_layers=bool(parent.layers))
        labels = torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -1)], 1).flatten()
        loss, kl, lm = head_losses(
            taken.read.flatten(0, 1),
            self.tap.head,
            self.tap.parameters(),
            labels,
            parent.target,
            self.mixture,
            self.span,
        )
        hidden = torch.zeros_like(loss)
        if parent.layers:
            pairs = zip(taken.layers, parent.layers, strict=True)
            hidden = torch.stack([cosine_distance(child, target) for child, target in pairs]).mean()
            loss = loss + self.mixture.hidden * hidden
        return loss, torch.stack([kl, hidden.detach(), lm])

    @contextmanager
    def as_forward(self) -> Iterator[None]:
        """While open, the child's ``forward(input_ids, parent)`` returns the losses."""
        model = self.tap.model.model
        # A function, not a method: accelerate would bind a method to the model.
        model.forward = lambda input_ids, parent: self.losses(input_ids, parent)
        try:
            yield
        finally:
            upstream.restore_forward(model)


def check_pair(parent: Tap, child: Tap, mixture: Mixture) -> None:
    """Check that parent and child have what the losses compare.

    Raises:
        UsageError: They differ in the number of logits, or in their layers' hidden states.
    """
    if mixture.kl and parent.vocab_size != child.vocab_size:
        raise UsageError(
            f"distillation: the parent has {parent.vocab_size} logits, the child {child.vocab_size}. "
            "Set distillation.kl to 0 in the recipe."
        )
    if mixture.hidden:
        probe = torch.arange(3, 7, device=parent.model.runtime.device)[None] % parent.model.language_config.vocab_size
        with torch.no_grad(), with_head(parent.model.model), with_head(child.model.model):
            shapes = [[h.shape[-1] for h in tap.run(probe, with_layers=True).layers] for tap in (parent, child)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                "distillation: parent and child differ in the number of layers or the size of their hidden states. "
                "Set distillation.hidden to 0 in the recipe."
            )
