"""Amounts of work of several kinds, and the estimate of the remaining time.

Operations of layers, operations of heads and reads from a disk have different units and speeds: even in operations, the
matrix products of a head are fast and its exponentials slow. So each kind is timed separately. Let n_k be the amount of
kind k that is left, t_k the time that the finished amount m_k took, and T the time since the start. Then

    time left = (T / sum_k t_k) sum_k n_k t_k / m_k.

The first factor accounts for the time between timed operations. An unfinished operation counts in neither T nor t_k;
the time that it has taken so far is subtracted. A kind without finished work has the rate of a similar kind. The first
few runs of a kind are not typical, so the similar rate keeps a weight: a small share of the whole amount of the kind.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from layersmith.library.alternative import Alternative
from layersmith.run import ranks

# Kind to similar kinds, all in operations; the first that has a rate is used.
ALIKE = {
    "changed attention": ("rest", "forward"),
    "changed ffn": ("rest", "forward"),
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

# Called with a kind of work and its amount.
Plan = Callable[[str, float], None]


def plan_all(plan: Plan, amounts: Mapping[str, float]) -> None:
    """Plan work of several kinds."""
    for kind, amount in amounts.items():
        plan(kind, amount)


def shared(plan: Plan) -> Plan:
    """Plans this process's share of work that is divided among all processes."""
    return lambda kind, amount: plan(kind, amount / ranks.count())


def share_of_layer(a: Alternative) -> float:
    """The approximate share of the work of its layer that an alternative takes."""
    return 0.5 if a.traits.runs_subblock else 0.0


@dataclass
class _Kind:
    left: float = 0.0
    done: float = 0.0
    seconds: float = 0.0
    before: float = 0.0


class Work:
    """Counts and times work by kind; the module's docstring has the formula.

    Kinds of work, and their units: ``look`` (alternatives), ``choose`` (once), ``reading`` (layers), ``whole`` (rows
    through the model), and in operations ``forward`` (the parent's layers), ``reference`` (its head and metrics),
    ``changed attention`` and ``changed ffn`` (a layer with an alternative), ``rest`` (the layers after it), ``head``,
    ``back`` and ``head back`` (gradients), and ``build`` (modules of alternatives), whose rate is 0 until the first.

    Args:
        clock: Returns seconds.

    Attributes:
        show: Called whenever some work was done.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._kinds = clock, defaultdict[str, _Kind](_Kind)
        self._started, self._inside = clock(), 0.0
        # The outermost operation that is running: kind, amount, start, and the seconds timed until then.
        self._open: tuple[str, float, float, float] | None = None
        self.show: Callable[[], None] = lambda: None

    def plan(self, kind: str, amount: float) -> None:
        """Add to the amount that is left."""
        self._kinds[kind].left += amount

    def forget(self) -> None:
        """Set the amounts that are left to 0."""
        for entry in self._kinds.values():
            entry.left = 0.0

    def done_before(self, kind: str, amount: float) -> None:
        """Count work of an earlier, interrupted run as done; it took no time of this run."""
        self._kinds[kind].before += amount

    @contextmanager
    def doing(self, kind: str, amount: float) -> Iterator[None]:
        """Time an amount of a kind while the context is open; nested work counts for its kind alone."""
        began, outside, outermost = self._clock(), self._inside, self._open is None
        if outermost:
            self._open = kind, amount, began, self._timed
        self._inside = 0.0
        yield
        entry, taken = self._kinds[kind], self._clock() - began
        entry.seconds += taken - self._inside
        self._inside = outside + taken
        entry.done += amount
        entry.left = max(0.0, entry.left - amount)
        if outermost:
            self._open = None
        self.show()

    @property
    def seconds_left(self) -> float | None:
        """The remaining seconds; None while the rate of some remaining kind is unknown."""
        left, now = self._seconds_of(lambda entry: entry.left), self._clock()
        if not left:
            return left
        if self._open is None:
            return left * (now - self._started) / self._timed
        kind, amount, began, timed = self._open
        so_far = min(now - began - (self._timed - timed), self.seconds_of(kind, amount) or 0.0)
        return max(0.0, left - so_far) * ((began - self._started) / timed if timed else 1.0)

    @property
    def _timed(self) -> float:
        return sum(entry.seconds for entry in self._kinds.values())

    def seconds_of(self, kind: str, amount: float) -> float | None:
        """Seconds that an amount of a kind takes; None while its rate is unknown."""
        rate = self._rate(kind)
        return None if rate is None else rate * amount

    @property
    def share(self) -> float | None:
        """The finished share of all work, by time; None while the rate of some kind is unknown."""
        left = self._seconds_of(lambda entry: entry.left)
        done = self._seconds_of(lambda entry: entry.done + entry.before)
        return None if left is None or not done else done / (done + left)

    def _seconds_of(self, amount: Callable[[_Kind], float]) -> float | None:
        total = 0.0
        for kind, entry in self._kinds.items():
            if amount(entry) > 0:
                rate = self._rate(kind)
                if rate is None:
                    return None
                total += rate * amount(entry)
        return total

    def _rate(self, kind: str) -> float | None:
        """Seconds per unit of a kind, shrunk towards the rate of a similar kind."""
        entry, rates = self._kinds[kind], (self._rate(other) for other in ALIKE.get(kind, ()) if other in self._kinds)
        alike = next((rate for rate in rates if rate is not None), None)
        if alike is None:
            return entry.seconds / entry.done if entry.done > 0 else 0.0 if kind == "build" else None
        weight = _SHARE_OF_ALIKE * (entry.left + entry.done + entry.before)
        return (entry.seconds + weight * alike) / (entry.done + weight) if entry.done + weight > 0 else None
