"""The Python API: models and text in memory, callbacks, results that print, and the notebook."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import layersmith
from layersmith.errors import InputError, UsageError
from layersmith.run.progress import NotebookBars, progress_of, progress_on
from layersmith.tables import Table
from tests.conftest import TINY_RECIPE

ROOT = Path(__file__).parents[1]
RECIPE = TINY_RECIPE | {"local_distillation": {"tokens": 0, "coupled_tokens": 0}}


@pytest.mark.parametrize("name", layersmith.__all__)
def test_public_names_have_types_and_a_docstring(name: str) -> None:
    public = getattr(layersmith, name)
    assert public.__doc__, name
    if inspect.isfunction(public):
        signature = inspect.signature(public)
        assert signature.return_annotation is not inspect.Signature.empty, name
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}: {parameter}"
            if parameter.name not in ("self", "cls"):
                assert parameter.name in str(public.__doc__), f"{name}: {parameter.name} is not described"


def test_subpackages_do_not_hide_functions() -> None:
    from layersmith.report import data
    from layersmith.search import solution

    assert isinstance(solution, ModuleType)
    assert isinstance(data, ModuleType)
    assert inspect.isfunction(layersmith.search)
    assert inspect.isfunction(layersmith.report)


def test_models_and_text_in_memory(make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path) -> None:
    path = make_parent("llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    documents = [file.read_text(encoding="utf-8") for file in sorted(text_folder.iterdir())]
    events: list[layersmith.Event] = []

    def stop(event: layersmith.Event) -> None:
        events.append(event)
        if event.kind == "begin" and event.stage.startswith("scores"):
            raise KeyboardInterrupt

    given: dict[str, Any] = {"budget": 0.85, "recipe": RECIPE, "progress": False}
    texts = datasets.Dataset.from_dict({"text": documents})
    with pytest.raises(KeyboardInterrupt):
        layersmith.compress(model, tmp_path / "run", data=texts, callback=stop, **given)
    assert any(event.stage.startswith("statistics") for event in events if event.kind == "end")

    events.clear()
    result = layersmith.compress(model, tmp_path / "run", data=texts, callback=events.append, **given)
    assert not any(event.stage.startswith("statistics") for event in events)  # it is resumed
    steps = [event for event in events if event.kind == "step"]
    assert all(0 < event.done <= event.total * (1 + 1e-9) for event in steps)
    assert result.load(device_map="cpu").config.block_configs

    judged = layersmith.evaluate(
        result.load(attn_implementation="eager"), documents, parent=(model, tokenizer), sequences=4,
        sequence_length=32, progress=False,
    )  # fmt: skip
    assert judged.row("kl_divergence") is not None
    found = layersmith.search(tmp_path / "run", 0.8, progress=False)
    for shown in (result, result.solution, judged, found, layersmith.inspect(model)):
        assert len(repr(shown)) < 40_000
        assert shown._repr_html_().count("<table>") >= 1
    assert len(repr(result)) < 300
    assert len(repr(result.solution)) < 200
    assert layersmith.report(tmp_path / "run", progress=False).solution == result.solution


def test_what_is_no_model_or_text_is_refused(make_parent: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="a PreTrainedModel"):
        layersmith.inspect(3)  # type: ignore[arg-type]
    nameless = layersmith.load(make_parent("llama"))
    nameless.name_or_path = "nowhere/at-all"
    with pytest.raises(InputError, match="the pair"):
        layersmith.inspect(nameless)
    for data in (7, [], [3]):
        with pytest.raises(InputError, match="the data are"):
            layersmith.evaluate(make_parent("llama"), data, progress=False)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not both"):
        layersmith.load(make_parent("llama"), device="cpu", device_map="auto")


def test_html_is_escaped() -> None:
    table = Table("a <b>", ("<i>", "n"), [("<script>alert(1)</script>", "1")], is_numeric=True)
    assert "<script>" not in table.html()
    assert "&lt;script&gt;" in table.html()
    assert table.text().splitlines()[-1].endswith("1")


def test_bars_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    handle = SimpleNamespace(update=drawn.append)

    def display(html: str, display_id: bool = False) -> SimpleNamespace:
        drawn.append(html)
        return handle

    fake = ModuleType("IPython.display")
    fake.display, fake.HTML = display, str  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    monkeypatch.setattr("layersmith.run.progress._SECONDS_BETWEEN_DRAWINGS", -1.0)
    shown = progress_on(Console(force_jupyter=True))
    assert isinstance(shown, NotebookBars)
    with shown.stage("score", 4, "rows") as advance:
        advance(1)
        shown.note("<b>")
    assert "25% of 4 rows" in drawn[1]
    assert "&lt;b&gt;" in drawn[2]
    assert "score: done in" in drawn[-1]
    assert progress_of(False).__class__.__name__ == "Progress"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code cells of examples/compress.ipynb, one after another."""
    notebook = json.loads((ROOT / "examples" / "compress.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "compress.ipynb", "exec"), names)
    assert names["result"].solution.costs["parameters"] <= 0.7 * names["result"].solution.parent_costs["parameters"]
    assert isinstance(names["child"], torch.nn.Module)
