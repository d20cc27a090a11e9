"""Score a whole library: exactly, or by second-order estimates with exact runs where they matter.

Results are appended to a journal as they come, keyed by what the alternative is and by the row's place in the data; an
interrupted run reads it and goes on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.progress import SILENT, Progress
from layersmith.recipe import ScoringRecipe
from layersmith.scoring.correction import Prior, choose_runs, correct, prior
from layersmith.scoring.exact import in_groups, run_exactly
from layersmith.scoring.metrics import METRICS, PARENT_VALUES
from layersmith.scoring.score import Journal, Score
from layersmith.scoring.second_order import estimate, look
from layersmith.staged import CannotTakeApart, StagedParent, take_apart

_PARENT = "parent"
_ESTIMATE = "second order "  # before the identity of an alternative
KL = "kl_divergence"
# About what a second-order sweep costs in forward passes; where fewer exact ones do, there is nothing to save.
SWEEP_PASSES = 6.0


def score_library(
    library: Library,
    tokens: torch.Tensor,
    recipe: ScoringRecipe,
    *,
    seed: int = 0,
    journal: Path | None = None,
    inputs: str = "",
    progress: Progress = SILENT,
) -> list[Score]:
    """Score every alternative of a library; the parent's own subblocks score as the parent.

    Args:
        library: the alternatives.
        tokens: ``[N, T]`` scoring rows.
        recipe: how.
        seed: of the random signs.
        journal: a file that keeps results as they come.
        inputs: digest of everything that scores depend on; a journal of other inputs is started anew.
        progress: told of the work done.

    Returns:
        Scores in the order of the library's alternatives.
    """
    pending = [a for a in library.alternatives if a.kind != _PARENT]
    staged: StagedParent | None = None
    try:
        staged = take_apart(library, tokens[:1, :32].repeat(2, 1).to(library.parent.runtime.device))
    except CannotTakeApart as reason:
        progress.note(f"scoring runs the whole model for every alternative, because {reason}.")
    work = _Work(library, staged, tokens, recipe, pending)
    with Journal(journal, inputs) as results:
        if work.by_estimates:
            scores = work.estimated(results, seed, progress)
        else:
            work.exact(results, {a.identity: len(tokens) for a in pending}, progress, "score")
            scores = [_exact_score(a, results, len(tokens)) for a in library.alternatives]
    if staged is not None and staged.arithmetic.done:
        progress.note(f"scoring: {staged.arithmetic}; {work.in_words(scores)}")
    return scores


@dataclass
class _Work:
    """What is to be done, and with what."""

    library: Library
    staged: StagedParent | None
    tokens: torch.Tensor
    recipe: ScoringRecipe
    pending: list[Alternative]

    @property
    def by_estimates(self) -> bool:
        """Whether second-order estimates are asked for, and save anything."""
        if self.recipe.mode == "exact" or self.recipe.objective != KL or self.staged is None:
            return False
        if self.recipe.mode == "second_order":
            return True
        return sum(map(self.cost, self.pending)) > SWEEP_PASSES + self.recipe.exact_passes

    def cost(self, alternative: Alternative) -> float:
        """Of an exact run on all rows, in forward passes of the parent."""
        return self._rest_of_a_pass[alternative.layer]

    @cached_property
    def _rest_of_a_pass(self) -> list[float]:
        """For each layer the share of the parent's weights that lie in it and after it."""
        parent = self.library.parent
        layers = [sum(p.numel() for p in layer.parameters()) for layer in parent.layers]
        output = parent.model.get_output_embeddings()
        head = sum(p.numel() for p in output.parameters()) if output is not None else 0
        return [(sum(layers[i:]) + head) / (sum(layers) + head) for i in range(len(layers))]

    def in_words(self, scores: Sequence[Score]) -> str:
        """How alternatives were scored."""
        own = [s for s in scores if s.alternative.kind != _PARENT]
        if not self.by_estimates:
            return f"{len(own)} alternatives exactly"
        exact = sum(s.exact_rows > 0 for s in own)
        return f"{len(own)} alternatives by second order, {exact} of them also exactly on some rows"

    def batches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        size = max(1, self.recipe.batch_tokens // self.tokens.shape[1])
        for start in range(0, len(rows), size):
            yield list(rows[start : start + size])

    # ------------------------------------------------------------------------------------------ exact

    def exact(self, results: Journal, wanted: dict[str, int], progress: Progress, stage: str) -> None:
        """Run alternatives exactly, each on the first of the rows in their order.

        Args:
            results: those that are there already; new ones are added.
            wanted: identity to a number of rows.
            progress: told of layers run.
            stage: its name.
        """
        order = row_order(len(self.tokens))
        depth = len(self.library.parent.blocks)
        # Steps are layers run, because an early alternative costs more than a late one.
        steps = {a.identity: depth - a.layer + 1 for a in self.pending}
        total = sum(steps[identity] * n for identity, n in wanted.items())
        device = self.library.parent.runtime.device
        length = self.tokens.shape[1]
        with progress.stage(stage, total, "layer passes") as advance:
            for places in self._exact_batches(wanted):
                rows = [order[p] for p in places]
                own = [a for a in self.pending if wanted.get(a.identity, 0) > places[0]]
                # Groups do not hang on what is known already, or an interrupted run would round in another way.
                groups = in_groups(own, max(1, self.recipe.batch_tokens // (len(rows) * length)))
                missing = []
                for group in groups:
                    if all(results.has(a.identity, rows) for a in group):
                        advance(sum(steps[a.identity] for a in group) * len(rows))
                    else:
                        missing.append(group)
                if not missing and results.has(_PARENT, rows):
                    continue
                found = run_exactly(self.library, self.staged, missing, self.tokens[rows].to(device))
                for measured in found:
                    of = _PARENT if measured.alternative is None else measured.alternative.identity
                    results.write(of, rows, measured.rows)
                    if measured.alternative is not None:
                        advance(steps[of] * len(rows))

    def _exact_batches(self, wanted: dict[str, int]) -> Iterator[list[int]]:
        """Places in the order of rows; all rows of a batch are wanted by the same alternatives."""
        ends = sorted({n for n in wanted.values() if n})
        for start, end in zip([0, *ends], ends, strict=False):
            yield from self.batches(range(start, end))

    # ------------------------------------------------------------------------------------------ estimates

    def estimated(self, results: Journal, seed: int, progress: Progress) -> list[Score]:
        """Estimates for all, exact runs for those that tell most, and what follows for the others."""
        assert self.staged is not None
        num_rows = len(self.tokens)
        device = self.library.parent.runtime.device
        with progress.stage("score", num_rows, "sequences") as advance:
            found = look(self.staged, self.pending, self.tokens[:1].to(device))
            for rows in self.batches(range(num_rows)):
                if not all(results.has(_ESTIMATE + a.identity, rows) for a in self.pending):
                    seeds = [[_row_seed(seed, k, row) for row in rows] for k in range(self.recipe.samples)]
                    values = estimate(self.staged, self.pending, found, self.tokens[rows].to(device), seeds)
                    for a in self.pending:
                        estimates = [{KL: float(v)} for v in values[a.identity]]
                        results.write(_ESTIMATE + a.identity, rows, estimates)
                advance(len(rows))
        by_row = {
            a.identity: [results.known[_ESTIMATE + a.identity, row][KL] for row in range(num_rows)]
            for a in self.pending
        }
        before = prior(
            self.pending,
            [math.fsum(by_row[a.identity]) / num_rows for a in self.pending],
            [found.size[a.identity] for a in self.pending],
        )
        costs = [self.cost(a) / num_rows for a in self.pending]
        chosen = choose_runs(before, costs, num_rows, self.recipe.exact_passes, self.recipe.precision)
        runs = {self.pending[index].identity: n for index, n in chosen.items()}
        self.exact(results, runs, progress, "rescore")
        return self._corrected(results, by_row, before, runs)

    def _corrected(
        self, results: Journal, by_row: dict[str, list[float]], before: Prior, runs: dict[str, int]
    ) -> list[Score]:
        num_rows = len(self.tokens)
        order = row_order(num_rows)
        observed: dict[int, tuple[float, int]] = {}
        for index, a in enumerate(self.pending):
            if n := runs.get(a.identity, 0):
                exact = math.fsum(results.known[a.identity, row][KL] for row in order[:n])
                estimated = math.fsum(by_row[a.identity][row] for row in order[:n])
                if exact > 0 and estimated > 0:
                    observed[index] = (math.log(exact / estimated), n)
        mean, deviation = correct(before, observed, num_rows)
        scores = {}
        for index, a in enumerate(self.pending):
            factor = math.exp(float(mean[index]))
            values = [factor * e for e in by_row[a.identity]]
            exact_rows = order[: runs.get(a.identity, 0)]
            error = (
                float(deviation[index]) * math.fsum(v for r, v in enumerate(values) if r not in exact_rows) / num_rows
            )
            for row in exact_rows:
                values[row] = results.known[a.identity, row][KL]
            scores[a.identity] = Score(a, {KL: values}, len(exact_rows), error)
        of_parent = {KL: [0.0] * num_rows}
        return [scores.get(a.identity) or Score(a, of_parent, num_rows) for a in self.library.alternatives]


def row_order(num_rows: int) -> list[int]:
    """Rows in the order in which exact runs take them: the first few lie far from each other."""
    bits = max(1, (num_rows - 1).bit_length())
    reversed_bits = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [i for i in reversed_bits if i < num_rows]


def _row_seed(seed: int, sample: int, row: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {sample} {row}".encode()).digest()[:7], "big")


def _exact_score(alternative: Alternative, results: Journal, num_rows: int) -> Score:
    identity = _PARENT if alternative.kind == _PARENT else alternative.identity
    rows = {metric: [results.known[identity, row][metric] for row in range(num_rows)] for metric in METRICS}
    if alternative.kind == _PARENT:
        # By definition, not by rounding.
        rows |= {metric: [value] * num_rows for metric, value in PARENT_VALUES.items()}
    return Score(alternative, rows, num_rows)
