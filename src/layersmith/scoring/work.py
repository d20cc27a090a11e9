"""Work of several kinds: how much is done, and how long what is left will take.

What a layer does, what a head does and what reading weights from a disk takes is counted in units that have nothing to
do with each other, and where all is counted in operations they take unlike times: the products of a head with a few
rows are fast, its exponentials slow. So each kind is timed by itself, and with n_k the amount of a kind that is left,
t_k the time that m_k of it took, and T the time since the beginning,

    time left = (T / sum_k t_k) sum_k n_k t_k / m_k.

The first factor is for what lies between the operations that are timed. An operation that is not at its end counts in
neither T nor t_k, and what it took so far is no longer left. A kind of which nothing was done yet takes the
rate of one that it is like; the first few runs of a kind are not typical, so that rate counts on, as much as a small
share of all there is of the kind.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from layersmith.library.alternative import Alternative

# Kinds to those whose rate they take, the first that has one; their amounts are in the same unit, operations.
ALIKE = {
    "own attention": ("rest", "forward"),
    "own ffn": ("rest", "forward"),
    "rest": ("forward",),
    "back": ("forward",),
    "head": ("head back", "reference"),
    "reference": ("head back", "forward"),
    "head back": ("forward",),
}
# Weight of the rate of a similar kind, as a share of the whole amount of a kind. The first few runs of a kind are not
# typical, so a low weight makes the remaining time jump early on; a high one keeps it wrong for long.
# benchmarks/time_left.py shows both.
_SHARE_OF_ALIKE = 0.03

# What is told a kind and an amount.
Plan = Callable[[str, float], None]


def plan_all(plan: Plan, amounts: Mapping[str, float]) -> None:
    """Tell of several kinds at once."""
    for kind, amount in amounts.items():
        plan(kind, amount)


def share_of_layer(a: Alternative) -> float:
    """About what a subblock takes of its layer with an alternative in its place."""
    return 0.5 if a.traits.runs_subblock else 0.0


@dataclass
class _Kind:
    left: float = 0.0
    done: float = 0.0
    seconds: float = 0.0
    before: float = 0.0


class Work:
    """See the module's docstring.

    Kinds of work, and their units: ``look`` (alternatives), ``choose`` (once), ``reading`` (layers), ``whole`` (rows
    through the model), and in operations ``forward`` (the parent's layers), ``reference`` (its head and what follows
    from that), ``own attention`` and ``own ffn`` (a layer with an alternative), ``rest`` (the layers after it),
    ``head``, ``back`` and ``head back`` (gradients), and ``build`` (modules with alternatives), which counts nothing
    until some were built.

    Args:
        clock: in seconds.

    Attributes:
        tell: called whenever some work is done.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._kinds = clock, defaultdict[str, _Kind](_Kind)
        self._started, self._inside = clock(), 0.0
        # What is being done, around all that is done within it: kind, amount, beginning, and what was timed by then.
        self._open: tuple[str, float, float, float] | None = None
        self.tell: Callable[[], None] = lambda: None

    def plan(self, kind: str, amount: float) -> None:
        """Add to what is to be done."""
        self._kinds[kind].left += amount

    def forget(self) -> None:
        """Nothing more is to be done, as far as is known."""
        for own in self._kinds.values():
            own.left = 0.0

    def done_before(self, kind: str, amount: float) -> None:
        """An interrupted run did this: it counts as done, and took no time of this one."""
        self._kinds[kind].before += amount

    @contextmanager
    def doing(self, kind: str, amount: float) -> Iterator[None]:
        """While open, so much of a kind is done; what is done of others meanwhile is theirs."""
        began, outside, outermost = self._clock(), self._inside, self._open is None
        if outermost:
            self._open = kind, amount, began, self._timed
        self._inside = 0.0
        yield
        own, taken = self._kinds[kind], self._clock() - began
        own.seconds += taken - self._inside
        self._inside = outside + taken
        own.done += amount
        own.left = max(0.0, own.left - amount)
        if outermost:
            self._open = None
        self.tell()

    @property
    def seconds_left(self) -> float | None:
        """Of the clock; None where nothing is known of some kind that is left."""
        left, now = self._seconds_of(lambda own: own.left), self._clock()
        if not left:
            return left
        if self._open is None:
            return left * (now - self._started) / self._timed
        kind, amount, began, timed = self._open
        so_far = min(now - began - (self._timed - timed), self.seconds_of(kind, amount) or 0.0)
        return max(0.0, left - so_far) * ((began - self._started) / timed if timed else 1.0)

    @property
    def _timed(self) -> float:
        return sum(own.seconds for own in self._kinds.values())

    def seconds_of(self, kind: str, amount: float) -> float | None:
        """What an amount of a kind takes; None where nothing is known of it."""
        rate = self._rate(kind)
        return None if rate is None else rate * amount

    @property
    def share(self) -> float | None:
        """Of all the work, what is done, as the times tell; None where nothing is known of some kind."""
        left = self._seconds_of(lambda own: own.left)
        done = self._seconds_of(lambda own: own.done + own.before)
        return None if left is None or not done else done / (done + left)

    def _seconds_of(self, amount: Callable[[_Kind], float]) -> float | None:
        total = 0.0
        for kind, own in self._kinds.items():
            if amount(own) > 0:
                rate = self._rate(kind)
                if rate is None:
                    return None
                total += rate * amount(own)
        return total

    def _rate(self, kind: str) -> float | None:
        """Seconds for an amount of 1."""
        own, rates = self._kinds[kind], (self._rate(other) for other in ALIKE.get(kind, ()) if other in self._kinds)
        alike = next((rate for rate in rates if rate is not None), None)
        if alike is None:
            return own.seconds / own.done if own.done > 0 else 0.0 if kind == "build" else None
        weight = _SHARE_OF_ALIKE * (own.left + own.done + own.before)
        return (own.seconds + weight * alike) / (own.done + weight) if own.done + weight > 0 else None
