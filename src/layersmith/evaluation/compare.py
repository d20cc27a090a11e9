"""Evaluation of a child against its parent on text that neither calibration nor scoring has seen.

Every number has its standard error over rows. Differences are paired row by row, so text that is hard for both models
adds no noise to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from layersmith.heterogeneous.build import head_of
from layersmith.run import ranks
from layersmith.run.progress import SILENT, Progress
from layersmith.scoring.metrics import Reference, Rows, as_rows, check_rows, measure, row_means
from layersmith.scoring.score import standard_error

# exp of more is near the end of float64, where products with standard errors overflow.
_LARGEST_EXPONENT = 500.0
_LABELS = {
    "kl_divergence": "KL divergence to the parent (nats a token)",
    "top_1_agreement": "Top-1 agreement with the parent",
    "top_5_agreement": "Top-5 agreement with the parent",
    "top_10_agreement": "Top-10 agreement with the parent",
    "hidden_distance": "Distance of final hidden states (1 - cosine)",
}


@dataclass(frozen=True)
class Comparison:
    """Metrics of a child and its parent on the same rows.

    Attributes:
        sequences, sequence_length: Number of rows, and tokens in each.
        sizes: Bytes and words of the text in all rows; None if the rows were not decoded.
        parent_loss, child_loss: LM loss of every row, in nats a token.
        metrics: Metrics of the child against the parent, for every row.
    """

    sequences: int
    sequence_length: int
    parent_loss: list[float]
    child_loss: list[float]
    metrics: dict[str, list[float]]
    sizes: tuple[int, int] | None = None

    def table(self) -> list[dict[str, Any]]:
        """One row for each metric: label, parent, child, difference, and standard errors."""
        rows = [self._loss_row(), *self._perplexity_rows(), *self._rows_by_text()]
        for name, label in _LABELS.items():
            if name not in self.metrics:
                continue
            values = self.metrics[name]
            rows.append(
                {
                    "metric": name,
                    "label": label,
                    "parent": None,
                    "child": _mean(values),
                    "child_standard_error": standard_error(values),
                    "difference": None,
                    "difference_standard_error": None,
                    "lower_is_better": not name.endswith("agreement"),
                }
            )
        return rows

    def _loss_row(self) -> dict[str, Any]:
        differences = [c - p for c, p in zip(self.child_loss, self.parent_loss, strict=True)]
        return {
            "metric": "loss",
            "label": "LM loss (nats a token)",
            "parent": _mean(self.parent_loss),
            "parent_standard_error": standard_error(self.parent_loss),
            "child": _mean(self.child_loss),
            "child_standard_error": standard_error(self.child_loss),
            "difference": _mean(differences),
            "difference_standard_error": standard_error(differences),
            "lower_is_better": True,
        }

    def _perplexity_rows(self) -> list[dict[str, Any]]:
        """The perplexity; no row if it would overflow."""
        loss = self._loss_row()
        if max(loss["parent"], loss["child"]) > _LARGEST_EXPONENT:
            return []
        parent, child = math.exp(loss["parent"]), math.exp(loss["child"])
        # Standard errors of exp(loss) to first order: d exp(x) = exp(x) dx.
        return [
            {
                "metric": "perplexity",
                "label": "Perplexity",
                "parent": parent,
                "child": child,
                "child_standard_error": _times(child, loss["child_standard_error"]),
                "difference": child - parent,
                "difference_standard_error": _times(child, loss["difference_standard_error"]),
                "lower_is_better": True,
            }
        ]

    def _rows_by_text(self) -> list[dict[str, Any]]:
        """The loss in bits a byte, and the perplexity by words: they do not depend on the tokenizer."""
        if self.sizes is None:
            return []
        loss, tokens = self._loss_row(), self.sequences * (self.sequence_length - 1)
        size, words = self.sizes
        bits, by_word = tokens / size / math.log(2), tokens / words
        numbers = {name: value for name, value in loss.items() if isinstance(value, float)}
        by_byte = {name: value * bits for name, value in numbers.items()}
        rows = [loss | by_byte | {"metric": "bits_per_byte", "label": "LM loss (bits a byte)"}]
        if max(loss["parent"], loss["child"]) * max(1.0, by_word) > _LARGEST_EXPONENT:
            return rows
        perplexity = {name: math.exp(loss[name] * by_word) for name in ("parent", "child")}
        return [
            *rows,
            {
                **self._perplexity_rows()[0],
                "metric": "word_perplexity",
                "label": "Perplexity by words",
                **perplexity,
                "child_standard_error": _times(perplexity["child"] * by_word, loss["child_standard_error"]),
                "difference": perplexity["child"] - perplexity["parent"],
                "difference_standard_error": _times(perplexity["child"] * by_word, loss["difference_standard_error"]),
            },
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "sequences": self.sequences,
            "tokens": self.sequences * self.sequence_length,
            "rows": self.table(),
            "by_row": {"parent_loss": self.parent_loss, "child_loss": self.child_loss, **self.metrics},
        }


def closed(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, float | None]:
    """The share of the loss gap between child and parent that distillation closed, and its standard error.

    Args:
        before: An evaluation of the child before distillation, as :meth:`Comparison.to_dict` returns it.
        after: An evaluation of the child afterwards, on the same rows.

    Returns:
        1 - A / B, where A and B are the mean gaps after and before, and the standard error of that ratio of means over
        the same rows; None for a single row.
    """
    by_row = [evaluation["by_row"] for evaluation in (before, after)]
    gaps = [[c - p for c, p in zip(rows["child_loss"], rows["parent_loss"], strict=True)] for rows in by_row]
    gap_before, gap_after = map(_mean, gaps)
    if gap_before == 0:  # the child was the parent's equal already
        return 0.0, None
    error = standard_error([a - gap_after / gap_before * b for b, a in zip(*gaps, strict=True)])
    return 1 - gap_after / gap_before, None if error is None else error / abs(gap_before)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def compare(
    parent: PreTrainedModel,
    child: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    batch_sequences: int,
    tokenizer: Any = None,
    progress: Progress = SILENT,
) -> Comparison:
    """Evaluate a child against its parent on ``tokens`` ``[N, T]``. Both are on one device and in evaluation mode.

    With the tokenizer, the loss is also given for each byte and word of the text.
    """
    rows = RowsToCompare(tokens, batch_sequences, tokenizer)
    return rows.comparison(rows.evaluate(parent, child, rows.starts, progress))


@dataclass(frozen=True)
class RowsToCompare:
    """Rows ``[N, T]`` on which models are compared, with the other arguments of :func:`compare`."""

    tokens: torch.Tensor
    batch_sequences: int
    tokenizer: Any = None

    @property
    def starts(self) -> range:
        """The first row of each batch."""
        return range(0, len(self.tokens), self.batch_sequences)

    def compare_in_all(self, parent: PreTrainedModel, child: PreTrainedModel, progress: Progress) -> Comparison:
        """:func:`compare`, in all processes of a launcher, which evaluate some batches each."""
        mine = self.starts[ranks.number() :: ranks.count()]
        found = ranks.from_each(lambda: self.evaluate(parent, child, mine, progress))
        return self.comparison({start: rows for of_process in found for start, rows in of_process.items()})

    @torch.inference_mode()
    def evaluate(
        self, parent: PreTrainedModel, child: PreTrainedModel, starts: Sequence[int], progress: Progress
    ) -> dict[int, tuple[Rows, Rows]]:
        """Metrics of parent and child on each row of some batches, by the first row of the batch."""
        # A streamed parent has other parameters on the meta device.
        device, found = next(p.device for p in parent.parameters() if not p.is_meta), {}
        batches = {start: self.tokens[start : start + self.batch_sequences].to(device) for start in starts}
        with progress.stage("evaluate", sum(map(len, batches.values())), "sequences") as advance:
            for start, batch in batches.items():
                found[start] = _evaluated(parent, child, batch)
                advance(len(batch))
        return found

    def comparison(self, found: dict[int, tuple[Rows, Rows]]) -> Comparison:
        """The comparison, from the metrics on all batches."""
        of_parent, of_child = ([row for start in self.starts for row in found[start][k]] for k in range(2))
        return Comparison(
            sequences=len(self.tokens),
            sequence_length=self.tokens.shape[1],
            parent_loss=[row["lm_loss"] for row in of_parent],
            child_loss=[row["lm_loss"] for row in of_child],
            metrics={name: [row[name] for row in of_child] for name in _LABELS if name in of_child[0]},
            sizes=None if self.tokenizer is None else _text_sizes(self.tokenizer, self.tokens),
        )


def _evaluated(parent: PreTrainedModel, child: PreTrainedModel, batch: torch.Tensor) -> tuple[Rows, Rows]:
    """Metrics of parent and child on each row of a batch ``[B, T]``."""
    logits, hidden = _run(parent, batch)
    child_logits, child_hidden = _run(child, batch)
    of_parent: Rows = []
    of_child: Rows = []
    for j in range(len(batch)):
        one = slice(j, j + 1)
        reference = Reference.of(logits[one], hidden[one], batch[one])
        of_parent += as_rows(row_means([measure(reference, logits[one].clone(), hidden[one])]))
        of_child += as_rows(row_means([measure(reference, child_logits[one], child_hidden[one])]))
    check_rows([{"loss": row["lm_loss"]} for row in of_parent], "the parent")
    check_rows(of_child, "the child")
    return of_parent, of_child


def _text_sizes(tokenizer: Any, tokens: torch.Tensor) -> tuple[int, int]:
    """Bytes and words of the predicted text: all tokens but the first of every row."""
    texts = [tokenizer.decode(row[1:]) for row in tokens]
    return max(1, sum(len(text.encode()) for text in texts)), max(1, sum(len(text.split()) for text in texts))


def _run(model: PreTrainedModel, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the hidden states that the head reads."""
    seen: list[torch.Tensor] = []
    handle = head_of(model).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    try:
        logits = model(input_ids=batch, use_cache=False).logits
    finally:
        handle.remove()
    return logits, seen[-1]


@torch.inference_mode()
def complete(model: PreTrainedModel, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """The greedy continuation of a prompt, without the prompt."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    generate: Any = model.generate
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
