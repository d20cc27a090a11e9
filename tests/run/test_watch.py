"""No process of a launcher waits for another that was killed, hangs, ended or is cut off."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from layersmith.run import ranks, watch
from layersmith.run.runtime import Runtime
from tests.faults.operations import forks

LOST = "was killed, hangs or is cut off during the stage scores. To resume, run the same command again."


def work(folder: Path, environment: dict[str, str], busy: int, seconds: float) -> None:
    """One of several processes; number ``busy`` works while the others wait for it."""
    os.environ.update(environment)
    watch.BEAT_SECONDS = 0.2
    runtime = Runtime.detect("cpu")
    sys.stderr = open(folder / f"said-{runtime.rank}", "w", buffering=1)  # noqa: SIM115
    ranks.start(runtime)
    with ranks.first(contextlib.nullcontext):
        ranks.doing("scores")
        (folder / f"ready-{runtime.rank}").touch()
        if runtime.rank == busy:
            time.sleep(seconds)
        ranks.on_first(lambda: None)


def environment_of(rank: int, world_size: int, address: str, port: int) -> dict[str, str]:
    of_group = {"WORLD_SIZE": world_size, "MASTER_ADDR": address, "MASTER_PORT": port, "RANK": rank}
    return {name: str(value) for name, value in of_group.items()}


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[Any]]]:
    processes: list[Any] = []

    def begin(busy: int, seconds: float, world_size: int = 3) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(world_size):
            environment = environment_of(rank, world_size, "127.0.0.1", port)
            processes.append(forks.Process(target=work, args=(tmp_path, environment, busy, seconds)))
            processes[-1].start()
        wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == world_size)
        return processes

    yield begin
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


NODE = """
import json, sys
from pathlib import Path
from tests.run.test_watch import work
work(Path(sys.argv[1]), json.loads(sys.argv[2]), 0, 600)
"""


@pytest.mark.skipif(shutil.which("ip") is None or os.geteuid() != 0, reason="needs root, to make network namespaces")
def test_two_nodes_whose_link_is_cut(tmp_path: Path) -> None:
    """Each node is a network namespace; both processes end, and name each other."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    names, links = [f"ls{os.getpid()}-{rank}" for rank in range(2)], [f"ls{os.getpid()}{rank}" for rank in range(2)]
    processes = []
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        for rank, (name, link) in enumerate(zip(names, links, strict=True)):
            ip("-n", name, "addr", "add", f"10.231.7.{rank + 1}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        for rank, name in enumerate(names):
            environment = environment_of(rank, 2, "10.231.7.1", 29511) | {"GLOO_SOCKET_IFNAME": links[rank]}
            command = ["ip", "netns", "exec", name, sys.executable, "-c", NODE, str(tmp_path), json.dumps(environment)]
            processes.append(subprocess.Popen(command))
        wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
        time.sleep(1)
        ip("-n", names[0], "link", "set", links[0], "down")
        for rank, process in enumerate(processes):
            assert process.wait(30) == 1
            assert f": process {1 - rank} of 2 {LOST}\n" in (tmp_path / f"said-{rank}").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
