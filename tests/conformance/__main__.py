"""Examine model families, each in a separate process, and write docs/families.md.

An interrupted run resumes: results are kept in ``runs/conformance.jsonl`` until the code or a version changes.

The exit status is 1 if a check that passes in docs/families.json fails now.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from layersmith.run.artifacts import file_digest, fingerprint
from tests.conformance import table
from tests.conformance.checks import Verdict, examine

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "runs" / "conformance.jsonl"
_MARK = "verdict: "


def main() -> int:
    options = _options()
    if options.one:
        print(_MARK + json.dumps(dataclasses.asdict(examine(options.one, with_hidden_size=True))))
        return 0
    if options.render:
        before, made_with = table.read()
        table.write_text(table.DOCS / "families.md", table.rendered(before, made_with))
        return 0
    unknown = [name for name in options.types if name not in table.ALL_TYPES]
    if unknown:
        print(f"No such model type: {', '.join(unknown)}", file=sys.stderr)
        return 2
    before, _ = table.read()
    types = options.types or table.ALL_TYPES
    # Named types are examined again; a run over all types resumes from earlier results.
    kept = {} if options.types or options.fresh else _kept()
    seconds = {v.model_type: v.seconds for v in before}
    verdicts = [kept[name] for name in types if name in kept]
    wanted = sorted((name for name in types if name not in kept), key=lambda name: -seconds.get(name, 0))
    if verdicts:
        print(f"{len(verdicts)} of {len(types)} were examined before.")
    try:
        for verdict in _examined(wanted, options.jobs, options.limit, keep=not options.types):
            verdicts.append(verdict)
    except KeyboardInterrupt:
        print("\nInterrupted. Repeat the command to resume.")
        return 130
    lines = table.worse(before, verdicts)
    if lines:
        print("\nWorse than docs/families.json:", *lines, sep="\n  ")
    if (not options.types or options.write) and (not lines or options.accept):
        seen = {verdict.model_type for verdict in verdicts}
        table.write([*verdicts, *(v for v in before if options.types and v.model_type not in seen)])
        print(f"Written: {table.DOCS / 'families.md'}")
    elif lines and (not options.types or options.write):
        print("docs/ is unchanged. Use --accept to write the new table.")
    return 1 if lines else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types to examine; default: all, and write docs/families.md")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    parser.add_argument("--limit", type=int, default=300, help="time limit per family in seconds")
    parser.add_argument("--fresh", action="store_true", help="do not resume an interrupted run")
    parser.add_argument(
        "--accept", action="store_true", help="write the table even if a check fails that passed before"
    )
    parser.add_argument("--write", action="store_true", help="write the rows of the named types into the table")
    parser.add_argument("--render", action="store_true", help="write docs/families.md again from docs/families.json")
    parser.add_argument("--one", metavar="TYPE", help=argparse.SUPPRESS)
    return parser.parse_args()


def _examined(types: Sequence[str], jobs: int, limit: int, keep: bool) -> Iterator[Verdict]:
    seen_with = _seen_with()
    begin = time.monotonic()
    pool = ThreadPoolExecutor(jobs)
    futures = [pool.submit(_in_a_process, name, limit) for name in types]
    try:
        for done, future in enumerate(as_completed(futures), 1):
            verdict = future.result()
            if keep:
                _keep(verdict, seen_with)
            left = (time.monotonic() - begin) / done * (len(types) - done)
            print(f"{done:4}/{len(types)}  {left / 60:4.0f} min left  {_said(verdict)}", flush=True)
            yield verdict
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _in_a_process(model_type: str, limit: int) -> Verdict:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.conformance", "--one", model_type]
    begin = time.monotonic()
    try:
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return Verdict(model_type, results={"describe": f"not done after {limit} s"}, seconds=float(limit))
    for line in ended.stdout.splitlines():
        if line.startswith(_MARK):
            return Verdict(**json.loads(line.removeprefix(_MARK)))
    last = (ended.stderr.strip().splitlines() or ["no output"])[-1]
    why = f"the process ended with {ended.returncode} ({last})"
    return Verdict(model_type, results={"describe": why}, seconds=round(time.monotonic() - begin, 1))


def _said(verdict: Verdict) -> str:
    name = f"{verdict.model_type} ({verdict.seconds:.0f} s)"
    if verdict.parent:
        return f"{name}: the unmodified parent does not run: {verdict.parent}"
    if verdict.refused:
        return f"{name}: refused: {verdict.refused}"
    not_ok = [f"{check}: {result}" for check, result in verdict.results.items() if result != "ok"]
    return f"{name}: {'; '.join(not_ok) or 'ok'}"


# ---------------------------------------------------------------------------------------------- resuming


def _seen_with() -> str:
    """A fingerprint of everything that a verdict depends on."""
    files = sorted([*(ROOT / "src").rglob("*.py"), *Path(__file__).parent.glob("*.py")])
    return fingerprint({"versions": table.versions(), "files": [file_digest(path) for path in files]})


def _kept() -> dict[str, Verdict]:
    if not KEPT.is_file():
        return {}
    lines = [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()]
    current = _seen_with()
    verdicts = [Verdict(**line["verdict"]) for line in lines if line["seen_with"] == current]
    return {verdict.model_type: verdict for verdict in verdicts}


def _keep(verdict: Verdict, seen_with: str) -> None:
    KEPT.parent.mkdir(exist_ok=True)
    line = json.dumps({"seen_with": seen_with, "verdict": dataclasses.asdict(verdict)})
    with KEPT.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
