import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from layersmith.costs.budget import Workload, parse_budget
from layersmith.demo.job import MODEL
from layersmith.execution.hidden_states import States
from layersmith.execution.layerwise import LayerwiseParent, split_layers
from layersmith.execution.parent import load_parent
from layersmith.library.alternative import Alternative
from layersmith.library.build import build_library
from layersmith.library.library import Library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.recipe import LibraryRecipe, ScoringRecipe
from layersmith.run.journal import Recording
from layersmith.run.progress import Progress
from layersmith.run.runtime import Runtime
from layersmith.scoring import estimated
from layersmith.scoring.correction import Prior, RunLimits, choose_runs, correct, prior
from layersmith.scoring.library_scores import score_library
from layersmith.scoring.regret import Axis
from layersmith.scoring.second_order import SeededBatch, _signs, estimate
from layersmith.scoring.silencing import look
from layersmith.scoring.task import row_order
from layersmith.search.frontier import axes_of
from layersmith.stages.costs import cost_table
from tests.conformance.tiny import tiny_config
from tests.conftest import stock_model

TOKENS = torch.randint(0, 512, (6, 24), generator=torch.Generator().manual_seed(4))


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def library_of(path: Path, recipe: LibraryRecipe, tokens: torch.Tensor = TOKENS) -> Library:
    parent = load_parent(path, Runtime(torch.device("cpu"), torch.float32))
    return build_library(parent, recipe, survey(parent, recipe), Calibration(tokens, 3))


def of_stages(library: Library, tokens: torch.Tensor = TOKENS) -> LayerwiseParent:
    return split_layers(library.parent, library)


def test_an_estimate_is_its_formula(make_parent: Callable[..., Path], family: str) -> None:
    """Against Jacobians and the Fisher information written out, for the signs that are drawn."""
    library = library_of(make_parent(family), LibraryRecipe(ffn_fractions=(0.5,)))
    layerwise = of_stages(library)
    rows = TOKENS[:1, :6]
    alternatives = [a for a in library.alternatives if a.kind != "parent" and a.layer in (1, 3)]
    surveyed = look(layerwise, alternatives, rows)
    (estimates,) = estimate(layerwise, alternatives, surveyed, [SeededBatch(rows, [[7]])], States())
    batch = layerwise.start(rows)
    hidden = [batch.embedded]
    for i in range(4):
        hidden.append(layerwise.run(batch, i, hidden[-1]))
    p = layerwise.head(rows, hidden[-1])[0][0].softmax(-1)
    signed = p.sqrt() * _signs([torch.Generator().manual_seed(7)], 6, p.shape[-1], p.device)[0]
    v = signed - p * signed.sum(-1, keepdim=True)
    for a in alternatives:
        stages = layerwise.split(a.layer, batch, hidden[a.layer])
        x = hidden[a.layer]
        if a.subblock == "ffn":
            x = layerwise.run(batch, a.layer, x, stages.attention)
        after = layerwise.run(batch, a.layer, x, getattr(stages, a.subblock))
        change = layerwise.run(batch, a.layer, x, layerwise.module_of(a, stages)) - after

        def logits(y: torch.Tensor, a=a, stages=stages) -> torch.Tensor:
            if a.subblock == "attention":
                y = layerwise.run(batch, a.layer, y, stages.ffn)
            for j in range(a.layer + 1, 4):
                y = layerwise.run(batch, j, y)
            return layerwise.head(rows, y)[0]

        y = after.detach().requires_grad_()
        (g,) = torch.autograd.grad((logits(y)[0] * v).sum(), y)
        expected = 0.5 * (g * change).sum(-1).square().mean()
        assert float(estimates[a.identity]) == pytest.approx(float(expected), rel=1e-3, abs=1e-9), a.key
    assert any(a.identity in surveyed.silencing for a in alternatives)


def test_signs_have_the_fisher_information_as_their_second_moment() -> None:
    p = torch.tensor([0.6, 0.3, 0.1, 0.0])
    generators = [torch.Generator().manual_seed(row) for row in range(4)]
    signs = _signs(generators, 20_000, 4, p.device).flatten(0, 1)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    signed = p.sqrt() * signs
    v = signed - p * signed.sum(-1, keepdim=True)
    fisher = p.diag() - torch.outer(p, p)
    assert torch.allclose(v.T @ v / len(v), fisher, atol=0.01)


@pytest.mark.parametrize("model_type", ["gptj", "gemma2", "falcon", "mixtral", "olmo2", "granite", "gpt2", "qwen2_moe"])
def test_small_changes_are_estimated_right_in_every_layout(model_type: str, tmp_path: Path) -> None:
    """Sequential, parallel, with norms after subblocks, experts: the ratio to the exact KL is one for small changes."""
    torch.manual_seed(0)
    stock_model(tiny_config(model_type)).save_pretrained(tmp_path)
    vocab_size = min(500, load_parent(tmp_path, Runtime(torch.device("cpu"), torch.float32)).language_config.vocab_size)
    tokens = torch.randint(3, vocab_size, (4, 40), generator=torch.Generator().manual_seed(1))
    library = library_of(tmp_path, LibraryRecipe(ffn_fractions=(0.75, 0.5)), tokens)
    exact = score_library(library, tokens, ScoringRecipe(mode="exact", batch_tokens=80))
    layerwise = of_stages(library, tokens)
    alternatives = [a for a in library.alternatives if a.kind != "parent"]
    surveyed = look(layerwise, alternatives, tokens)
    seeds = [[100 * k + row for row in range(len(tokens))] for k in range(8)]
    (estimates,) = estimate(layerwise, alternatives, surveyed, [SeededBatch(tokens, seeds)], States())
    assert {tuple(values.shape) for values in estimates.values()} == {(len(tokens),)}
    ratios = []
    for s in exact:
        if (
            s.alternative.kind != "parent"
            and s.mean("kl_divergence") > 1e-7
            and surveyed.size[s.alternative.identity] < 0.1
        ):
            ratios.append(float(estimates[s.alternative.identity].mean()) / s.mean("kl_divergence"))
    if ratios:
        assert 0.5 < float(torch.tensor(ratios).median()) < 2.0, ratios
    identities = [a.identity for a in alternatives]
    by_identity = {s.alternative.identity: s.mean("kl_divergence") for s in exact}
    ranks = spearmanr([float(estimates[i].mean()) for i in identities], [by_identity[i] for i in identities])
    assert ranks[0] > 0.8


@pytest.fixture(scope="module")
def trained() -> tuple[Library, torch.Tensor]:
    """The model that is shipped, on text of this Python's library."""
    import argparse
    import textwrap

    from layersmith.data.splits import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    text = Path(str(argparse.__file__)).read_text() + Path(str(textwrap.__file__)).read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"])[: 16 * 128].view(16, 128)
    return library_of(MODEL, LibraryRecipe(ffn_fractions=(0.75, 0.5, 0.25)), ids[8:]), ids[:8]


@pytest.fixture(scope="module")
def truth(trained: tuple[Library, torch.Tensor]) -> dict[str, float]:
    library, tokens = trained
    scores = score_library(library, tokens, ScoringRecipe(mode="exact"))
    return {s.alternative.key: s.mean("kl_divergence") for s in scores}


def test_scores_of_a_trained_model(trained: tuple[Library, torch.Tensor], truth: dict[str, float]) -> None:
    """Near the exact ones in rank and value, nearer than without exact runs, and as far off as they say."""
    library, tokens = trained
    off, scores = [], []
    for passes in (0.0, 3.0):
        recipe = ScoringRecipe(mode="second_order", exact_passes=passes, precision=0)
        estimates = scores if passes else []
        scores = score_library(library, tokens, recipe)
        off.append(max(abs(s.mean("kl_divergence") - truth[s.alternative.key]) for s in scores))
    estimated = [s for s in scores if s.alternative.kind != "parent"]
    exact = [truth[s.alternative.key] for s in estimated]
    assert spearmanr(exact, [s.mean("kl_divergence") for s in estimated])[0] > 0.985
    assert off[1] < off[0]
    assert 0 < sum(s.exact_rows > 0 for s in estimated) < len(estimated)
    z = [(s.mean("kl_divergence") - t) / s.error for s, t in zip(estimated, exact, strict=True) if s.error]
    for estimate_, s in zip(estimates, scores, strict=True):
        rows = row_order(len(tokens))[: s.exact_rows]
        assert (s.checked is not None) == bool(rows and s.alternative.kind != "parent")
        if s.checked is not None:
            means = [sum(score.rows["kl_divergence"][r] for r in rows) / len(rows) for score in (estimate_, s)]
            assert s.checked == pytest.approx(means)
    assert 0.4 < float(torch.tensor(z).square().mean().sqrt()) < 2.5


def axes_for(library: Library) -> list[Axis]:
    limits = parse_budget(params="0.7", kv_cache="0.5").limits
    return axes_of(library.alternatives, cost_table(library.parent, library, Workload()), limits)


def test_interrupted_at_any_line_the_scores_are_the_same(trained: tuple[Library, torch.Tensor], tmp_path: Path) -> None:
    library, tokens = trained
    recipe = ScoringRecipe(batch_tokens=256, exact_passes=2.0, settled=0.0)
    journal, axes = tmp_path / "journal", axes_for(library)
    whole = score_library(library, tokens[:4], recipe, axes=axes, recording=Recording(journal, "a"))
    lines = journal.read_bytes().splitlines(keepends=True)
    for kept in (1, len(lines) // 5, len(lines) // 2, len(lines) - 3):
        journal.write_bytes(b"".join(lines[:kept]) + lines[kept][:9])
        again = score_library(library, tokens[:4], recipe, axes=axes, recording=Recording(journal, "a"))
        assert [s.rows for s in again] == [s.rows for s in whole]


def test_exact_runs_go_where_the_search_is_undecided_and_end_when_it_is_settled(
    trained: tuple[Library, torch.Tensor], truth: dict[str, float]
) -> None:
    library, tokens = trained
    axes = axes_for(library)
    assert [axis.cost for axis in axes] == ["parameters", "kv_cache_bytes"]
    assert axes[1].sizes == (0.9, 0.8, 0.7, 0.6, 0.5)
    scores_by_name, rows = {}, {}
    for name, recipe in (("early", ScoringRecipe(settled=1.0)), ("all", ScoringRecipe(settled=0.0))):
        notes = Notes()
        scores_by_name[name] = score_library(library, tokens, recipe, axes=axes, recording=Recording(progress=notes))
        rows[name] = {s.alternative.key: s.exact_rows for s in scores_by_name[name] if s.alternative.kind != "parent"}
        assert "estimated regret" in notes.notes[-1]
    assert all(rows["all"][key] >= n for key, n in rows["early"].items())
    assert 2 * sum(rows["early"].values()) < sum(rows["all"].values())
    # What more was run decides: solutions by the scores are as good as those by true ones.
    costs = axes[0].shares
    for size in (0.9, 0.7):
        taken = []
        for scores in (truth, {s.alternative.key: s.mean("kl_divergence") for s in scores_by_name["all"]}):
            low, high = 0.0, 1e3
            for _ in range(60):
                chosen = {}
                for a in library.alternatives:
                    value = scores[a.key] + (low + high) / 2 * costs[a.key]
                    place = a.layer, a.subblock
                    chosen[place] = min(chosen.get(place, (value, a.key)), (value, a.key))
                above = sum(costs[key] for _, key in chosen.values()) + axes[0].fixed > size
                low, high = ((low + high) / 2, high) if above else (low, (low + high) / 2)
            taken.append(sum(truth[key] for _, key in chosen.values()))
        assert taken[1] < 1.05 * taken[0]


def test_exact_where_nothing_is_saved_or_kl_is_not_asked_for(
    make_parent: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = library_of(make_parent("llama"), LibraryRecipe(ffn_fractions=(0.5,), kv_methods=("pool",), linear=()))
    monkeypatch.setattr(estimated, "estimate", lambda *args: pytest.fail("estimated"))
    for recipe in (ScoringRecipe(exact_passes=1000), ScoringRecipe(objective="lm_loss"), ScoringRecipe(mode="exact")):
        scores = score_library(library, TOKENS, recipe)
        assert all(s.exact_rows == len(TOKENS) for s in scores)


def test_what_routers_do_to_small_changes_is_told_by_a_few_exact_runs() -> None:
    """KL that falls with the size of a change, not with its square, below where jumps to other experts decide."""
    alternatives = [Alternative(i, "ffn", "no_op") for i in range(40)]
    estimates = torch.logspace(-7, -2, 40).double()
    r = (1 + 0.004 / estimates.sqrt()).log()
    errors = []
    for before_routers in (True, False):
        known = prior(alternatives, estimates.tolist(), [0.05] * 40, [before_routers] * 40)
        mean, deviation = correct(known, {i: (float(r[i]), 8) for i in (2, 20, 37)}, 8)
        errors.append((mean - r).abs().max())
        if before_routers:
            assert 0.2 < float(((mean - r) / deviation)[3::9].square().mean().sqrt()) < 3
    assert errors[0] < 0.35
    assert errors[1] > 1


def test_what_few_tokens_tell_of_experts_is_known_less_well() -> None:
    """An estimate that one row makes up says less, and so does an exact run on other rows; next to nothing can wait."""
    alternatives = [Alternative(i, "ffn", "experts") for i in range(6)]
    estimates, sizes, rows = [1e-2] * 5 + [1e-7], [0.05] * 6, 16
    known = prior(alternatives, estimates, sizes, [True] * 6, [0.2, 4.0, 0.2, 0.2, 0.2, 4.0], rows)
    deviation = known.covariance.diagonal().sqrt()
    assert 0.9 < deviation[1] < 1.2
    assert deviation[0] < 0.2 < deviation[1]
    assert known.noise[1] > 5 * known.noise[0]
    assert (known.weight[:5] == 1).all()
    assert deviation[5] > deviation[1]
    for weighed, runs_it in ((known, False), (dataclasses.replace(known, weight=torch.ones(6).double()), True)):
        assert (5 in choose_runs(weighed, [1.0] * 6, RunLimits(rows, budget=64, precision=0.2))) == runs_it
    assert (prior(alternatives, estimates, sizes).weight == 1).all()  # without routers nothing changes
    _, left = correct(known, {0: (0.1, 16), 1: (0.1, 16)}, rows)
    assert left[1] < 0.01 < left[2]


def test_a_router_sees_what_changes_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stock_model(tiny_config("mixtral")).save_pretrained(tmp_path)
    recipe = LibraryRecipe(expert_fractions=(0.5,), kv_methods=("pool",), linear=())
    library = library_of(tmp_path, recipe, TOKENS % 90)
    seen: dict[tuple[int, str], bool] = {}

    def noted(alternatives: list[Alternative], *rest: Any) -> Prior:
        seen.update({(a.layer, a.subblock): bool(before) for a, before in zip(alternatives, rest[2], strict=True)})
        assert all((s is not None) == (a.subblock == "ffn") for a, s in zip(alternatives, rest[3], strict=True))
        return prior(alternatives, *rest)

    monkeypatch.setattr(estimated, "prior", noted)
    score_library(library, TOKENS % 90, ScoringRecipe(mode="second_order", exact_passes=1))
    last = len(library.parent.blocks) - 1
    assert not seen[last, "ffn"]
    assert all(before for place, before in seen.items() if place != (last, "ffn"))


def test_first_rows_lie_far_apart() -> None:
    assert row_order(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert sorted(row_order(13)) == list(range(13))
