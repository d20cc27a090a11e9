"""Heads and states of mixers: what is dead goes first, and without it the model gives the same.

Where the parts of a fused weight lie is written down here once more, by hand.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import layersmith
from layersmith.block_config import AttentionConfig
from layersmith.execution.exchange import exchanged, forward
from layersmith.execution.parent import Parent
from layersmith.library.alternative import Alternative
from layersmith.library.build import build_library
from layersmith.library.library import Library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.model_descriptor.infer.mixers import in_proportion
from layersmith.model_descriptor.stock import causal_lm_config, restore_buffers
from layersmith.recipe import LibraryRecipe
from layersmith.stages.verify import axis_verdicts
from tests.conformance.checks import _load_as_stock
from tests.conformance.tiny import tiny_config
from tests.library.axes.test_families import TOKENS, parent_of

RECIPE = LibraryRecipe(linear=(), no_op=(), query_heads=False)
# Family to where the mixer of its first layer is.
MAMBA_2 = {"nemotron_h": "mixer", "bamba": "mamba", "granitemoehybrid": "mamba", "falcon_h1": "mamba"}


def library_of(parent: Parent) -> Library:
    return build_library(parent, RECIPE, survey(parent, RECIPE), Calibration(TOKENS, 2))


def gives_the_same(library: Library, kind: str, size: int) -> bool:
    parent = library.parent
    (chosen,) = (a for a in library.alternatives if (a.layer, a.kind, a.size) == (0, kind, size))
    before = forward(parent, TOKENS)[0]
    with exchanged(parent, library.layers([chosen])):
        after = forward(parent, TOKENS)[0]
    return torch.allclose(after, before, atol=1e-5 * float(before.abs().max()))


def test_every_alternative_can_be_built_where_layers_have_one_subblock_each() -> None:
    parent = parent_of("nemotron_h")
    library = build_library(parent, LibraryRecipe(), survey(parent, LibraryRecipe()), Calibration(TOKENS, 2))
    assert any(a.kind == "linear" for a in library.alternatives)
    for alternative in library.alternatives:
        with exchanged(parent, library.layers([alternative])):
            assert bool(forward(parent, TOKENS)[0].isfinite().all()), alternative.key


class _Mamba2:
    """Rows of a Mamba-2 mixer, ``[z: H P, x: H P, B: G N, C: G N, dt: H]``; its convolution has those of x, B and C."""

    def __init__(self, parent: Parent, name: str):
        sizes = parent.blocks[0].attention.mamba
        assert sizes is not None
        self.H, self.P, self.N, self.G = sizes.num_heads, sizes.head_dim, sizes.state_dim, sizes.num_groups
        self.module = parent.layers[0].get_submodule(name)
        self.weights = dict(self.module.named_parameters())

    def of_head(self, h: int) -> dict[str, torch.Tensor]:
        width, shared = self.H * self.P, 2 * self.G * self.N
        entries = torch.arange(h * self.P, (h + 1) * self.P)
        places = {"conv1d.weight": entries, "conv1d.bias": entries, "norm.weight": entries}
        places["in_proj.weight"] = torch.cat([entries, width + entries, torch.tensor([2 * width + shared + h])])
        return places | {name: torch.tensor([h]) for name in ("A_log", "D", "dt_bias")}

    def of_state(self, n: int) -> torch.Tensor:
        return torch.arange(2 * self.G) * self.N + n


@pytest.mark.parametrize("family", MAMBA_2)
@torch.no_grad()
def test_dead_heads_go_first(family: str) -> None:
    """Every other head is a copy of its neighbour, for the norm over all of them, and nothing reads it."""
    parent = parent_of(family)
    mixer = _Mamba2(parent, MAMBA_2[family])
    dead = list(range(0, mixer.H, 2))
    for h in dead:
        for name, places in mixer.of_head(h).items():
            if name in mixer.weights:
                mixer.weights[name][places] = mixer.weights[name][mixer.of_head(h + 1)[name]]
        mixer.weights["out_proj.weight"][:, h * mixer.P : (h + 1) * mixer.P] = 0
    library = library_of(parent)
    order = library.orders["0.mixer_heads"]
    assert order.shape == (mixer.G, mixer.H // mixer.G)
    assert sorted(order[:, order.shape[1] // 2 :].flatten().tolist()) == dead
    assert gives_the_same(library, "mixer_heads", mixer.H // 2)
    assert not gives_the_same(library, "mixer_heads", mixer.H // 4)


@pytest.mark.parametrize("family", MAMBA_2)
@torch.no_grad()
def test_dead_entries_of_heads_go_first(family: str) -> None:
    """Half the entries of every head, others in each, are copies of their neighbours, and nothing reads them."""
    parent = parent_of(family)
    mixer = _Mamba2(parent, MAMBA_2[family])
    dead = {h: [p for p in range(mixer.P) if (p + h) % 2] for h in range(mixer.H)}
    for h, entries in dead.items():
        places = mixer.of_head(h) | {"in_proj.weight": mixer.of_head(h)["in_proj.weight"][: 2 * mixer.P]}
        for name in places.keys() & mixer.weights.keys() - {"A_log", "D", "dt_bias"}:
            rows = places[name].view(-1, mixer.P)  # z and x
            neighbours = [p + 1 if p % 2 == 0 else p - 1 for p in entries]
            mixer.weights[name][rows[:, entries]] = mixer.weights[name][rows[:, neighbours]]
        mixer.weights["out_proj.weight"][:, [h * mixer.P + p for p in entries]] = 0
    library = library_of(parent)
    order = library.orders["0.mixer_size"]
    assert {h: sorted(rows[mixer.P // 2 :].tolist()) for h, rows in enumerate(order)} == dead
    assert gives_the_same(library, "mixer_head_size", mixer.P // 2)
    assert not gives_the_same(library, "mixer_head_size", mixer.P // 4)


@pytest.mark.parametrize("family", MAMBA_2)
@torch.no_grad()
def test_dead_numbers_of_a_state_go_first(family: str) -> None:
    parent = parent_of(family)
    mixer = _Mamba2(parent, MAMBA_2[family])
    dead = [0, 3, 5, 6]
    width = mixer.H * mixer.P
    for n in dead:
        mixer.weights["in_proj.weight"][2 * width + mixer.of_state(n)] = 0
        mixer.weights["conv1d.weight"][width + mixer.of_state(n)] = 0
        mixer.weights["conv1d.bias"][width + mixer.of_state(n)] = 0
    library = library_of(parent)
    assert set(library.orders["0.state"][4:].tolist()) == set(dead)
    assert gives_the_same(library, "state_size", 4)
    assert not gives_the_same(library, "state_size", 2)


@torch.no_grad()
def test_dead_heads_of_linear_attention_go_first() -> None:
    """Heads of a group, and the groups themselves: its parts are fused group by group."""
    for dead, kind, size in (([0, 3], "mixer_heads", 2), ([0, 1], "mixer_groups", 1)):
        parent = parent_of("qwen3_next")
        head_dim = parent.blocks[0].attention.mamba.head_dim
        out = parent.layers[0].get_parameter("linear_attn.out_proj.weight")
        for h in dead:
            out[:, h * head_dim : (h + 1) * head_dim] = 0
        library = library_of(parent)
        assert gives_the_same(library, kind, size)
        if kind == "mixer_heads":
            assert library.orders["0.mixer_heads"].tolist() == [[1, 0], [2, 3]]
        else:
            assert library.orders["0.mixer"].tolist() == [1, 0]


@torch.no_grad()
def test_heads_that_share_a_norm_keep_the_same_entries() -> None:
    parent = parent_of("qwen3_next")
    sizes = parent.blocks[0].attention.mamba
    H, P = sizes.num_heads, sizes.head_dim
    dead = list(range(0, P, 2))
    weights = dict(parent.layers[0].linear_attn.named_parameters())
    # [q: N, k: N, v: H / G P, z: H / G P] for each of G groups; the convolution has all of q, all of k, all of v.
    N, G = sizes.state_dim, sizes.num_groups
    fused = weights["in_proj_qkvz.weight"].view(G, 2 * N + 2 * H // G * P, -1)[:, 2 * N :].view(G, 2 * H // G, P, -1)
    convolved = weights["conv1d.weight"][2 * G * N :].view(H, P, -1)
    for part in (fused, convolved):
        part[..., dead, :] = part[..., [p + 1 for p in dead], :]
    weights["norm.weight"][dead] = weights["norm.weight"][[p + 1 for p in dead]]
    weights["out_proj.weight"].view(-1, H, P)[..., dead] = 0
    library = library_of(parent)
    assert all(sorted(part[P // 2 :].tolist()) == dead for part in library.orders["0.mixer_size"])
    assert gives_the_same(library, "mixer_head_size", P // 2)


@torch.no_grad()
def test_mamba_without_heads_has_a_state() -> None:
    """Nothing reads the half of it: the scale of the norm before is zero, and what it sees is there twice."""
    parent = parent_of("jamba")
    mixer = parent.layers[0].get_submodule("mamba")
    N, rank = mixer.ssm_state_size, mixer.time_step_rank
    dead, kept = list(range(1, N, 2)), list(range(0, N, 2))
    for start in (rank, rank + N):
        mixer.x_proj.weight[[start + n for n in dead]] = mixer.x_proj.weight[[start + n for n in kept]]
    mixer.c_layernorm.weight[dead] = 0
    library = library_of(parent)
    assert set(library.orders["0.state"][N // 2 :].tolist()) == set(dead)
    assert gives_the_same(library, "state_size", N // 2)


@pytest.mark.parametrize("family", ["nemotron_h", "bamba", "jamba", "qwen3_next", "falcon_h1"])
def test_a_child_generates_and_loads_without_layersmith(family: str, tmp_path: Path) -> None:
    """Layers with states of other sizes share a cache; three of four heads have a width that is no whole multiple."""
    parent = parent_of(family)
    library = library_of(parent)
    chosen: dict[int, Alternative] = {}
    for alternative in library.alternatives:
        if alternative.kind.startswith(("mixer", "state")):
            chosen.setdefault(alternative.layer, alternative)
    last = max(chosen)
    chosen[last] = next(a for a in library.alternatives if (a.layer, a.kind) == (last, "state_size"))
    if family != "jamba" and (others := [i for i in chosen if i != last]):
        chosen[others[0]] = next(a for a in library.alternatives if (a.layer, a.kind) == (others[0], "mixer_head_size"))
    child = library.compose(list(chosen.values()))
    layersmith.save(child, tmp_path / "child")
    again = _load_as_stock(tmp_path / "child")
    assert torch.equal(again(TOKENS, use_cache=False).logits, child(TOKENS, use_cache=False).logits)
    prompt = TOKENS[:1, :16]
    text = child.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    whole = child(text, use_cache=False).logits.argmax(-1)
    assert torch.equal(text[:, 16:], whole[:, 15:-1])


def test_what_cannot_differ_says_why() -> None:
    parent = parent_of("jamba")
    axes = survey(parent, RECIPE).axes
    assert axis_verdicts(axes[0], parent.blocks[0])["mixer heads"] == "its state has no heads"
    assert axis_verdicts(axes[0], parent.blocks[0])["mixer head size"] == "its state has no heads"
    assert axis_verdicts(axes[1], parent.blocks[1])["state sizes"] == "it keeps no state of fixed size in the cache"


def test_a_recipe_can_leave_mixers_alone() -> None:
    parent = parent_of("bamba")
    recipe = LibraryRecipe(mixers=False)
    kinds = {a.kind for a in survey(parent, recipe).alternatives}
    assert not kinds & {"mixer_heads", "mixer_groups", "mixer_head_size", "state_size"}


def test_a_fresh_child_starts_by_the_sizes_of_its_layers() -> None:
    """Transformers' own code starts these weights by the model's config, whatever the layer has."""
    config = causal_lm_config(tiny_config("nemotron_h"))
    blocks = layersmith.block_configs(config)
    fewer = Alternative(0, "attention", "mixer_heads", size=4).block_config(blocks[0])
    child = layersmith.build(config, [fewer, *blocks[1:]], dtype=torch.float32)
    mixer: nn.Module = child.get_submodule("model.layers.0.mixer")
    assert mixer.get_parameter("A_log").tolist() == torch.arange(1.0, 5.0).log().tolist()
    assert bool((mixer.get_parameter("D") == 1).all())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_a_model_gives_its_layers_is_by_the_config_of_each(device: str) -> None:
    """The model makes one vector of multipliers, as long as its own config says, and hands it to every layer."""
    parent = parent_of("falcon_h1")
    mamba = parent.blocks[1].attention.mamba
    multipliers = parent.config.ssm_multipliers
    assert mamba is not None
    assert len(set(multipliers)) == 5
    H, P, N, G = 3, mamba.head_dim, 5, mamba.num_groups
    fewer = dataclasses.replace(mamba, num_heads=H, state_dim=N)
    changed = dataclasses.replace(parent.blocks[1], attention=AttentionConfig(mamba=fewer))
    blocks = [parent.blocks[0], changed, *parent.blocks[2:]]
    child = layersmith.build(parent.config, blocks, dtype=torch.float32, device=device)
    restore_buffers(child, parent.runtime)
    by_hand = [torch.full((n,), m) for n, m in zip((H * P, H * P, G * N, G * N, H), multipliers, strict=True)]
    for i in (1, 0):
        buffer = child.get_submodule(f"model.layers.{i}.mamba").get_buffer("mup_vector")
        assert buffer.tolist() == (torch.cat(by_hand)[None, None] if i else parent.layers[0].mamba.mup_vector).tolist()


def test_multiples_in_proportion_are_never_less() -> None:
    assert in_proportion(2, 64, 128) == 1
    assert type(in_proportion(2, 64, 128)) is int
    for width in range(1, 400):
        for hidden in (48, 49, 96, 100, 2560, 4093):
            assert int(in_proportion(1, width, hidden) * hidden) == width
