"""The losses of global distillation, span by span of tokens, with their gradients.

With z the child's logits, p the parent's probabilities, q = softmax(z / t), y the token that did follow, over N tokens

    kl     = t^2 / N  sum over tokens of  sum over v of p(v) (log p(v) - log q(v)),   d kl / dz = t (q - p) / N
    lm     = 1 / M    sum over the M tokens with a next one of  - log softmax(z)(y)
    hidden = 1 / (L N) sum over layers and tokens of  1 - cos(child's hidden state, parent's)

Logits are computed, used and freed for one span of tokens after another, with the gradients of the head's input and
weights. So no more than one span of logits is in memory. Gradients of the head's weights are summed in float32.

Source: arXiv 2411.19146, section 5 (KL and cosine without an LM loss is the best of its mixtures); t^2 is of arXiv
1503.02531, section 2.1. Gradients in the forward pass are from arXiv 2410.10989.

Shapes: N tokens, n those of a span, D hidden, V vocabulary, k tokens whose probability is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

# Memory of the logits of a span in float32, but no fewer than this many tokens: smaller spans save memory, larger ones
# make larger matrix products.
_SPAN_BYTES = 16 * 1024**2
_SPAN_TOKENS = 256
# Log-probabilities are clamped here, so that impossible tokens add no infinities.
_LOWEST = -1e4

Head = Callable[[torch.Tensor], torch.Tensor]


class Target(Protocol):
    """The parent's predictions on N tokens."""

    def divergence(self, log_q: torch.Tensor, start: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """KL ``[n]`` of the tokens from ``start`` on, and the target ``[n, V]``: q minus it is the gradient.

        Args:
            log_q: ``[n, V]`` float32, the child's log-probabilities.
            start: First token of the span.
            temperature: Temperature of both.
        """
        ...


@dataclass(frozen=True, eq=False)
class FromHidden:
    """Predictions computed by the parent's head from its inputs ``[N, D]``."""

    hidden: torch.Tensor
    head: Head

    def divergence(self, log_q: torch.Tensor, start: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits = self.head(self.hidden[start : start + len(log_q)])
        log_p = log_softmax(logits, temperature)
        p = log_p.exp()
        return torch.linalg.vecdot(p, log_p.sub_(log_q)), p


@dataclass(frozen=True, eq=False)
class FromTop:
    """The parent's k most likely next tokens, and all others as one.

        KL = sum over the k of p (log p - log q) + P (log P - log Q)

    where P and Q are the total probabilities of the other tokens: all that is cached of the parent is compared exactly.

    Attributes:
        ids: ``[N, k]``, the tokens.
        log_p: ``[N, k]`` float32, their log-probabilities.
        log_rest: ``[N]`` float32, log P; the lowest value if there are no others.
    """

    ids: torch.Tensor
    log_p: torch.Tensor
    log_rest: torch.Tensor

    def divergence(self, log_q: torch.Tensor, start: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        span = slice(start, start + len(log_q))
        ids, log_p, log_rest = self.ids[span].long(), self.log_p[span].float(), self.log_rest[span].float()
        p, rest = log_p.exp(), log_rest.exp()
        others = log_q.scatter(-1, ids, -torch.inf)
        log_q_rest = others.logsumexp(-1).clamp_min(_LOWEST)
        kl = torch.linalg.vecdot(p, log_p - log_q.gather(-1, ids)) + rest * (log_rest - log_q_rest)
        # Nothing is known of the proportions among the others, so the child keeps its own.
        target = others.sub_(log_q_rest[:, None]).exp_().mul_(rest[:, None]).scatter_(-1, ids, p)
        return kl, target

    @staticmethod
    def of(logits: torch.Tensor, k: int, temperature: float) -> FromTop:
        """The k most likely tokens of the parent's logits ``[n, V]``; k is at most V."""
        log_p, ids = log_softmax(logits, temperature).topk(k, -1)
        if k == logits.shape[-1]:
            return FromTop(ids, log_p, torch.full_like(log_p[:, 0], _LOWEST))
        others = log_softmax(logits, temperature).scatter_(-1, ids, -torch.inf)
        return FromTop(ids, log_p, others.logsumexp(-1).clamp_min(_LOWEST))


def log_softmax(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities in float32, in a new tensor, clamped at ``_LOWEST``."""
    logits = logits if temperature == 1 else logits.float() / temperature
    return torch.log_softmax(logits, -1, dtype=torch.float32).clamp_(min=_LOWEST)


@dataclass(frozen=True)
class Mixture:
    """Weights of the losses.

    Attributes:
        kl, lm: Weights of the losses on logits.
        hidden: Weight of the distance of hidden states.
        temperature: Temperature t of the KL divergence.
    """

    kl: float
    hidden: float
    lm: float
    temperature: float


def span_tokens(vocab_size: int) -> int:
    """Number of tokens of a span."""
    return max(_SPAN_TOKENS, _SPAN_BYTES // (4 * vocab_size))


def head_losses(
    hidden: torch.Tensor,
    head: Head,
    parameters: Sequence[nn.Parameter],
    labels: torch.Tensor,
    target: Target | None,
    mixture: Mixture,
    span: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The losses on logits: their weighted sum, which has gradients, and KL and LM loss without.

    Args:
        hidden: ``[N, D]``, inputs of the child's head.
        head: Computes logits ``[n, V]`` from hidden states ``[n, D]``.
        parameters: Parameters of the head.
        labels: ``[N]``, the next tokens; -1 at the end of a row.
        target: The parent's predictions; None if KL has no weight.
        mixture: Weights and temperature.
        span: Number of tokens whose logits are in memory at once.
    """
    given = (head, labels, target, mixture, span, torch.is_grad_enabled())
    summed, kl, lm = _HeadLosses.apply(hidden, given, *parameters)
    return summed, kl, lm


class _HeadLosses(torch.autograd.Function):
    """See :func:`head_losses`; gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, given: Any, *parameters: nn.Parameter) -> Any:
        head, labels, target, mixture, span, wanted_at_all = given
        trained = [i for i, p in enumerate(parameters) if p.requires_grad and wanted_at_all]
        gradient = torch.empty_like(hidden) if hidden.requires_grad and wanted_at_all else None
        wants = gradient is not None or bool(trained)
        sums = [torch.zeros_like(parameters[i], dtype=torch.float32) for i in trained]
        num_tokens, num_labels = len(hidden), (labels >= 0).sum().clamp_min(1)
        kl = hidden.new_zeros((), dtype=torch.float64)
        lm = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, num_tokens, span):
            given = hidden[start : start + span].detach().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(wants):
                logits = head(given)
            change: torch.Tensor | None = None
            log_q = log_softmax(logits.detach(), mixture.temperature)
            if target is not None:
                divergence, wanted = target.divergence(log_q, start, mixture.temperature)
                kl += divergence.double().sum()
                if wants and mixture.kl:
                    change = torch.exp(log_q).sub_(wanted).mul_(mixture.kl * mixture.temperature)
                del wanted
            if mixture.lm:
                if mixture.temperature != 1:
                    log_q = log_softmax(logits.detach())
                next_ids = labels[start : start + span]
                there = next_ids >= 0
                at_label = log_q.gather(-1, next_ids.clamp_min(0)[:, None])[:, 0]
                lm -= at_label.masked_fill(~there, 0.0).double().sum()
                if wants:
                    weight = mixture.lm * there * (num_tokens / num_labels)
                    lm_change = log_q.exp_().mul_(weight[:, None])
                    lm_change.scatter_add_(-1, next_ids.clamp_min(0)[:, None], -weight[:, None].float())
                    change = lm_change if change is None else change.add_(lm_change)
            del log_q
            if wants and change is not None:
                inputs = [*([given] if gradient is not None else []), *(parameters[i] for i in trained)]
                made = list(torch.autograd.grad(logits, inputs, change.to(logits.dtype)))
                if gradient is not None:
                    gradient[start : start + span] = made.pop(0)
                for total, part in zip(sums, made, strict=True):
                    total += part
        kl, lm = (kl * mixture.temperature**2 / num_tokens).float(), (lm / num_labels).float()
        ctx.trained, ctx.dtypes, ctx.num_tokens = trained, [p.dtype for p in parameters], num_tokens
        ctx.has_gradient = gradient is not None
        ctx.save_for_backward(*([gradient] if gradient is not None else []), *sums)
        ctx.mark_non_differentiable(kl, lm)
        return mixture.kl * kl + mixture.lm * lm, kl, lm

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        # Divided by the number of tokens here, not before: in float16 the gradients of single tokens would underflow.
        scale = gradients[0].float() / ctx.num_tokens
        saved = list(ctx.saved_tensors)
        hidden = None
        if ctx.has_gradient:
            gradient = saved.pop(0)
            hidden = (gradient * scale).to(gradient.dtype)
        parameters: list[torch.Tensor | None] = [None] * len(ctx.dtypes)
        for i, total in zip(ctx.trained, saved, strict=True):
            parameters[i] = (total * scale).to(ctx.dtypes[i])
        return hidden, None, *parameters


def cosine_distance(child: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of one minus the cosine between hidden states ``[..., D]``; no gradient to the parent's."""
    return _CosineDistance.apply(child, parent)


class _CosineDistance(torch.autograd.Function):
    """Keeps only its inputs and three numbers for each token."""

    @staticmethod
    def forward(ctx: Any, child: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
        a, b = child.float(), parent.float()
        length = torch.linalg.vector_norm(a, dim=-1).clamp_min(1e-12)
        product = length * torch.linalg.vector_norm(b, dim=-1).clamp_min(1e-12)
        cosine = torch.linalg.vecdot(a, b) / product
        ctx.save_for_backward(child, parent, length, product, cosine)
        return 1 - cosine.mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        child, parent, length, product, cosine = ctx.saved_tensors
        scale = gradients[0].float() / cosine.numel()
        made = (scale * cosine / length.square())[..., None] * child.float()
        made.addcmul_(parent.float(), (-scale / product)[..., None])
        return made.to(child.dtype), None
