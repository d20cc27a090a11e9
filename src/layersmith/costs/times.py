"""Time per subblock, whatever it comes from: measured here, given in a file, or predicted for a device elsewhere.

Time to first token is that of a prefill of the prompt; time per token that of one decode step while the rest of the
context is written; both for a whole batch. A child takes what is outside the layers and the sum over its subblocks:

    t(child) = fixed + sum over subblocks s of t(s)

Whole children that were timed bend that sum (:mod:`layersmith.costs.curve`).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layersmith.costs.counted import Workload
from layersmith.costs.curve import Bend, Curve
from layersmith.costs.table import CostTable
from layersmith.errors import InputError
from layersmith.library.alternative import Alternative
from layersmith.run.artifacts import read_json

# What a table of times adds to counted costs, in seconds.
PREFILL, DECODE, TOKEN = "prefill_seconds", "decode_seconds", "token_seconds"
TIMES = (PREFILL, DECODE, TOKEN)

# The name of checks of what the search chose.
SOLUTION = "solution"

# Children with the same sum differ by so much of the parent's time, root mean square; the solution is itself.
_UNLIKE, _ITSELF = 0.01, 0.003


@dataclass(frozen=True)
class Timing:
    """Seconds of one prefill and of one decode step, of a whole batch."""

    prefill: float
    decode: float

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.prefill + other.prefill, self.decode + other.decode)

    def __sub__(self, other: Timing) -> Timing:
        return Timing(self.prefill - other.prefill, self.decode - other.decode)

    def at_least(self, other: Timing) -> Timing:
        """The longer of each."""
        return Timing(max(self.prefill, other.prefill), max(self.decode, other.decode))

    def scaled(self, prefill: float, decode: float) -> Timing:
        return Timing(self.prefill * prefill, self.decode * decode)


ZERO = Timing(0.0, 0.0)


@dataclass(frozen=True)
class Check:
    """A whole child against the sum of its parts.

    Attributes:
        what: which child.
        fraction: its parameters, as a fraction of the parent's.
        parts: the sum, as it was before any correction.
        whole: what the child took; the parent, timed beside it, took ``parent``.
        error: standard errors of their ratio.
    """

    what: str
    fraction: float
    parts: Timing
    whole: Timing
    parent: Timing
    error: Timing = ZERO

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Check:
        names = ("parts", "whole", "parent", "error")
        return Check(data["what"], data["fraction"], *(Timing(**data[name]) for name in names))


@dataclass(frozen=True)
class Times:
    """Times of all alternatives of a search space.

    Attributes:
        source: ``measured``, ``given`` or ``predicted``.
        device: that they are of, in words.
        workload: that they are for.
        by_key: key of an alternative to its own, before any correction.
        fixed: outside the layers.
        checks: whole children that were timed.
    """

    source: str
    device: str
    workload: Workload
    by_key: dict[str, Timing]
    fixed: Timing
    checks: tuple[Check, ...] = ()

    def whole(self, chosen: Iterable[str]) -> Timing:
        """The sum of parts, not corrected, of the child of these alternatives (keys)."""
        own = [self.by_key[key] for key in chosen]
        return self.fixed + Timing(math.fsum(t.prefill for t in own), math.fsum(t.decode for t in own))

    def parent(self, alternatives: Sequence[Alternative]) -> Timing:
        return self.whole(a.key for a in alternatives if a.is_parent)

    def curves(self, alternatives: Sequence[Alternative]) -> dict[str, Curve]:
        """From sums of parts to whole children, of prefill and decode, as far as the checks tell."""
        parent = self.parent(alternatives)
        found = {}
        for phase in ("prefill", "decode"):
            whole = getattr(parent, phase)
            seen = [
                (
                    getattr(check.parts, phase) / whole,
                    getattr(check.whole, phase) / getattr(check.parent, phase),
                    math.hypot(getattr(check.error, phase), _ITSELF if check.what == SOLUTION else _UNLIKE),
                )
                for check in self.checks
            ]
            found[phase] = Curve.fitted(getattr(self.fixed, phase) / whole, seen)
        return found

    def at_speed_of(self, check: Check, alternatives: Sequence[Alternative]) -> Times:
        """The same on a machine that is as fast as when a check was made, told from the parent's time."""
        parent = self.parent(alternatives)
        ratio = (check.parent.prefill / parent.prefill, check.parent.decode / parent.decode)
        return dataclasses.replace(
            self,
            by_key={key: own.scaled(*ratio) for key, own in self.by_key.items()},
            fixed=self.fixed.scaled(*ratio),
            checks=tuple(dataclasses.replace(c, parts=c.parts.scaled(*ratio)) for c in self.checks),
        )

    def checked(self, *more: Check) -> Times:
        return dataclasses.replace(self, checks=(*self.checks, *more))

    def into(self, costs: CostTable, alternatives: Sequence[Alternative]) -> CostTable:
        """A cost table with these times, bent as the checks tell."""
        by_key = {a.key: costs.by_key[a.key] | self._costs(self.by_key[a.key]) for a in alternatives}
        whole: Any = costs.parent | self._costs(self.parent(alternatives))
        bend = None
        if self.checks:
            curves = self.curves(alternatives)
            one = {PREFILL: self._costs(Timing(1, 0))[TOKEN], DECODE: self._costs(Timing(0, 1))[TOKEN]}
            bend = Bend({PREFILL: curves["prefill"], DECODE: curves["decode"]}, whole, {TOKEN: one})
        return CostTable(by_key, costs.fixed | self._costs(self.fixed), whole, bend, costs.workload)

    def _costs(self, timing: Timing) -> dict[str, Any]:
        return costs_of(timing, self.workload)

    # ------------------------------------------------------------------------------------------ as data

    def to_dict(self, alternatives: Sequence[Alternative]) -> dict[str, Any]:
        return {
            "source": self.source,
            "device": self.device,
            "batch": self.workload.batch,
            "context": self.workload.context,
            "generate": self.workload.generate,
            "fixed": dataclasses.asdict(self.fixed),
            "parent": dataclasses.asdict(self.parent(alternatives)),
            "alternatives": {key: [t.prefill, t.decode] for key, t in self.by_key.items()},
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "curves": {phase: dataclasses.asdict(own) for phase, own in self.curves(alternatives).items()},
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Times:
        return Times(
            data["source"],
            data["device"],
            Workload(data["batch"], data["context"], data["generate"]),
            {key: Timing(*own) for key, own in data["alternatives"].items()},
            Timing(**data["fixed"]),
            tuple(Check.from_dict(check) for check in data["checks"]),
        )


def kept_in(run: Path) -> dict[str, Any] | None:
    """The times of a run as they were known last, as data; None where its budget has no limit of time."""
    for stage in ("search", "costs"):
        if (path := run / stage / "times.json").is_file():
            found: dict[str, Any] = read_json(path)
            return found
    return None


def costs_of(timing: Timing, workload: Workload) -> dict[str, float]:
    """Time costs of a timing: to first token, per token of a sequence, and of the machine for each token written."""
    written = workload.batch * workload.generated
    return {
        PREFILL: timing.prefill,
        DECODE: timing.decode,
        TOKEN: (timing.prefill + workload.generated * timing.decode) / written,
    }


# ---------------------------------------------------------------------------------------------- times from elsewhere

_HEADER = ("layers", "subblock", "alternative", "prefill_ms", "decode_ms")
_FIXED = "fixed"


def to_csv(times: Times, alternatives: Sequence[Alternative]) -> str:
    """Times as a table that :func:`from_csv` reads: a row for what is outside the layers, then one an alternative.

    Layers in which an alternative takes the same are in one row.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_HEADER)
    writer.writerow(["", _FIXED, "", *(f"{1e3 * v:.6g}" for v in (times.fixed.prefill, times.fixed.decode))])
    rows: dict[tuple[str, str, Timing], list[int]] = {}
    for a in alternatives:
        rows.setdefault((a.subblock, a.name, times.by_key[a.key]), []).append(a.layer)
    for (subblock, name, timing), layers in rows.items():
        own = " ".join(map(str, layers))
        writer.writerow([own, subblock, name, f"{1e3 * timing.prefill:.6g}", f"{1e3 * timing.decode:.6g}"])
    return out.getvalue()


def from_csv(path: str | Path, alternatives: Sequence[Alternative], workload: Workload) -> Times:
    """Times from a file with the columns layers, subblock, alternative, prefill_ms, decode_ms.

    ``layers`` are numbers with spaces between, or empty for all. One row with the subblock ``fixed`` says what is
    outside the layers.

    Raises:
        InputError: the file is missing or not such a table, a time is not a number, or an alternative has none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}).") from error
    reader = csv.DictReader(io.StringIO(text))
    missing = [name for name in _HEADER if name not in (reader.fieldnames or ())]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}. It needs {', '.join(_HEADER)}.")
    fixed: Timing | None = None
    given: dict[str, Timing] = {}
    for line, row in enumerate(reader, 2):
        timing = _timing(path, line, row)
        if row["subblock"] == _FIXED:
            fixed = timing
            continue
        try:
            layers = {int(number) for number in (row["layers"] or "").split()}
        except ValueError as error:
            raise InputError(f"{path}, line {line}: layers are numbers with spaces between.") from error
        for a in alternatives:
            if (a.subblock, a.name) == (row["subblock"], row["alternative"]) and (not layers or a.layer in layers):
                given[a.key] = timing
    if fixed is None:
        raise InputError(f"{path}: no row with the subblock 'fixed', which says what is outside the layers.")
    without = [a for a in alternatives if a.key not in given]
    if without:
        named = ", ".join(f"layer {a.layer} {a.subblock} {a.name}" for a in without[:3])
        raise InputError(f"{path}: no time for {named}{f' and {len(without) - 3} more' if len(without) > 3 else ''}.")
    return Times("given", Path(path).name, workload, {a.key: given[a.key] for a in alternatives}, fixed)


def _timing(path: str | Path, line: int, row: Mapping[str, Any]) -> Timing:
    values = []
    for name in ("prefill_ms", "decode_ms"):
        try:
            value = float(row[name])
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}, line {line}: {name} {row[name]!r} is not a number.") from error
        if not math.isfinite(value) or value < 0:
            raise InputError(f"{path}, line {line}: {name} {row[name]!r} is not a time.")
        values.append(value / 1e3)
    return Timing(*values)
