import pytest
import torch

from layersmith.library.alternative import Alternative
from layersmith.scoring.correction import RunLimits, choose_runs, correct, draw, prior
from layersmith.scoring.regret import Axis, ExpectedRegret
from layersmith.scoring.rounds import Rounds

# Two layers' FFNs, of which each can also be half as wide or gone: (cost, score) of what is not the parent's.
CHOICES = {
    ("ffn_width", 0): (0.2, 1.0),
    ("no_op", 0): (0.0, 4.0),
    ("ffn_width", 1): (0.2, 1.2),
    ("no_op", 1): (0.0, 9.0),
}
PARENTS = [Alternative(layer, "ffn", "parent") for layer in (0, 1)]
PENDING = [Alternative(layer, "ffn", kind) for kind, layer in CHOICES]
SCORES = torch.tensor([score for _, score in CHOICES.values()], dtype=torch.float64)


def model(*sizes: float) -> ExpectedRegret:
    shares = {a.key: 0.4 for a in PARENTS} | {a.key: CHOICES[a.kind, a.layer][0] for a in PENDING}
    return ExpectedRegret([*PENDING, *PARENTS], PENDING, [Axis("parameters", shares, 0.2, sizes)])


def test_nothing_is_lost_where_scores_are_known() -> None:
    regret, part = model(0.9, 0.8, 0.6).regret(SCORES, SCORES[:, None].repeat(1, 4))
    assert regret == 0
    assert part.tolist() == [0] * 4


def test_what_is_lost_is_told_by_the_multiplier_of_a_size() -> None:
    """At 0.8 one of the two FFNs is halved, layer 0's by the scores that are known; by every other draw layer 1's costs
    less. Under the least multiplier at which layer 0's is halved, 1 / 0.2, layer 1's is not."""
    drawn = SCORES[:, None].repeat(1, 4)
    drawn[2, 1::2] = 0.5
    regret, part = model(0.8).regret(SCORES, drawn)
    # Half as wide saves 0.2 x 5 = 1.0 and costs 0.5, in half of the draws; the score is 1.0.
    assert regret == pytest.approx(0.25, rel=1e-6)
    assert part.tolist() == pytest.approx([0, 0, 0.125, 0], abs=1e-9)  # the other half is the parent's


def test_only_what_is_taken_by_some_draw_is_worth_a_look() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = SCORES[:, None] * (0.3 * torch.randn(4, 256, generator=generator, dtype=torch.float64)).exp()
    regret, part = model(0.8, 0.6).regret(SCORES, drawn)
    assert 0 < regret < 0.3
    assert part[2] > 10 * part[3]  # layer 1's no-op is never near
    assert float(part.sum()) < regret  # the rest is the share of the parent's subblocks
    assert model().regret(SCORES, drawn)[0] == 0


def test_draws_are_as_far_apart_as_is_said() -> None:
    alternatives = [Alternative(i, "ffn", "no_op") for i in range(12)]
    known = prior(alternatives, torch.logspace(-4, -1, 12).tolist(), [0.3] * 12)
    observed = {2: (0.5, 4), 7: (-0.4, 16)}
    mean, deviation = correct(known, observed, 16)
    drawn = draw(known, observed, 16, 20_000, seed=3)
    assert drawn.mean(1).tolist() == pytest.approx(mean.tolist(), abs=0.03)
    assert drawn.std(1).tolist() == pytest.approx(deviation.tolist(), rel=0.05, abs=1e-3)
    assert drawn[7].std() < 1e-3  # run on all rows
    assert draw(known, {}, 16, 20_000, seed=3).std(1).tolist() == pytest.approx(
        known.covariance.diagonal().sqrt().tolist(), rel=0.05
    )


def test_runs_go_on_from_those_of_before_and_to_what_is_worth_most() -> None:
    alternatives = [Alternative(i, "ffn", "no_op") for i in range(12)]
    known = prior(alternatives, torch.logspace(-4, -1, 12).tolist(), [0.3] * 12)
    first = choose_runs(known, [1.0] * 12, RunLimits(16, 10, 0.0))
    worth = torch.zeros(12, dtype=torch.float64)
    worth[5] = 1
    more = choose_runs(known, [1.0] * 12, RunLimits(16, 15, 0.0), first, worth)
    assert all(more[i] >= rows for i, rows in first.items())
    assert 0 < sum(more.values()) - sum(first.values()) <= 15
    assert more[5] == max(more.values()) > first.get(5, 0)


def test_rounds_end_when_the_search_is_settled_and_that_is_foreseen() -> None:
    alternatives = [Alternative(i, "ffn", "no_op") for i in range(12)]
    parents = [Alternative(i, "ffn", "parent") for i in range(12)]
    shares = {a.key: 0.0 for a in alternatives} | {a.key: 1 / 12 for a in parents}
    estimates = torch.logspace(-4, -1, 12).double()
    known = prior(alternatives, estimates.tolist(), [0.3] * 12)
    search = ExpectedRegret([*alternatives, *parents], alternatives, [Axis("parameters", shares, 0.0, (0.7, 0.5))])

    def rounds(settled: float, expected_regret: ExpectedRegret | None = search) -> Rounds:
        return Rounds(known, estimates, [0.05] * 12, 16, 4.0, 0.0, settled, expected_regret)

    def all_of(plan: Rounds, r: float) -> list[dict[int, int]]:
        """The runs after each round, if every exact run shows r times its standard deviation."""
        by_round: list[dict[int, int]] = []
        before: dict[int, int] = {}
        for k in range(plan.count):
            observed = {i: (r * float(known.covariance[i, i].sqrt()), n) for i, n in before.items()}
            following = plan.after(k, before, observed)
            if following == before:
                break
            by_round.append(following)
            before = following
        return by_round

    costs = [0.05 * sum(runs.values()) for runs in all_of(rounds(0.0), 0.0)]
    assert len(costs) == 7
    assert all((k + 1) / 2 < cost <= (k + 2) / 2 for k, cost in enumerate(costs))
    assert len(all_of(rounds(1.0), 0.0)) == 1
    assert len(all_of(rounds(1.0, expected_regret=None), 0.0)) == 1
    assert 0.05 * sum(all_of(rounds(1.0, expected_regret=None), 0.0)[0].values()) > 3  # all of the work
    first = rounds(0.0).after(0, {}, {})
    plan = rounds(0.8 * rounds(0.0).worth({i: (0.0, n) for i, n in first.items()})[0])
    count, foreseen = plan.foresee(0, {}, {})
    assert foreseen == all_of(plan, 0.0)[-1]
    assert 1 < count == len(all_of(plan, 0.0)) < 7
    # What was foreseen is done, and more only where the regret is much larger than it should be.
    nothing = dict.fromkeys(range(12), (0.0, 16))
    assert plan.after(1, first, nothing) == first
    assert plan.after(1, first, nothing, foreseen=2) != first
    seen = {i: (0.0, n) for i, n in foreseen.items()}
    assert plan.after(count, foreseen, seen, count) == foreseen
    assert (
        plan.after(
            count, foreseen, {i: (3 * float(known.covariance[i, i].sqrt()), n) for i, n in foreseen.items()}, count
        )
        != foreseen
    )
    # Where runs show three times what was expected, the search is settled later, if at all.
    regrets = [
        plan.worth({i: (r * float(known.covariance[i, i].sqrt()), n) for i, n in first.items()})[0] for r in (0, 3)
    ]
    assert regrets[1] > regrets[0] > 0
