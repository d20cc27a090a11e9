"""The interface of the spec: names, kinds, meanings."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import layersmith
from layersmith import ModelDescriptor
from layersmith.errors import UnsupportedModel
from layersmith.model_descriptor import base
from layersmith.model_descriptor.factory import ModelDescriptorFactory
from tests.conftest import FAMILIES, stock_model

# name -> (kind, abstract, parameters)
INTERFACE = {
    "attn_no_op_post_init": (staticmethod, False, ["decoder_layer"]),
    "attn_no_op_supported": (classmethod, False, []),
    "block_config_to_layer_overrides": (staticmethod, True, ["block_config"]),
    "create_dummy_block": (classmethod, False, ["original_layer", "block_index"]),
    "decoder_layer_cls": (staticmethod, True, []),
    "final_norm_name": (staticmethod, True, []),
    "get_language_model_config": (staticmethod, False, ["config"]),
    "get_weight_groups": (classmethod, False, ["layer_names", "num_hidden_layers"]),
    "init_rotary_embedding": (staticmethod, True, ["model", "runtime"]),
    "input_embedding_name": (staticmethod, True, []),
    "layer_block_name": (staticmethod, True, ["index"]),
    "layer_name_predicates": (staticmethod, True, ["num_layers"]),
    "mlp_no_op_post_init": (staticmethod, False, ["decoder_layer"]),
    "mlp_no_op_supported": (classmethod, False, []),
    "output_embedding_name": (staticmethod, True, []),
    "requires_trust_remote_code": (staticmethod, False, []),
    "uses_autocast": (staticmethod, False, []),
}


@pytest.mark.parametrize("name", INTERFACE)
def test_every_method_has_its_kind(name: str) -> None:
    kind, abstract, parameters = INTERFACE[name]
    member = vars(ModelDescriptor)[name]
    assert isinstance(member, kind)
    assert (name in ModelDescriptor.__abstractmethods__) == abstract
    assert list(inspect.signature(getattr(ModelDescriptor, name)).parameters) == parameters


def test_nothing_else_is_public() -> None:
    assert {name for name in vars(ModelDescriptor) if not name.startswith("_")} == set(INTERFACE)
    assert base.ModelDescriptor is layersmith.ModelDescriptor


def test_matches_the_shared_spec() -> None:
    spec = Path(__file__).parents[3] / "shared" / "spec" / "model_descriptor.txt"
    if not spec.is_file():
        pytest.skip("the shared specification is not beside this checkout")
    methods = re.findall(r"((?:abstract )?(?:static|classmethod)) (\w+)\(", spec.read_text())
    kinds = {name: kind for kind, name in methods}
    assert set(kinds) == set(INTERFACE)
    for name, (kind, abstract, _) in INTERFACE.items():
        word = "static" if kind is staticmethod else "classmethod"
        assert kinds[name] == ("abstract " if abstract else "") + word


def test_no_op_support_follows_overriding() -> None:
    class WithoutAttention(layersmith.describe(FAMILIES["llama"]())):  # type: ignore[misc]
        attn_no_op_post_init = staticmethod(ModelDescriptor.attn_no_op_post_init)

    assert not WithoutAttention.attn_no_op_supported()
    assert WithoutAttention.mlp_no_op_supported()


def test_every_parameter_is_in_one_group(family: str) -> None:
    model = stock_model(FAMILIES[family]())
    descriptor = layersmith.describe(model)
    groups = descriptor.get_weight_groups(model.state_dict(), 4)
    names = [name for members in groups.values() for name in members]
    assert sorted(names) == sorted(model.state_dict())
    assert set(groups) == {"embedding", "lm_head", *(f"block_{i}_{s}" for i in range(4) for s in ("attention", "ffn"))}
    assert "model.norm.weight" in groups["lm_head"]
    assert all(name.startswith("model.layers.2.") for name in groups["block_2_ffn"])


def test_a_name_without_a_group_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.9"):
        layersmith.describe(FAMILIES["llama"]()).get_weight_groups(["model.layers.9.mlp.up_proj.weight"], 4)


def test_names_are_modules_of_the_model(family: str) -> None:
    model = stock_model(FAMILIES[family]())
    descriptor = layersmith.describe(model)
    assert isinstance(model.get_submodule(descriptor.layer_block_name(1)), descriptor.decoder_layer_cls())
    assert model.get_submodule(descriptor.input_embedding_name()) is model.get_input_embeddings()
    assert model.get_submodule(descriptor.output_embedding_name()) is model.get_output_embeddings()
    assert isinstance(model.get_submodule(descriptor.final_norm_name()), nn.Module)


def test_rotary_embedding_is_made_anew(family: str) -> None:
    config = FAMILIES[family]()
    real = stock_model(config)
    descriptor = layersmith.describe(config)
    meta = layersmith.build(config, layersmith.block_configs(config), device="meta")
    meta.load_state_dict(real.state_dict(), assign=True)

    class OnCPU:
        device = torch.device("cpu")
        dtype = torch.float32

    descriptor.init_rotary_embedding(meta, OnCPU())
    ids = torch.arange(12)[None]
    assert torch.equal(meta.eval()(ids).logits, real(ids).logits)


def test_factory() -> None:
    llama = ModelDescriptorFactory.get("llama")
    assert llama.layer_block_name(3) == "model.layers.3"
    assert ModelDescriptorFactory.get(llama) is llama
    with pytest.raises(UnsupportedModel, match="Did you mean 'mistral'"):
        ModelDescriptorFactory.get("mistrall")

    @ModelDescriptorFactory.register_decorator("a_new_family")
    class New(llama):  # type: ignore[misc, valid-type]
        pass

    assert ModelDescriptorFactory.get("a_new_family") is New
