"""Identities: what is true of alternatives whatever the weights are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import layersmith
from layersmith import ModelDescriptor
from layersmith.execution.exchange import exchanged, forward
from layersmith.execution.parent import Parent, load_parent
from layersmith.library import ranking, statistics
from layersmith.library.alternative import Alternative
from layersmith.library.build import build_library
from layersmith.library.library import Library, read_library, write_library
from layersmith.library.probes import probes_for
from layersmith.library.search_space import ffn_widths, head_group_counts, kv_head_counts
from layersmith.library.slicing import keep_groups, keep_kv_heads, keep_query_heads, narrow, pool_kv_heads
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.recipe import LibraryRecipe
from layersmith.run.runtime import Runtime
from tests.conftest import FAMILIES

TOKENS = torch.randint(0, 512, (8, 32), generator=torch.Generator().manual_seed(3))
CPU = Runtime(torch.device("cpu"), torch.float32)


def open_parent(make_parent: Callable[..., Path], family: str, **more: Any) -> Parent:
    return load_parent(make_parent(family, **more), CPU)


def library_of(parent: Parent, **recipe: Any) -> Library:
    settings = LibraryRecipe(**recipe)
    return build_library(parent, settings, survey(parent, settings), Calibration(TOKENS, 4))


@pytest.fixture
def parent(make_parent: Callable[..., Path], family: str) -> Parent:
    return open_parent(make_parent, family)


def logits_with(parent: Parent, layers: dict[int, torch.nn.Module]) -> torch.Tensor:
    with exchanged(parent, layers):
        return forward(parent, TOKENS)[0]


def test_the_widest_alternative_is_the_parent(parent: Parent) -> None:
    axes = survey(parent, LibraryRecipe()).axes[1]
    weights = dict(parent.layers[1].named_parameters())
    for made in (
        narrow(weights, axes.ffn, [torch.randperm(64)]),
        keep_kv_heads(weights, axes.kv, torch.randperm(4)),
        keep_groups(weights, axes.kv, torch.randperm(4)),
        keep_query_heads(weights, axes.kv, torch.randperm(8)),
        pool_kv_heads(weights, axes.kv, 4),
    ):
        for name, tensor in made.items():
            assert torch.equal(tensor, weights[name]), name


def test_dead_channels_can_go(parent: Parent) -> None:
    library = library_of(parent)
    layer = parent.layers[2]
    with torch.no_grad():
        layer.mlp.down_proj.weight[:, 1::2] = 0
    library.orders["2.ffn.0"] = torch.arange(64).view(32, 2).T.flatten()  # even channels first
    before = forward(parent, TOKENS)[0]
    after = logits_with(parent, {2: library.layer(Alternative(2, "ffn", "ffn_width", "iterative", 32))})
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_dead_heads_can_go(parent: Parent) -> None:
    library = library_of(parent)
    layer, head_dim = parent.layers[1], library.axes[1].kv.head_dim
    with torch.no_grad():  # KV heads 0 and 2, with their query heads 0, 1, 4, 5
        for head in (0, 1, 4, 5):
            layer.self_attn.o_proj.weight[:, head * head_dim : (head + 1) * head_dim] = 0
    library.orders["1.attention"] = torch.tensor([3, 1, 0, 2])
    before = forward(parent, TOKENS)[0]
    after = logits_with(parent, {1: library.layer(Alternative(1, "attention", "kv_heads", "contribution", 2))})
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_equal_heads_pool_to_the_same(parent: Parent) -> None:
    library = library_of(parent)
    axes = library.axes[0].kv
    with torch.no_grad():
        for axis in axes.weights:
            if {segment.part for segment in axis.segments} != {"kv"}:
                continue
            weight = parent.layers[0].get_parameter(axis.name)
            heads = weight.view(4, axes.head_dim, -1)
            heads[1], heads[3] = heads[0], heads[2]
    before = forward(parent, TOKENS)[0]
    after = logits_with(parent, {0: library.layer(Alternative(0, "attention", "kv_heads", "pool", 2))})
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_rankings_keep_what_matters(parent: Parent) -> None:
    """Channels that add nothing are the last in both rankings, KV heads that add nothing too."""
    dead = torch.arange(0, 64, 3)
    with torch.no_grad():
        parent.layers[3].mlp.down_proj.weight[:, dead] *= 1e-3
        head_dim = parent.layers[3].self_attn.head_dim
        parent.layers[3].self_attn.o_proj.weight[:, 2 * head_dim : 4 * head_dim] *= 1e-3  # KV head 1
    for method in ("contribution", "iterative"):
        library = library_of(parent, ffn_ranking=method)
        assert set(library.orders["3.ffn.0"][-len(dead) :].tolist()) == set(dead.tolist())
        assert library.orders["3.attention"][-1] == 1
        assert sorted(library.orders["3.ffn.0"].tolist()) == list(range(64))


def test_costs_of_channels_are_true_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(500, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    w = torch.randn(5, 12, generator=generator)
    costs = ranking.channel_costs(w, a.T @ a / len(a))
    for removed in ([3], [0, 7], [1, 2, 3, 8, 11]):
        error = (a[:, removed] @ w[:, removed].T).square().sum(1).mean()
        torch.testing.assert_close(costs[removed][:, removed].sum().float(), error, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ranking.channel_costs(w, (a * a).mean(0)), costs.diagonal(), rtol=1e-6, atol=1e-6)
    pairs = ranking.channel_costs(w, a.T @ a / len(a), unit=3)
    torch.testing.assert_close(pairs[1, 2], costs[3:6, 6:9].sum())


def test_costs_of_channels_by_columns_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(ranking, "_COLUMNS_AT_ONCE", 5)
    torch.testing.assert_close(ranking._by_columns(w), w.T @ w)


def test_importance_is_the_share_of_the_true_error() -> None:
    generator = torch.Generator().manual_seed(2)
    m = torch.randn(40, 9, generator=generator, dtype=torch.float64)
    costs = m.T @ m
    order = ranking.by_iterative_removal(costs)
    curve = ranking.error_curve(costs, order)
    assert [left for left, _ in curve] == list(range(9, -1, -1))
    for left, lost in curve:
        gone = order[left:]
        assert lost == pytest.approx(float(costs[gone][:, gone].sum() / costs.sum()), abs=1e-12)
    alone = ranking.error_curve(costs.diagonal(), order)
    assert [lost for _, lost in alone][:: len(alone) - 1] == pytest.approx([0, 1])
    assert len(ranking.error_curve(torch.ones(5000), torch.arange(5000))) == 34


def test_importance_is_kept_with_the_library(parent: Parent, tmp_path: Path) -> None:
    library = library_of(parent)
    assert {f"{i}.{part}" for i in range(4) for part in ("ffn.0", "attention")} <= library.importance.keys()
    write_library(library, tmp_path)
    again = read_library(tmp_path, parent).importance
    assert {k: [tuple(p) for p in v] for k, v in again.items()} == dict(library.importance)


def test_iterative_removal_is_greedy_in_the_true_error() -> None:
    generator = torch.Generator().manual_seed(1)
    m = torch.randn(40, 9, generator=generator, dtype=torch.float64)
    costs = m.T @ m
    removed: list[int] = []
    for _ in range(9):
        rest = [j for j in range(9) if j not in removed]
        best = min(rest, key=lambda j: float(costs[[*removed, j]][:, [*removed, j]].sum()))
        removed.append(best)
    assert ranking.by_iterative_removal(costs).tolist() == removed[::-1]


def test_least_squares_recovers_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 8, generator=generator, dtype=torch.float64)
    w = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    y = x @ w.T
    solved = ranking.least_squares(x.T @ x / 400, x.T @ y / 400, ridge=1e-10)
    torch.testing.assert_close(solved, w, rtol=1e-5, atol=1e-5)


def test_linear_replacement_is_the_best_linear_map(parent: Parent) -> None:
    """No scaling or nudging of the map comes nearer to the parent's subblock on the calibration data."""
    library = library_of(parent)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    mlp = parent.layers[1].mlp
    handle = mlp.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    forward(parent, TOKENS)
    handle.remove()
    x, y = (t.flatten(0, -2) for t in seen[0])
    w = library.maps["1.ffn"]

    def error(weight: torch.Tensor) -> float:
        return float((x @ weight.T - y).square().mean())

    assert error(w) < float(y.square().mean())
    for factor in (0.9, 1.1):
        assert error(w) < error(w * factor)


def test_one_pass_or_many_give_the_same(make_parent: Callable[..., Path]) -> None:
    parent = open_parent(make_parent, "qwen2")
    whole = library_of(parent, ffn_ranking="iterative")
    pieces = library_of(parent, ffn_ranking="iterative", statistics_gib=1e-5)
    for name in whole.orders:
        assert torch.equal(whole.orders[name], pieces.orders[name])
    for name in whole.maps:
        assert torch.equal(whole.maps[name], pieces.maps[name])


def test_interrupted_statistics_go_on_to_the_same_sums(
    make_parent: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = open_parent(make_parent, "qwen2")
    space = survey(parent, LibraryRecipe())
    memory = 60_000.0
    probes = probes_for(parent, space.axes, space.alternatives, "iterative")
    whole = statistics.gather(parent, probes, Calibration(TOKENS, 2), memory)
    monkeypatch.setattr(statistics, "_SAVE_EVERY_SECONDS", 0.0)
    add, calls = statistics.add_batch, 0

    def interrupted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise KeyboardInterrupt
        add(*args)

    monkeypatch.setattr(statistics, "add_batch", interrupted)
    kept = Calibration(TOKENS, 2, checkpoint=tmp_path / "sums", inputs="these")
    attempts = 0
    while True:
        attempts += 1
        try:
            resumed = statistics.gather(parent, probes, kept, memory)
            break
        except KeyboardInterrupt:
            continue
    assert attempts > 2
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    # Sums of other inputs are not taken for these.
    monkeypatch.setattr(statistics, "add_batch", add)
    kept = Calibration(TOKENS[:4], 2, checkpoint=tmp_path / "sums", inputs="others")
    other = statistics.gather(parent, probes, kept, memory)
    assert not torch.equal(other["0.ffn.0"], whole["0.ffn.0"])


def test_composition_equals_what_is_written(parent: Parent, tmp_path: Path) -> None:
    library = library_of(parent)
    places = {(a.layer, a.subblock, a.kind): a for a in library.alternatives}
    chosen = [
        places[0, "attention", "no_op"], places[0, "ffn", "ffn_width"],
        places[1, "attention", "kv_heads"], places[1, "ffn", "linear"],
        places[2, "attention", "linear"], places[2, "ffn", "no_op"],
        places[3, "attention", "parent"], places[3, "ffn", "parent"],
    ]  # fmt: skip
    scored = logits_with(parent, library.layers(chosen))
    child = library.compose(chosen)
    assert torch.equal(child(TOKENS).logits, scored)
    layersmith.save(child, tmp_path / "child")
    assert torch.equal(layersmith.load(tmp_path / "child").eval()(TOKENS).logits, scored)


def test_bfloat16_parent_is_scored_as_it_will_be_stored(make_parent: Callable[..., Path], tmp_path: Path) -> None:
    parent = open_parent(make_parent, "llama", dtype=torch.bfloat16, shard="40KB")
    assert parent.dtype == torch.bfloat16
    library = library_of(parent)
    chosen = [a for a in library.alternatives if a.kind == "linear" or (a.method == "pool" and a.size == 2)]
    chosen = [a for a in chosen if (a.kind == "linear") == (a.layer % 2 == 0)]
    scored = logits_with(parent, library.layers(chosen))
    child = library.compose(chosen).to(torch.bfloat16)
    layersmith.save(child, tmp_path / "child")
    assert torch.equal(layersmith.load(tmp_path / "child", dtype=torch.float32).eval()(TOKENS).logits, scored)


def test_a_child_can_be_a_parent(make_parent: Callable[..., Path], tmp_path: Path) -> None:
    library = library_of(open_parent(make_parent, "qwen3"))
    places = {(a.layer, a.subblock, a.kind): a for a in library.alternatives}
    layersmith.save(
        library.compose(
            [places[0, "attention", "no_op"], places[1, "attention", "kv_heads"], places[2, "ffn", "no_op"]]
        ),
        tmp_path / "child",
    )
    parent = load_parent(tmp_path / "child", CPU)
    again = library_of(parent)
    kinds = {(a.layer, a.subblock) for a in again.alternatives if a.kind != "parent"}
    assert (0, "attention") not in kinds
    assert (2, "ffn") not in kinds
    solution = [a for a in again.alternatives if a.key == "layer 3: ffn no-op"]
    grandchild = again.compose(solution)
    assert torch.equal(grandchild(TOKENS).logits, logits_with(parent, again.layers(solution)))


def test_search_space_leaves_out_what_a_descriptor_lacks(make_parent: Callable[..., Path]) -> None:
    llama = layersmith.describe(FAMILIES["llama"]())

    class NoAttentionNoOp(llama):  # type: ignore[misc, valid-type]
        attn_no_op_post_init = staticmethod(ModelDescriptor.attn_no_op_post_init)

    parent = load_parent(make_parent("llama"), CPU, NoAttentionNoOp)
    space = survey(parent, LibraryRecipe())
    assert not [a for a in space.alternatives if a.subblock == "attention" and a.kind in ("no_op", "linear")]
    assert [a for a in space.alternatives if a.subblock == "ffn" and a.kind == "no_op"]
    assert any("no attention no-op" in note for note in space.notes)


def test_grids_follow_the_hardware() -> None:
    assert ffn_widths(14336, LibraryRecipe(ffn_fractions=(0.75, 0.5, 0.1))) == [10752, 7168, 1536]
    assert all(width % 256 == 0 for width in ffn_widths(11008, LibraryRecipe()))
    assert ffn_widths(512, LibraryRecipe()) == [448, 384, 320, 256, 192, 128, 64]
    assert ffn_widths(100, LibraryRecipe(ffn_sizes=(100, 60, 7))) == [60, 7]
    assert kv_head_counts(8, 32, LibraryRecipe()) == [4, 2, 1]
    assert kv_head_counts(6, 12, LibraryRecipe()) == [3, 1]
    assert kv_head_counts(8, 32, LibraryRecipe(kv_heads=(8, 3, 4))) == [4]


def test_kv_heads_that_go_with_their_query_heads_need_not_divide_anything() -> None:
    assert head_group_counts(8, True, 32, LibraryRecipe()) == [6, 4, 2, 1]
    assert head_group_counts(8, True, 32, LibraryRecipe(kv_heads=(8, 3, 4))) == [4, 3]
    assert head_group_counts(2, True, 8, LibraryRecipe()) == [1]
    assert head_group_counts(12, False, 12, LibraryRecipe()) == [9, 6, 3]


def test_kept_layers_stay(make_parent: Callable[..., Path]) -> None:
    space = survey(open_parent(make_parent, "llama"), LibraryRecipe(keep_layers=(0, 3)))
    assert {a.layer for a in space.alternatives if a.kind != "parent"} == {1, 2}
