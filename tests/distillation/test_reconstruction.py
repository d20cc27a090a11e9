"""The last projection of a pruned subblock, refitted: against least squares on activations that are collected here."""

import dataclasses
from pathlib import Path

import pytest
import torch

from layersmith.distillation.activations import run_parent_layer
from layersmith.distillation.layer_by_layer import TrainingSetup
from layersmith.distillation.local import distill_locally
from layersmith.distillation.reconstruction import RIDGE, watched
from layersmith.execution.hidden_states import States
from layersmith.execution.layerwise import split_layers
from layersmith.execution.parent import load_parent
from layersmith.library.build import build_library
from layersmith.library.library import Library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.recipe import LibraryRecipe, LocalDistillationRecipe
from layersmith.run.runtime import Runtime
from layersmith.scoring.library_scores import score_library
from layersmith.scoring.second_order import SeededBatch, estimate
from layersmith.scoring.silencing import Survey, look
from tests.conformance.tiny import tiny_config
from tests.conftest import stock_model

TOKENS = torch.randint(3, 99, (12, 32), generator=torch.Generator().manual_seed(4))
RECIPE = LibraryRecipe(ffn_fractions=(0.5,), head_fractions=(0.5,), expert_fractions=(0.5,))
ONLY_LEAST_SQUARES = LocalDistillationRecipe(tokens=0)


def library_of(model_type: str, folder: Path, recipe: LibraryRecipe = RECIPE) -> Library:
    torch.manual_seed(0)
    stock_model(tiny_config(model_type)).save_pretrained(folder)
    recipe = dataclasses.replace(recipe, keep_layers=(2, 3))
    parent = load_parent(folder, Runtime(torch.device("cpu"), torch.float32))
    return build_library(parent, recipe, survey(parent, recipe), Calibration(TOKENS, 4))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gptj"])
def test_it_is_least_squares(model_type: str, tmp_path: Path) -> None:
    """Of |W' b - W a|^2 and the ridge, over all tokens; a and b are what both modules are given."""
    library = library_of(model_type, tmp_path)
    made = distill_locally(library, TOKENS, TOKENS[:0], TrainingSetup(ONLY_LEAST_SQUARES))
    layerwise = split_layers(library.parent, library)
    batch = layerwise.start(TOKENS)
    hidden = layerwise.run(batch, 0, batch.embedded)
    stages = layerwise.split(1, batch, hidden)
    places, _ = run_parent_layer(layerwise, 1, stages, batch, hidden)
    kinds = set()
    for a in library.alternatives:
        if a.layer != 1 or not made.kept.of(a.identity):
            continue
        ((name, refitted),) = made.kept.of(a.identity).items()
        reader = library.reader(a)
        assert reader is not None
        _, dim = reader
        stage, module = getattr(stages, a.subblock), layerwise.module_of(a, stages)
        seen = []
        for part in (stage, module):
            with watched(part, name.removesuffix(".weight")) as pairs:
                layerwise.run(batch, 1, places[a.subblock].given, part)
            seen.append(pairs[0])
        y, b = seen[0][1].double(), seen[1][0].double()
        pruned = module.get_parameter(name).detach().movedim(dim, 1).double()
        strength = (RIDGE * b.square().mean() * len(b)).sqrt()
        left = torch.cat([b, strength * torch.eye(b.shape[1])])
        right = torch.cat([y - b @ pruned.T, torch.zeros(b.shape[1], len(pruned))])
        expected = pruned + torch.linalg.lstsq(left, right).solution.T
        off = b @ (refitted.movedim(dim, 1).double() - expected).T
        assert off.norm() < 1e-3 * (y - b @ pruned.T).norm(), a.key
        kinds.add((a.kind, a.method))
    assert "ffn_width" in {kind for kind, _ in kinds}
    of_heads = {("kv_heads", "pool"), ("kv_heads", "contribution"), ("head_groups", "contribution")}
    assert model_type != "llama" or of_heads <= kinds


@pytest.mark.parametrize("model_type", ["llama", "gptj", "mixtral", "bamba", "falcon_h1", "qwen2_moe"])
def test_it_helps_in_every_layout(model_type: str, tmp_path: Path) -> None:
    """On the rows that it was made from, and so that exact scores of what was refitted fall; the rest stays."""
    library = library_of(model_type, tmp_path)
    made = distill_locally(library, TOKENS, TOKENS[:0], TrainingSetup(ONLY_LEAST_SQUARES))
    refitted = {r["of"]: r["weights"] for r in made.kept.records if r["weights"]}
    assert refitted
    assert made.identity != library.identity
    layerwise = split_layers(library.parent, library)
    batch = layerwise.start(TOKENS)
    hidden = batch.embedded
    for i in range(2):
        places, output = run_parent_layer(layerwise, i, layerwise.split(i, batch, hidden), batch, hidden)
        for a in library.alternatives:
            if a.layer == i and a.key in refitted:
                errors = []
                for version in (library, made):
                    layerwise.builder = version
                    changed = layerwise.run(
                        batch, i, places[a.subblock].given, layerwise.module_of(a, layerwise.split(i, batch, hidden))
                    )
                    errors.append(float((changed - places[a.subblock].output).square().mean()))
                layerwise.builder = library
                assert errors[1] < errors[0], a.key
        hidden = output
    for a in library.alternatives:
        if a.key not in refitted:
            weights, other = library.weights(a), made.weights(a)
            assert all(torch.equal(weights[name], other[name]) for name in weights)
        else:
            assert made.silenced(a) is None


def test_second_order_scores_see_what_was_refitted(tmp_path: Path) -> None:
    from layersmith.recipe import ScoringRecipe

    library = library_of("llama", tmp_path)
    made = distill_locally(library, TOKENS, TOKENS[:0], TrainingSetup(ONLY_LEAST_SQUARES))
    recipe = ScoringRecipe(mode="second_order", samples=8, exact_passes=0)
    before, after = (
        {s.alternative.key: s.mean("kl_divergence") for s in score_library(version, TOKENS, recipe)}
        for version in (library, made)
    )
    exact = {
        s.alternative.key: s.mean("kl_divergence") for s in score_library(made, TOKENS, ScoringRecipe(mode="exact"))
    }
    kept = [r["of"] for r in made.kept.records if r["weights"]]
    assert sum(after[key] for key in kept) < sum(before[key] for key in kept)
    ratios = sorted(after[key] / exact[key] for key in kept)
    assert 0.5 < ratios[len(ratios) // 2] < 1.5


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gptj"])
def test_what_was_only_refitted_is_estimated_without_a_run_of_its_own(model_type: str, tmp_path: Path) -> None:
    made = distill_locally(library_of(model_type, tmp_path), TOKENS, TOKENS[:0], TrainingSetup(ONLY_LEAST_SQUARES))
    layerwise = split_layers(made.parent, made)
    alternatives = [a for a in made.alternatives if a.kind != "parent"]
    survey_ = look(layerwise, alternatives, TOKENS[:1])
    kinds = {(a.kind, a.method) for a in alternatives if a.identity in survey_.refitted}
    assert ("ffn_width", "contribution") in kinds or ("ffn_width", "iterative") in kinds
    assert not any(a.identity in survey_.silencing for a in alternatives if made.kept.of(a.identity))
    batches = [SeededBatch(TOKENS[:3], [[1, 2, 3], [4, 5, 6]]), SeededBatch(TOKENS[3:5], [[7, 8], [9, 10]])]
    short, run = (
        estimate(layerwise, alternatives, survey_, batches, States()) for survey_ in (survey_, Survey(survey_.size))
    )
    for estimates, other in zip(short, run, strict=True):
        for a in alternatives:
            assert estimates[a.identity].tolist() == pytest.approx(other[a.identity].tolist(), rel=2e-3, abs=1e-12), (
                a.key
            )
