"""A command in several processes, each on a node of its own, of which one is lost in the middle."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.nodes import Nodes
from tests.faults.operations import command, forks

# All others have to end within this time after a process was lost, and it must not last longer to begin or to finish.
MOST_SECONDS, MOST_SECONDS_OF_A_RUN = 60.0, 600.0
# Nothing is taken from another run, and errors of foreign code are treated as users have them.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "LAYERSMITH_STORE": "off", "LAYERSMITH_STRICT": "0"}
KINDS = ("killed", "stopped", "cut off", "out of memory")


class Missed(Exception):
    """The run had finished before the fault struck, or it changed nothing, which is no result."""


@dataclass
class Launch:
    """The processes of one command, forked from one that has imported everything and run nothing.

    Attributes:
        nodes: Where they run; process 0 on node 0.
        count: Number of processes.
        said: Folder for what they print.
    """

    nodes: Nodes
    count: int
    said: Path
    processes: list[Any] = field(default_factory=list)

    def start(self, arguments: list[str]) -> None:
        self.said.mkdir(parents=True)
        for rank in range(self.count):
            environment = self.nodes.environment(rank, self.count) | ENVIRONMENT
            process = forks.Process(target=self._command, args=(self.nodes, rank, environment, arguments, self.said))
            process.start()
            self.processes.append(process)

    @staticmethod
    def _command(nodes: Nodes, rank: int, environment: dict[str, str], arguments: list[str], said: Path) -> None:
        os.environ.update(environment)
        nodes.enter(rank)
        command(arguments, said / str(rank), None)

    def codes(self) -> list[int | None]:
        """Exit code of each process, or minus the signal that ended it; None while it runs."""
        return [process.exitcode for process in self.processes]

    def check(self) -> None:
        """Raises: Missed: A process has finished; AssertionError: one has failed."""
        codes = self.codes()
        assert not any(codes), f"exit codes {codes}:\n" + "\n".join(map(self.words, range(self.count)))
        if 0 in codes:
            raise Missed("a process had finished")

    def words(self, rank: int) -> str:
        """What a process has printed."""
        return (self.said / str(rank)).read_text(encoding="utf-8", errors="replace")

    def sentence(self, rank: int) -> str:
        """The one sentence with which a process ended.

        Raises:
            AssertionError: It printed a traceback, or not one sentence.
        """
        words = self.words(rank)
        sentences = [line for line in words.splitlines() if line.startswith("layersmith: ")]
        assert len(sentences) == 1, f"process {rank} of {self.count} printed:\n{words}"
        assert "Traceback" not in words, f"process {rank} of {self.count} printed:\n{words}"
        return sentences[0]

    def wait(self, ranks: list[int], seconds: float) -> float:
        """Wait until some processes have ended; returns the seconds that it took."""
        began = time.monotonic()
        while alive := [rank for rank in ranks if self.processes[rank].exitcode is None]:
            assert time.monotonic() < began + seconds, f"processes {alive} of {self.count} go on:\n" + "\n".join(
                map(self.words, alive)
            )
            time.sleep(0.05)
        return time.monotonic() - began

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def finish(nodes: Nodes, count: int, arguments: list[str], said: Path) -> None:
    """Run a command to its end."""
    launch = Launch(nodes, count, said)
    try:
        launch.start(arguments)
        launch.wait(list(range(count)), MOST_SECONDS_OF_A_RUN)
        assert not any(launch.codes()), f"exit codes {launch.codes()}:\n" + "\n".join(map(launch.words, range(count)))
    finally:
        launch.end()


def logged(run: Path) -> list[dict[str, Any]]:
    """The log of a run, without a line that is being written."""
    file = run / "log.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


def wait_for_stage(launch: Launch, run: Path, stage: str) -> None:
    """Wait until a stage has begun.

    Raises:
        Missed: A process had finished before.
    """
    began = time.monotonic()
    while not any(record["stage"] == stage and record["event"] == "begun" for record in logged(run)):
        launch.check()
        assert time.monotonic() < began + MOST_SECONDS_OF_A_RUN
        time.sleep(0.002)


def strike(kind: str, launch: Launch, rank: int) -> None:
    """Lose a process."""
    pid = launch.processes[rank].pid
    if kind == "killed":
        os.kill(pid, signal.SIGKILL)
    elif kind == "stopped":
        os.kill(pid, signal.SIGSTOP)
    elif kind == "cut off":
        launch.nodes.cut(rank)
    else:  # no further page is granted, beyond those that the process has already
        resource.prlimit(pid, resource.RLIMIT_AS, (1, resource.RLIM_INFINITY))


def stages_at(run: Path, order: list[str], strike_now: Callable[[], None]) -> set[str]:
    """Strike, and return the stages that processes may have been at: the log is written by the first one alone.

    Raises:
        Missed: The last stage was finished.
    """
    before = logged(run)[-1]
    strike_now()
    after = logged(run)[-1]
    if before["stage"] == order[-1] and before["event"] != "begun":
        raise Missed("the last stage was finished")
    found = {before["stage"], after["stage"]}
    for record in (before, after):
        if record["event"] != "begun":  # on the way to the next
            found.add([*order, "report"][order.index(record["stage"]) + 1])
    return found


def named_stage(sentence: str, rank: int, count: int) -> str:
    """The stage that a sentence says a process was lost in.

    Raises:
        AssertionError: It does not name that process and a stage.
    """
    found = re.search(rf"process {rank} of {count} .* during the stage ([a-z_/]+)", sentence)
    assert found is not None, f"does not name process {rank} of {count} and its stage: {sentence}"
    return found[1]
