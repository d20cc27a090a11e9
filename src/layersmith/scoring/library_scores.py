"""Score a whole library: exactly, or by second-order estimates with exact runs where they matter.

Results are appended to a journal as they come, keyed by what the alternative is and by the row's place in the data; an
interrupted run reads it and goes on.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from layersmith.block_config import BlockConfig
from layersmith.execution.hidden_states import States, StatesOnDisk
from layersmith.execution.layerwise import LayerwiseParent, NotLayerwise, split_layers, tokens_at_once
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.recipe import ScoringRecipe
from layersmith.run.progress import SILENT, Advance, Progress
from layersmith.scoring.correction import Prior, correct, prior
from layersmith.scoring.exact import (
    Job,
    Measured,
    amounts_of,
    amounts_of_parent,
    in_groups,
    plan_layer_by_layer,
    run_exactly,
    run_layer_by_layer,
)
from layersmith.scoring.forward import most_seconds
from layersmith.scoring.metrics import METRICS, PARENT_VALUES
from layersmith.scoring.regret import Axis, Contest
from layersmith.scoring.rounds import Observed, Rounds, Runs, relative_log
from layersmith.scoring.score import Journal, Score, error_beside_each_other, standard_error
from layersmith.scoring.second_order import Survey, estimate, look, plan_estimate
from layersmith.scoring.work import Work, plan_all

# Identity of an alternative to the number of rows on which it runs exactly.
_Runs = Mapping[str, int]
_PARENT = "parent"
_ESTIMATE = "second order "  # before the identity of an alternative
KL = "kl_divergence"
# About what a second-order sweep costs in forward passes; where fewer exact ones do, there is nothing to save.
SWEEP_PASSES = 6.0
# Rounds of exact runs, as long as no estimate is known; and one row in so many comes first in a sweep, and tells.
_GUESSED_ROUNDS, _FIRST_SHARE = 2, 8
# The first rows of exact runs that may stop early.
_LEAST_ROWS = 8


def score_library(
    library: Library,
    tokens: torch.Tensor,
    recipe: ScoringRecipe,
    *,
    axes: Sequence[Axis] = (),
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
        axes: by which the search will choose; what decides there is run exactly first. Default: all scores count alike.
        seed: of the random signs.
        journal: a file that keeps results as they come.
        inputs: digest of everything that scores depend on; a journal of other inputs is started anew.
        progress: told of the work done.

    Returns:
        Scores in the order of the library's alternatives.
    """
    pending = [a for a in library.alternatives if a.kind != _PARENT]
    device = library.parent.runtime.device
    with progress.stage("score", len(pending), "alternatives") as advance:
        staged: LayerwiseParent | None = None
        try:
            staged = split_layers(library.parent, library)
        except NotLayerwise as reason:
            progress.note(f"scoring runs the whole model for every alternative, because {reason}.")
        folder = journal.parent if journal else Path(tempfile.gettempdir())
        told = _Told(advance, len(pending), tokens.shape[1], clock_of(progress, device))
        scoring = _Scoring(library, staged, tokens, recipe, pending, folder, told, axes)
        with Journal(journal, inputs) as results:
            if scoring.by_estimates:
                scores = scoring.estimated(results, seed)
            else:
                rows = scoring.until_settled(results)
                scores = [_exact_score(a, results, rows) for a in library.alternatives]
    if staged is not None and staged.arithmetic.done:
        progress.note(f"scoring: {staged.arithmetic}; {scoring.in_words(scores)}")
    return scores


def clock_of(progress: Progress, device: torch.device) -> Callable[[], float]:
    """A clock that waits until the device has done what it was told to do."""

    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return progress.clock()

    return read


@dataclass
class _Told:
    """Tells a stage how far scoring is: a share of all work in alternatives, and what is done of the part at work.

    Attributes:
        advance: of the stage.
        num_alternatives: its steps.
        length: tokens in a row.
        clock: in seconds.
        work: all of it.
    """

    advance: Advance
    num_alternatives: int
    length: int
    clock: Callable[[], float]
    work: Work = field(init=False)
    _steps: float = 0.0

    def __post_init__(self) -> None:
        self.work = Work(self.clock)
        self.work.tell = self.tell
        self.begin("scored", 1)

    def begin(self, what: str, rows: float) -> None:
        """A part of the work, in which so many rows make an alternative."""
        self._what, self._rows, self._done, self._known, self._began = what, max(1.0, rows), 0.0, 0.0, self.clock()

    def add(self, rows: float) -> None:
        """So many rows of alternatives are done."""
        self._done += rows
        self.tell()

    def add_known(self, rows: float) -> None:
        """So many were done by a run that was interrupted."""
        self._known += rows

    def tell(self) -> None:
        share, left = self.work.share, self.work.seconds_left
        if share is None or left is None:
            return
        steps = max(self._steps, share * self.num_alternatives)
        speed = self._done * self.length / max(self.clock() - self._began, 1e-9)
        said = f"{(self._known + self._done) / self._rows:,.0f} {self._what}, {speed:,.0f} tokens/s"
        self.advance(steps - self._steps, left, said)
        self._steps = steps


@dataclass
class _Scoring:
    """What is to be done, and with what."""

    library: Library
    staged: LayerwiseParent | None
    tokens: torch.Tensor
    recipe: ScoringRecipe
    pending: list[Alternative]
    folder: Path
    told: _Told
    axes: Sequence[Axis] = ()
    regret: float | None = None

    @property
    def work(self) -> Work:
        return self.told.work

    @property
    def by_estimates(self) -> bool:
        """Whether second-order estimates are asked for, and save anything."""
        if self.recipe.mode == "exact" or self.recipe.objective != KL or self.staged is None:
            return False
        if self.recipe.mode == "second_order":
            return True
        return sum(map(self.cost, self.pending)) > SWEEP_PASSES + exact_passes(self.recipe, self.library.parent.blocks)

    def cost(self, alternative: Alternative) -> float:
        """Of an exact run on all rows, in forward passes of the parent."""
        return self._rest_of_a_pass[alternative.layer]

    @cached_property
    def _rest_of_a_pass(self) -> list[float]:
        """For each layer the share of the parent's weights that lie in it and after it."""
        parent = self.library.parent
        layers = [sum(p.numel() for p in layer.parameters()) for layer in parent.layers]
        head = sum(p.numel() for p in parent.head.parameters())
        return [(sum(layers[i:]) + head) / (sum(layers) + head) for i in range(len(layers))]

    def in_words(self, scores: Sequence[Score]) -> str:
        """How alternatives were scored."""
        own = [s for s in scores if s.alternative.kind != _PARENT]
        if not self.by_estimates:
            rows, all_rows = scores[0].exact_rows, len(self.tokens)
            return f"{len(own)} alternatives exactly" + (f", on {rows} of {all_rows} rows" if rows < all_rows else "")
        exact = sum(s.exact_rows > 0 for s in own)
        said = f"{len(own)} alternatives by second order, {exact} of them also exactly on some rows"
        if self.regret is None:
            return said
        return f"{said}; children chosen by them are about {self.regret:.1%} from those by true scores"

    def batches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        size = max(1, self.tokens_at_once // self.tokens.shape[1])
        for start in range(0, len(rows), size):
            yield list(rows[start : start + size])

    @cached_property
    def tokens_at_once(self) -> int:
        return tokens_at_once(self.library.parent, self.staged, self.recipe.batch_tokens)

    @property
    def streamed(self) -> bool:
        """Whether each layer is read once for all that goes through it."""
        return self.staged is not None and self.staged.streamed

    def states(self) -> States:
        return StatesOnDisk(self.folder) if self.streamed else States()

    # ------------------------------------------------------------------------------------------ exact

    def until_settled(self, results: Journal) -> list[int]:
        """Run all alternatives exactly, on ever more rows until scores are as near as is asked; gives those rows."""
        num_rows, precision = len(self.tokens), self.recipe.row_precision
        ends = _ends_of_waves(num_rows) if precision else [num_rows]
        done, until = 0, num_rows
        for end in ends:
            self.work.forget()
            self.told.begin("scored", until)
            self.told.add_known(done * len(self.pending))
            of_all = [{a.identity: rows for a in self.pending} for rows in (end, done, until)]
            self.exact(results, *of_all)
            done = end
            if precision and done < num_rows:
                error = error_beside_each_other(self._losses(results, row_order(num_rows)[:done]), num_rows)
                if error <= precision:
                    break
                # It falls with the square root of 1/n - 1/N.
                needed = 1 / (1 / num_rows + (precision / error) ** 2 * (1 / done - 1 / num_rows))
                until = next(e for e in ends if e >= min(needed, num_rows) and e > done)
        return row_order(num_rows)[:done]

    def _losses(self, results: Journal, rows: Sequence[int]) -> torch.Tensor:
        """``[A, n]``: how much worse than the parent alternatives are on rows."""
        objective = self.recipe.objective
        values = [[results.known[a.identity, row][objective] for row in rows] for a in self.pending]
        of_parent = [PARENT_VALUES.get(objective, results.known[_PARENT, row][objective]) for row in rows]
        difference = torch.tensor(values, dtype=torch.float64) - torch.tensor(of_parent, dtype=torch.float64)
        return -difference if objective.endswith("agreement") else difference

    def exact(self, results: Journal, wanted: _Runs, done: _Runs, planned: _Runs | None = None) -> None:
        """Run alternatives exactly, each on the first of the rows in their order.

        Args:
            results: those that are there already; new ones are added.
            wanted: the runs.
            done: those of before.
            planned: those that there will be in all, as far as is known; default: none follow.
        """
        self._plan_exact(results, planned or wanted, done)
        for rows, groups, missing in self._parts(results, wanted, done):
            self.told.add_known(len(rows) * (sum(map(len, groups)) - sum(map(len, missing))))
        if self.streamed:
            assert self.staged is not None
            jobs, rows_of = self._jobs(results, wanted, done)
            found = run_layer_by_layer(self.staged, jobs, self.states(), self.recipe.spill_gib * 1024**3, self.work)
            for n, measured in found:
                self._write(results, rows_of[n], measured)
            return
        for rows, _, missing in self._parts(results, wanted, done):
            if missing or not results.has(_PARENT, rows):
                batch = self.tokens[rows].to(self.library.parent.runtime.device)
                for measured in run_exactly(self.library, self.staged, missing, batch, self.work):
                    self._write(results, rows, measured)

    def _plan_exact(self, results: Journal, wanted: _Runs, done: _Runs, times: int = 1) -> None:
        """Tell of the work of exact runs; ``times`` -1 takes back what was told."""

        def add(kind: str, amount: float) -> None:
            self.work.plan(kind, times * amount)

        length = self.tokens.shape[1]
        for rows, groups, missing in self._parts(results, wanted, done):
            for group in groups:
                plan = add if group in missing else self.work.done_before
                for a in group:
                    plan_all(plan, amounts_of(self.library, self.staged, a, len(rows), length))
            if not self.streamed and (missing or not results.has(_PARENT, rows)):
                plan_all(add, amounts_of_parent(self.staged, len(rows), length))
        if self.streamed:
            assert self.staged is not None
            jobs, _ = self._jobs(results, wanted, done)
            plan_layer_by_layer(self.staged, jobs, self.recipe.spill_gib * 1024**3, add)

    def _parts(
        self, results: Journal, wanted: _Runs, done: _Runs
    ) -> Iterator[tuple[list[int], list[list[Alternative]], list[list[Alternative]]]]:
        """Rows of a batch, alternatives in the groups in which they run, and those groups of which some are missing."""
        order = row_order(len(self.tokens))
        for places in self._exact_batches(wanted, done):
            rows = [order[p] for p in places]
            own = [a for a in self.pending if done.get(a.identity, 0) <= places[0] < wanted.get(a.identity, 0)]
            if not own:
                continue
            # Groups do not hang on what is known already, or an interrupted run would round in another way.
            together = 1 if self.streamed else max(1, self.tokens_at_once // (len(rows) * self.tokens.shape[1]))
            groups = in_groups(own, together)
            yield rows, groups, [g for g in groups if not all(results.has(a.identity, rows) for a in g)]

    def _jobs(self, results: Journal, wanted: _Runs, done: _Runs) -> tuple[list[Job], list[list[int]]]:
        """What is missing, and the rows of each job."""
        jobs, rows_of = [], []
        for rows, _, missing in self._parts(results, wanted, done):
            if missing or not results.has(_PARENT, rows):
                batch = self.tokens[rows].to(self.library.parent.runtime.device)
                jobs.append(Job(batch, [a for group in missing for a in group]))
                rows_of.append(rows)
        return jobs, rows_of

    def _write(self, results: Journal, rows: list[int], measured: Measured) -> None:
        of = _PARENT if measured.alternative is None else measured.alternative.identity
        results.write(of, rows, measured.rows)
        if measured.alternative is not None:
            self.told.add(len(rows))

    def _exact_batches(self, wanted: _Runs, done: _Runs) -> Iterator[list[int]]:
        """Places in the order of rows; all rows of a batch are wanted by the same alternatives."""
        ends = sorted({n for runs in (wanted, done) for n in runs.values() if n})
        for start, end in zip([0, *ends], ends, strict=False):
            yield from self.batches(range(start, end))

    # ------------------------------------------------------------------------------------------ estimates

    def estimated(self, results: Journal, seed: int) -> list[Score]:
        """Estimates for all, exact runs for those that tell most, and what follows for the others."""
        assert self.staged is not None
        num_rows, device = len(self.tokens), self.library.parent.runtime.device
        self.work.plan("choose", 2)
        found = look(self.staged, self.pending, self.tokens[:1].to(device), self.work)
        sizes = [found.size[a.identity] for a in self.pending]
        sweeps = list(self._swept_together(num_rows))
        missing = [[rows for rows in together if not self._has_estimates(results, rows)] for together in sweeps]
        self.told.begin("estimated", num_rows)
        for together, own in zip(sweeps, missing, strict=True):
            known = [rows for rows in together if rows not in own]
            for plan, batches in ((self.work.plan, own), (self.work.done_before, known)):
                if batches:
                    shapes = [self.tokens[rows].shape for rows in batches]
                    plan_estimate(self.staged, self.pending, found, shapes, self.recipe.samples, plan)
            self.told.add_known(len(self.pending) * sum(map(len, known)))
        with self.work.doing("choose", 1):
            guessed = not self._has_estimates(results, self._first_rows)
            foreseen = self._guessed(sizes) if guessed else self._foreseen(results, sizes)[1]
        self._plan_exact(Journal(None, ""), self._by_identity(foreseen), {})
        for own in missing:
            while own:
                size = self._batches_of_a_sweep(found, own[0])
                if self.streamed and size < len(own):
                    self.work.plan("reading", 2 * len(self.staged.layers))
                self._sweep(results, found, own[:size], seed)
                own = own[size:]
                if guessed and self._has_estimates(results, self._first_rows):
                    self._plan_exact(Journal(None, ""), self._by_identity(foreseen), {}, -1)
                    self._plan_exact(Journal(None, ""), self._by_identity(self._foreseen(results, sizes)[1]), {})
                    guessed = False
        by_row = {
            a.identity: [results.known[_ESTIMATE + a.identity, row][KL] for row in range(num_rows)]
            for a in self.pending
        }
        with self.work.doing("choose", 1):
            rounds = self._rounds([by_row[a.identity] for a in self.pending], sizes)
            count, _ = self._foreseen(results, sizes)
        runs: Runs = {}
        for k in range(rounds.count):
            with self.work.doing("choose", 0):
                observed = self._observed(results, by_row, runs)
                following = rounds.after(k, runs, observed, count)
                _, planned = rounds.foresee(k, runs, observed, max(count, k + 1))
            self.work.forget()
            if following == runs:
                break
            self.told.begin(f"of {len(planned)} run exactly", sum(planned.values()) / max(1, len(planned)))
            self.told.add_known(sum(runs.values()))
            self.exact(results, *map(self._by_identity, (following, runs, planned)))
            runs = following
        observed = self._observed(results, by_row, runs)
        if rounds.contest is not None:
            self.regret, _ = rounds.worth(observed)
        return self._corrected(results, by_row, rounds.known, observed, runs)

    @property
    def _first_rows(self) -> list[int]:
        """Those that come first in a sweep, so that some estimates soon are known."""
        return list(range(max(1, len(self.tokens) // _FIRST_SHARE)))

    def _guessed(self, sizes: Sequence[float]) -> Runs:
        """Exact runs there may be, from the sizes of changes alone: KL goes with their square, near enough for that."""
        rounds = self._rounds([[size**2] * len(self.tokens) for size in sizes], sizes)
        routed = any(block.ffn.moe is not None for block in self.library.parent.blocks)
        return rounds.foresee(0, {}, {}, rounds.count if routed else min(_GUESSED_ROUNDS, rounds.count))[1]

    def _foreseen(self, results: Journal, sizes: Sequence[float]) -> tuple[int, Runs]:
        """How many rounds of exact runs there are, and which, by the estimates on the first rows."""
        rows, num_rows = self._first_rows, len(self.tokens)
        of = [[results.known[_ESTIMATE + a.identity, row][KL] for row in rows] for a in self.pending]
        by_row = [[value * num_rows / len(rows) for value in own] for own in of]
        return self._rounds(by_row, sizes).foresee(0, {}, {})

    def _by_identity(self, runs: Runs) -> _Runs:
        return {self.pending[index].identity: rows for index, rows in runs.items()}

    def _rounds(self, by_row: Sequence[Sequence[float]], sizes: Sequence[float]) -> Rounds:
        """The rounds of exact runs, from estimates by row and the sizes of changes."""
        num_rows, recipe = len(self.tokens), self.recipe
        return Rounds(
            known=self._prior(by_row, sizes),
            estimates=torch.tensor([math.fsum(own) / num_rows for own in by_row], dtype=torch.float64),
            costs=[self.cost(a) / num_rows for a in self.pending],
            num_rows=num_rows,
            passes=exact_passes(recipe, self.library.parent.blocks),
            precision=recipe.precision,
            settled=recipe.settled,
            contest=Contest(self.library.alternatives, self.pending, self.axes) if self.axes else None,
        )

    def _prior(self, by_row: Sequence[Sequence[float]], sizes: Sequence[float]) -> Prior:
        """What is known before exact runs, from estimates by row and the sizes of changes."""
        num_rows, blocks = len(self.tokens), self.library.parent.blocks
        estimates = [math.fsum(own) / num_rows for own in by_row]
        routed = [self._before_routers(a) for a in self.pending]
        of_experts = [
            _scatter(own) if a.subblock == "ffn" and blocks[a.layer].ffn.moe is not None else None
            for a, own in zip(self.pending, by_row, strict=True)
        ]
        return prior(self.pending, estimates, sizes, routed, of_experts, num_rows)

    def _observed(self, results: Journal, by_row: dict[str, list[float]], runs: Runs) -> Observed:
        """What exact runs showed."""
        order, found = row_order(len(self.tokens)), {}
        for index, n in runs.items():
            of = self.pending[index].identity
            on = order[:n]
            r = relative_log([results.known[of, row][KL] for row in on], [by_row[of][row] for row in on])
            if r is not None:
                found[index] = r, n
        return found

    def _before_routers(self, a: Alternative) -> bool:
        """Whether what an alternative changes decides which experts some token gets."""
        blocks = enumerate(self.library.parent.blocks)
        return any(block.ffn.moe is not None and (a.layer, a.subblock) < (i, "ffn") for i, block in blocks)

    def _swept_together(self, num_rows: int) -> Iterator[list[list[int]]]:
        """Batches that go through a layer before the next is run: one by one where layers lie in memory."""
        assert self.staged is not None
        batches = list(self.batches(range(num_rows)))
        size, first = 1, self._first_rows
        if len(batches[0]) > len(first) and not self.streamed:
            batches = [first, *self.batches(range(len(first), num_rows))]
        if self.streamed:
            # What every layer is given, and the gradients.
            waiting = len(self.staged.layers) + 1 + self.recipe.samples
            of_batch = waiting * len(batches[0]) * self.tokens.shape[1] * self.staged.bytes_of_a_token
            size = max(1, int(self.recipe.spill_gib * 1024**3 / of_batch))
        for start in range(0, len(batches), size):
            yield batches[start : start + size]

    def _batches_of_a_sweep(self, found: Survey, rows: Sequence[int]) -> int:
        """How many like this one may go through a sweep, which gives its results at its end."""
        if not self.streamed:
            return 1
        assert self.staged is not None
        amounts: dict[str, float] = {}
        shape = self.tokens[rows].shape
        plan_estimate(self.staged, self.pending, found, [shape], self.recipe.samples, amounts.__setitem__)
        of_batch = [self.work.seconds_of(kind, n) for kind, n in amounts.items() if kind != "reading"]
        if None in of_batch:  # the first tells
            return 1
        return max(1, int(most_seconds(self.staged, self.work, 2) / max(math.fsum(s or 0.0 for s in of_batch), 1e-9)))

    def _has_estimates(self, results: Journal, rows: Sequence[int]) -> bool:
        return all(results.has(_ESTIMATE + a.identity, rows) for a in self.pending)

    def _sweep(self, results: Journal, found: Survey, batches: Sequence[list[int]], seed: int) -> None:
        assert self.staged is not None
        seeds = [[[_row_seed(seed, k, row) for row in rows] for k in range(self.recipe.samples)] for rows in batches]
        tokens = [self.tokens[rows].to(self.library.parent.runtime.device) for rows in batches]
        values = estimate(self.staged, self.pending, found, tokens, seeds, self.states(), self.work)
        for rows, own in zip(batches, values, strict=True):
            self.told.add(len(self.pending) * len(rows))
            for a in self.pending:
                results.write(_ESTIMATE + a.identity, rows, [{KL: float(v)} for v in own[a.identity]])

    def _corrected(
        self, results: Journal, by_row: dict[str, list[float]], known: Prior, observed: Observed, runs: Runs
    ) -> list[Score]:
        num_rows = len(self.tokens)
        order = row_order(num_rows)
        mean, deviation = correct(known, observed, num_rows)
        scores = {}
        for index, a in enumerate(self.pending):
            factor = math.exp(float(mean[index]))
            values = [factor * e for e in by_row[a.identity]]
            exact_rows = order[: runs.get(index, 0)]
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


def exact_passes(recipe: ScoringRecipe, blocks: Sequence[BlockConfig]) -> float:
    """Work that exact runs may take: where routers choose experts, estimates say less."""
    return recipe.exact_passes * (3 if any(block.ffn.moe is not None for block in blocks) else 1)


def _scatter(values: Sequence[float]) -> float:
    """Standard deviation over the mean."""
    mean = math.fsum(values) / len(values)
    error = standard_error(values)
    return 0.0 if error is None or mean <= 0 else error * math.sqrt(len(values)) / mean


def _ends_of_waves(num_rows: int) -> list[int]:
    """After how many rows it is asked whether they are enough; of fewer errors cannot be told."""
    ends = [_LEAST_ROWS]
    while ends[-1] < num_rows:
        ends.append(2 * ends[-1])
    return [*ends[:-1], num_rows]


def row_order(num_rows: int) -> list[int]:
    """Rows in the order in which exact runs take them: the first few lie far from each other."""
    bits = max(1, (num_rows - 1).bit_length())
    reversed_bits = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [i for i in reversed_bits if i < num_rows]


def _row_seed(seed: int, sample: int, row: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {sample} {row}".encode()).digest()[:7], "big")


def _exact_score(alternative: Alternative, results: Journal, on: Sequence[int]) -> Score:
    identity = _PARENT if alternative.kind == _PARENT else alternative.identity
    rows = {metric: [results.known[identity, row][metric] for row in sorted(on)] for metric in METRICS}
    if alternative.kind == _PARENT:
        # By definition, not by rounding.
        rows |= {metric: [value] * len(on) for metric, value in PARENT_VALUES.items()}
    return Score(alternative, rows, len(on))
