"""One process of several is lost in the middle of a run: the others end and say so, and the same command finishes.

``make lost`` runs it, for a quarter of an hour: ``compress`` in two and three processes, each on a node of its own,
with the parent whole in each or with its layers divided. It writes a table into the file that ``LAYERSMITH_LOST``
names.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import TINY_RECIPE
from tests.faults import lost
from tests.faults.lost import KINDS, MOST_SECONDS, Launch, Missed
from tests.faults.nodes import Nodes, are_possible

NUMBER, SEED, ATTEMPTS = 20, 24, 4
pytestmark = [
    pytest.mark.skipif("LAYERSMITH_LOST" not in os.environ, reason="make lost: takes a quarter of an hour"),
    pytest.mark.skipif(not are_possible(), reason="needs root, to make network namespaces"),
]
RECIPE = TINY_RECIPE | {
    "device": "cpu",
    "library": {"ffn_fractions": [0.5]},
    "formats": ["int8"],
    "local_distillation": {"tokens": 2048, "coupled_tokens": 4096, "batch_tokens": 64},
    "search": {"refine_passes": 2, "refine_rows": 2, "frontier_points": 3},
    "costs": {"time_child": True},
}
# A child with number formats cannot be sharded, so that of a divided parent has none.
TRAINED = {"tokens": 3840, "batch_tokens": 192, "device_tokens": 32}
MORE = {
    "whole": {"stream": "never", "distillation": TRAINED},
    "divided": {"stream": "always", "formats": ["bf16"], "distillation": TRAINED},
}


@dataclass(frozen=True)
class Case:
    """A fault.

    Attributes:
        number: From 0.
        kind: One of :data:`~tests.faults.lost.KINDS`.
        parent: ``whole`` or ``divided``.
        count: Number of processes.
        rank: The process that is lost.
        place: Where among the stages, from 0 to 1.
        share: How much of the stage has passed, by the time that it takes without a fault.
        again: Number of processes that finish the run; of one that has begun to distil globally, ``count``.
    """

    number: int
    kind: str
    parent: str
    count: int
    rank: int
    place: float
    share: float
    again: int


def cases() -> list[Case]:
    """One fault in each of 20 equal parts of the list of stages, in a random order of kinds, parents and processes."""
    choice = random.Random(SEED)
    order = choice.sample(range(NUMBER), NUMBER)
    result = []
    for number, part in enumerate(order):
        parent, count = tuple(MORE)[number // len(KINDS) % 2], choice.choice((2, 3))
        place, rank = (part + choice.random()) / NUMBER, choice.randrange(count)
        kind, again = KINDS[number % len(KINDS)], choice.choice((1, 2, 3))
        again = max(2, again) if parent == "divided" else again  # one process cannot train a parent on the disk
        result.append(Case(number, kind, parent, count, rank, place, choice.random(), again))
    return result


@dataclass(frozen=True)
class Request:
    """A command, and what it makes where nothing happens.

    Attributes:
        arguments: Arguments for a run folder.
        child: Digests of the files of the child.
        seconds: Duration of each stage, in their order.
    """

    arguments: Callable[[Path], list[str]]
    child: dict[str, str]
    seconds: dict[str, float]


def digests(folder: Path) -> dict[str, str]:
    """Digests of the files of a child, but for the card, which says times."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "README.md")
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def requests(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Request]:
    parent, result = make_parent("llama", num_hidden_layers=4), {}
    for name, more in MORE.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "recipe.json").write_text(json.dumps(RECIPE | more))
        options = ["--data", str(text_folder), "--params", "0.8", "--recipe", str(folder / "recipe.json")]

        def arguments(run: Path, options: list[str] = options) -> list[str]:
            return ["compress", str(parent), str(run), *options]

        with Nodes(2) as nodes:
            lost.finish(nodes, 2, arguments(folder / "run"), folder / "said")
        done = [record for record in lost.logged(folder / "run") if record["event"] == "done"]
        seconds = {record["stage"]: record["seconds"] for record in done if record["stage"] != "report"}
        result[name] = Request(arguments, digests(folder / "run" / "child"), seconds)
    return result


@pytest.fixture(scope="module")
def passed() -> Iterator[list[tuple[Case, str, float]]]:
    """Cases that passed, the stage that each struck, and the seconds until all others had ended."""
    rows: list[tuple[Case, str, float]] = []
    yield rows
    lines = [
        "| fault | parent | process | stage | seconds until all others ended | finished by |",
        "|---|" + "---|" * 5,
    ]
    for case, stage, seconds in rows:
        which = f"{case.rank} of {case.count}"
        lines.append(f"| {case.kind} | {case.parent} | {which} | {stage} | {seconds:.1f} | {case.again} |")
    longest = max((seconds for *_, seconds in rows), default=0.0)
    stages = len({stage for _, stage, _ in rows})
    kinds = ", ".join(f"{kind}: {n}" for kind, n in Counter(case.kind for case, *_ in rows).items())
    lines.append(f"\n{len(rows)} of {NUMBER} passed ({kinds}), in {stages} stages; at most {longest:.1f} seconds.\n")
    with open(os.environ["LAYERSMITH_LOST"], "a", encoding="utf-8") as file:
        file.write("\n".join(lines))


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.number}-{case.kind}-{case.parent}")
def test_one_of_several_is_lost(
    case: Case, requests: dict[str, Request], passed: list[tuple[Case, str, float]], tmp_path: Path
) -> None:
    request = requests[case.parent]
    for attempt in range(ATTEMPTS):
        folder = tmp_path / str(attempt)
        with Nodes(3) as nodes:
            try:
                stage, seconds = lose(
                    case, request, Launch(nodes, case.count, folder / "lost"), folder / "run", attempt
                )
            except Missed as missed:
                print(f"attempt {attempt} missed: {missed}")
                continue
            nodes.mend(case.rank)
            case = replace(case, again=case.count) if stage.startswith("distill") else case
            lost.finish(nodes, case.again, request.arguments(folder / "run"), folder / "again")
        assert digests(folder / "run" / "child") == request.child
        passed.append((case, stage, seconds))
        return
    pytest.fail("the run had finished each time before the fault struck")


def lose(case: Case, request: Request, launch: Launch, run: Path, attempt: int) -> tuple[str, float]:
    """Start the command and lose a process; returns the stage that was named, and the seconds until all had ended."""
    order = list(request.seconds)
    stage = order[int(case.place * len(order))]
    try:
        launch.start(request.arguments(run))
        lost.wait_for_stage(launch, run, stage)
        time.sleep(case.share / 2**attempt * request.seconds[stage])
        launch.check()
        possible = lost.stages_at(run, order, partial(lost.strike, case.kind, launch, case.rank))
        others = [rank for rank in range(case.count) if rank != case.rank]
        seconds = launch.wait(others, MOST_SECONDS)
        if case.kind == "out of memory":  # it may have had enough for a while
            possible |= {record["stage"] for record in lost.logged(run)}
        named = check_others(case, launch, others, possible)
        check_lost(case, launch)
        return named, seconds
    finally:
        launch.end()


def check_others(case: Case, launch: Launch, others: list[int], possible: set[str]) -> str:
    """Each of the others says which process is lost and where; returns the stage."""
    codes = [launch.codes()[rank] for rank in others]
    if not any(codes):
        raise Missed("the run finished")
    assert all(code == 1 for code in codes), codes
    named = {lost.named_stage(launch.sentence(rank), case.rank, case.count) for rank in others}
    assert named <= possible, (named, possible)
    return named.pop()


def check_lost(case: Case, launch: Launch) -> None:
    """The process itself ends as well, by itself unless it was killed. A stopped one is continued."""
    process = launch.processes[case.rank]
    if case.kind == "stopped":
        os.kill(process.pid, signal.SIGCONT)
    launch.wait([case.rank], MOST_SECONDS)
    if case.kind == "killed":
        assert process.exitcode == -signal.SIGKILL
    elif case.kind == "out of memory":  # a library in C++ may abort
        assert process.exitcode in (1, -signal.SIGABRT), launch.words(case.rank)
        if process.exitcode == 1:
            assert "out of memory" in launch.sentence(case.rank)
    else:
        assert process.exitcode == 1
        assert f" of {case.count} " in launch.sentence(case.rank)
