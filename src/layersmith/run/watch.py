"""Each process of a launcher watches the others, so that none waits for one that was killed, hangs or is cut off.

Every process sends a datagram to all others every few seconds. One that was heard and falls silent is given up.
Silence is measured in beats of the process that listens, not by its clock: a run that is suspended as a whole, or a
machine that slept, accuses nobody when it goes on. A process that was never heard is not watched, as datagrams may be
blocked.

A process that gives up prints one sentence and exits at once, wherever it is: it may be inside a collective operation
that never returns. The run folder allows that at any time, since the same command resumes the run.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from layersmith.foreign import MORE_MEMORY

# A process that is silent for PATIENCE beats (42 seconds) counts as lost. After a failed collective operation one is
# gone for certain, and fewer beats say which.
BEAT_SECONDS, PATIENCE, PATIENCE_AFTER_A_FAILURE = 3.0, 14, 3
# What a process says of itself: that it works, that it has an error and wants to know who else has one, that it has
# ended, and that all have to end with a sentence.
_WORKS, _ERRS, _ENDED, _FAILED = "works", "errs", "ended", "failed"
# A datagram of this size is never divided on the way.
_MOST_BYTES = 1024
_ADVICE = "To resume, run the same command again."


def without_memory(rank: int, count: int, doing: str) -> str:
    """What to say where a process has no memory left."""
    where = f" during the stage {doing}" if doing else ""
    return f"process {rank} of {count} ran out of memory{where}. {MORE_MEMORY}"


@dataclass
class Watch:
    """A thread that shows the others that this process lives, and watches whether they do.

    Attributes:
        rank: Number of this process.
        addresses: Host and port of every process, by number.
        token: What all datagrams of the run begin with.
        channel: Socket that sends and receives them.
        doing: Stage that this process works on.
        errs: Whether this process has an error of which the others may not know.
        has_failed: Whether a collective operation has failed here.
    """

    rank: int
    addresses: list[tuple[str, int]]
    token: str
    channel: socket.socket
    doing: str = ""
    errs: bool = False
    has_failed: bool = False
    _ending: bool = False
    _thread: threading.Thread | None = None
    _unraisable: deque[Any] = field(default_factory=deque)
    _hook: Callable[[Any], object] = sys.__unraisablehook__
    _signs: dict[int, str] = field(default_factory=dict)
    _silent: dict[int, int] = field(default_factory=dict)

    def start(self) -> None:
        # A thread that gets no memory for its first call runs no hook in Python, and who starts it waits for ever.
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable.append
        self._thread = threading.Thread(target=self._run, name="layersmith-watch", daemon=True)
        self._thread.start()

    def tell(self, stage: str) -> None:
        """Tell the others at once which stage this process works on: it may be lost before the next beat."""
        self.doing = stage
        self._send(f"{_WORKS} {stage}")

    def stop(self) -> None:
        """Tell the others that this process has ended, and watch no more."""
        self._ending = True
        sys.unraisablehook = self._hook
        self._report_unraisable()
        self._send(f"{_ENDED} {self.doing}")

    def errs_alone(self) -> bool:
        """After an error here: whether some other process still works after a few beats."""
        self.errs = True
        for _ in range(PATIENCE_AFTER_A_FAILURE):
            time.sleep(BEAT_SECONDS)
            if self._signs and all(sign.startswith((_ERRS, _FAILED, _ENDED)) for sign in list(self._signs.values())):
                return False
        return True

    def leave(self, sentence: str) -> NoReturn:
        """End this process and all others with a sentence, where it cannot wait for them any more."""
        try:
            self._send(f"{_FAILED} {sentence}")
        finally:  # there may be no memory for that
            _exit(sentence)

    def _report_unraisable(self) -> None:
        while self._unraisable:
            failure = self._unraisable.popleft()
            if issubclass(failure.exc_type, MemoryError) and not self._ending:
                self.leave(without_memory(self.rank, len(self.addresses), self.doing))
            self._hook(failure)

    def give_up(self) -> NoReturn:
        """After a failed collective operation: wait until the thread knows who is gone, and exit."""
        self.has_failed = True
        time.sleep(BEAT_SECONDS * (PATIENCE_AFTER_A_FAILURE + 2))
        _exit(f"another process of this run is gone. {_ADVICE}")

    def _run(self) -> None:
        while not self._ending:
            self._send(f"{_ERRS if self.errs else _WORKS} {self.doing}")
            self._listen(BEAT_SECONDS)
            self._report_unraisable()
            for rank, sign in self._signs.items():
                self._silent[rank] += 1
                if self._silent[rank] > self._patience(sign) and not self._ending:
                    state, _, stage = sign.partition(" ")
                    what = "ended" if state == _ENDED else "was killed, hangs or is cut off"
                    when = f" during the stage {stage}" if stage else " before its first stage"
                    _exit(f"process {rank} of {len(self.addresses)} {what}{when}. {_ADVICE}")

    def _patience(self, sign: str) -> int:
        if not self.has_failed:
            return PATIENCE
        return 0 if sign.startswith(_ENDED) else PATIENCE_AFTER_A_FAILURE

    def _send(self, sign: str) -> None:
        data = f"{self.token} {self.rank} {sign}".encode()[:_MOST_BYTES]
        for rank, address in enumerate(self.addresses):
            if rank != self.rank:
                try:
                    self.channel.sendto(data, address)
                except OSError:  # no way there at the moment: the other one hears nothing, and says so
                    continue

    def _listen(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._ending:
            self.channel.settimeout(left)
            try:
                token, _, rest = self.channel.recv(_MOST_BYTES).decode(errors="replace").partition(" ")
            except TimeoutError:
                return
            except OSError:  # an earlier datagram could not be delivered
                continue
            number, _, sign = rest.partition(" ")
            if secrets.compare_digest(token.encode(), self.token.encode()) and number.isdecimal():
                state, _, sentence = sign.partition(" ")
                if state == _FAILED and not self._ending:
                    _exit(sentence)
                self._signs[int(number)], self._silent[int(number)] = sign, 0


def watch_over(rank: int, gather: Callable[[tuple[str, int, str]], list[tuple[str, int, str]]]) -> Watch:
    """Begin to watch; all processes call this.

    Args:
        rank: Number of this process.
        gather: Gives all processes what each of them has: its address, and a token, of which the first one's counts.
    """
    first, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", 1))
    family, *_, address = socket.getaddrinfo(first, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing, but tells by which of its addresses this machine is reached from there
        here = probe.getsockname()[0]
    channel = socket.socket(family, socket.SOCK_DGRAM)
    channel.bind((here, 0))
    members = gather((here, channel.getsockname()[1], secrets.token_hex(8)))
    watch = Watch(rank, [(host, number) for host, number, _ in members], members[0][2], channel)
    watch.start()
    return watch


def _exit(sentence: str) -> NoReturn:
    try:
        print(f"layersmith: {socket.gethostname()}: {sentence}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)
