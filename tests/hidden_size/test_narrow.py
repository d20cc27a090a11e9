"""Narrow parents: which channels and heads stay, refitted maps, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import layersmith
from layersmith.errors import UnsupportedModel
from layersmith.execution.parent import Parent, load_parent
from layersmith.hidden_size.channels import by_activations, by_second_order, head_importance, norms_of
from layersmith.hidden_size.narrow import Narrower, check_narrow, refit, why_not, write
from layersmith.hidden_size.narrowing import Kept
from layersmith.hidden_size.prove import prove_narrowing
from layersmith.run.runtime import Runtime
from tests.conformance.tiny import tiny_config, tiny_model
from tests.conftest import randomize

ROWS = torch.randint(5, 90, (6, 24), generator=torch.Generator().manual_seed(0)).split(2)


def nothing(steps: float, left: float | None = None, said: str = "") -> None:
    pass


def parent_of(model_type: str) -> Parent:
    model: Any = randomize(tiny_model(tiny_config(model_type))).eval().requires_grad_(False)
    blocks = tuple(layersmith.block_configs(model.config))
    runtime = Runtime(torch.device("cpu"), torch.float32)
    return Parent("", model, torch.float32, layersmith.describe(model.config), blocks, "", runtime)


@pytest.fixture(scope="module")
def llama() -> Narrower:
    parent = parent_of("llama")
    return Narrower.of(parent, prove_narrowing(parent.config), 48)


def test_dead_channels_are_the_least_important(llama: Narrower) -> None:
    parent, norms = llama.parent, norms_of(llama.parent.model, llama.carriers)
    assert len(norms) == 9  # two in each of four layers, and the last
    dead = torch.tensor([3, 20, 41])
    before = {c.name: parent.model.state_dict()[c.name].clone() for c in llama.carriers}
    with torch.no_grad():
        for carrier in llama.carriers:
            parent.model.state_dict()[carrier.name].index_fill_(carrier.dim, dead, 0)
    for importance in (
        by_activations(parent, norms, ROWS, nothing),
        by_second_order(parent, norms, ROWS, 0, nothing),
    ):
        assert importance.shape == (64,)
        assert sorted(importance.argsort()[:3].tolist()) == dead.tolist()
        assert float(importance[dead].abs().max()) == 0 < float(importance.sort().values[3])
    again = by_second_order(parent, norms, ROWS, 0, nothing)
    assert torch.equal(again, importance)
    parent.model.load_state_dict(before, strict=False)


def test_refitted_maps_are_nearer_to_what_the_parent_gives(llama: Narrower) -> None:
    kept = Kept(torch.arange(48))
    plain, refitted = llama.model(kept), llama.model(kept)
    assert refit(llama, refitted, kept, ROWS, nothing) == 4 * 5 + 1  # q, k, v, gate and up of every layer, and the head
    name, seen = "model.layers.2.self_attn.v_proj", list[torch.Tensor]()
    norm = llama.parent.model.get_submodule("model.layers.2.input_layernorm")
    handle = norm.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    with torch.no_grad():
        llama.parent.model(input_ids=torch.cat(ROWS))
        expected = llama.parent.model.get_submodule(name)(seen[1])
        errors = []
        for model in (plain, refitted):
            given = model.get_submodule("model.layers.2.input_layernorm")(seen[0][..., :48])
            errors.append(float((model.get_submodule(name)(given) - expected).square().mean()))
    handle.remove()
    assert errors[1] < 0.9 * errors[0]


def test_a_narrow_parent_is_an_ordinary_checkpoint(llama: Narrower, tmp_path: Path) -> None:
    narrower = replace(llama, parent=replace(llama.parent, dtype=torch.bfloat16))
    model = narrower.model(Kept(torch.arange(48)))
    write(narrower, model, tmp_path)
    parent = load_parent(tmp_path, Runtime(torch.device("cpu"), torch.float32))
    assert (parent.dtype, parent.config.hidden_size, parent.config.head_dim) == (torch.bfloat16, 48, 16)
    assert parent.blocks == llama.parent.blocks
    ids = torch.arange(400)[None] % parent.config.vocab_size  # at late positions, rotary frequencies matter most
    assert torch.equal(model(input_ids=ids).logits, parent.model(input_ids=ids).logits)
    assert not (tmp_path / "modeling_layersmith.py").exists()


def test_heads_that_follow_the_hidden_size_go_by_their_importance() -> None:
    parent = parent_of("gpt_bigcode")
    narrower = Narrower.of(parent, prove_narrowing(parent.config), 48)
    assert (narrower.heads, narrower.heads_left) == (4, 3)
    with torch.no_grad():
        parent.model.get_submodule("transformer.h.1.attn.c_proj").weight[:, 32:48] = 0
    importance = head_importance(parent, narrower.carriers, ROWS, nothing)
    assert sorted(importance) == [0, 1, 2, 3]
    assert int(importance[1].argmin()) == 2
    assert float(importance[1][2]) == 0
    heads = {layer: of_layer.argsort(descending=True)[:3].sort().values for layer, of_layer in importance.items()}
    model = narrower.model(Kept(torch.arange(48), heads))
    assert model.config.n_head == 3
    assert torch.isfinite(model(input_ids=ROWS[0]).logits).all()
    assert "a multiple of that" in why_not(parent, narrower.narrowing, 40)


def test_a_parent_whose_layers_differ_is_refused(llama: Narrower) -> None:
    parent = llama.parent
    check_narrow(parent)
    parent.model.config.block_configs = [block.to_dict() for block in parent.blocks]
    with pytest.raises(UnsupportedModel, match="its layers differ"):
        check_narrow(parent)
    del parent.model.config.block_configs
