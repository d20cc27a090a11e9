"""The model card in a child's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import layersmith
from layersmith.costs.budget import parse_budget
from layersmith.pipeline import stages
from layersmith.report.card import Child, base_model, data_name, hub_name, license_of, model_card, table
from layersmith.run.artifacts import file_digest
from layersmith.run.folder import Run
from layersmith.run.header import read_header, write_header
from layersmith.stages.job import job_of_run
from layersmith.stages.library import LIBRARY
from layersmith.stages.refine import SOLUTION
from tests.conftest import TINY_RECIPE, search_again


def parts(folder: Path) -> tuple[dict[str, Any], str]:
    match = re.fullmatch(r"---\n(.*?)\n---\n(.*)", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1]), match[2]


def test_a_child_always_has_its_card(make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path) -> None:
    parent, run = make_parent("llama"), tmp_path / "run"
    # Times come after the child's card, and are in the finished card.
    recipe = TINY_RECIPE | {"costs": {"time_child": True, "seconds": 1.0}}
    for reached in stages(parent, run, text_folder, 0.9, recipe):
        if reached == "child":
            break
    front, text = parts(run / "child")
    assert "base_model" not in front  # a local parent has no name on the Hub
    assert front["library_name"] == "transformers"
    assert "layersmith" in front["tags"]
    assert "license" not in front
    assert "Not evaluated." in text
    assert "With Transformers alone, through the modelling file" in text

    result = layersmith.compress(parent, run, data=text_folder, budget=0.9, recipe=recipe)
    front, text = parts(result.child)
    loss = result.metric("loss")
    assert f"{loss['child']:.4f} ± {loss['child_standard_error']:.4f}" in text
    assert "Not evaluated." not in text
    assert "They are timed on" in text
    (results,) = front["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in results["metrics"]}["loss"] == pytest.approx(loss["child"], rel=1e-5)
    card = ModelCard.load(result.child / "README.md")  # as huggingface_hub reads it
    assert card.data.eval_results is not None
    assert {r.metric_type for r in card.data.eval_results} >= {"loss", "kl_divergence"}
    assert all(r.dataset_name and r.task_type == "text-generation" for r in card.data.eval_results)
    changed = [a for a in result.solution.alternatives if a.kind != "parent"]
    assert text.count("→") == len(changed) > 0
    assert str(tmp_path) not in text
    assert str(text_folder) not in text

    edited = (result.child / "README.md").read_text() + "\nEdited by hand.\n"
    (result.child / "README.md").write_text(edited)
    layersmith.compress(parent, run, data=text_folder, budget=0.9, recipe=recipe)
    assert (result.child / "README.md").read_text() == edited

    search_again(run, parse_budget(params="0.8"), out=tmp_path / "smaller")
    assert "Not evaluated." in parts(tmp_path / "smaller")[1]
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 2
    names: dict[str, Any] = {}
    exec(code[0].replace("path/to/this/folder", str(result.child)), names)
    assert sum(p.numel() for p in names["model"].parameters()) == result.solution.costs["parameters"]


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\ntext", {}, {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n", {"license": "mit"},
         {"license": "other", "license_name": "own", "license_link": "LICENSE"}),
        ("no front matter, license: mit", {}, {}),
        ("---\nlicense: [a\n---\n", {}, {}),
        ("---\n- license\n---\n", {"license": "mit"}, {"license": "mit"}),
        (None, {"license": None}, {}),
    ],
)  # fmt: skip
def test_only_a_licence_that_the_parent_names(
    card: str | None, config: dict[str, Any], expected: dict[str, str], tmp_path: Path
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_of(str(tmp_path), config) == expected


def test_names(tmp_path: Path) -> None:
    assert base_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert base_model(f"{tmp_path}/models--Qwen--Qwen3-0.6B/snapshots/abc123") == "Qwen/Qwen3-0.6B"
    assert base_model(str(tmp_path)) == tmp_path.name
    assert [hub_name(n) for n in ("gpt2", "a/b", str(tmp_path), "/gone", "./x/y")] == ["gpt2", "a/b", None, None, None]
    assert data_name("org/data") == "org/data"
    assert data_name(tmp_path / "texts") == "texts"
    assert license_of("no/such-model", {}) == license_of("../not a name", {}) == {}


def test_nothing_breaks_out_of_a_table() -> None:
    rows = table(["a", "b"], [["x|y\nz", "<b>*`"]]).splitlines()
    assert rows == ["| a | b |", "| --- | ---: |", r"| x\|y z | \<b\>\*\` |"]


def test_hostile_names_in_the_front_matter(make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path) -> None:
    parent = tmp_path / "a: [b] <script>alert(1)"
    parent.symlink_to(make_parent("llama"))
    result = layersmith.compress(parent, tmp_path / "run", data=text_folder, budget=1.0, recipe=TINY_RECIPE)
    front, text = parts(result.child)
    assert "base_model" not in front
    assert "<script>" not in text
    assert "Nothing was changed" in text
    page = result.report.read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page
    assert json.loads((result.run / "report.json").read_text())["parent"]["name"] == parent.name


def test_what_a_received_run_says_is_escaped_in_the_card(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    """Names, versions and the device come from files of the run."""
    hostile = "</td>|`x` <img src=x onerror=alert(1)> [a](javascript:alert(1)) {{ 7 * 7 }}\n# heading"
    result = layersmith.compress(
        make_parent("llama"), tmp_path / "run", data=text_folder, budget=0.9, recipe=TINY_RECIPE
    )
    header = read_header(result.run)
    header["versions"] = dict.fromkeys(header["versions"], hostile)
    data = result.run / "data" / "data.json"
    text = json.dumps(json.loads(data.read_text()) | {"source": hostile}).encode()
    data.unlink()  # the store has it too
    data.write_bytes(text)
    header["stages"]["data"]["files"]["data/data.json"] = {"size": len(text), "sha256": file_digest(data)}
    write_header(result.run, header)
    job = job_of_run(result.run)
    card = model_card(result.child, Child(Run(result.run), job.read(LIBRARY), job.read(SOLUTION), job.recipe))
    front, body = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    plain = re.sub(r"\\[\\`*_{}\[\]<>|#~$&]", "", body)
    assert not re.search(r"<img|<script|`x`|\[a\]\(|^# heading", plain, re.MULTILINE)
    assert body.count("\n# ") == 1
