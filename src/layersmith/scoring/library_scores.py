"""Score a whole library: exactly, or by second-order estimates with exact runs where they matter.

Results are appended to a journal as they come, keyed by what the alternative is and by the row's place in the data; an
interrupted run reads it and goes on.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.parent import Parent
from layersmith.progress import SILENT, Progress
from layersmith.recipe import ScoringRecipe
from layersmith.scoring.correction import Prior, choose_runs, correct, prior
from layersmith.scoring.exact import Job, in_groups, run_exactly, run_layer_by_layer
from layersmith.scoring.metrics import METRICS, PARENT_VALUES
from layersmith.scoring.score import Journal, Score
from layersmith.scoring.second_order import Survey, estimate, look
from layersmith.scoring.states import States, StatesOnDisk
from layersmith.staged import CannotTakeApart, StagedParent, take_apart

_PARENT = "parent"
_ESTIMATE = "second order "  # before the identity of an alternative
KL = "kl_divergence"
# About what a second-order sweep costs in forward passes; where fewer exact ones do, there is nothing to save.
SWEEP_PASSES = 6.0
# What tokens that run at once may take: this where it is much beside the weights, else a share of those.
_SMALL_BYTES = 256 * 1024**2
_SHARE_OF_WEIGHTS = 0.1
_STREAMED_BYTES = 64 * 1024**2


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
    work = _Work(library, staged, tokens, recipe, pending, journal.parent if journal else Path(tempfile.gettempdir()))
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
    folder: Path

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
        size = max(1, self.tokens_at_once // self.tokens.shape[1])
        for start in range(0, len(rows), size):
            yield list(rows[start : start + size])

    @cached_property
    def tokens_at_once(self) -> int:
        """Of the recipe's, so many that what a layer makes of them stays small beside the parent's weights."""
        parent = self.library.parent
        weights = sum(p.numel() * p.element_size() for p in parent.model.parameters())
        most = _STREAMED_BYTES if self.streamed else max(_SMALL_BYTES, _SHARE_OF_WEIGHTS * weights)
        vocab_size = self.staged.vocab_size if self.staged is not None else parent.language_config.vocab_size
        return int(min(self.recipe.batch_tokens, max(1, most // _bytes_of_a_token(parent, vocab_size))))

    @property
    def streamed(self) -> bool:
        """Whether each layer is read once for all that goes through it."""
        return self.library.parent.stream is not None and self.staged is not None

    def states(self) -> States:
        return StatesOnDisk(self.folder) if self.streamed else States()

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
            if self.streamed:
                self._exact_by_layers(results, wanted, steps, advance)
                return
            for places in self._exact_batches(wanted):
                rows = [order[p] for p in places]
                own = [a for a in self.pending if wanted.get(a.identity, 0) > places[0]]
                # Groups do not hang on what is known already, or an interrupted run would round in another way.
                groups = in_groups(own, max(1, self.tokens_at_once // (len(rows) * length)))
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

    def _exact_by_layers(
        self, results: Journal, wanted: dict[str, int], steps: dict[str, int], advance: Callable[[float], None]
    ) -> None:
        assert self.staged is not None
        order = row_order(len(self.tokens))
        jobs, rows_of = [], []
        for places in self._exact_batches(wanted):
            rows = [order[p] for p in places]
            own = [a for a in self.pending if wanted.get(a.identity, 0) > places[0]]
            missing = [a for a in own if not results.has(a.identity, rows)]
            advance(sum(steps[a.identity] * len(rows) for a in own if a not in missing))
            if missing or not results.has(_PARENT, rows):
                jobs.append(Job(self.tokens[rows].to(self.library.parent.runtime.device), missing))
                rows_of.append(rows)
        most = self.recipe.spill_gib * 1024**3
        for n, measured in run_layer_by_layer(self.staged, jobs, self.states(), most, advance):
            of = _PARENT if measured.alternative is None else measured.alternative.identity
            results.write(of, rows_of[n], measured.rows)

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
            for together in self._swept_together(num_rows):
                missing = [r for r in together if not self._has_estimates(results, r)]
                if missing:
                    self._sweep(results, found, missing, seed)
                advance(sum(map(len, together)))
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

    def _swept_together(self, num_rows: int) -> Iterator[list[list[int]]]:
        """Batches that go through a layer before the next is run: one by one where layers lie in memory."""
        assert self.staged is not None
        batches = list(self.batches(range(num_rows)))
        size = 1
        if self.streamed:
            # What every layer is given, and the gradients.
            waiting = len(self.staged.layers) + 1 + self.recipe.samples
            of_batch = waiting * len(batches[0]) * self.tokens.shape[1] * self.staged.bytes_of_a_token
            size = max(1, int(self.recipe.spill_gib * 1024**3 / of_batch))
        for start in range(0, len(batches), size):
            yield batches[start : start + size]

    def _has_estimates(self, results: Journal, rows: Sequence[int]) -> bool:
        return all(results.has(_ESTIMATE + a.identity, rows) for a in self.pending)

    def _sweep(self, results: Journal, found: Survey, batches: Sequence[list[int]], seed: int) -> None:
        assert self.staged is not None
        seeds = [[[_row_seed(seed, k, row) for row in rows] for k in range(self.recipe.samples)] for rows in batches]
        tokens = [self.tokens[rows].to(self.library.parent.runtime.device) for rows in batches]
        values = estimate(self.staged, self.pending, found, tokens, seeds, self.states())
        for rows, own in zip(batches, values, strict=True):
            for a in self.pending:
                results.write(_ESTIMATE + a.identity, rows, [{KL: float(v)} for v in own[a.identity]])

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
            checked = None
            if exact_rows:
                on_them = ([by_row[a.identity][row] for row in exact_rows], [values[row] for row in exact_rows])
                checked = (math.fsum(on_them[0]) / len(exact_rows), math.fsum(on_them[1]) / len(exact_rows))
            scores[a.identity] = Score(a, {KL: values}, len(exact_rows), error, checked)
        of_parent = {KL: [0.0] * num_rows}
        return [scores.get(a.identity) or Score(a, of_parent, num_rows) for a in self.library.alternatives]


def _bytes_of_a_token(parent: Parent, vocab_size: int) -> float:
    """About what a token takes while gradients go through a layer, or while the parent's logits are at hand."""
    item = parent.runtime.dtype.itemsize
    widest = max(sum(p.shape[-2] for p in layer.parameters() if p.ndim > 1) for layer in parent.layers)
    return max(3.0 * item * widest, 8.0 * vocab_size)


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
