"""Sizes inside a subblock: without what is dead the model gives the same, and children are what was scored.

Where the entries of heads and ranks lie is written down here once more, by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import layersmith
from layersmith.costs.budget import Workload
from layersmith.costs.counted import ModelShape, subblock_costs
from layersmith.execution.exchange import exchanged, forward
from layersmith.execution.parent import Parent
from layersmith.export.run import export
from layersmith.export.source import CannotExport
from layersmith.library.alternative import Alternative
from layersmith.library.build import build_library
from layersmith.library.library import Library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.model_descriptor.stock import causal_lm_config
from layersmith.recipe import LibraryRecipe
from layersmith.stages.verify import axis_verdicts
from tests.conformance.tiny import tiny_config
from tests.library.axes.test_families import TOKENS, parent_of, parent_of_config

RECIPE = LibraryRecipe(linear=(), no_op=(), query_heads=False, inner_sizes=True)
# Family to the sizes of its attention: RMS norms of heads, latent attention, heads of which a part turns.
SIZES = {
    "qwen3": {"head_dim"},
    "minicpm3": {"kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"},
    "phi": {"head_dim"},
}


def library_of(parent: Parent) -> Library:
    return build_library(parent, RECIPE, survey(parent, RECIPE), Calibration(TOKENS, 2))


def half_of(library: Library, name: str, layer: int = 0) -> Alternative:
    sizes = [a for a in library.alternatives if (a.layer, a.kind, a.method) == (layer, "attention_size", name)]
    return next(a for a in sizes if 2 * a.size == next(x for x in library.axes[layer].inner if x.name == name).size)


def kill(layer: nn.Module, family: str, name: str) -> None:
    """Make every other unit of a size dead: where it is computed and where it is read."""
    attention = layer.get_submodule("self_attn")
    P, R = 16, 8  # entries of a head, and of the part of latent attention's that turns
    with torch.no_grad():
        if name == "kv_lora_rank":
            attention.get_parameter("kv_a_proj_with_mqa.weight")[:16:2] = 0
            attention.get_parameter("kv_b_proj.weight")[:, ::2] = 0
        elif name == "q_lora_rank":
            attention.get_parameter("q_a_proj.weight")[::2] = 0
        elif name == "v_head_dim":  # the values of a head follow its keys
            attention.get_parameter("o_proj.weight").view(-1, 4, P)[:, :, ::2] = 0
        elif name == "qk_nope_head_dim":  # the part that turns follows the rest
            attention.get_parameter("q_b_proj.weight").view(4, 8 + R, -1)[:, :8:2] = 0
        elif name == "qk_rope_head_dim":  # entry 0 turns with entry 4
            attention.get_parameter("q_b_proj.weight").view(4, 8 + R, -1)[:, 8::2] = 0
        elif family == "qwen3":  # entry 0 turns with entry 8, and all are in the norm
            for part in ("q_proj.weight", "k_proj.weight"):
                attention.get_parameter(part).view(-1, P, 64)[:, ::2] = 0
            attention.get_parameter("o_proj.weight").view(64, -1, P)[:, :, ::2] = 0
        else:  # 8 of 16 turn: entry 0 with entry 4; two of the rest belong to each pair
            dead = torch.tensor([0, 4, 2, 6, 8, 9, 12, 13])
            attention.get_parameter("q_proj.weight").view(-1, P, 64)[:, dead] = 0
            attention.get_parameter("q_proj.bias").view(-1, P)[:, dead] = 0
            attention.get_parameter("dense.weight").view(64, -1, P)[:, :, dead] = 0


@pytest.mark.parametrize("family", sorted(SIZES))
def test_what_is_dead_goes_first_and_changes_nothing(family: str) -> None:
    parent = parent_of(family)
    for name in SIZES[family]:
        kill(parent.layers[0], family, name)
    library = library_of(parent)
    before = forward(parent, TOKENS)[0]
    for axis in library.axes[0].inner:
        order = library.orders[f"0.inner.{axis.name}"]
        assert order.shape == (axis.groups, axis.units)
        assert {unit % 2 for unit in order[:, axis.units // 2 :].flatten().tolist()} == {0}, axis
        with exchanged(parent, library.layers([half_of(library, axis.name)])):
            after = forward(parent, TOKENS)[0]
        torch.testing.assert_close(after, before, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("family", sorted(SIZES))
@torch.no_grad()
def test_a_child_is_what_was_scored_and_its_cache_is_what_was_counted(family: str, tmp_path: Path) -> None:
    parent = parent_of(family)
    library = library_of(parent)
    names = sorted(SIZES[family])
    assert {axis.name for axis in library.axes[0].inner} == SIZES[family]
    chosen = [half_of(library, names[i % len(names)], i) for i in range(len(parent.blocks))]
    with exchanged(parent, library.layers(chosen)):
        scored = forward(parent, TOKENS)[0]
    child = library.compose(chosen)
    assert torch.equal(child(TOKENS, use_cache=False).logits, scored)
    layersmith.save(child, tmp_path / "child")
    again = layersmith.load(tmp_path / "child", dtype=torch.float32).eval()
    assert torch.equal(again(TOKENS, use_cache=False).logits, scored)

    cache = again(TOKENS, use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for slot in cache.layers for t in (slot.keys, slot.values))
    shape = ModelShape(parent.descriptor, parent.config, library.blocks(chosen), library.axes, torch.float32)
    costs, _ = subblock_costs(shape, Workload(batch=TOKENS.shape[0], context=TOKENS.shape[1]))
    assert sum(of_layer["attention"]["kv_cache_bytes"] for of_layer in costs) == held
    text = again.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
    greedy = again(text, use_cache=False).logits[0, TOKENS.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(greedy, text[0, TOKENS.shape[1] :])
    with pytest.raises(CannotExport, match=rf"layer 0 has {names[0]} \d+, and the layout has one such size"):
        export(tmp_path / "child", tmp_path / "padded", "padded")


def test_experts_of_a_latent_have_a_width_and_the_latent_another() -> None:
    config = causal_lm_config(tiny_config("nemotron_h"))
    config.moe_latent_size = 24
    parent = parent_of_config(config, "nemotron_h")
    space = survey(parent, RECIPE)
    moe = parent.blocks[1].ffn.moe
    assert moe is not None
    assert moe.expert_intermediate_dim == config.moe_intermediate_size
    assert [(axis.name, axis.role) for axis in space.axes[1].inner] == [("moe_latent_size", "latent width")]
    assert {a.size for a in space.alternatives if a.kind == "ffn_size"} == {16, 12, 8}


def test_verdicts_say_what_each_size_is_of() -> None:
    parent = parent_of("minicpm3")
    axes = survey(parent, RECIPE).axes[0]
    verdicts = axis_verdicts(axes, parent.blocks[0])
    assert [verdicts[role] for role in ("key head size", "value head size", "rank")] == ["ok"] * 3
    assert verdicts["head size"] == "no attribute of its config sets it alone"


def test_sizes_inside_are_offered_on_request_only() -> None:
    parent = parent_of("minicpm3")
    assert not any(a.kind == "attention_size" for a in survey(parent, LibraryRecipe()).alternatives)
