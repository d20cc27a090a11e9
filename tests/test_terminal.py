"""What commands print as their result."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from layersmith.report.data import Report
from layersmith.report.html import render
from layersmith.terminal import print_result
from tests.report.sample import full_report


def printed(report: Any, folder: Path) -> str:
    """What ``compress`` prints for a run with this report."""
    for row in report["evaluation"]["rows"]:
        row["child"] = 0.05 if math.isnan(row["child"]) else row["child"]  # a run writes finite numbers only
    (folder / "report.json").write_text(json.dumps(report))
    parsed = Report.from_json(report)
    metrics = {row["metric"]: row for row in report["evaluation"]["rows"]}
    row = {"parent": None, "child": 1.0, "difference": None, "child_standard_error": None, "label": "a metric"}
    times = set(parsed.times.child if parsed.times else ())
    costs = [{k: v for k, v in model.costs.items() if k not in times} for model in (parsed.parent, parsed.child)]
    result = SimpleNamespace(
        run=folder, child=folder / "child", report=folder / "report.html", evaluation=report["evaluation"],
        solution=SimpleNamespace(parent_costs=costs[0], costs=costs[1]),
        metric=lambda name: metrics.get(name, row),
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=120)
    print_result(console, result)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("busy", [False, True])
def test_no_speedup_is_claimed_when_the_machine_was_busy(busy: bool, tmp_path: Path) -> None:
    report = full_report()
    noise = {"error": {"prefill": 0.01, "decode": 0.01}, "spread": {"prefill": 0.6, "decode": 0.1}, "busy": busy}
    report["times"]["noise"] = {"parent": noise | {"busy": False}, "child": noise}
    text = printed(report, tmp_path)
    (line,) = [line for line in text.splitlines() if "time to first token" in line]
    assert ("busy" in line) == busy
    assert ("0.75x" in line) != busy
    page = render(report)
    assert ("busy" in text, "the machine was busy" in page) == (busy, busy)
