"""The remaining time of a whole run: the planned work of its stages, scaled by what the run has measured so far.

Let w_k be the work of stage k in operations, c_k the seconds that it takes besides, and t the seconds that the finished
work W took here. With the planned rate r as a prior that is worth a fiftieth of all work P, the rate is

    (W + P/50) / (t + P/(50 r)),

and stage k takes w_k / rate + c_k. Without a planned rate there is no prior, and no estimate before the first work. The
running stage is extrapolated from its share of finished steps once that is large enough to be relied on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

# Worth of the planned rate, as a share of the work of the run.
_PRIOR = 1 / 50
# The finished share of a stage from which its own speed is relied on.
_RELIABLE = 0.25

# Seconds of every stage at a rate in operations per second.
SecondsOf = Callable[[float], Mapping[str, float]]


@dataclass(frozen=True)
class Planned:
    """What the stages of a run are planned to take.

    Attributes:
        work: Operations of each stage, slow ones counted for more.
        seconds_of: Seconds of every stage at a rate.
        rate: Operations per second as measured before the run; None if they were not.
    """

    work: Mapping[str, float]
    seconds_of: SecondsOf
    rate: float | None = None


@dataclass
class Timeline:
    """Where a run is among its stages.

    A part of a stage may have a plan by its own name, such as the tasks of the evaluation.

    Attributes:
        stages: Names of the stages, in order.
        parts: Part => the stage that it belongs to, and the number of times that it is shown.
        planned: What they take; None until that is known.
        clock: Time in seconds.
    """

    stages: Sequence[str]
    parts: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    planned: Planned | None = None
    clock: Callable[[], float] = time.monotonic
    _stage: str = ""
    _began: dict[str, float] = field(default_factory=dict)
    _share: dict[str, float] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)
    _shown: dict[str, int] = field(default_factory=dict)
    _left_as_said: tuple[str, float, float] | None = None

    def enter(self, stage: str) -> None:
        """A stage begins."""
        self._stage = stage
        self._began[stage] = self.clock()

    def leave(self) -> None:
        """The current stage ends."""
        for name in (self._stage, *(part for part, (stage, _) in self.parts.items() if stage == self._stage)):
            if name in self._share:
                self._share[name] = 1.0
                self._seconds.setdefault(name, self.clock() - self._began[name])
        self._left_as_said = None

    @property
    def place(self) -> tuple[int, int]:
        """Number of the current stage, from 1, and of all."""
        return (self.stages.index(self._stage) + 1 if self._stage in self.stages else 0), len(self.stages)

    def begin(self, name: str) -> str:
        """Something begins to be shown; returns the name by which it is planned."""
        name = name if name in self.parts else self._stage
        if name != self._stage:
            self._shown[name] = self._shown.get(name, 0) + 1
            if name not in self._began:
                self._seconds.setdefault(self._stage, self.clock() - self._began[self._stage])
                self._began[name] = self.clock()
        return name

    def done(self, name: str, share: float, left: float | None) -> None:
        """A share of what is shown is done, and it says how long it will still take if it knows."""
        if name in self.parts:
            share = (self._shown[name] - 1 + share) / max(self._shown[name], self.parts[name][1])
            left = None
        self._share[name] = min(1.0, max(share, self._share.get(name, 0.0)))
        self._left_as_said = None if left is None else (name, self.clock(), left)

    def left(self) -> float | None:
        """Seconds that the run will still take; None while that is unknown."""
        rate = self._rate()
        if self.planned is None or rate is None:
            return None
        seconds = self.planned.seconds_of(rate)
        here = self.stages.index(self._stage) if self._stage in self.stages else 0
        current = {self._stage, *(part for part, (stage, _) in self.parts.items() if stage == self._stage)}
        later = {part for part, (stage, _) in self.parts.items() if stage in self.stages[here + 1 :]}
        later |= set(self.stages[here + 1 :])
        return sum(seconds.get(name, 0.0) for name in later) + sum(self._left_of(n, seconds) for n in current)

    def _left_of(self, name: str, seconds: Mapping[str, float]) -> float:
        if name in self._seconds or (name == self._stage and self._share.get(name) == 1.0):
            return 0.0
        planned, share = seconds.get(name, 0.0), self._share.get(name, 0.0)
        if name not in self._began:
            return planned
        taken = self.clock() - self._began[name]
        if self._left_as_said is not None and self._left_as_said[0] == name:
            return max(0.0, self._left_as_said[1] + self._left_as_said[2] - self.clock())
        trust = min(1.0, share / _RELIABLE)
        extrapolated = taken * (1 - share) / share if share else 0.0
        return trust * extrapolated + (1 - trust) * max(planned - taken, planned * (1 - share) / 2)

    def _rate(self) -> float | None:
        """Operations per second so far, with the planned rate as a prior."""
        if self.planned is None:
            return None
        done = taken = 0.0
        for name, share in self._share.items():
            work = self.planned.work.get(name, 0.0)
            if work and share:
                done += share * work
                taken += self._seconds.get(name, self.clock() - self._began[name])
        if self.planned.rate is None:
            return done / taken if taken > 0 and done else None
        prior = _PRIOR * sum(self.planned.work.values())
        return (done + prior) / (taken + prior / self.planned.rate)
