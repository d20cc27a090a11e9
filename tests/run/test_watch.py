"""No process of a launcher waits for another that was killed, hangs, ended or is cut off."""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from layersmith.errors import InputError
from layersmith.run import ranks, watch
from layersmith.run.runtime import Runtime
from tests.faults.nodes import Nodes, are_possible
from tests.faults.operations import forks

LOST = "was killed, hangs or is cut off during the stage scores. To resume, run the same command again."


def begin(folder: Path, environment: dict[str, str]) -> Runtime:
    """Make this process one of several, with frequent signs of life and its sentences in a file."""
    os.environ.update(environment)
    watch.BEAT_SECONDS = 0.2
    runtime = Runtime.detect("cpu")
    sys.stderr = open(folder / f"said-{runtime.rank}", "w", buffering=1)  # noqa: SIM115
    ranks.start(runtime)
    return runtime


def work(folder: Path, environment: dict[str, str], busy: int, seconds: float) -> None:
    """One of several processes; number ``busy`` works while the others wait for it."""
    runtime = begin(folder, environment)
    with ranks.first(contextlib.nullcontext):
        ranks.doing("scores")
        (folder / f"ready-{runtime.rank}").touch()
        if runtime.rank == busy:
            time.sleep(seconds)
        ranks.on_first(lambda: None)


def environments(world_size: int) -> Iterator[dict[str, str]]:
    """What torchrun would tell each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(world_size):
        of_group = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank}
        yield {name: str(value) for name, value in of_group.items()}


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[Any]]]:
    processes: list[Any] = []

    def begun(busy: int, seconds: float, world_size: int = 3) -> list[Any]:
        for environment in environments(world_size):
            processes.append(forks.Process(target=work, args=(tmp_path, environment, busy, seconds)))
            processes[-1].start()
        wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == world_size)
        return processes

    yield begun
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.parametrize(("sent", "to"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 1), (signal.SIGSTOP, 0)])
def test_the_others_end_with_one_sentence(sent: signal.Signals, to: int, start: Callable, tmp_path: Path) -> None:
    processes = start(to, 600)
    time.sleep(1)  # until the others have heard its stage
    os.kill(processes[to].pid, sent)
    for rank, process in enumerate(processes):
        if rank != to:
            process.join(30)
            said = (tmp_path / f"said-{rank}").read_text()
            assert (process.exitcode, said) == (1, f"layersmith: {socket.gethostname()}: process {to} of 3 {LOST}\n")


def test_who_works_longer_than_the_patience_is_left_alone(start: Callable, tmp_path: Path) -> None:
    for rank, process in enumerate(start(1, 0.2 * watch.PATIENCE + 2)):
        process.join(30)
        assert process.exitcode == 0, (tmp_path / f"said-{rank}").read_text()


def train(folder: Path, environment: dict[str, str], wrong: set[int]) -> None:
    """One of two processes; those in ``wrong`` have an error where the others are in a collective operation."""
    runtime = begin(folder, environment)
    with ranks.watched(), ranks.ending_all():
        ranks.doing("distilled")
        if runtime.rank in wrong:
            raise InputError("the loss is not finite.")
        torch.distributed.all_reduce(torch.ones(1))


@pytest.mark.parametrize("wrong", [{1}, {0, 1}])
def test_an_error_of_one_process_ends_those_that_wait_for_it(wrong: set[int], tmp_path: Path) -> None:
    processes = [forks.Process(target=train, args=(tmp_path, environment, wrong)) for environment in environments(2)]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        process.join(30)
        said = (tmp_path / f"said-{rank}").read_text()
        assert process.exitcode == 1, said
        assert ("Traceback" in said) == (len(wrong) == 2), said  # an error of all is raised in each
        assert said.endswith("the loss is not finite.\n")


def train_to_death(folder: Path, environment: dict[str, str]) -> None:
    """One of two processes; the second is killed while the first is in a collective operation of another package."""
    runtime = begin(folder, environment)
    with ranks.watched(), ranks.ending_all():
        ranks.doing("scores")
        if runtime.rank == 1:
            time.sleep(1)  # until the other has heard its stage
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.all_reduce(torch.ones(1))


def test_a_killed_process_is_named_where_a_connection_fails(tmp_path: Path) -> None:
    processes = [forks.Process(target=train_to_death, args=(tmp_path, environment)) for environment in environments(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    said = (tmp_path / "said-0").read_text()
    assert (processes[0].exitcode, said) == (1, f"layersmith: {socket.gethostname()}: process 1 of 2 {LOST}\n")


def work_on_a_node(nodes: Nodes, folder: Path, rank: int) -> None:
    nodes.enter(rank)
    work(folder, nodes.environment(rank, 2), 0, 600)


@pytest.mark.skipif(not are_possible(), reason="needs root, to make network namespaces")
def test_two_nodes_whose_link_is_cut(tmp_path: Path) -> None:
    """Each node is a network namespace; both processes end, and name each other."""
    with Nodes(2) as nodes:
        processes = [forks.Process(target=work_on_a_node, args=(nodes, tmp_path, rank)) for rank in range(2)]
        try:
            for process in processes:
                process.start()
            wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
            time.sleep(1)
            nodes.cut(0)
            for rank, process in enumerate(processes):
                process.join(30)
                said = (tmp_path / f"said-{rank}").read_text()
                assert (process.exitcode, f": process {1 - rank} of 2 {LOST}\n" in said) == (1, True), said
        finally:
            for process in processes:
                process.kill()
                process.join()
