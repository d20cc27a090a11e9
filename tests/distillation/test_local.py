"""Alternatives that learn to give what the parent's subblock gives."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layersmith.distillation import layer_by_layer, store
from layersmith.distillation.joint import distill_jointly
from layersmith.distillation.layer_by_layer import TrainingSetup
from layersmith.distillation.local import distill_locally
from layersmith.distillation.replacement import ReplacementTraining
from layersmith.errors import UsageError
from layersmith.execution.exchange import first_tensor
from layersmith.execution.parent import load_parent
from layersmith.library.alternative import Alternative
from layersmith.library.build import build_library
from layersmith.library.library import Library, read_library, write_library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.recipe import LibraryRecipe, LocalDistillationRecipe, Recipe
from layersmith.run.digests import read_sealed
from layersmith.run.runtime import Runtime
from tests.conformance.tiny import tiny_config
from tests.conftest import stock_model

TOKENS = torch.randint(3, 99, (34, 32), generator=torch.Generator().manual_seed(4))
CALIBRATION, TRAINING = TOKENS[:8], TOKENS[8:]
LIBRARY = LibraryRecipe(ffn_fractions=(0.5,), head_fractions=(0.5,), expert_fractions=(0.5,), kv_methods=("pool",))
RECIPE = LocalDistillationRecipe(tokens=32 * 24, batch_tokens=64, learning_rate=0.02, coupled_learning_rate=0.02)


def library_of(model_type: str, folder: Path, recipe: LibraryRecipe = LIBRARY) -> Library:
    torch.manual_seed(0)
    stock_model(tiny_config(model_type)).save_pretrained(folder)
    return open_library(folder, recipe)


def open_library(folder: Path, recipe: LibraryRecipe = LIBRARY) -> Library:
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    parent = load_parent(folder, Runtime(torch.device("cpu"), torch.float32, rank, world_size))
    return build_library(parent, recipe, survey(parent, recipe), Calibration(CALIBRATION, 4))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("model_type", ["llama", "gptj", "mixtral", "bamba", "falcon_h1", "gemma2"])
def test_what_learns_gets_nearer(model_type: str, tmp_path: Path) -> None:
    """In every layout: no alternative ends farther from the parent than it began, and some end nearer."""
    library = library_of(model_type, tmp_path, dataclasses.replace(LIBRARY, keep_layers=(0, 3)))
    before = {name: tensor.clone() for name, tensor in library.parent.model.state_dict().items()}
    made = distill_locally(
        library, CALIBRATION, TRAINING, TrainingSetup(dataclasses.replace(RECIPE, reconstruct=False))
    )
    after = library.parent.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    records = made.kept.records
    assert {r["of"] for r in records} == {a.key for a in library.alternatives if a.kind not in ("parent", "no_op")}
    assert all(r["after"] <= r["before"] == r["pruned"] for r in records)
    pruned = [r for r in records if r["kind"] != "linear"]  # linear maps begin at their best
    assert sum(r["after"] < r["before"] for r in pruned) > len(pruned) / 2
    assert all(r["curve"][0] == [0, r["before"]] and 0 < r["tokens"] <= 32 * 24 for r in records)
    # What is kept is what was measured: a child is made of it, and its parameters are those that costs count.
    best = next(r for r in records if r["after"] < r["before"] and r["kind"] in ("ffn_width", "experts", "kv_heads"))
    a = next(a for a in library.alternatives if a.key == best["of"])
    child = made.compose([a])
    assert sum(p.numel() for p in child.parameters()) == sum(p.numel() for p in library.compose([a]).parameters())
    assert not torch.equal(child(TOKENS[:2]).logits, library.compose([a])(TOKENS[:2]).logits)


def test_what_comes_of_it_is_written_and_read(tmp_path: Path) -> None:
    library = library_of("llama", tmp_path / "parent")
    made = distill_locally(library, CALIBRATION, TRAINING, TrainingSetup(RECIPE, folder=tmp_path / "work", inputs="a"))
    write_library(made, tmp_path / "library")
    again = read_library(tmp_path / "library", library.parent)
    in_memory = distill_locally(library, CALIBRATION, TRAINING, TrainingSetup(RECIPE))
    assert again.identity == made.identity == in_memory.identity != library.identity
    for a in library.alternatives:
        weights = again.weights(a)
        assert all(torch.equal(weights[name], w) for name, w in in_memory.weights(a).items())
    records = json.loads((tmp_path / "library" / "distilled.json").read_text())
    assert records == list(in_memory.kept.records)
    assert len(list((tmp_path / "library" / "layers").glob("layer-*.safetensors"))) == 4


class Stopped(Exception):
    pass


def in_pieces(work: Callable[[], Any], every: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int]:
    """The result of work that is stopped at every ``every``-th step and started again, and the number of stops."""
    step, calls, stops = ReplacementTraining.step, 0, 0

    def interrupted(*args: Any) -> None:
        nonlocal calls, stops
        calls += 1
        if calls % every == 0:
            stops += 1
            raise Stopped
        step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ReplacementTraining, "step", interrupted)
        while True:
            try:
                return work(), stops
            except Stopped:
                continue


def test_interrupted_at_any_step_it_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = library_of("llama", tmp_path / "parent", dataclasses.replace(LIBRARY, keep_layers=(0, 3)))
    given = {"inputs": "these"}
    distill_locally(library, CALIBRATION, TRAINING, TrainingSetup(RECIPE, folder=tmp_path / "whole", **given))
    monkeypatch.setattr(store, "_SAVE_EVERY_SECONDS", 0.0)
    pieces = tmp_path / "pieces"
    _, stops = in_pieces(
        lambda: distill_locally(library, CALIBRATION, TRAINING, TrainingSetup(RECIPE, folder=pieces, **given)),
        23,
        monkeypatch,
    )
    assert stops > 4
    assert contents(pieces) == contents(tmp_path / "whole")
    # Work of other inputs is not taken for this.
    other = distill_locally(library, CALIBRATION, TRAINING[:14], TrainingSetup(RECIPE, folder=pieces, inputs="others"))
    assert (
        other.kept.records[0]["tokens"]
        < read_sealed(tmp_path / "whole" / "layers" / "layer-001.json", dict)["records"][0]["tokens"]
    )


def test_groups_that_fit_in_memory_learn_the_same(tmp_path: Path) -> None:
    library = library_of("llama", tmp_path / "parent")
    small = dataclasses.replace(RECIPE, memory_gib=0.0015)
    whole = distill_locally(library, CALIBRATION, TRAINING, TrainingSetup(RECIPE))
    for work in (None, tmp_path / "work"):
        in_groups = distill_locally(library, CALIBRATION, TRAINING, TrainingSetup(small, folder=work))
        assert in_groups.identity == whole.identity
        assert in_groups.kept.records == whole.kept.records


@pytest.fixture
def taken_apart(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The parents that distillation takes apart."""
    seen: list[Any] = []
    split_layers = layer_by_layer.split_layers
    monkeypatch.setattr(layer_by_layer, "split_layers", lambda *args: seen.append(split_layers(*args)) or seen[-1])
    return seen


def test_arithmetic_is_what_is_needed_and_little_more(tmp_path: Path, taken_apart: list[Any]) -> None:
    """Needed: the parent's layers once on every token, and three times the products of each alternative that learns."""
    library = library_of("llama", tmp_path / "parent")
    recipe = dataclasses.replace(RECIPE, kinds=("ffn_width",), reconstruct=False, stop_below=0.0)
    made = distill_locally(library, CALIBRATION, TRAINING, TrainingSetup(recipe))
    trained = [r for r in made.kept.records if r["tokens"]]
    assert {r["kind"] for r in trained} == {"ffn_width"}
    arithmetic = taken_apart[0].arithmetic
    tokens = max(r["tokens"] for r in trained)
    config = library.parent.config
    ffn = 2 * 3 * config.hidden_size * config.intermediate_size
    expected = sum(r["tokens"] for r in trained) * 3 * ffn * 0.5
    layers = sum(p.numel() for layer in library.parent.layers for p in layer.parameters() if p.ndim == 2)
    forward = 2 * layers * tokens
    attention = 4 * 32 * config.num_attention_heads * config.head_dim * len(library.parent.blocks) * tokens
    assert arithmetic.needed == pytest.approx(expected + forward + attention, rel=0.02)
    assert arithmetic.done <= 1.3 * arithmetic.needed


def chosen_of(library: Library) -> list[Alternative]:
    """Both changed in layer 1, one and a no-op in 2, one alone in 0, one gone in 3."""

    def found(layer: int, kind: str) -> Alternative:
        return next(a for a in library.alternatives if (a.layer, a.kind) == (layer, kind))

    return [
        Alternative(0, "attention", "parent"), found(0, "ffn_width"), found(1, "head_groups"), found(1, "ffn_width"),
        Alternative(2, "attention", "no_op"), found(2, "ffn_width"), Alternative(3, "ffn", "no_op"),
    ]  # fmt: skip


@pytest.mark.parametrize("on", ["parent", "child"])
def test_what_is_chosen_for_a_layer_learns_together(on: str, tmp_path: Path) -> None:
    library = library_of("llama", tmp_path / "parent")
    chosen = chosen_of(library)
    made = distill_jointly(
        library, chosen, TRAINING[:0], TRAINING, TrainingSetup(dataclasses.replace(RECIPE, coupled_on=on))
    )
    assert [r["layer"] for r in made.pairs.records] == [0, 1, 2, 3]
    assert all(r["after"] < r["before"] for r in made.pairs.records)

    # Errors are what layers give to what they are given, on rows that are held out.
    held_out, parent = TRAINING[:1], library.parent.model
    with torch.no_grad():
        of_parent, of_child = (hidden_states(m, held_out) for m in (parent, made.compose(chosen)))
    for i, record in enumerate(made.pairs.records):
        given = of_child[i] if on == "child" else of_parent[i]
        gives = run_layer(made, [a for a in chosen if a.layer == i], i, held_out, given)
        error = (gives - of_parent[i + 1]).square().sum() / (of_parent[i + 1] - of_parent[i]).square().sum()
        assert record["after"] == pytest.approx(float(error), rel=1e-4)
    # What is the parent's own in a layer that is changed learns too.
    assert "self_attn.q_proj.weight" in made.pairs.of(made.pairs.records[3]["identity"])
    # One of the two by itself is what it was.
    alone = [a for a in chosen if a.layer == 1][:1]
    assert torch.equal(made.compose(alone)(TOKENS[:2]).logits, library.compose(alone)(TOKENS[:2]).logits)
    made.pairs.write(tmp_path / "pairs")
    assert type(made.pairs).read(tmp_path / "pairs").identity == made.pairs.identity


def hidden_states(model: Any, rows: torch.Tensor) -> list[torch.Tensor]:
    """What every layer is given, and what the last gives."""
    seen: list[torch.Tensor] = []
    layers = model.model.layers
    handles = [layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for layer in layers]
    handles.append(layers[-1].register_forward_hook(lambda module, args, output: seen.append(first_tensor(output))))
    model(rows)
    for handle in handles:
        handle.remove()
    return seen


def run_layer(
    library: Library, chosen: list[Alternative], i: int, rows: torch.Tensor, given: torch.Tensor
) -> torch.Tensor:
    """What a layer with alternatives gives, run by the model's own forward."""
    model = library.compose(chosen)
    handle = model.model.layers[i].register_forward_pre_hook(lambda module, args: (given, *args[1:]))
    with torch.no_grad():
        gives = hidden_states(model, rows)[i + 1]
    handle.remove()
    return gives


def test_pairs_interrupted_at_any_step_end_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = library_of("llama", tmp_path / "parent")
    chosen, given = chosen_of(library), {"inputs": "these"}
    distill_jointly(library, chosen, TRAINING[:0], TRAINING, TrainingSetup(RECIPE, folder=tmp_path / "whole", **given))
    monkeypatch.setattr(store, "_SAVE_EVERY_SECONDS", 0.0)
    pieces = tmp_path / "pieces"
    made, stops = in_pieces(
        lambda: distill_jointly(library, chosen, TRAINING[:0], TRAINING, TrainingSetup(RECIPE, folder=pieces, **given)),
        7,
        monkeypatch,
    )
    assert stops > 5
    assert contents(pieces) == contents(tmp_path / "whole")
    in_memory = distill_jointly(library, chosen, TRAINING[:0], TRAINING, TrainingSetup(RECIPE))
    assert in_memory.pairs.identity == made.pairs.identity


def test_arithmetic_of_pairs_is_what_is_needed(tmp_path: Path, taken_apart: list[Any]) -> None:
    """Needed: parent and child once on every token, and three times the products of the child's layers that learn."""
    library = library_of("llama", tmp_path / "parent")
    chosen = [a for a in library.alternatives if a.kind == "ffn_width" and a.layer in (1, 2)]
    made = distill_jointly(
        library, chosen, TRAINING[:0], TRAINING, TrainingSetup(dataclasses.replace(RECIPE, stop_below=0.0))
    )
    config = library.parent.config
    size = sum(p.numel() for p in library.parent.layers[0].parameters() if p.ndim == 2)
    size_of_child = size - 3 * config.hidden_size * config.intermediate_size // 2
    a, b = (r["tokens"] for r in made.pairs.records)
    whole, attention = 32 * 25, 4 * 32 * config.num_attention_heads * config.head_dim
    # Layer 1 of the child is run once more than it learns; layer 2, where it ends to matter, is not.
    expected = 4 * whole * (2 * size + attention) + (3 * (a + b) + whole) * 2 * size_of_child
    expected += (3.5 * (a + b) + whole) * attention
    arithmetic = taken_apart[0].arithmetic
    assert arithmetic.needed == pytest.approx(expected, rel=0.02)
    assert arithmetic.done <= 1.3 * arithmetic.needed


def test_a_parent_that_stays_on_the_disk_teaches_the_same(tmp_path: Path) -> None:
    library = library_of("llama", tmp_path)
    parent = load_parent(tmp_path, Runtime(torch.device("cpu"), torch.float32), stream_near=tmp_path)
    assert parent.stream is not None
    streamed = build_library(parent, LIBRARY, survey(parent, LIBRARY), Calibration(CALIBRATION, 4))
    learned = [distill_locally(pruned, CALIBRATION, TRAINING, TrainingSetup(RECIPE)) for pruned in (library, streamed)]
    assert learned[0].kept.identity == learned[1].kept.identity
    together = [
        distill_jointly(pruned, chosen_of(pruned), TRAINING[:0], TRAINING, TrainingSetup(RECIPE)).pairs.identity
        for pruned in learned
    ]
    assert together[0] == together[1] != ""


def test_a_parent_in_bfloat16_teaches_what_it_will_store(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock_model(tiny_config("llama")).to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        parent = load_parent(tmp_path, Runtime(torch.device("cpu"), dtype))
        library = build_library(parent, LIBRARY, survey(parent, LIBRARY), Calibration(CALIBRATION, 4))
        made = distill_locally(library, CALIBRATION, TRAINING, TrainingSetup(RECIPE))
        trained = [r for r in made.kept.records if r["after"] < r["before"]]
        assert len(trained) > len(made.kept.records) / 2
        assert {t.dtype for r in trained for t in made.kept.of(r["identity"]).values()} == {torch.bfloat16}


def test_recipes() -> None:
    for bad in (
        {"tokens": -1},
        {"learning_rate": 0.0},
        {"coupled_learning_rate": 0.0},
        {"memory_gib": 0.0},
        {"kinds": ["ffn_widht"]},
        {"coupled_on": "both"},
    ):
        with pytest.raises(UsageError, match="local_distillation"):
            Recipe.from_dict({"local_distillation": bad})


def block_errors(library: Library, chosen: list[Alternative], rows: torch.Tensor) -> list[float]:
    """Squared distance of the hidden states after every layer to the parent's."""
    with torch.no_grad():
        of_parent, of_child = (hidden_states(m, rows) for m in (library.parent.model, library.compose(chosen)))
    return [float((a - b).square().sum()) for a, b in zip(of_child[1:], of_parent[1:], strict=True)]


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_refit_on_the_childs_inputs_brings_every_layer_nearer_to_the_parents(family: str, tmp_path: Path) -> None:
    library = library_of(family, tmp_path)
    chosen = chosen_of(library)
    setup = TrainingSetup(dataclasses.replace(RECIPE, child_refit=1.0))
    made = distill_jointly(library, chosen, CALIBRATION, TRAINING[:0], setup)
    assert {r["layer"] for r in made.pairs.records if r["weights"]} == {0, 1, 2, 3}
    for i in range(4):
        # The layers before it are refitted; the layer itself is not, or is.
        before = library.with_kept(library.kept, kept_of(made.pairs, range(i)))
        after = library.with_kept(library.kept, kept_of(made.pairs, range(i + 1)))
        assert block_errors(after, chosen, CALIBRATION)[i] < block_errors(before, chosen, CALIBRATION)[i]


def kept_of(pairs: Any, layers: range) -> Any:
    """The jointly refitted weights of some layers."""
    return dataclasses.replace(pairs, records=tuple(r for r in pairs.records if r["layer"] in layers))


@pytest.mark.parametrize(("family", "share"), [("llama", 0.0), ("olmo2", 0.5)])
def test_without_a_share_or_behind_a_norm_nothing_is_refitted(family: str, share: float, tmp_path: Path) -> None:
    library = library_of(family, tmp_path)
    chosen = [a for a in library.alternatives if a.kind == "ffn_width" and a.layer in (1, 2)]
    setup = TrainingSetup(dataclasses.replace(RECIPE, child_refit=share))
    assert distill_jointly(library, chosen, CALIBRATION, TRAINING[:0], setup).pairs.identity == ""


def test_training_rows_that_are_left_serve_the_refit_as_calibration_rows_do(tmp_path: Path) -> None:
    library = library_of("llama", tmp_path)
    recipe = dataclasses.replace(RECIPE, coupled_tokens=0, child_refit_sequences=2)
    made = [
        distill_jointly(library, chosen_of(library), calibration, training, TrainingSetup(recipe)).pairs
        for calibration, training in (
            (CALIBRATION, TRAINING),
            (torch.cat([CALIBRATION, TRAINING[:2]]), TRAINING[:0]),
            (CALIBRATION, TRAINING[:0]),
        )
    ]
    weights = [[pairs.of(r["identity"]) for r in pairs.records] for pairs in made]
    names = [(i, name) for i, of_layer in enumerate(weights[0]) for name in of_layer]
    assert names
    assert all(torch.equal(weights[0][i][name], weights[1][i][name]) for i, name in names)
    assert not any(torch.equal(weights[0][i][name], weights[2][i][name]) for i, name in names)


def test_refitted_layers_resume_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = library_of("llama", tmp_path / "parent")
    chosen, given = chosen_of(library), {"inputs": "these"}
    recipe = dataclasses.replace(RECIPE, child_refit=0.5)
    whole = TrainingSetup(recipe, folder=tmp_path / "whole", **given)
    pieces = TrainingSetup(recipe, folder=tmp_path / "pieces", **given)
    distill_jointly(library, chosen, CALIBRATION, TRAINING, whole)
    monkeypatch.setattr(store, "_SAVE_EVERY_SECONDS", 0.0)
    _, stops = in_pieces(lambda: distill_jointly(library, chosen, CALIBRATION, TRAINING, pieces), 7, monkeypatch)
    assert stops > 5
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")
