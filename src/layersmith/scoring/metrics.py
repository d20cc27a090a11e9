"""What is measured when a model stands beside its parent.

Shapes: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

METRICS = ("kl_divergence", "lm_loss", "top_1_agreement", "top_5_agreement", "top_10_agreement", "hidden_distance")
_TOP = (1, 5, 10)


@dataclass(frozen=True, eq=False)
class Reference:
    """What the parent says on one row.

    Attributes:
        log_probabilities: ``[T, V]`` float32.
        top: ``[T]`` its most likely next token.
        hidden: ``[T, D]`` float32, what its head reads.
        labels: ``[T - 1]`` the tokens that did follow.
    """

    log_probabilities: torch.Tensor
    top: torch.Tensor
    hidden: torch.Tensor
    labels: torch.Tensor


def reference(logits: torch.Tensor, hidden: torch.Tensor, input_ids: torch.Tensor) -> Reference:
    """From the parent's logits ``[T, V]`` and hidden states ``[T, D]`` on a row ``[T]``."""
    log_probabilities = logits.float().log_softmax(-1)
    return Reference(log_probabilities, log_probabilities.argmax(-1), hidden.float(), input_ids[1:])


def measure(parent: Reference, logits: torch.Tensor, hidden: torch.Tensor) -> dict[str, float]:
    """Means over the tokens of one row.

    ``kl_divergence``: sum over v of p(v) (log p(v) - log q(v)), p the parent's, in nats.
    ``lm_loss``: minus log q of the token that did follow, in nats; over T - 1 tokens.
    ``top_k_agreement``: share of tokens where the parent's most likely next token is among the k most likely.
    ``hidden_distance``: one minus the cosine between the hidden states that the heads read.
    """
    log_q = logits.float().log_softmax(-1)
    log_p = parent.log_probabilities
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    # The rank of the parent's token: how many are strictly more likely.
    rank = (log_q > log_q.gather(-1, parent.top[:, None])).sum(-1)
    cosine = torch.nn.functional.cosine_similarity(hidden.float(), parent.hidden, dim=-1)
    values = {
        "kl_divergence": kl.double().mean(),
        "lm_loss": -log_q[:-1].gather(-1, parent.labels[:, None]).double().mean(),
        **{f"top_{k}_agreement": (rank < k).double().mean() for k in _TOP},
        "hidden_distance": (1 - cosine).double().mean(),
    }
    return {name: float(value) for name, value in values.items()}


def loss_of(metric: str, value: float, parent_value: float) -> float:
    """How much worse than the parent, at least zero: the parent is the best answer to every objective."""
    difference = parent_value - value if metric.endswith("agreement") else value - parent_value
    return max(0.0, difference)


# The value of each metric for the parent itself, where it does not depend on the data.
PARENT_VALUES = {
    "kl_divergence": 0.0,
    "top_1_agreement": 1.0,
    "top_5_agreement": 1.0,
    "top_10_agreement": 1.0,
    "hidden_distance": 0.0,
}
