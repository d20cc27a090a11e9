"""Write ``docs/reliability.md`` from what the fault tests kept: ``python -m tests.faults.figures FILE [FUZZ]``.

``FUZZ`` is the file that ``test_fuzz.py`` writes when it runs for a given time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
HEAD = """# Reliability

Written by `make faults` on {date} at commit `{commit}`, on {cores} cores. The instruments are in `tests/faults/`.

- **Killed.** Every operation that changes a file or folder is counted. What is on the disk before it is copied, as
  `kill -9` would leave it; in some cases the process is really killed. The same command then has to end with the same
  bytes and nothing left over. Operations that leave the same state, but for temporary files that are removed unread,
  are tried once.
- **Damaged.** Each file of a finished run is changed in one bit, cut in half, emptied or deleted, and a command is
  called. The file has to be made again, or the command has to refuse and its advice has to work, or the file has to be
  kept as an edit. The answer of a command that does not read the file has to be the same.
- **Interrupted.** Ctrl-C, SIGTERM, a full disk or too little memory at an operation: the right exit code and one
  sentence, and the same command goes on to the same bytes.
- **Fuzzed.** Readers of files and of settings are given generated input, which they have to use or to refuse. A hang is
  more than 5 seconds of processor time.
"""


def tables(rows: list[list[str]]) -> str:
    """The cases by command and fault, operations by command, and tests by module."""
    outcomes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    tests: dict[str, Counter[str]] = defaultdict(Counter)
    operations: dict[str, tuple[str, str]] = {}
    for what, kind, place, outcome in rows:
        if what == "test":
            tests[kind][outcome] += 1
        elif kind == "operations":
            operations[what] = place, outcome
        else:
            outcomes[what, kind][outcome] += 1
    lines = ["| command | operations that change files | |", "|---|---|---|"]
    lines += [f"| {what} | {count} | {states} |" for what, (count, states) in operations.items()]
    lines += ["", "| command | fault | cases | outcomes |", "|---|---|---|---|"]
    for (what, kind), found in sorted(outcomes.items()):
        said = ", ".join(f"{outcome}: {count}" for outcome, count in found.most_common())
        lines.append(f"| {what} | {kind} | {found.total()} | {said} |")
    if tests:
        lines += ["", "| tests | passed | failed |", "|---|---|---|"]
        lines += [f"| `{module}` | {found['passed']} | {found['failed']} |" for module, found in sorted(tests.items())]
    return "\n".join(lines)


def fuzz_table(file: Path) -> str:
    """What fuzzing showed, by target."""
    lines = ["", "", "| fuzzed | inputs | used | refused | crashes | hangs | slowest | memory |", "|---|" + "---|" * 7]
    for target, f in json.loads(file.read_text(encoding="utf-8")).items():
        counts = " | ".join(f"{f[name]:,}" for name in ("executions", "accepted", "refused", "crashes", "hangs"))
        lines.append(f"| {target} | {counts} | {f['slowest_seconds']:.1f} s | {f['peak_mib']:.0f} MiB |")
    return "\n".join(lines)


def main(file: Path, fuzz: Path | None = None) -> None:
    """Write the page."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    head = HEAD.format(date=time.strftime("%Y-%m-%d"), commit=commit, cores=os.cpu_count())
    fuzzed = "" if fuzz is None or not fuzz.is_file() else fuzz_table(fuzz)
    PAGE.write_text(f"{head}\n{tables(rows)}{fuzzed}\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
