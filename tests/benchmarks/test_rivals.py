"""Other methods do what their papers say: each is compared with a straightforward implementation on a tiny model."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import os
import pathlib
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.rivals import refit
from benchmarks.rivals.activations import Activations, observe
from benchmarks.rivals.depth import Evolution, block_influence, evopress, removal_counts
from benchmarks.rivals.flap import flap, fluctuation
from benchmarks.rivals.gisp import gisp, importance
from benchmarks.rivals.judge import Judge, Tasks
from benchmarks.rivals.minitron import Narrow, divergence, minitron, narrowed, parameters_of, refitted_narrow
from benchmarks.rivals.problem import Choice, Problem, alternatives, uniform_shapes
from benchmarks.rivals.refit import refitted
from benchmarks.rivals.slicegpt import dimension_for, sliced
from benchmarks.rivals.tyr import prune_locally, tyr
from benchmarks.rivals.wanda import unit_scores, wanda
from layersmith.data.splits import load_tokenizer
from layersmith.demo.job import MODEL
from layersmith.distillation.local import distill_locally
from layersmith.evaluation.compare import compare
from layersmith.execution.exchange import exchanged
from layersmith.execution.parent import load_parent
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.library.survey import survey
from layersmith.recipe import LibraryRecipe
from layersmith.run.runtime import Runtime

pytestmark = pytest.mark.skipif("LAYERSMITH_RIVALS" not in os.environ, reason="a minute; make test-rivals runs it")

generator = torch.Generator().manual_seed(5)
CALIBRATION, SCORING = (torch.randint(0, 512, (n, 32), generator=generator) for n in (8, 6))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """A library of a tiny Llama with 4 layers, 8 query heads of 2 KV heads, and 64 channels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.15,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("parent")
    LlamaForCausalLM(config).save_pretrained(path)
    parent = load_parent(path, Runtime(torch.device("cpu"), torch.float32))
    found = survey(parent, LibraryRecipe())
    return Library(parent, found.axes, found.alternatives, {}, {}, found.notes)


@pytest.fixture(scope="module")
def trained() -> Problem:
    """The demo's code model, on Python sources."""
    parent = load_parent(MODEL, Runtime(torch.device("cpu"), torch.float32))
    found, tokenizer = survey(parent, LibraryRecipe()), load_tokenizer(MODEL)
    text = "".join(Path(module.__file__).read_text() for module in (argparse, dataclasses, pathlib))
    rows = torch.tensor(tokenizer(text)["input_ids"][: 24 * 128]).view(24, 128)
    library = Library(parent, found.axes, found.alternatives, {}, {}, found.notes)
    return Problem(library, rows[:16], rows[16:])


@pytest.fixture
def problem(shared: Library) -> Problem:
    return Problem(shared, CALIBRATION, SCORING)


@pytest.fixture
def seen(problem: Problem) -> Activations:
    return observe(problem)


def inputs_of(problem: Problem, i: int, module: str) -> torch.Tensor:
    """What a module of a layer is given on the calibration rows, ``[tokens, entries]``."""
    got: list[torch.Tensor] = []
    handle = problem.layers[i].get_submodule(module).register_forward_pre_hook(lambda m, args: got.append(args[0]))
    with torch.no_grad():
        problem.model(input_ids=problem.calibration)
    handle.remove()
    return got[0].flatten(0, 1).double()


def layer_parameters(choice: Choice) -> int:
    child = choice.child()
    return sum(p.numel() for layer in child.model.layers for p in layer.parameters())


def test_sizes_are_those_of_the_child(problem: Problem) -> None:
    orders = {f"{i}.queries": torch.arange(8).view(2, 4) for i in range(4)}
    orders |= {f"{i}.ffn.0": torch.randperm(64) for i in range(4)}
    choice = Choice.of(problem, orders, [(8, 64), (4, 33), (0, 20), (2, 0)])
    assert choice.parameters == layer_parameters(choice)


def test_wanda_sums_magnitude_times_norm(problem: Problem, seen: Activations) -> None:
    x, w = inputs_of(problem, 1, "mlp.down_proj"), problem.layers[1].mlp.down_proj.weight.double()
    expected = [sum(abs(w[i, j]) * x[:, j].norm() for i in range(32)) for j in range(64)]
    assert torch.allclose(unit_scores(problem, seen, 1, "ffn"), torch.stack(expected), rtol=1e-5)
    x, w = inputs_of(problem, 2, "self_attn.o_proj"), problem.layers[2].self_attn.o_proj.weight.double()
    expected = [(w[:, 8 * h : 8 * h + 8].abs() * x[:, 8 * h : 8 * h + 8].norm(dim=0)).sum() for h in range(8)]
    assert torch.allclose(unit_scores(problem, seen, 2, "attention"), torch.stack(expected), rtol=1e-5)
    choice = wanda(problem, seen, 0.6 * problem.sizes.total)
    assert 0.55 * problem.sizes.total < choice.parameters <= 0.6 * problem.sizes.total
    kept = {a.size for a in choice.chosen if a.subblock == "ffn"}
    assert len(kept) == 1


def test_flap_replaces_units_by_their_mean(problem: Problem, seen: Activations) -> None:
    """The mean output of a pruned subblock is the parent's on the parent's inputs, and the KL is lower for it."""
    x, w = inputs_of(problem, 0, "mlp.down_proj"), problem.layers[0].mlp.down_proj.weight.double()
    expected = x.var(0, unbiased=False) * w.square().sum(0)
    assert torch.allclose(fluctuation(problem, seen, 0, "ffn"), expected, rtol=1e-3, atol=1e-9)
    target = 0.6 * problem.sizes.total
    choice, plain = (flap(problem, seen, target, compensate) for compensate in (True, False))
    assert choice.chosen == plain.chosen
    assert 0.95 * target < choice.parameters <= target
    child = choice.child()
    for i in range(4):
        x = inputs_of(problem, i, "mlp.down_proj").float()
        a = next(a for a in choice.chosen if (a.layer, a.subblock) == (i, "ffn"))
        kept = torch.arange(64) if a.is_parent else choice.library.orders[f"{i}.ffn.0"][: a.size].sort().values
        with torch.no_grad():
            of_child = child.model.layers[i].mlp.down_proj(x[:, kept]).mean(0)
            of_parent = problem.layers[i].mlp.down_proj(x).mean(0)
        assert torch.allclose(of_child, of_parent, atol=1e-4)


def test_published_order_of_methods_on_a_trained_model(trained: Problem) -> None:
    """FLAP's table 5: its biases help. GISP's table 4: it loses less than Wanda-sp. Ours: a refit helps each."""
    seen, target = observe(trained), 0.5 * trained.sizes.total
    compensated, plain = (flap(trained, seen, 0.8 * trained.sizes.total, compensate) for compensate in (True, False))
    magnitude = wanda(trained, seen, target)
    ((_, iterative),) = gisp(trained, [target], step=1 / 16, rows_a_step=8)
    children = {"flap": compensated, "plain": plain, "wanda": magnitude, "gisp": iterative}
    losses = {name: divergence(trained, choice.child(), trained.scoring) for name, choice in children.items()}
    assert losses["flap"] < losses["plain"]
    assert losses["gisp"] < losses["wanda"]
    for name in ("plain", "wanda", "gisp"):
        after = refitted(trained, seen, children[name])
        assert divergence(trained, after.child(), trained.scoring) < losses[name]


def test_gisp_importance_is_gradient_times_weight(problem: Problem) -> None:
    scores = importance(problem, [copy.deepcopy(layer) for layer in problem.layers], CALIBRATION)
    model = copy.deepcopy(problem.model).requires_grad_(True)
    model(input_ids=CALIBRATION, labels=CALIBRATION).loss.backward()
    mlp, attention = model.model.layers[3].mlp, model.model.layers[3].self_attn

    def product(weight: torch.nn.Parameter) -> torch.Tensor:
        return (weight * weight.grad).detach().abs()

    channels = product(mlp.gate_proj.weight).sum(1) + product(mlp.up_proj.weight).sum(1)
    channels += product(mlp.down_proj.weight).sum(0)
    heads = product(attention.q_proj.weight).view(8, 8, 32).sum((1, 2))
    heads += product(attention.o_proj.weight).view(32, 8, 8).sum((0, 2))
    assert torch.allclose(scores[3][1], channels, rtol=1e-3)
    assert torch.allclose(scores[3][0], heads, rtol=1e-3)


def test_gisp_children_are_nested_and_better_in_small_steps(problem: Problem) -> None:
    """The paper's figure 3: many small steps lose less than one large one."""
    total = problem.sizes.total
    (_, large), (_, small) = gisp(problem, [0.8 * total, 0.5 * total], step=1 / 20, rows_a_step=4)
    for a, b in zip(large.chosen, small.chosen, strict=True):
        whole = 64 if a.subblock == "ffn" else 8
        sizes = [whole if x.is_parent else 0 if x.is_no_op else x.size for x in (a, b)]
        assert sizes[0] >= sizes[1]
        if sizes[1] and a.subblock == "ffn":
            orders = [
                c.library.orders[f"{a.layer}.ffn.0"][:n].tolist() for c, n in zip((large, small), sizes, strict=True)
            ]
            assert set(orders[0]) >= set(orders[1])
    assert large.parameters <= 0.8 * total
    assert small.parameters <= 0.5 * total


def test_block_influence_is_the_cosine(problem: Problem, seen: Activations) -> None:
    with torch.no_grad():
        states = problem.model(input_ids=CALIBRATION, output_hidden_states=True).hidden_states
    cosine = torch.cosine_similarity(states[0], states[1], dim=-1).mean()
    assert seen.cosine[0] == pytest.approx(float(cosine), rel=1e-5)
    choice = block_influence(problem, seen, 0.75 * problem.sizes.total)
    removed = {a.layer for a in choice.chosen if a.is_no_op}
    assert removed == {max(seen.cosine, key=lambda i: seen.cosine[i])}
    assert choice.child().config.num_hidden_layers == 4


def test_evopress_finds_the_best_of_all(problem: Problem) -> None:
    """On a space small enough to try everything."""
    counts = removal_counts(problem, 0.7 * problem.sizes.total)
    choice = evopress(problem, 0.7 * problem.sizes.total, Evolution(6, ((14, 1),), 15_000, 8))
    removed = [{a.layer for a in choice.chosen if a.is_no_op and a.subblock == s} for s in ("attention", "ffn")]
    assert tuple(map(len, removed)) == counts
    library = Choice.of(problem, {}, problem.whole).library
    every = [
        [Alternative(i, "attention", "no_op") for i in first] + [Alternative(i, "ffn", "no_op") for i in second]
        for first in itertools.combinations(range(4), counts[0])
        for second in itertools.combinations(range(4), counts[1])
    ]
    losses = problem.divergences(library, every, range(14))
    (found,) = problem.divergences(library, [[a for a in choice.chosen if a.is_no_op]], range(14))
    assert found == pytest.approx(min(losses), rel=1e-4)


def test_a_narrowed_parent_is_the_narrower_model(problem: Problem) -> None:
    kept = torch.tensor([k for k in range(32) if k % 4])
    masked = narrowed(problem, kept).model
    config = LlamaConfig(**{**problem.model.config.to_dict(), "hidden_size": 24, "rms_norm_eps": 1e-6 * 24 / 32})
    config.rms_norm_eps = problem.model.config.rms_norm_eps * 32 / 24
    narrow = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in narrow.state_dict().items():
            whole = problem.model.state_dict()[name]
            for dim, (n, full) in enumerate(zip(weight.shape, whole.shape, strict=True)):
                whole = whole.index_select(dim, kept) if n != full else whole
            weight.copy_(whole)
        ids = CALIBRATION[:2]
        assert torch.allclose(narrow(input_ids=ids).logits, masked(input_ids=ids).logits, atol=1e-4)


def test_minitron_is_as_large_as_it_says(problem: Problem, seen: Activations) -> None:
    narrow = minitron(problem, seen, 0.7 * problem.sizes.total)
    whole = sum(p.numel() for p in problem.model.parameters())
    limit = whole - 0.3 * problem.sizes.total
    assert 0.9 * limit < parameters_of(problem, narrow) <= limit
    if len(narrow.kept) < 32:
        after = refitted_narrow(problem, narrow).child()
        assert divergence(problem, after, CALIBRATION) < divergence(problem, narrow.choice.child(), CALIBRATION)


def test_minitron_refit_with_a_smaller_hidden_size(problem: Problem, seen: Activations) -> None:
    """It brings the child nearer the parent, and leaves removed dimensions at zero."""
    kept = seen.hidden.norm(dim=0).topk(28).indices.sort().values
    new = narrowed(problem, kept)
    orders = {f"{i}.queries": torch.arange(8).view(2, 4) for i in range(4)}
    orders |= {f"{i}.ffn.0": torch.arange(64) for i in range(4)}
    narrow = Narrow(new, Choice.of(new, orders, [(4, 50)] * 4), kept)
    before, after = narrow.choice.child(), refitted_narrow(problem, narrow).child()
    assert divergence(problem, after, CALIBRATION) < divergence(problem, before, CALIBRATION)
    gone = torch.tensor([k for k in range(32) if k not in kept.tolist()])
    for layer in after.model.layers:
        assert not layer.mlp.down_proj.weight[gone].any()
        assert not layer.self_attn.o_proj.weight[gone].any()


def test_tyr_updates_by_least_squares_on_the_mean_of_its_prefix(problem: Problem) -> None:
    """With one size offered for each layer, the prefix is the child, and the update is a least-squares fit."""
    sizes = [([4], [40])] * 4
    library = prune_locally(problem, sizes)
    chosen = alternatives(problem, [(4, 40)] * 4)
    i = 1
    with exchanged(library.parent, library.layers([a for a in chosen if a.layer < i])):
        attention = library.layers([a for a in chosen if a.layer == i and a.subblock == "attention"])
        with exchanged(library.parent, attention):
            x = inputs_of(problem, i, "mlp.down_proj")
    w = problem.layers[i].mlp.down_proj.weight.double()
    kept = library.orders[f"{i}.ffn.0"][:40].sort().values
    expected = torch.linalg.lstsq(x[:, kept], x @ w.T).solution.T
    (a,) = [a for a in chosen if (a.layer, a.subblock) == (i, "ffn")]
    made = library.weights(a)["mlp.down_proj.weight"].double()
    error = [((x[:, kept] @ m.T - x @ w.T) ** 2).mean() for m in (made, expected, w[:, kept])]
    assert error[1] <= error[0] * (1 + 1e-9)
    assert error[0] < 1.05 * error[1] + 1e-3 * error[2]


def test_tyr_is_better_than_uniform(problem: Problem) -> None:
    target = 0.7 * problem.sizes.total
    found = tyr(problem, target, steps=(1 / 8,), how=Evolution(6, ((4, 2), (14, 1)), 6_000))
    assert 0.93 * target < found.parameters <= target
    assert layer_parameters(found) == found.parameters
    uniform = uniform_shapes(problem, target)
    best, library = uniform[(len(uniform) - 1) // 2], prune_locally(problem, [([h], [w]) for h, w in uniform[0]])
    library = prune_locally(problem, [([h], [w]) for h, w in best])
    (ours,) = problem.divergences(found.library, [found.chosen], range(14))
    (alike,) = problem.divergences(library, [alternatives(problem, best)], range(14))
    assert ours < alike


def test_slicegpt_of_all_dimensions_is_the_parent(problem: Problem) -> None:
    """And KL grows as dimensions go, as in the paper's table 1."""
    assert divergence(problem, sliced(problem, 32), SCORING) < 1e-5
    losses = [divergence(problem, sliced(problem, d), SCORING) for d in (31, 28, 24)]
    assert losses == sorted(losses)
    assert dimension_for(problem, 2 * problem.sizes.total) == 32


def test_refits_help_every_choice(problem: Problem, seen: Activations) -> None:
    target = 0.7 * problem.sizes.total
    shapes = [(8, 64), (0, 0), (8, 64), (0, 64)]
    for choice in (wanda(problem, seen, target), flap(problem, seen, target), Choice.of(problem, {}, shapes)):
        plain = dataclasses.replace(choice, biases={})
        after = refitted(problem, seen, choice)
        assert layer_parameters(after) == choice.parameters
        assert divergence(problem, after.child(), CALIBRATION) < divergence(problem, plain.child(), CALIBRATION)


def test_the_first_refit_is_layersmiths(problem: Problem, seen: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "refitted_on_child", lambda problem, library, chosen: library)
    orders = {f"{i}.queries": torch.arange(8).view(2, 4) for i in range(4)}
    orders |= {f"{i}.ffn.0": torch.randperm(64) for i in range(4)}
    choice = Choice.of(problem, orders, [(4, 40)] * 4)
    library = dataclasses.replace(choice.library, alternatives=choice.chosen)
    expected = distill_locally(library, CALIBRATION, CALIBRATION[:0], refit.SETUP)
    made = refitted(problem, seen, choice).library
    for a in choice.chosen:
        for name, weight in expected.kept.of(a.identity).items():
            assert torch.allclose(made.kept.of(a.identity)[name], weight, atol=1e-4)


def test_the_judge_measures_what_layersmith_does(problem: Problem, tmp_path: Path) -> None:
    orders = {f"{i}.ffn.0": torch.arange(64) for i in range(4)}
    child = Choice.of(problem, orders, [(8, 40)] * 4).child()
    parent = problem.library.parent
    expected = compare(parent.model, child, SCORING, batch_sequences=2)
    found = Judge(parent, None, {"a": SCORING}, Tasks([], 1), tmp_path).on_text(child)["a"]
    assert found["kl"] == pytest.approx(expected.metrics["kl_divergence"], rel=1e-4)
    assert found["loss"] == pytest.approx(expected.child_loss, rel=1e-5)
