"""A run that chooses number formats: what its child is, and what is refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import layersmith
from layersmith.costs.budget import Workload, parse_budget
from layersmith.errors import UnsupportedModel, UsageError
from layersmith.export.run import export
from layersmith.heterogeneous.quantized import read_gguf_blocks
from layersmith.library.formats import quantized_embeddings
from layersmith.quantization.formats import FORMATS
from layersmith.recipe import Recipe
from layersmith.run.artifacts import read_json
from layersmith.run.progress import SILENT
from layersmith.stages import automatic_formats as automatic_formats_module
from layersmith.stages.automatic_formats import automatic_formats, without_impossible
from layersmith.stages.distill_finished import distill
from layersmith.stages.inspect import outline
from layersmith.stages.job import formats_of, job_of_run
from layersmith.stages.realize import composed
from layersmith.stages.reopen import search
from tests.conftest import TINY_RECIPE

RECIPE: dict[str, Any] = TINY_RECIPE | {"local_distillation": {"tokens": 0, "coupled_tokens": 0}}


def made(parent: Path, text: Path, out: Path, formats: list[str], weights: str) -> layersmith.Result:
    recipe = RECIPE | {"formats": formats}
    return layersmith.compress(parent, out, data=text, budget={"weights": weights}, recipe=recipe, progress=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs next to each other share what does not depend on formats."""
    return tmp_path_factory.mktemp("formats")


def norms(folder: Path) -> dict[str, torch.Tensor]:
    stored = load_file(folder / "model.safetensors")
    return {name: weight for name, weight in stored.items() if name.endswith("layernorm.weight")}


def test_a_child_with_formats_of_gguf(
    make_parent: Callable[..., Path], text_folder: Path, runs: Path, tmp_path: Path
) -> None:
    parent = make_parent("llama", torch.bfloat16)
    result = made(parent, text_folder, runs / "gguf", ["q8_0", "q4_0"], "0.4")
    solution = result.solution
    assert solution.proven_optimal
    assert solution.costs["weight_bytes"] <= 0.4 * solution.parent_costs["weight_bytes"]
    assert solution.embeddings in ("q8_0", "q4_0")
    assert {a.format for a in solution.alternatives if not a.is_no_op} <= {"", "q8_0", "q4_0"}
    blocks = read_gguf_blocks(result.child)
    stored = load_file(result.child / "model.safetensors")
    of_file = sum(b.numel() for _, b in blocks.values())
    of_file += sum(t.numel() * t.element_size() for name, t in stored.items() if name not in blocks)
    assert of_file == solution.costs["weight_bytes"]
    child = layersmith.load(result.child)
    assert sum(p.numel() for p in child.parameters()) == solution.costs["parameters"]
    moment = load_file(result.run / "formats" / "head.safetensors")["moment"]
    for name, weight in quantized_embeddings(layersmith.load(parent), solution.embeddings, moment).items():
        assert torch.equal(stored[name].float(), weight.values())
    assert 0 < result.metric("kl_divergence")["child"] < 0.2
    assert "q4_0" in (result.child / "README.md").read_text()
    before = norms(parent)
    assert any(not torch.equal(norm, before[name]) for name, norm in norms(result.child).items())  # they hold scales
    assert export(result.child, tmp_path / "gguf", "gguf").proof.difference < 1e-3
    report = read_json(result.run / "report.json")
    kinds = {layer[s]["kind"] for layer in report["layers"] for s in ("attention", "ffn")}
    assert "quantized" in kinds

    (plain,) = search(result.run, {"weights": "0.8"}, formats=["bf16"], progress=False).solutions
    assert all(not a.format for a in plain.alternatives)
    (free,) = search(result.run, {"weights": "0.8"}, progress=False).solutions
    assert free.score < plain.score
    assert free.has_formats
    assert all(a.shape.is_parent for a in free.alternatives)  # quantization alone is best
    (less_cache,) = search(result.run, {"kv_cache": "0.5"}, progress=False).solutions
    assert not less_cache.has_formats  # no format makes the cache smaller
    assert any(not a.is_parent for a in less_cache.alternatives)
    on: Any = {"times_on": ("H100", None), "progress": False}
    (fast,), (pruned,) = (
        search(result.run, {"time_per_token": "0.6"}, formats=names, **on).solutions for names in (None, ["bf16"])
    )
    assert fast.costs["decode_seconds"] <= 0.6 * fast.parent_costs["decode_seconds"]
    assert fast.has_formats  # fewer bytes are read
    assert fast.score < pruned.score
    with pytest.raises(UsageError, match="their times cannot be measured here"):
        search(result.run, {"time_per_token": "0.6"}, progress=False)
    with pytest.raises(UsageError, match="no scores of q5_0, but of q4_0, q8_0"):
        search(result.run, {"weights": "0.8"}, formats=["q5_0"], progress=False)


def test_a_child_with_formats_of_compressed_tensors(
    make_parent: Callable[..., Path], text_folder: Path, runs: Path, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    parent = make_parent("llama", torch.bfloat16)
    result = made(parent, text_folder, runs / "tensors", ["int8", "int4-g32"], "0.5")
    stored = load_file(result.child / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in stored.values()) == result.solution.costs["weight_bytes"]
    assert result.solution.embeddings == ""
    child, before = layersmith.load(result.child), norms(parent)
    assert sum(p.numel() for p in child.parameters()) == result.solution.costs["parameters"]
    assert 0 < result.metric("kl_divergence")["child"] < 0.2
    assert any(not torch.equal(norm, before[name]) for name, norm in norms(result.child).items())  # they hold scales
    stock = AutoModelForCausalLM.from_pretrained(result.child, trust_remote_code=True, dtype=torch.bfloat16)
    ids = torch.arange(3, 35)[None]
    with torch.no_grad(), composed(job_of_run(result.run), result.solution, SILENT) as (rounded, _):
        for name, weight in rounded.state_dict().items():
            assert torch.equal(child.state_dict()[name], weight), name
        assert torch.equal(stock(input_ids=ids).logits, child(input_ids=ids).logits)
        assert torch.equal(rounded(input_ids=ids).logits, child(input_ids=ids).logits)
    assert export(result.child, tmp_path / "vllm", "vllm").proof.difference == 0

    quick = {"batch_tokens": 128, "device_tokens": 128, "learning_rate": 0.001, "tokens": 8192}
    learned = distill(result.run, recipe={"distillation": quick}, progress=False)
    before, after = ({r["metric"]: r["child"] for r in e["rows"]} for e in (learned.before, learned.after))
    assert before["kl_divergence"] == result.metric("kl_divergence")["child"]
    assert after["kl_divergence"] < before["kl_divergence"]
    again = load_file(learned.child / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in again.items()} == {n: (t.shape, t.dtype) for n, t in stored.items()}
    assert any(not torch.equal(t, stored[name]) for name, t in again.items() if name.endswith("weight_packed"))
    assert all(torch.equal(t, stored[name]) for name, t in again.items() if name.endswith("weight_scale"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formats": ["int5"]}, "unknown format 'int5'"),
        ({"formats": ["q8_0", "nvfp4"]}, "no file holds all of q8_0, nvfp4"),
        ({"formats": ["q8_0"], "scoring": {"objective": "lm_loss"}}, "kl_divergence only"),
        ({"formats": ["q8_0"], "distillation": {"tokens": 100, "finalists": 2}}, "finalists are trained without them"),
    ],
)
def test_what_cannot_be_asked_for(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        formats_of(Recipe.from_dict(change))


def test_bf16_alone_offers_no_format() -> None:
    assert formats_of(Recipe(formats=("bf16",))) == formats_of(Recipe()) == []
    assert formats_of(Recipe(formats=("bf16", "q8_0", "q8_0"))) == ["q8_0"]
    assert FORMATS["bf16"].storage == "plain"


@pytest.mark.parametrize(
    ("recipe", "budget", "formats"),
    [
        ({}, {"memory": "0.6"}, ["int8", "int4-g32"]),
        ({}, {"bits": "6"}, ["int8", "int4-g32"]),
        ({}, {"memory": "0.6", "params": "0.9"}, ["int8", "int4-g32"]),
        ({}, {"memory": "1GiB"}, []),  # the parent is smaller
        ({}, {"params": "0.6"}, []),
        ({}, {"kv_cache": "0.6"}, []),
        ({}, {"memory": "0.6", "ttft": "0.9"}, []),
        ({"formats": ["bf16"]}, {"memory": "0.6"}, []),
        ({"formats": ["q8_0"]}, {"memory": "0.6"}, ["q8_0"]),
        ({"scoring": {"objective": "lm_loss"}}, {"memory": "0.6"}, []),
        ({"rounds": {"count": 2}}, {"memory": "0.6"}, []),
    ],
)
def test_formats_that_are_offered_by_default(
    recipe: dict[str, Any], budget: dict[str, str], formats: list[str], make_parent: Callable[..., Path]
) -> None:
    pytest.importorskip("compressed_tensors")
    asked = Recipe.from_dict(recipe)
    parent = make_parent("llama", torch.bfloat16)
    limits = parse_budget(**budget).limits
    notes: list[str] = []
    chosen = automatic_formats(asked, limits, outline(parent, asked.library, Workload()), notes.append)
    assert formats_of(chosen) == formats
    assert dataclasses.replace(chosen, formats=asked.formats) == asked
    assert formats_of(Recipe.from_dict(chosen.to_dict())) == formats
    assert len(notes) <= 1
    assert bool(notes) == (
        asked.formats == ("auto",) and ("memory" in budget or "bits" in budget) and "GiB" not in str(budget)
    )


@pytest.mark.parametrize("formats", [("auto", "int8"), ("int8",)])
def test_formats_of_a_parent_that_does_not_run_layer_by_layer(
    formats: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*given: Any) -> None:
        raise UnsupportedModel("its layers pass on more than hidden states")

    monkeypatch.setattr(automatic_formats_module, "layerwise_of", refused)
    recipe, seen = Recipe(formats=formats), list[Any]()
    run, progress = SimpleNamespace(change_recipe=seen.append), SimpleNamespace(note=seen.append)
    job: Any = SimpleNamespace(
        recipe=recipe, formats=["int8"], made_from=lambda stage: None, parent=None, progress=progress, run=run
    )
    if "auto" not in formats:
        with pytest.raises(UnsupportedModel):
            without_impossible(job)
        return
    left = without_impossible(job)
    assert left.formats == ("auto",)
    assert seen == ["its layers pass on more than hidden states", left]


def test_bits_are_of_the_parents_parameters() -> None:
    limits = parse_budget(bits="4.5").limits
    assert limits.resolve({"parameters": 1000, "weight_bytes": 4000}) == {"weight_bytes": 562}
    assert type(limits).from_data(limits.to_data()) == limits
    assert str(limits) == "weights 4.5 bits a parameter of the parent"
    with pytest.raises(UsageError, match="limited twice"):
        parse_budget(bits="4.5", weights="0.5")
    for wrong in ("0", "4.5x", "100", "none"):
        with pytest.raises(UsageError, match="not a number of bits"):
            parse_budget(bits=wrong)
