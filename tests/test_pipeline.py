"""The main job: identities of its result, interruption, and everything that can be wrong with its input."""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import layersmith
from layersmith.costs.budget import parse_budget
from layersmith.errors import Infeasible, InputError, LayersmithError, UsageError
from layersmith.pipeline import PREPARATION, STAGES, WORK, stages
from layersmith.recipe import Recipe
from layersmith.report.html import render
from layersmith.run.artifacts import read_json
from layersmith.scoring.metrics import METRICS
from layersmith.stages import HOLDS, NAMES
from layersmith.stages import data as data_stage
from layersmith.stages import describe as describe_stage
from layersmith.stages import job as job_module
from layersmith.stages import library as library_stage
from layersmith.stages import scores as scores_stage
from layersmith.stages import statistics as statistics_stage
from layersmith.stages.evaluate_model import evaluate
from layersmith.stages.hidden_size import NARROWED
from layersmith.stages.reopen import report
from tests.conftest import TINY_RECIPE, search_again


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but the log, which has times in it, and the report without what it takes from there."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("log.jsonl", ".lock", "report.html")
    }
    if "report.json" in files:
        report = json.loads(files["report.json"])
        made = [stage.name for stage in STAGES if (folder / stage.name).is_dir()]
        assert [t["stage"] for t in report["timings"]][-len(made) :] == made
        files["report.json"] = json.dumps(report | {"timings": []}).encode()
        files["report.html"] = render(report | {"timings": []}).encode()
    return files


@pytest.fixture(scope="session")
def finished(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> layersmith.Result:
    return layersmith.compress(
        make_parent("llama"), tmp_path_factory.mktemp("run") / "out", data=text_folder, budget=0.9, recipe=TINY_RECIPE
    )


def test_the_child_is_what_the_search_counted(finished: layersmith.Result) -> None:
    child = layersmith.load(finished.child)
    parameters = sum(p.numel() for p in child.parameters())
    assert parameters == finished.solution.costs["parameters"]
    assert parameters <= finished.solution.limits["parameters"] < finished.solution.parent_costs["parameters"]
    stored = load_file(finished.child / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in stored.values()) == finished.solution.costs["weight_bytes"]
    assert finished.metric("kl_divergence")["child"] > 0
    assert finished.metric("kl_divergence")["child_standard_error"] > 0
    assert str(finished).endswith(f"child: {finished.child}")


def test_the_run_folder_tells_everything(finished: layersmith.Result) -> None:
    names = {path.name for path in finished.run.iterdir() if not path.name.startswith(".")}
    assert names == {
        "recipe.yaml", "run.json", "describe", "data", "costs", "statistics", "library", "scores", "search", "frontier",
        "refine", "solution", "pairs", "child", "evaluation", "report.html", "report.json", "log.jsonl",
    }  # fmt: skip
    header = read_json(finished.run / "run.json")
    assert header["versions"]["torch"] == torch.__version__
    assert header["seed"] == 0
    assert Recipe.read(finished.run / "recipe.yaml") == Recipe.read(TINY_RECIPE)
    assert (finished.child / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama_tied", torch.bfloat16),
        ("mistral", torch.float32),
        ("qwen2", torch.float32),
        ("qwen2_windows", torch.bfloat16),
        ("qwen3", torch.bfloat16),
    ],
)
def test_every_family(
    family: str, dtype: torch.dtype, make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    parent = make_parent(family, dtype=dtype, shard="30KB", num_hidden_layers=3)
    result = layersmith.compress(
        parent,
        tmp_path / "run",
        data=text_folder,
        budget={"memory": "0.7", "batch": 2, "context": 64},
        recipe=TINY_RECIPE,
    )
    child = layersmith.load(result.child)
    assert child.dtype == dtype
    assert sum(p.numel() for p in child.parameters()) == result.solution.costs["parameters"]
    assert result.solution.costs["memory_bytes"] <= result.solution.limits["memory_bytes"]


def test_the_whole_budget_gives_the_parent(make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path) -> None:
    parent = make_parent("qwen3", dtype=torch.bfloat16)
    for objective in METRICS:
        recipe = TINY_RECIPE | {"scoring": {"objective": objective}}
        if (tmp_path / "run").exists():
            shutil.rmtree(tmp_path / "run")
        result = layersmith.compress(parent, tmp_path / "run", data=text_folder, budget="1.0", recipe=recipe)
        assert all(a.kind == "parent" for a in result.solution.alternatives)
        assert result.solution.score == 0
        before, after = load_file(parent / "model.safetensors"), load_file(result.child / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert result.metric("kl_divergence")["child"] == pytest.approx(0, abs=1e-7)


def test_a_finished_run_is_kept(finished: layersmith.Result, make_parent: Callable, text_folder: Path) -> None:
    before = contents(finished.run)
    again = layersmith.compress(make_parent("llama"), finished.run, data=text_folder, budget=0.9, recipe=TINY_RECIPE)
    assert contents(again.run) == before
    kept = [json.loads(line) for line in (finished.run / "log.jsonl").read_text().splitlines()][-8:]
    assert {record["event"] for record in kept} == {"kept"}


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the expensive work of a run is done."""
    calls: Counter[str] = Counter()
    for module, name in (
        (job_module, "load_parent"), (data_stage, "prepare"), (describe_stage, "survey"),
        (statistics_stage, "build_library"), (library_stage, "distill_locally"), (scores_stage, "score_library"),
    ):  # fmt: skip

        def count(*arguments: Any, _real: Any = getattr(module, name), _name: str = name, **more: Any) -> Any:
            calls[_name] += 1
            return _real(*arguments, **more)

        monkeypatch.setattr(module, name, count)
    return calls


def test_runs_next_to_each_other_share_their_work(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another budget nothing is scored again; with another local distillation no statistics are gathered."""
    parent, calls = make_parent("llama"), counted(monkeypatch)
    layersmith.compress(parent, tmp_path / "one", data=text_folder, budget=0.9, recipe=TINY_RECIPE)
    assert set(calls.values()) == {1}
    two = layersmith.compress(parent, tmp_path / "two", data=text_folder, budget=0.8, recipe=TINY_RECIPE)
    assert calls.pop("load_parent") == 2  # the child is evaluated against it
    assert set(calls.values()) == {1}
    other = TINY_RECIPE | {"local_distillation": {"tokens": 0, "reconstruct": False}}
    layersmith.compress(parent, tmp_path / "three", data=text_folder, budget=0.9, recipe=other)
    assert calls["build_library"] == calls["survey"] == calls["prepare"] == 1
    assert calls["distill_locally"] == calls["score_library"] == 2
    alone = layersmith.compress(
        parent, tmp_path / "elsewhere" / "two", data=text_folder, budget=0.8, recipe=TINY_RECIPE
    )
    assert contents(alone.run) == contents(two.run)


def test_a_finished_run_is_opened_without_work(
    finished: layersmith.Result, make_parent: Callable, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    again = layersmith.compress(make_parent("llama"), finished.run, data=text_folder, budget=0.9, recipe=TINY_RECIPE)
    assert not calls
    assert again.solution == finished.solution
    assert again.evaluation == finished.evaluation


@pytest.mark.parametrize("change", ["budget", "recipe", "data", "parent"])
def test_a_run_of_something_else_is_not_touched(
    change: str, finished: layersmith.Result, make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    before = contents(finished.run)
    given: dict[str, Any] = {"data": text_folder, "budget": 0.9, "recipe": TINY_RECIPE}
    parent = make_parent("llama")
    if change == "budget":
        given["budget"] = 0.85
    elif change == "recipe":
        given["recipe"] = TINY_RECIPE | {"library": {"ffn_fractions": [0.5]}}
    elif change == "data":
        shutil.copytree(text_folder, tmp_path / "other")
        (tmp_path / "other" / "more.txt").write_text("something else " * 200)
        given["data"] = tmp_path / "other"
    else:
        parent = make_parent("llama", rms_norm_eps=1e-5)
    with pytest.raises(InputError, match=f"another {change}"):
        layersmith.compress(parent, finished.run, **given)
    assert contents(finished.run) == before


def test_the_names_of_stages_are_those_that_run() -> None:
    # Narrow parents are made in a folder of their own, before the run.
    assert (NARROWED.name, *(stage.name for stage in STAGES)) == NAMES
    page = (Path(__file__).parents[1] / "docs" / "run-folder.md").read_text(encoding="utf-8")
    for name, holds in HOLDS.items():
        assert f"| `{name}` | {holds} |" in page


def test_stages_one_at_a_time(make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path) -> None:
    """Stopped after each stage and started again, it ends with the same bytes, wherever the data lies by then."""
    parent = make_parent("llama")
    whole = layersmith.compress(parent, tmp_path / "whole", data=text_folder, budget=0.9, recipe=TINY_RECIPE)
    for stage in (*PREPARATION, *WORK):
        for reached in stages(parent, tmp_path / "elsewhere" / "steps", text_folder, 0.9, TINY_RECIPE):
            if reached == stage.name:
                break
        # No other hidden size and no format is offered, and nothing is timed.
        is_wanted = stage.name not in ("hidden_size", "formats", "clock")
        assert (tmp_path / "elsewhere" / "steps" / stage.name).is_dir() == is_wanted
        assert not (tmp_path / "elsewhere" / "steps" / "report.html").exists()
    shutil.copytree(text_folder, tmp_path / "moved")
    out = tmp_path / "elsewhere" / "steps"
    again = layersmith.compress(parent, out, data=tmp_path / "moved", budget=0.9, recipe=TINY_RECIPE)
    assert contents(again.run) == contents(whole.run)


def test_a_run_finds_its_parent_from_another_folder(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(make_parent("llama"), tmp_path / "here" / "parent")
    monkeypatch.chdir(tmp_path / "here")
    for reached in stages("parent", "run", text_folder, 0.9, TINY_RECIPE):
        if reached == "scores":
            break
    monkeypatch.chdir(tmp_path)
    _, solution = search_again("here/run", parse_budget(params="0.8"))
    assert solution.costs["parameters"] <= solution.limits["parameters"]
    (tmp_path / "here").rename(tmp_path / "there")  # both moved: found as the command named it
    monkeypatch.chdir(tmp_path / "there")
    assert search_again("run", parse_budget(params="0.8"))[1].alternatives == solution.alternatives


def test_only_what_we_wrote_is_cleaned_up(
    finished: layersmith.Result, make_parent: Callable[..., Path], text_folder: Path
) -> None:
    (finished.run / ".git").mkdir()
    (finished.run / ".layersmith-child.abc123").mkdir()
    (finished.run / ".layersmith-run.json.xyz").write_text("half")
    layersmith.compress(make_parent("llama"), finished.run, data=text_folder, budget=0.9, recipe=TINY_RECIPE)
    assert (finished.run / ".git").is_dir()
    assert not (finished.run / ".layersmith-child.abc123").exists()
    assert not (finished.run / ".layersmith-run.json.xyz").exists()
    (finished.run / ".git").rmdir()


def test_another_budget_from_the_same_run(finished: layersmith.Result, tmp_path: Path) -> None:
    _, solution = search_again(finished.run, parse_budget(params="0.8"), out=tmp_path / "smaller")
    child = layersmith.load(tmp_path / "smaller")
    assert sum(p.numel() for p in child.parameters()) == solution.costs["parameters"] <= solution.limits["parameters"]
    _, again = search_again(finished.run, parse_budget(params="0.9"))
    assert again.alternatives == finished.solution.alternatives
    _, by_cache = search_again(finished.run, parse_budget(kv_cache="0.5", batch=3, context=77))
    assert by_cache.costs["kv_cache_bytes"] <= by_cache.parent_costs["kv_cache_bytes"] // 2
    with pytest.raises(Infeasible):
        search_again(finished.run, parse_budget(params="0.05"))
    with pytest.raises(InputError, match="already there"):
        search_again(finished.run, parse_budget(params="0.9"), out=tmp_path / "smaller")
    with pytest.raises(UsageError, match="Did you mean"):
        search_again(finished.run, parse_budget(params="0.9"), objective="kl_divergense")


def test_what_was_trained_together_is_used_again(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    """For the same budget comes the run's own child; for another, the layers that it has in common with that."""
    recipe = TINY_RECIPE | {
        "data": TINY_RECIPE["data"] | {"training_sequences": 100},
        "local_distillation": {"tokens": 0, "coupled_tokens": 3072, "batch_tokens": 64},
        "search": {"refine_passes": 0, "frontier_points": 2},
    }
    finished = layersmith.compress(make_parent("llama"), tmp_path / "run", data=text_folder, budget=0.7, recipe=recipe)
    library, same = search_again(finished.run, parse_budget(params="0.7"), out=tmp_path / "same")
    assert same.alternatives == finished.solution.alternatives
    child, again = (layersmith.load(folder).state_dict() for folder in (finished.child, tmp_path / "same"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in child.items())
    alone = library.compose(same.alternatives).state_dict()
    assert not all(torch.equal(tensor, child[name]) for name, tensor in alone.items())

    library, other = search_again(finished.run, parse_budget(params="0.68"), out=tmp_path / "other", refine=False)
    made, alone = layersmith.load(tmp_path / "other").state_dict(), library.compose(other.alternatives).state_dict()
    records = read_json(finished.run / "pairs" / "distilled.json")
    trained = {record["layer"] for record in records if record["weights"]}
    used = set()
    for i in range(len(library.parent.blocks)):
        ours, theirs = ([a for a in c.alternatives if a.layer == i] for c in (other, finished.solution))
        names = [name for name in made if name.startswith(f"{library.parent.descriptor.layer_block_name(i)}.")]
        if ours == theirs:
            assert all(torch.equal(made[name], child[name]) for name in names)
            used.add(i)
        else:
            assert all(torch.equal(made[name], alone[name]) for name in names)
    assert used & trained
    assert len(used) < len(library.parent.blocks)


def test_a_smaller_budget_never_scores_better(finished: layersmith.Result) -> None:
    scores = [search_again(finished.run, parse_budget(params=str(f)))[1].score for f in (1.0, 0.95, 0.9, 0.85, 0.8)]
    assert scores == sorted(scores)
    assert scores[0] == 0


def test_report_and_evaluation_of_a_run(
    finished: layersmith.Result, make_parent: Callable[..., Path], text_folder: Path
) -> None:
    before = (finished.run / "report.html").read_bytes()
    (finished.run / "report.html").unlink()
    assert report(finished.run).report.read_bytes() == before
    sizes = {"sequences": 4, "sequence_length": 32}
    row = evaluate(finished.child, text_folder, parent=make_parent("llama"), **sizes).row("kl_divergence")
    assert row is not None
    assert row.child == pytest.approx(finished.metric("kl_divergence")["child"], rel=1e-4)
    alone = evaluate(make_parent("llama"), text_folder, **sizes).row("kl_divergence")
    assert alone is not None
    assert alone.child == pytest.approx(0, abs=1e-7)


# ---------------------------------------------------------------------------------------------- what can be wrong


def broken_parent(harm: str, parent: Path, folder: Path) -> Path:
    shutil.copytree(parent, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if harm == "no weights":
        weights.unlink()
    elif harm == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif harm == "shapes disagree":
        config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 72'))
    elif harm == "layers disagree":
        config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 3'))
    elif harm == "no config":
        config.unlink()
    elif harm == "config is not JSON":
        config.write_text("{")
    elif harm == "unknown family":
        config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "lama"'))
    elif harm == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif harm == "nothing there":
        shutil.rmtree(folder)
    return folder


@pytest.mark.parametrize(
    "harm",
    [
        "no weights", "truncated weights", "shapes disagree", "layers disagree", "no config", "config is not JSON",
        "unknown family", "no tokenizer", "nothing there",
    ],
)  # fmt: skip
def test_broken_parents(harm: str, make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path) -> None:
    parent = broken_parent(harm, make_parent("llama"), tmp_path / "parent")
    with pytest.raises(LayersmithError) as refused:
        layersmith.compress(parent, tmp_path / "out", data=text_folder, budget=0.9, recipe=TINY_RECIPE)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_other_bad_input(make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path) -> None:
    parent, out = make_parent("llama"), tmp_path / "out"
    good: dict[str, Any] = {"data": text_folder, "budget": 0.9, "recipe": TINY_RECIPE}
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "recipe.yaml").write_text("data:\n  sequence_lenght: 32\n")
    (tmp_path / "broken.yaml").write_text("data: [")
    for change, match in (
        ({"data": tmp_path / "empty.txt"}, "no text in it"),
        ({"data": tmp_path / "missing.txt"}, "no such file"),
        ({"recipe": tmp_path / "recipe.yaml"}, "Did you mean 'sequence_length'"),
        ({"recipe": tmp_path / "broken.yaml"}, "not a YAML recipe"),
        ({"recipe": tmp_path / "missing.yaml"}, "no such recipe"),
        ({"recipe": {"scoring": {"objective": "beauty"}}}, "not one of"),
        ({"recipe": {"library": {"keep_layers": [9]}}}, "no layer 9"),
        ({"recipe": {"library": {"ffn_fractions": [1.5]}}}, "ffn_fractions"),
        ({"recipe": {"device": "abacus"}}, "abacus"),
        ({"recipe": {"seed": "one"}}, "seed"),
        ({"budget": "7 parsecs"}, "parsecs"),
        ({"budget": {"memory": "-3GiB"}}, "more than nothing"),
        ({"budget": 0.01}, "smallest child"),
    ):
        with pytest.raises(LayersmithError, match=match) as refused:
            layersmith.compress(parent, out, **good | change)
        assert "\n" not in str(refused.value)
        assert not out.exists()
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(InputError, match="not a run"):
        layersmith.compress(parent, out, **good)
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_recipes() -> None:
    recipe = Recipe()
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    changed = dataclasses.replace(recipe, seed=3)
    assert Recipe.read(changed) is changed
    assert Recipe.read({"seed": 3}) == changed


def test_two_processes_do_not_share_a_run(
    finished: layersmith.Result, make_parent: Callable[..., Path], text_folder: Path
) -> None:
    import fcntl

    with open(finished.run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process"):
            layersmith.compress(make_parent("llama"), finished.run, data=text_folder, budget=0.9, recipe=TINY_RECIPE)
