"""Effects of exchanges on a child, compared with derivatives, with the sweep at the parent, and on a trained model."""

import argparse
import gzip
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from layersmith.data.splits import load_tokenizer
from layersmith.demo.job import MODEL
from layersmith.execution.hidden_states import States
from layersmith.execution.layerwise import LayerwiseParent, split_layers
from layersmith.execution.parent import load_parent
from layersmith.library.alternative import Alternative, no_op_of_other
from layersmith.library.build import build_library
from layersmith.library.library import Library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.recipe import LibraryRecipe, ScoringRecipe
from layersmith.run.progress import SILENT
from layersmith.run.runtime import Runtime
from layersmith.scoring.children import child_evaluator
from layersmith.scoring.exchanges import exchange_effects
from layersmith.scoring.second_order import SeededBatch, estimate
from layersmith.scoring.silencing import look

TOKENS = torch.randint(0, 512, (4, 24), generator=torch.Generator().manual_seed(4))
CPU = Runtime(torch.device("cpu"), torch.float32)


def library_of(path: Path, tokens: torch.Tensor, recipe: LibraryRecipe) -> Library:
    parent = load_parent(path, CPU)
    return build_library(parent, recipe, survey(parent, recipe), Calibration(tokens, 8))


def of_places(library: Library) -> dict[tuple[int, str], list[Alternative]]:
    places: dict[tuple[int, str], list[Alternative]] = {}
    for a in library.alternatives:
        places.setdefault((a.layer, a.subblock), []).append(a)
    return places


def test_around_the_parent_it_is_the_sweep(make_parent: Callable[..., Path], family: str) -> None:
    library = library_of(make_parent(family), TOKENS, LibraryRecipe(ffn_fractions=(0.5,)))
    layerwise = split_layers(library.parent, library)
    parent = [a for a in library.alternatives if a.kind == "parent"]
    others = [a for a in library.alternatives if a.kind != "parent"]
    batches = [TOKENS[:3], TOKENS[3:]]
    effects = exchange_effects(layerwise, parent, others, batches, 5, States())
    assert np.abs(effects.linear).max() < 1e-6  # the divergence is flat there
    seeds = [[[5 * 1_000_003 + row for row in rows]] for rows in (range(3), range(3, 4))]
    seeded = [SeededBatch(rows, of_batch) for rows, of_batch in zip(batches, seeds, strict=True)]
    survey_ = look(layerwise, others, TOKENS[:1])
    by_sweep = estimate(layerwise, others, survey_, seeded, States())
    for a in others:
        expected = float(torch.cat([of_batch[a.identity] for of_batch in by_sweep]).mean())
        k = effects.place[a.key]
        assert 0.5 * effects.mixed[k, k] == pytest.approx(expected, rel=2e-3, abs=1e-9)


@torch.no_grad()
def loss(
    layerwise: LayerwiseParent, child: dict[tuple[int, str], Alternative], mixed: Alternative, share: float
) -> float:
    """KL of a child in which a share of one stage's output is another alternative's."""
    batch = layerwise.start(TOKENS)
    hidden = batch.embedded
    for i in range(len(layerwise.layers)):
        for subblock in ("attention", "ffn"):
            chosen = child[i, subblock]
            made = layerwise.run(batch, i, hidden, layerwise.builder.layer(chosen, no_op_of_other(chosen)))
            if (i, subblock) == (mixed.layer, mixed.subblock):
                other = layerwise.run(batch, i, hidden, layerwise.builder.layer(mixed, no_op_of_other(mixed)))
                made = (1 - share) * made + share * other
            hidden = made
    q = layerwise.head(TOKENS, hidden)[0].double().log_softmax(-1)
    p = layerwise.head(TOKENS, layerwise.hidden_states(batch)[-1])[0].double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_slopes_are_derivatives(make_parent: Callable[..., Path]) -> None:
    library = library_of(make_parent("llama"), TOKENS, LibraryRecipe(ffn_fractions=(0.5,)))
    layerwise, rng = split_layers(library.parent, library), random.Random(3)
    child = {place: rng.choice(members) for place, members in of_places(library).items()}
    others = [a for a in library.alternatives if child[a.layer, a.subblock] != a]
    effects = exchange_effects(layerwise, list(child.values()), others, [TOKENS[:3], TOKENS[3:]], 0, States())
    assert set(effects.place) == {a.key for a in others}
    for a in rng.sample(others, 12):
        slope = (loss(layerwise, child, a, 0.01) - loss(layerwise, child, a, -0.01)) / 0.02
        assert effects.linear[effects.place[a.key]] == pytest.approx(slope, rel=0.03, abs=2e-5)


def test_exchanges_are_foretold() -> None:
    """On a trained model: what a child of two exchanges loses more or less, better than sums of scores say."""
    text = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in (random, argparse, gzip))
    rows = torch.tensor(load_tokenizer(MODEL)(text)["input_ids"])[: 16 * 128].view(16, 128)
    library = library_of(MODEL, rows, LibraryRecipe(kv_heads=(3,), linear=(), no_op=()))
    models, rng = child_evaluator(library, rows, ScoringRecipe(), SILENT), random.Random(0)
    assert models.layerwise is not None
    places = of_places(library)
    child = {
        p: next((a for a in members if a.size == 256), members[0]) if p[0] else members[0]
        for p, members in places.items()
    }
    near = {p: [a for a in members if a.size in (192, 320, 3)] for p, members in places.items() if p[0]}
    others = [a for members in near.values() for a in members]
    effects = models.exchange_effects(list(child.values()), others, range(16), 1)
    parent = [a for a in library.alternatives if a.kind == "parent"]
    at_parent = exchange_effects(models.layerwise, parent, library.alternatives[1:], [rows], 1, States())
    scores = {key: 0.5 * at_parent.mixed[k, k] for key, k in at_parent.place.items()}
    tried, foretold, by_scores = [], [], []
    for _ in range(24):
        changed = [rng.choice(near[place]) for place in rng.sample(list(near), 2)]
        tried.append(list({**child, **{(a.layer, a.subblock): a for a in changed}}.values()))
        foretold.append(effects.of(changed))
        by_scores.append(sum(scores[a.key] - scores[child[a.layer, a.subblock].key] for a in changed))
    before, *after = (np.mean([row["kl_divergence"] for row in rows]) for rows in
                      models.run([list(child.values()), *tried], range(16)))  # fmt: skip
    truth = np.array(after) - before
    off = [np.abs(np.array(predicted) - truth).mean() / np.abs(truth).mean() for predicted in (foretold, by_scores)]
    assert off[0] < 0.2, off
    assert off[0] < 0.7 * off[1], off
    one, other = changed
    assert effects.given(())[effects.place[one.key]] == pytest.approx(effects.of([one]))
    assert effects.given([other])[effects.place[one.key]] == pytest.approx(effects.of(changed) - effects.of([other]))
