import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import layersmith
from layersmith import ModelDescriptor
from layersmith.errors import UnsupportedModel, UsageError
from layersmith.heterogeneous.no_op import MatchingZeros, Same, return_tuple_of_size
from layersmith.heterogeneous.patcher import deci_x_patcher
from tests.conftest import FAMILIES, NO_ATTENTION, block, child_model, stock_model

IDS = torch.arange(20)[None] * 7 % 512


def test_no_op_modules() -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(MatchingZeros()(x), torch.zeros_like(x))
    assert torch.equal(MatchingZeros()(hidden_states=x, attention_mask=None), torch.zeros_like(x))
    assert Same()(x) is x
    out = return_tuple_of_size(MatchingZeros, size=3)()(x)
    assert len(out) == 3
    assert out[1:] == (None, None)
    assert torch.equal(out[0], torch.zeros_like(x))


def test_each_layer_has_its_own_config_and_the_models_stays() -> None:
    config = FAMILIES["llama"]()
    blocks = [block({"num_key_value_heads": 2}), block(NO_ATTENTION), block(None, {"intermediate_size": 16}), block()]
    before = config.to_dict()
    descriptor = layersmith.describe(config)
    with deci_x_patcher(descriptor, blocks):
        model = LlamaForCausalLM(config)
    assert config.to_dict() == before
    layers = model.model.layers
    assert layers[0].self_attn.k_proj.weight.shape[0] == 2 * 16
    assert not list(layers[1].self_attn.parameters())
    assert layers[2].mlp.up_proj.weight.shape[0] == 16
    assert layers[3].self_attn.k_proj.weight.shape[0] == 4 * 16


def test_leaves_no_trace() -> None:
    descriptor = layersmith.describe(FAMILIES["llama"]())
    cls = descriptor.decoder_layer_cls()
    original = cls.__init__
    with deci_x_patcher(descriptor, [block()] * 4):
        assert cls.__init__ is not original
    assert cls.__init__ is original
    with pytest.raises(RuntimeError, match="on purpose"), deci_x_patcher(descriptor, [block()] * 4):
        raise RuntimeError("on purpose")
    assert cls.__init__ is original


def test_an_inherited_constructor_stays_inherited() -> None:
    llama = layersmith.describe(FAMILIES["llama"]())

    class Derived(llama.decoder_layer_cls()):  # type: ignore[misc]
        pass

    class Descriptor(llama):  # type: ignore[misc, valid-type]
        @staticmethod
        def decoder_layer_cls() -> list[type[nn.Module]]:
            return [Derived, llama.decoder_layer_cls()]

    with deci_x_patcher(Descriptor, [block(None, {"intermediate_size": 16})]):
        layer = Derived(FAMILIES["llama"](), 0)
    assert layer.mlp.up_proj.weight.shape[0] == 16
    assert "__init__" not in vars(Derived)


def test_no_op_equals_the_residual(family: str) -> None:
    """Removing a subblock is the same as zeroing the weights of its last projection."""
    config = FAMILIES[family]()
    parent = stock_model(config)
    for subblock, projection in (("attention", "self_attn.o_proj"), ("ffn", "mlp.down_proj")):
        for index in range(4):
            blocks = layersmith.block_configs(config)
            blocks[index] = block(NO_ATTENTION) if subblock == "attention" else block(None, {"no_op": True})
            child = child_model(config, blocks)
            child.load_state_dict({n: t for n, t in parent.state_dict().items() if n in child.state_dict()})
            zeroed = stock_model(config)
            output = zeroed.model.layers[index].get_submodule(projection)
            with torch.no_grad():
                for parameter in output.parameters():
                    parameter.zero_()
            assert torch.equal(child(IDS).logits, zeroed(IDS).logits)


def test_full_size_blocks_are_the_stock_model(family: str) -> None:
    config = FAMILIES[family]()
    parent = stock_model(config)
    child = layersmith.build(config, layersmith.block_configs(config)).eval()
    child.load_state_dict(parent.state_dict())
    assert torch.equal(child(IDS).logits, parent(IDS).logits)


def test_a_descriptor_without_a_no_op_says_so() -> None:
    llama = layersmith.describe(FAMILIES["llama"]())

    class NoNoOps(llama):  # type: ignore[misc, valid-type]
        attn_no_op_post_init = staticmethod(ModelDescriptor.attn_no_op_post_init)

    with pytest.raises(UnsupportedModel, match="no attention no-op"):
        layersmith.build(FAMILIES["llama"](), [block(NO_ATTENTION)] + [block()] * 3, descriptor=NoNoOps)


def test_wrong_number_of_blocks() -> None:
    with pytest.raises(UsageError, match="3 block configs for the 4 layers"):
        layersmith.build(FAMILIES["llama"](), [block()] * 3)


def test_implementations_of_attention_and_experts_reach_every_layer() -> None:
    config = FAMILIES["llama"]()
    child = child_model(config, [block({"num_key_value_heads": 2})] * 4)
    sdpa = child(IDS).logits
    child.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in child.model.layers} == {"eager"}
    child.set_experts_implementation("eager")
    assert {layer.self_attn.config._experts_implementation for layer in child.model.layers} == {"eager"}
    torch.testing.assert_close(child(IDS).logits, sdpa, rtol=1e-4, atol=1e-4)
