"""How alternatives work together, on a trained model."""

import argparse
import gzip
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from layersmith.data import load_tokenizer
from layersmith.demo.job import MODEL
from layersmith.library.library import Library, build_library, survey
from layersmith.parent import load_parent
from layersmith.progress import SILENT
from layersmith.recipe import LibraryRecipe, Recipe, ScoringRecipe
from layersmith.runtime import Runtime
from layersmith.scoring.library_scores import score_library
from layersmith.search.surrogate import Surrogate
from layersmith.search.whole import WholeModels, whole_models


@pytest.fixture(scope="module")
def models() -> WholeModels:
    parent = load_parent(MODEL, Runtime(torch.device("cpu"), torch.float32))
    text = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (random, argparse, gzip))
    rows = torch.tensor(load_tokenizer(MODEL)(text)["input_ids"])[: 16 * 128].view(16, 128)
    recipe = LibraryRecipe(ffn_fractions=(0.875, 0.75), kv_heads=(), query_heads=False, linear=(), no_op=())
    library = build_library(parent, recipe, survey(parent, recipe), rows, batch_sequences=8)
    return whole_models(library, rows, Recipe(), SILENT)


def children(library: Library, count: int) -> list[list]:
    rng = random.Random(0)
    places: dict = {}
    for a in library.alternatives:
        places.setdefault((a.layer, a.subblock), []).append(a)
    return [[rng.choice(own) for own in places.values()] for _ in range(count)]


def test_pairs_tell_what_a_child_loses(models: WholeModels) -> None:
    """The sum of scores is off; with cosines the child's loss is near, and a surrogate that knows them starts there."""
    library = models.library
    scores = score_library(library, models.tokens, ScoringRecipe(mode="exact"))
    losses = {s.alternative.key: s.mean("kl_divergence") for s in scores}
    known = models.together(library.alternatives, range(16), seed=1)
    assert known is not None
    norms = np.linalg.norm(known.directions, axis=1)
    assert norms == pytest.approx(np.ones(len(norms)), abs=1e-5)
    chosen = children(library, 24)
    sums = np.array([math.fsum(losses[a.key] for a in own) for own in chosen])
    pairs = known.of_pairs(losses, chosen)
    truth = np.array([np.mean([row["kl_divergence"] for row in own]) for own in models.run(chosen, range(16))])
    by_sum, by_form = np.abs(np.log(truth / sums)), np.abs(np.log(truth / (sums + pairs)))
    assert by_form.mean() < 0.6 * by_sum.mean(), (truth, sums, pairs)
    assert by_form.max() < 0.25, (truth, sums, pairs)
    # Pair by pair.
    one, other = (a for a in chosen[0] if a.kind != "parent" and a.layer in (0, 8) and a.subblock == "ffn")
    cosine = float(known.directions[known.place[one.key]] @ known.directions[known.place[other.key]])
    roots = math.sqrt(losses[one.key] * losses[other.key])
    assert known.of_pairs(losses, [[one, other]])[0] == pytest.approx(2 * cosine * roots, rel=1e-3, abs=1e-9)
    plain, informed = (Surrogate(losses, chosen[:1], truth[:1].tolist(), own) for own in (None, known))
    off = [np.abs(np.log(truth[1:] / own.predict(chosen[1:])[0])).mean() for own in (plain, informed)]
    assert off[1] < off[0], off
