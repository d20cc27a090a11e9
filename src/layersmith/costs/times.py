"""Time per subblock: measured here, read from a file, or predicted for another device.

The time to first token is that of the prompt's prefill; the time per token is that of one decode step. Both are for a
whole batch. A child takes the time outside the layers plus the sum over its subblocks:

    t(child) = fixed + sum over subblocks s of t(s)

If whole children were timed, they correct that sum (:mod:`layersmith.costs.curve`).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Len
from pydantic import NonNegativeFloat
from typing_extensions import TypedDict

from layersmith.costs.budget import Workload
from layersmith.costs.curve import Bend, Curve
from layersmith.costs.table import CostTable
from layersmith.errors import InputError
from layersmith.library.alternative import Alternative
from layersmith.records import check, parse
from layersmith.run.artifacts import read_json
from layersmith.untrusted import MAX_JSON_BYTES, read_bytes

# Costs that times add to the counted costs, in seconds.
PREFILL, DECODE, TOKEN = "prefill_seconds", "decode_seconds", "token_seconds"
TIMES = (PREFILL, DECODE, TOKEN)

# Name of the checks of the solution itself.
SOLUTION = "solution"

# Children with the same sum differ by the first share of the parent's time (root mean square), repeats of the solution
# by the second: a timed child says less about other children than about itself.
_OTHER_CHILD, _SAME_CHILD = 0.01, 0.003


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
        """The longer time of each phase."""
        return Timing(max(self.prefill, other.prefill), max(self.decode, other.decode))

    def scaled(self, prefill: float, decode: float) -> Timing:
        return Timing(self.prefill * prefill, self.decode * decode)


ZERO = Timing(0.0, 0.0)


@dataclass(frozen=True)
class Check:
    """A whole child, timed, and the sum of its parts.

    Attributes:
        what: Name of the child.
        fraction: Its parameters as a fraction of the parent's.
        parts: Sum of its parts, before any correction.
        whole: Time of the child.
        parent: Time of the parent in the same rounds.
        error: Standard error of the ratio of the two.
    """

    what: str
    fraction: float
    parts: Timing
    whole: Timing
    parent: Timing
    error: Timing = ZERO


class TimesData(TypedDict):
    """What ``times.json`` holds."""

    source: str
    device: str
    batch: int
    context: int
    generate: int | None
    fixed: dict[str, Any]
    parent: dict[str, Any]
    alternatives: dict[str, Annotated[list[NonNegativeFloat], Len(2, 2)]]
    checks: list[dict[str, Any]]


@dataclass(frozen=True)
class Times:
    """Times of all alternatives of a search space.

    Attributes:
        source: ``measured``, ``given`` or ``predicted``.
        device: Name of the device.
        workload: Workload of the times.
        by_key: Key of an alternative to its time, before any correction.
        fixed: Time outside the layers.
        checks: Whole children that were timed.
    """

    source: str
    device: str
    workload: Workload
    by_key: dict[str, Timing]
    fixed: Timing
    checks: tuple[Check, ...] = ()

    def whole(self, chosen: Iterable[str]) -> Timing:
        """The uncorrected sum of parts of a child, by the keys of its alternatives."""
        parts = [self.by_key[key] for key in chosen]
        return self.fixed + Timing(math.fsum(t.prefill for t in parts), math.fsum(t.decode for t in parts))

    def parent(self, alternatives: Sequence[Alternative]) -> Timing:
        return self.whole(a.key for a in alternatives if a.is_parent)

    def curves(self, alternatives: Sequence[Alternative]) -> dict[str, Curve]:
        """Corrections of prefill and decode from sums of parts to whole children, fitted to the checks."""
        parent = self.parent(alternatives)
        curves = {}
        for phase in ("prefill", "decode"):
            whole = getattr(parent, phase)
            seen = [
                (
                    getattr(check.parts, phase) / whole,
                    getattr(check.whole, phase) / getattr(check.parent, phase),
                    math.hypot(getattr(check.error, phase), _SAME_CHILD if check.what == SOLUTION else _OTHER_CHILD),
                )
                for check in self.checks
            ]
            curves[phase] = Curve.fitted(getattr(self.fixed, phase) / whole, seen)
        return curves

    def at_speed_of(self, check: Check, alternatives: Sequence[Alternative]) -> Times:
        """The same times scaled to the speed of the machine during a check, by the parent's time."""
        parent = self.parent(alternatives)
        ratio = (check.parent.prefill / parent.prefill, check.parent.decode / parent.decode)
        return dataclasses.replace(
            self,
            by_key={key: timing.scaled(*ratio) for key, timing in self.by_key.items()},
            fixed=self.fixed.scaled(*ratio),
            checks=tuple(dataclasses.replace(c, parts=c.parts.scaled(*ratio)) for c in self.checks),
        )

    def checked(self, *more: Check) -> Times:
        """The same times with more checks."""
        return dataclasses.replace(self, checks=(*self.checks, *more))

    def into(self, costs: CostTable, alternatives: Sequence[Alternative]) -> CostTable:
        """A cost table with these times, corrected by the checks.

        Embeddings and head in a format take as long as in the parent's data type.
        """
        known = ((key, timing) for key, timing in self.by_key.items() if key in costs.by_key)
        by_key = {key: costs.by_key[key] | self._costs(timing) for key, timing in known}
        outside = {name: of_format | self._costs(self.fixed) for name, of_format in costs.outside.items()}
        whole: Any = costs.parent | self._costs(self.parent(alternatives))
        bend = None
        if self.checks:
            curves = self.curves(alternatives)
            one = {PREFILL: self._costs(Timing(1, 0))[TOKEN], DECODE: self._costs(Timing(0, 1))[TOKEN]}
            bend = Bend({PREFILL: curves["prefill"], DECODE: curves["decode"]}, whole, {TOKEN: one})
        return CostTable(by_key, costs.fixed | self._costs(self.fixed), whole, bend, costs.workload, outside)

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
            "curves": {phase: dataclasses.asdict(curve) for phase, curve in self.curves(alternatives).items()},
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Times:
        """Raises: InputError, UsageError: not what :meth:`to_dict` gives."""
        check(data, TimesData, "times.json")
        workload = {name: data[name] for name in ("batch", "context", "generate")}
        return Times(
            source=data["source"],
            device=data["device"],
            workload=parse(Workload, workload, "times.json: "),
            by_key={key: Timing(*timing) for key, timing in data["alternatives"].items()},
            fixed=parse(Timing, data["fixed"], "times.json: fixed."),
            checks=tuple(parse(Check, entry, "times.json: checks.") for entry in data["checks"]),
        )


def kept_in(run: Path) -> dict[str, Any] | None:
    """The times of a run as they were known last, as data; None where its budget has no limit of time."""
    for stage in ("search", "costs"):
        if (path := run / stage / "times.json").is_file():
            record: dict[str, Any] = read_json(path, TimesData)
            return record
    return None


def costs_of(timing: Timing, workload: Workload) -> dict[str, float]:
    """Costs of a timing: time to first token, time per token, and the machine's time for each generated token."""
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
    """Times as a table that :func:`from_csv` reads.

    One row is for the time outside the layers. Each other row is one alternative in all layers where it takes the same.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_HEADER)
    writer.writerow(["", _FIXED, "", *(f"{1e3 * v:.6g}" for v in (times.fixed.prefill, times.fixed.decode))])
    rows: dict[tuple[str, str, Timing], list[int]] = {}
    for a in alternatives:
        rows.setdefault((a.subblock, a.name, times.by_key[a.key]), []).append(a.layer)
    for (subblock, name, timing), layers in rows.items():
        numbers = " ".join(map(str, layers))
        writer.writerow([numbers, subblock, name, f"{1e3 * timing.prefill:.6g}", f"{1e3 * timing.decode:.6g}"])
    return out.getvalue()


def from_csv(path: str | Path, alternatives: Sequence[Alternative], workload: Workload) -> Times:
    """Times from a file with the columns layers, subblock, alternative, prefill_ms, decode_ms.

    ``layers`` are numbers separated by spaces, or empty for all. One row with the subblock ``fixed`` has the time
    outside the layers.

    Raises:
        InputError: The file is missing or has other columns, a time is not a number, or an alternative has no time.
    """
    try:
        reader = csv.DictReader(io.StringIO(read_bytes(Path(path), MAX_JSON_BYTES).decode("utf-8-sig")))
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}).") from error
    missing = [name for name in _HEADER if name not in (reader.fieldnames or ())]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}. It needs {', '.join(_HEADER)}.")
    fixed: Timing | None = None
    given: dict[str, Timing] = {}
    for line, row in enumerate(rows, 2):
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
