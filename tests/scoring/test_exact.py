import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from layersmith.execution.exchange import exchanged, forward
from layersmith.execution.parent import load_parent
from layersmith.library.build import build_library
from layersmith.library.library import Library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.recipe import LibraryRecipe, ScoringRecipe
from layersmith.run.journal import Recording
from layersmith.run.runtime import Runtime
from layersmith.scoring import exact_runs
from layersmith.scoring.library_scores import score_library
from layersmith.scoring.metrics import METRICS, Reference, measure, row_means
from layersmith.scoring.score import losses, relative_error, standard_error
from layersmith.scoring.task import row_order

# For what does not depend on the family.
TWO = ("llama_tied", "qwen2_windows")
TOKENS = torch.randint(0, 512, (6, 24), generator=torch.Generator().manual_seed(4))


def exact(rows: int) -> ScoringRecipe:
    """So many rows in one forward pass."""
    return ScoringRecipe(mode="exact", batch_tokens=rows * TOKENS.shape[1])


@pytest.fixture
def library(make_parent: Callable[..., Path], family: str) -> Library:
    parent = load_parent(make_parent(family), Runtime(torch.device("cpu"), torch.float32))
    recipe = LibraryRecipe(ffn_fractions=(0.5,))
    return build_library(parent, recipe, survey(parent, recipe), Calibration(TOKENS, 3))


def test_scores_equal_a_run_of_the_whole_model(library: Library) -> None:
    """Starting in the middle gives what starting at the beginning gives, by definitions written out here."""
    parent = library.parent
    scores = score_library(library, TOKENS, exact(6))
    p_logits, p_hidden = forward(parent, TOKENS)
    p = p_logits.double().log_softmax(-1)
    for score in scores[::3]:
        with exchanged(parent, library.layers([score.alternative])):
            logits, hidden = forward(parent, TOKENS)
        q = logits.double().log_softmax(-1)
        if score.alternative.kind == "parent":
            assert torch.equal(logits, p_logits)
            continue
        kl = (p.exp() * (p - q)).sum(-1).mean()
        assert score.mean("kl_divergence") == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
        lm = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        assert score.mean("lm_loss") == pytest.approx(float(lm), rel=1e-5)
        top = p.argmax(-1)
        for k in (1, 5, 10):
            among = (logits.topk(k).indices == top[..., None]).any(-1).double().mean()
            assert score.mean(f"top_{k}_agreement") == pytest.approx(float(among), abs=0.02)
        cosine = torch.nn.functional.cosine_similarity(hidden, p_hidden, dim=-1).mean()
        assert score.mean("hidden_distance") == pytest.approx(1 - float(cosine), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("family", TWO)
def test_batches_do_not_matter(library: Library) -> None:
    one, all_at_once = (score_library(library, TOKENS, exact(n)) for n in (1, 6))
    for a, b in zip(one, all_at_once, strict=True):
        for metric in METRICS:
            assert a.rows[metric] == pytest.approx(b.rows[metric], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("objective", METRICS)
def test_the_parent_is_the_best_answer(library: Library, objective: str) -> None:
    scores = score_library(library, TOKENS, exact(6))
    worse = losses(scores, objective)
    for score in scores:
        assert worse[score.alternative.key] >= 0
        if score.alternative.kind == "parent":
            assert worse[score.alternative.key] == 0


@pytest.mark.parametrize("family", TWO)
def test_interrupted_scoring_goes_on_to_the_same_scores(library: Library, tmp_path: Path) -> None:
    whole = score_library(library, TOKENS, exact(3))
    journal = tmp_path / "journal"
    score_library(library, TOKENS, exact(3), recording=Recording(journal, "a"))
    lines = journal.read_bytes().splitlines(keepends=True)
    for kept in (0, 1, 2, len(lines) // 3, len(lines) // 2 + 1, len(lines) - 1):
        # Cut in the middle of a line, as a kill does.
        journal.write_bytes(b"".join(lines[:kept]) + lines[min(kept, len(lines) - 1)][:17])
        again = score_library(library, TOKENS, exact(3), recording=Recording(journal, "a"))
        assert [s.rows for s in again] == [s.rows for s in whole]
        assert sorted(journal.read_bytes().splitlines()) == sorted(line.rstrip(b"\n") for line in lines)


@pytest.mark.parametrize("family", TWO)
def test_a_journal_of_other_inputs_is_not_believed(library: Library, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    score_library(library, TOKENS[:3], exact(3), recording=Recording(journal, "other data"))
    again = score_library(library, TOKENS, exact(3), recording=Recording(journal, "this data"))
    assert [s.rows for s in again] == [s.rows for s in score_library(library, TOKENS, exact(3))]


@pytest.mark.parametrize("objective", ["kl_divergence", "hidden_distance"])
def test_no_more_rows_than_the_asked_precision_needs(
    make_parent: Callable[..., Path], tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = load_parent(make_parent("llama"), Runtime(torch.device("cpu"), torch.float32))
    recipe_of_library = LibraryRecipe(ffn_fractions=(0.5,), kv_methods=("pool",), linear=(), query_heads=False)
    library = build_library(parent, recipe_of_library, survey(parent, recipe_of_library), Calibration(TOKENS, 3))
    tokens = torch.randint(0, 512, (24, 12), generator=torch.Generator().manual_seed(5))
    recipe = ScoringRecipe(mode="exact", objective=objective, batch_tokens=8 * 12)  # type: ignore[arg-type]
    whole = score_library(library, tokens, recipe)
    seen: list[tuple[int, float]] = []

    def noted(values: torch.Tensor, num_rows: int) -> float:
        seen.append((values.shape[1], relative_error(values, num_rows)))
        return seen[-1][1]

    monkeypatch.setattr(exact_runs, "relative_error", noted)
    assert [s.rows for s in score_library(library, tokens, dataclasses.replace(recipe, row_precision=1e-9))] == [
        s.rows for s in whole
    ]
    (first, error), (second, later) = seen
    assert (first, second) == (8, 16)
    assert error > later > 0
    asked = dataclasses.replace(recipe, row_precision=(error + later) / 2)
    enough = score_library(library, tokens, asked, recording=Recording(tmp_path / "journal", "a"))
    rows = sorted(row_order(24)[:16])
    for score, of_all in zip(enough, whole, strict=True):
        assert score.exact_rows == 16
        assert score.rows[objective] == pytest.approx([of_all.rows[objective][row] for row in rows])
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal").write_bytes(b"".join(lines[: len(lines) // 3]))
    again = score_library(library, tokens, asked, recording=Recording(tmp_path / "journal", "a"))
    assert [s.rows for s in again] == [s.rows for s in enough]


def test_the_relative_error_of_scores() -> None:
    """The predicted error is the true one, and rows that are hard for all alternatives do not count."""
    generator = torch.Generator().manual_seed(0)
    scores = 0.5 + torch.rand(300, 1, generator=generator, dtype=torch.float64)
    hard = 0.2 + 3 * torch.rand(1, 64, generator=generator, dtype=torch.float64)
    assert relative_error((scores * hard)[:, :16], 64) < 1e-6
    values = scores * hard * (1 + 0.3 * torch.randn(300, 64, generator=generator, dtype=torch.float64))
    error = relative_error(values[:, :16], 64)
    ratio = values[:, :16].mean(1) / values.mean(1)
    assert error == pytest.approx(float((ratio / ratio.mean() - 1).square().mean().sqrt()), rel=0.15)
    assert relative_error(values[:, :1], 64) == float("inf")
    assert relative_error(-values, 64) == float("inf")


def test_metrics_of_a_model_against_itself() -> None:
    logits, hidden = torch.randn(1, 9, 50), torch.randn(1, 9, 8)
    ids = torch.randint(0, 50, (1, 9))
    values = {
        k: float(v) for k, v in row_means([measure(Reference.of(logits, hidden, ids), logits.clone(), hidden)]).items()
    }
    assert values["kl_divergence"] == 0
    assert values["top_1_agreement"] == values["top_5_agreement"] == 1
    assert values["hidden_distance"] == pytest.approx(0, abs=1e-6)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert values["lm_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_metrics_by_their_definitions() -> None:
    """Far apart and near each other, in spans, and with tokens that have no probability at all."""
    generator = torch.Generator().manual_seed(1)
    for distance in (0.01, 1.0, 10.0):
        logits = 4 * torch.randn(2, 12, 40, generator=generator)
        other = logits + distance * torch.randn(2, 12, 40, generator=generator)
        logits[..., -3:] = other[..., -3:] = -torch.inf
        hidden, changed = torch.randn(2, 2, 12, 8, generator=generator)
        ids = torch.randint(0, 37, (2, 12), generator=generator)
        reference = Reference.of(logits, hidden, ids)
        spans = [
            measure(reference.span(i, i + 5), other[:, i : i + 5].clone(), changed[:, i : i + 5]) for i in (0, 5, 10)
        ]
        means = row_means(spans)
        log_p, log_q = (z[..., :-3].double().log_softmax(-1) for z in (logits, other))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        assert means["kl_divergence"].tolist() == pytest.approx(kl.mean(-1).tolist(), rel=1e-4, abs=1e-7)
        loss = -log_q[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].mean(-1)
        assert means["lm_loss"].tolist() == pytest.approx(loss.tolist(), rel=1e-5)
        among = (log_q.topk(5).indices == log_p.argmax(-1)[..., None]).any(-1).double().mean(-1)
        assert means["top_5_agreement"].tolist() == pytest.approx(among.tolist())


def test_standard_error() -> None:
    values = [1.0, 2.0, 4.0, 4.5]
    assert standard_error(values) == pytest.approx(float(torch.tensor(values).std() / 2))
    assert standard_error([1.0]) is None


def test_exact_runs_are_dealt_with_the_parent_in_mind() -> None:
    # Many alternatives on a few rows, then few on all others, where the parent takes most of the time.
    parts = [(1.0, [0.5] * 40), (8.0, [4.0]), (8.0, [4.0]), (8.0, [4.0])]
    for processes in (1, 2, 3, 4, 60):
        dealt = exact_runs.deal_groups(parts, processes)
        assert [len(owners) for owners in dealt] == [40, 1, 1, 1]
        order = [owner for owners in dealt for owner in owners]
        assert order == sorted(order)  # ranges
        assert max(order) < processes
        loads = [0.0] * processes
        for (of_parent, costs), owners in zip(parts, dealt, strict=True):
            for cost, owner in zip(costs, owners, strict=True):
                loads[owner] += cost
            for owner in set(owners):
                loads[owner] += of_parent
        assert max(loads) <= {1: 57.0, 2: 33.0, 3: 24.0, 4: 21.0}.get(processes, 12.0)
    assert exact_runs.deal_groups([(1.0, []), (1.0, [])], 3) == [[], []]
