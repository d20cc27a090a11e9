"""layersmith compared with other methods of pruning, on one parent, without training, at the same sizes.

    python -m benchmarks.quality RUN --outside text.jsonl --tasks-in tasks/ --work WORK --out quality.json

RUN is a finished run of ``layersmith compress`` or ``layersmith demo``. Its calibration and scoring rows are what every
method may use; its evaluation rows, from other documents of the same sources, are the text inside the calibration's
domain. Text outside comes from the file, one row a document. Rows of the table that are in the file already are not
made again. ``--table`` only writes the table.

A share is that of the parameters in the decoder layers; the embedding comes on top.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import PreTrainedModel

import benchmarks.rivals.refit as closed_form
from benchmarks.rivals.activations import Activations, observe
from benchmarks.rivals.depth import Evolution, block_influence, evopress
from benchmarks.rivals.flap import flap
from benchmarks.rivals.gisp import gisp
from benchmarks.rivals.judge import Judge, Tasks
from benchmarks.rivals.minitron import Narrow, minitron, narrowed, parameters_of, refitted_narrow
from benchmarks.rivals.problem import Choice, Problem, Work
from benchmarks.rivals.quality_table import write
from benchmarks.rivals.slicegpt import slicegpt
from benchmarks.rivals.tyr import tyr
from benchmarks.rivals.wanda import wanda
from layersmith.costs.budget import Budget
from layersmith.data.overlap import OverlapRule, without_copies
from layersmith.library.stored_weights import Kept
from layersmith.recipe import SearchRecipe
from layersmith.stages.data import DATA
from layersmith.stages.job import Job, job_of_run
from layersmith.stages.library import LIBRARY
from layersmith.stages.realize import PAIRS, library_with_pairs
from layersmith.stages.refine import SOLUTION
from layersmith.stages.reopen import SearchRequest, search_several
from layersmith.stages.scores import SCORES

SHARES = (0.875, 0.75, 0.625, 0.5)
TASKS = ("arc_easy", "lambada_openai", "copa")
# The run's own child is taken for a share that is larger by this at most.
_NEAR = 0.005


def spread_rows(path: Path, tokenizer: Any, count: int, length: int) -> torch.Tensor:
    """``count`` rows, each the start of a document, in an order that depends on the text."""
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    rows = (torch.tensor(tokenizer(text[: 8 * length], verbose=False)["input_ids"][:length]) for text in texts)
    long = [row for row in rows if len(row) == length]
    if len(long) < count:
        raise ValueError(f"{path}: only {len(long)} documents have {length} tokens")
    return torch.stack(long[:count])


# ---------------------------------------------------------------------------------------------- methods


@dataclasses.dataclass
class Made:
    """A child, its parameters without the parent's embedding and head, and the tokens and seconds that it took."""

    child: PreTrainedModel
    parameters: float
    work: tuple[float, float] = (0.0, 0.0)


def run_seconds(job: Job, stages: Sequence[str]) -> float:
    """What some stages of the run took, by the clock."""
    events = map(json.loads, (job.run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return math.fsum(e["seconds"] for e in events if e.get("stage") in stages and "seconds" in e)


class Methods:
    """All methods on one parent; what several of them need is made once."""

    def __init__(self, problem: Problem, shares: list[float], work: Path, job: Job, search_tokens: float):
        self.problem, self.work, self.job = problem, work, job
        self.shares = sorted(shares, reverse=True)
        self.total = problem.sizes.total
        self.rest = sum(p.numel() for p in problem.model.parameters()) - self.total
        self.search = {"tokens": search_tokens}
        self._choices: dict[tuple[str, float], tuple[Any, float, float]] = {}

    @cached_property
    def seen(self) -> tuple[Activations, float]:
        """Activations, kept on the disk, and the seconds that they took."""
        file = self.work / "activations.pt"
        if not file.is_file():
            started, tokens = time.process_time(), self.problem.work.tokens
            seen = observe(self.problem)
            self.problem.work.tokens = tokens
            torch.save((seen, time.process_time() - started), file)
        loaded: tuple[Activations, float] = torch.load(file, weights_only=False)
        return loaded

    def choice(self, name: str, share: float) -> tuple[Any, float, float]:
        """What a method chose, its tokens and its seconds; the refitted row goes on from it."""
        if (name, share) not in self._choices and not self._restore(name, share):
            problem = dataclasses.replace(self.problem, work=Work())
            parameters, extra = share * self.total, 0.0
            if name == "GISP":
                sizes, file = [s * self.total for s in self.shares], self.work / f"gisp-{self.shares}.pt"
                for size, choice in gisp(problem, sizes, file=file):
                    of_share = self.shares[sizes.index(size)]
                    self._keep(name, of_share, choice, (problem.work.tokens, problem.work.seconds))
                return self._choices[name, share]
            makers: dict[str, Callable[[], Any]] = {
                "Wanda-sp": lambda: wanda(problem, self.seen[0], parameters),
                "FLAP": lambda: flap(problem, self.seen[0], parameters),
                "ShortGPT": lambda: block_influence(problem, self.seen[0], parameters),
                "Minitron": lambda: minitron(problem, self.seen[0], parameters),
                "EvoPress": lambda: evopress(problem, parameters, Evolution(**self.search)),
                "Tyr": lambda: tyr(problem, parameters, how=Evolution(stages=((2, 4), (8, 1)), **self.search)),
            }
            if name in ("Wanda-sp", "FLAP", "ShortGPT", "Minitron"):
                extra = self.seen[1]
                problem.work.tokens += problem.calibration.numel()
                problem.work.started = time.process_time()
            choice = makers[name]()
            self._keep(name, share, choice, (problem.work.tokens, problem.work.seconds + extra))
        return self._choices[name, share]

    def _file(self, name: str, share: float) -> Path:
        return self.work / f"choice-{name}-{share}.pt"

    def _keep(self, name: str, share: float, choice: Choice | Narrow, work: tuple[float, float]) -> None:
        """Keep a choice, also on the disk, so that another call can evaluate it."""
        self._choices[name, share] = (choice, *work)
        is_narrow = isinstance(choice, Narrow)
        data = (choice.choice if isinstance(choice, Narrow) else choice).to_dict()
        torch.save((data, choice.kept if is_narrow else None, work), self._file(name, share))

    def _restore(self, name: str, share: float) -> bool:
        if not self._file(name, share).is_file():
            return False
        data, kept, work = torch.load(self._file(name, share), weights_only=False)
        problem = self.problem if kept is None else narrowed(self.problem, kept)
        choice = Choice.restored(problem, data)
        self._choices[name, share] = (choice if kept is None else Narrow(problem, choice, kept), *work)
        return True

    def rival(self, name: str, share: float, refit: bool) -> Made:
        if name == "SliceGPT":
            problem = dataclasses.replace(self.problem, work=Work())
            child = slicegpt(problem, share * self.total)
            return Made(child, share * self.total, (problem.work.tokens, problem.work.seconds))
        key = f"{name} refit" if refit else name
        if refit and not self._restore(key, share):
            choice, *work = self.choice(name, share)
            problem = dataclasses.replace(self.problem, work=Work())
            if isinstance(choice, Narrow):
                choice = dataclasses.replace(choice, choice=refitted_narrow(problem, choice))
            else:
                choice = closed_form.refitted(problem, self.seen[0], choice)
            self._keep(key, share, choice, (work[0] + problem.work.tokens, work[1] + problem.work.seconds))
        choice, *work = self.choice(key, share)
        if isinstance(choice, Narrow):
            return Made(choice.choice.child(), parameters_of(self.problem, choice) - self.rest, (work[0], work[1]))
        return Made(choice.child(), choice.parameters, (work[0], work[1]))

    def ours(self, share: float, uniform: bool, refit: bool) -> Made:
        """From the scores of the run; the refit on the child's inputs is left out without ``refit``."""
        problem = dataclasses.replace(self.problem, work=Work())
        limit, job = share * self.total + self.rest, self.job
        solution, library = job.read(SOLUTION), library_with_pairs(job)
        is_runs = not uniform and 0 <= limit - solution.costs["parameters"] < _NEAR * self.total
        if not is_runs:
            rules = SearchRecipe(uniform_groups=0) if uniform else None
            request = SearchRequest(job.run.folder, Budget.parse(str(int(limit))), rules=rules)
            library, (solution, *_) = search_several(request, refine=not uniform)
            library = dataclasses.replace(library, pairs=Kept())
            if refit:
                problem = dataclasses.replace(problem, library=library)
                library = closed_form.refitted_on_child(problem, library, list(solution.alternatives))
        elif not refit:
            library = dataclasses.replace(library, pairs=Kept())
        child = library.compose(solution.alternatives)
        later = ["refine", "pairs"] if refit else ["refine"]  # made here if the child is not the run's
        seconds = run_seconds(job, ["statistics", "library", "scores", *(later if is_runs else [])])
        return Made(child, solution.costs["parameters"] - self.rest, (0.0, seconds + problem.work.seconds))


RIVALS = ("Wanda-sp", "FLAP", "ShortGPT", "Minitron", "GISP", "EvoPress", "Tyr", "SliceGPT")
OURS, UNIFORM = "layersmith", "layersmith, all layers alike"


def rows_wanted(shares: list[float], only: list[str] | None) -> Iterator[tuple[str, float, bool]]:
    """Method, share, and whether with layersmith's refit (for layersmith: the one on the child's inputs)."""
    for share in shares:
        for name in (OURS, UNIFORM, *RIVALS):
            if only is None or name in only:
                for refit in (True, False) if name in (OURS, UNIFORM) else (False, True):
                    if not (name == "SliceGPT" and refit):
                        yield name, share, refit


# ---------------------------------------------------------------------------------------------- the work


def prepared(args: argparse.Namespace) -> tuple[Job, Problem, Judge]:
    """The run, the problem, and who judges; none of the evaluation's text is in the calibration's."""
    job = job_of_run(args.run, (DATA, LIBRARY, SCORES, SOLUTION, PAIRS))
    tokens = job.read(DATA)
    every = max(1, len(tokens.evaluation) // args.rows)
    outside = spread_rows(args.outside, job.tokenizer, args.rows, tokens.evaluation.shape[1])
    texts = {"inside": tokens.evaluation[::every][: args.rows], "outside": outside}
    used = {"calibration": tokens.calibration, "scoring": tokens.scoring}
    for name, rows in texts.items():
        without_copies(used, rows, job.tokenizer, OverlapRule("refuse", name), [])
    library = dataclasses.replace(job.read(LIBRARY), kept=Kept(), pairs=Kept())
    tasks = [args.tasks_in / f"{task}.jsonl" for task in TASKS] if args.tasks_in is not None else []
    problem = Problem(library, tokens.calibration, tokens.scoring)
    return job, problem, Judge(job.parent, job.tokenizer, texts, Tasks(tasks, args.items), args.work)


class Rows:
    """The rows of the table, in a JSON file that several calls may write to."""

    def __init__(self, path: Path):
        self.path, self.lock = path, FileLock(f"{path}.lock")

    def read(self) -> list[dict[str, Any]]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else []

    def get(self, name: str, share: float, refit: bool) -> dict[str, Any]:
        """A row, empty if it is not there."""
        return next((row for row in self.read() if _key(row) == (name, share, refit)), {})

    def put(self, row: dict[str, Any]) -> None:
        with self.lock:
            rows = [*(other for other in self.read() if _key(other) != _key(row)), row]
            write_rows(self.path, rows)


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write rows as JSON, a line each; an interruption leaves the file as it was."""
    partial = path.with_suffix(".partial")
    partial.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
    partial.replace(path)


def _key(row: dict[str, Any]) -> tuple[str, float, bool]:
    return row["method"], row["share"], row["refit"]


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--outside", type=Path, help="JSONL file of text outside the calibration's domain")
    parser.add_argument("--tasks-in", type=Path, help="folder with JSONL files of tasks; without it, no tasks")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between calls")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--only", nargs="+", help="these methods only")
    parser.add_argument("--rows", type=int, default=20, help="of each text")
    parser.add_argument("--items", type=int, default=200, help="of each task")
    parser.add_argument("--search-tokens", type=float, default=250_000, help="of EvoPress and Tyr")
    parser.add_argument("--refit", choices=("yes", "no"), help="rows with, or without, layersmith's refit only")
    parser.add_argument("--most", type=int, default=1000, help="rows to make in this call")
    parser.add_argument("--table", action="store_true", help="only write the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    table = Rows(args.out)
    if not args.table:
        make_rows(args, table)
    write(table.read(), args.out)


def make_rows(args: argparse.Namespace, table: Rows) -> None:
    job, problem, judge = prepared(args)
    methods = Methods(problem, args.shares, args.work, job, args.search_tokens)
    wanted = [("parent", 1.0, False), *rows_wanted(args.shares, args.only)]
    wanted = [key for key in wanted if args.refit is None or key[2] == (args.refit == "yes")]
    parts = {"text": judge.on_text} | ({"tasks": judge.on_tasks} if args.tasks_in is not None else {})
    missing = [key for key in wanted if parts.keys() - table.get(*key).keys()]
    for name, share, refit in missing[: args.most]:
        row = table.get(name, share, refit)
        if name == "parent":
            made = Made(problem.model, problem.sizes.total)
        elif name in (OURS, UNIFORM):
            made = methods.ours(share, name == UNIFORM, refit)
        else:
            made = methods.rival(name, share, refit)
        if not row:
            row = {"method": name, "share": share, "refit": refit, "tokens": made.work[0], "seconds": made.work[1]}
            row |= {"parameters": made.parameters, "of": problem.sizes.total, "parent": Path(job.path).name}
            row |= {"rows": args.rows, "commit": commit()}
        for part in parts.keys() - row.keys():
            row |= {part: parts[part](made.child)} | ({"items": args.items} if part == "tasks" else {})
            table.put(row)
        print(json.dumps({key: value for key, value in row.items() if key not in parts}), flush=True)


if __name__ == "__main__":
    main()
