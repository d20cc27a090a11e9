"""Ctrl-C, SIGTERM, a full disk, too little memory: the right exit code, one sentence, and the same command goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from layersmith.run.artifacts import TEMPORARY
from tests.faults.conftest import ALL, Tiny, contents
from tests.faults.operations import Fault, run

INTERRUPTS = {
    "Ctrl-C": (130, "layersmith: interrupted. To resume, run the same command again."),
    "SIGTERM": (143, "layersmith: terminated. To resume, run the same command again."),
    "full disk": (2, "no space left on the disk. Free some and run the same command again."),
    "out of memory": (1, "layersmith: out of memory."),
}


def fault_of(what: str, at: Path, number: int) -> Fault:
    if what == "full disk":
        return Fault(at, fail_at=number)
    if what == "out of memory":
        return Fault(at, memory_at=number)
    return Fault(at, signal_at=(number, signal.SIGINT if what == "Ctrl-C" else signal.SIGTERM))


@pytest.mark.parametrize("what", INTERRUPTS)
def test_an_interrupted_command_goes_on(
    what: str, tiny: Tiny, compressed: Path, tmp_path: Path, figures: Callable
) -> None:
    """Interrupted again and again, each time later, until it ends."""
    code, sentence = INTERRUPTS[what]
    at, said = tmp_path / "run", tmp_path / "said"
    step, ends = (20 if ALL else 241), 0
    for number in range(20, 2000, step):
        ended = run(tiny.compress(at), said, fault_of(what, tmp_path, number))
        if ended == 0:
            break
        text = said.read_text()
        assert (ended, sentence in text) == (code, True), (number, text)
        assert "Traceback" not in text
        assert len([line for line in text.splitlines() if line.startswith("layersmith: ")]) == 1
        assert not list(at.rglob(f"{TEMPORARY}*")) or what == "full disk"
        ends += 1
        figures("compress", what, str(number), "goes on")
    assert ends >= 2
    assert contents(at) == contents(compressed)
