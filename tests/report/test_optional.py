"""What some runs have beside the rest is read from where it lies, and shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import layersmith
from layersmith.errors import InputError
from layersmith.report.optional import read_distillation, read_frontier
from layersmith.run.artifacts import write_json
from layersmith.run.folder import Run
from layersmith.stages.reopen import report as report_again
from tests.conftest import TINY_RECIPE
from tests.report.sample import frontier


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    assert read_frontier(tmp_path) is None
    assert read_distillation(tmp_path) is None
    (tmp_path / "frontier").mkdir()
    (tmp_path / "frontier" / "frontier.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_frontier(tmp_path)


def test_distillation(tmp_path: Path) -> None:
    points = [{"tokens": 0, "loss": 2.0, "kl": 1.0}, {"tokens": 512, "loss": 1.0, "kl": 0.5}]
    write_json(
        tmp_path / "distillation" / "global" / "log.json",
        {"name": "global", "x": "tokens", "points": points, "validation": points[1:]},
    )
    record: dict[str, Any] = {"of": "layer 0: ffn 32", "layer": 0, "subblock": "ffn", "after": 0.1, "tokens": 64}
    record |= {"identity": "a", "weights": None}
    record["curve"] = [[0, 0.2], [64, 0.1]]
    records = [record | {"before": 0.3}, record | {"before": 0.2, "pruned": 0.4}, record | {"before": 0.2, "tokens": 0},
               record | {"before": None, "after": None}]  # fmt: skip
    write_json(tmp_path / "library" / "distilled.json", records)
    distillation = read_distillation(tmp_path)
    assert distillation is not None
    assert [(c.name, len(c.points)) for c in distillation.curves] == [("global", 2), ("global, held out", 1)]
    assert [(r.before, r.after) for r in distillation.alternatives] == [(0.3, 0.1), (0.4, 0.1)]


def test_a_run_with_all_of_it(make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path) -> None:
    result = layersmith.compress(
        make_parent("llama"), tmp_path / "run", data=text_folder, budget=0.8, recipe=TINY_RECIPE
    )
    without = json.loads((result.run / "report.json").read_text())
    assert len(without["frontier"]["points"]) == TINY_RECIPE["search"]["frontier_points"]
    assert not without["distillation"]["curves"]
    trained = without["distillation"]["alternatives"]
    assert {r["subblock"] for r in trained} == {"attention", "ffn", "block"}
    assert all(r["curve"][0] == [0, r["curve"][0][1]] and len(r["curve"]) > 1 for r in trained)
    assert without["importance"]
    assert {t["stage"] for t in without["timings"]} >= {"describe", "library", "scores", "evaluation"}
    (checked,) = without["checks"]["sums"]
    assert checked["predicted"] == result.solution.score
    assert checked["measured"] == result.metric("kl_divergence")["child"]

    made = frontier()
    made["points"] = [p | {"solution": {"alternatives": []}} for p in made["points"]]
    write_json(result.run / "frontier" / "frontier.json", made)
    run = Run.existing(result.run)
    run.finished("frontier", "other inputs", run.record_of("frontier"))
    points = [{"tokens": 512 * i, "loss": 2.0 - i} for i in range(2)]
    write_json(result.run / "distillation" / "log.json", {"name": "global", "x": "tokens", "points": points})
    report_again(result.run)
    report = json.loads((result.run / "report.json").read_text())
    assert len(report["frontier"]["points"]) == len(made["points"])
    assert "solution" not in report["frontier"]["points"][0]
    measured = [p for s in (made, *made["baselines"]) for p in s["points"] if p["measured"]]
    assert len(report["checks"]["sums"]) == 1 + len(measured)
    page = result.report.read_text(encoding="utf-8")
    for part in ("Loss for every budget of parameters", "uniform narrowing", "Global distillation: training loss"):
        assert part in page
