"""Metrics that compare a model with its parent.

With d = z - z', the parent's logits minus the other's, and p the parent's probabilities,

    KL(p || q) = E_p[d] + log E_p[exp(-d)] = log(1 + E_p[exp(E_p[d] - d) - 1])

which needs no log-probabilities, and stays accurate where both distributions are nearly the same.

Shapes: B rows, T tokens, t a span of them, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layersmith.errors import InputError

METRICS = ("kl_divergence", "lm_loss", "top_1_agreement", "top_5_agreement", "top_10_agreement", "hidden_distance")
_TOP = (1, 5, 10)
# Logits are raised to this value: some families give minus infinity to tokens that do not exist.
_LOWEST = -1e4
# Limit of the exponent: exp of more comes near the end of float32. Divergences of more nats are cut off.
_MOST_NATS = 80.0


Rows = list[dict[str, float]]


@dataclass(frozen=True, eq=False)
class Reference:
    """The parent's outputs on rows of tokens.

    Attributes:
        logits: The logits, ``[B, T, V]``.
        probabilities: Their softmax, ``[B, T, V]`` float32.
        log_normalizers: ``[B, T]`` float32, the logarithm of the sum of exponentials of the logits.
        top: The most likely next tokens, ``[B, T]``.
        hidden: The inputs of the head, ``[B, T, D]``.
        labels: The next tokens of the text, ``[B, T]``; -1 at the end.
        has_lowest: Whether some logits were raised to the lowest value.
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    log_normalizers: torch.Tensor
    top: torch.Tensor
    hidden: torch.Tensor
    labels: torch.Tensor
    has_lowest: bool = False

    @staticmethod
    def of(
        logits: torch.Tensor, hidden: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor | None = None
    ) -> Reference:
        """From the parent's logits and hidden states on rows ``[B, T]``, or on a span of them with its labels."""
        labels = labels_of(input_ids) if labels is None else labels
        has_lowest = bool(logits.amin() < _LOWEST)
        if has_lowest:
            logits = logits.clamp_min(_LOWEST)
        probabilities, log_normalizers = logits.float().softmax(-1), logits.float().logsumexp(-1)
        return Reference(logits, probabilities, log_normalizers, logits.argmax(-1), hidden, labels, has_lowest)

    def span(self, start: int, end: int) -> Reference:
        """Views of the tokens from ``start`` to ``end`` of every row."""
        return dataclasses.replace(
            self,
            logits=self.logits[:, start:end],
            probabilities=self.probabilities[:, start:end],
            log_normalizers=self.log_normalizers[:, start:end],
            top=self.top[:, start:end],
            hidden=self.hidden[:, start:end],
            labels=self.labels[:, start:end],
        )


def labels_of(input_ids: torch.Tensor) -> torch.Tensor:
    """``[B, T]``: the token that follows each; -1 at the end."""
    return torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -1)], 1)


def measure(parent: Reference, logits: torch.Tensor, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Metrics ``[..., B, t]`` of every token, float32.

    Args:
        parent: The parent's outputs on a span of ``t`` tokens.
        logits: The model's logits, ``[..., B, t, V]``; overwritten.
        hidden: The inputs of its head, ``[..., B, t, D]``; its D may be another.

    ``kl_divergence``: sum over v of p(v) (log p(v) - log q(v)), p the parent's, in nats.
    ``lm_loss``: minus log q of the next token of the text, in nats; nan at the last token.
    ``top_k_agreement``: whether the parent's most likely next token is among the model's k most likely ones.
    ``hidden_distance``: one minus the cosine between the inputs of the heads; left out if their sizes differ.
    """
    logits = logits.float().clamp_min_(_LOWEST) if parent.has_lowest else logits.float()
    shape = logits.shape[:-1]
    p = parent.probabilities
    # The rank of the parent's token: how many are strictly more likely.
    at_top = logits.gather(-1, parent.top.expand(shape)[..., None])
    rank = torch.gt(logits, at_top, out=torch.empty_like(logits)).sum(-1)  # in float32: many times faster than bools
    at_label = logits.gather(-1, parent.labels.clamp_min(0).expand(shape)[..., None])[..., 0]
    d = torch.sub(parent.logits.float(), logits, out=logits)
    mean = torch.linalg.vecdot(p, d)
    d -= mean[..., None]
    kl = torch.linalg.vecdot(p, d.neg_().clamp_max_(_MOST_NATS).exp_().sub_(1)).log1p()
    log_normalizers = parent.log_normalizers + kl - mean
    loss = log_normalizers - at_label
    same = hidden.shape[-1] == parent.hidden.shape[-1]
    distance = {"hidden_distance": 1 - _cosine(hidden, parent.hidden)} if same else {}
    return {
        "kl_divergence": kl,
        "lm_loss": loss.masked_fill(parent.labels < 0, torch.nan),
        **{f"top_{k}_agreement": (rank < k).float() for k in _TOP},
        **distance,
    }


def _cosine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(first.float(), second.float(), dim=-1)


def row_means(spans: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Means ``[..., B]`` over all tokens of a row, float64, from what :func:`measure` gives for its spans."""
    return {name: torch.cat([span[name] for span in spans], -1).double().nanmean(-1) for name in spans[0]}


def as_rows(means: dict[str, torch.Tensor]) -> Rows:
    """``[B]`` values of every metric as one mapping per row."""
    values = {name: of_rows.tolist() for name, of_rows in means.items()}
    return [{name: values[name][j] for name in values} for j in range(len(values[METRICS[0]]))]


def check_rows(rows: Rows, of: object) -> None:
    """Raises: InputError: A metric is NaN or infinite; ``of`` names the model or alternative that was measured."""
    for j, row in enumerate(rows):
        for name, value in row.items():
            if not math.isfinite(value):
                raise InputError(
                    f"{of}: {name} is {value} in row {j} of a batch, so its predictions overflow. Set dtype to float32 "
                    "in the recipe, or check the parent's weights."
                )


def loss_of(metric: str, value: float, parent_value: float) -> float:
    """The loss increase over the parent, at least 0; the parent is optimal under every objective."""
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
