"""What is a number of query heads and what only behaves like one."""

from __future__ import annotations

import pytest
import torch

import layersmith
from layersmith.library.alternative import Alternative
from layersmith.model_descriptor.infer.descriptor import InferredDescriptor
from tests.conformance.tiny import tiny_config


def found_of(family: str) -> type[InferredDescriptor]:
    descriptor = layersmith.describe(tiny_config(family))
    assert issubclass(descriptor, InferredDescriptor)
    return descriptor


@pytest.mark.parametrize("family", ["cohere2", "lfm2", "qwen3"])
def test_heads(family: str) -> None:
    """With logits that are small, a size that goes along, and a norm of each head."""
    paths = {sizes.query_heads for sizes in found_of(family).findings.sizes}
    assert (("num_attention_heads",),) in paths
    assert paths <= {(("num_attention_heads",),), ()}


def test_heads_that_do_without_their_number_of_keys_only_where_attention_is_fused() -> None:
    """In latent attention the number of KV heads that the config says sets no shape; plain attention divides by it."""
    config = tiny_config("deepseek_v3")
    paths = {sizes.query_heads for sizes in found_of("deepseek_v3").findings.sizes}
    assert paths == {(("num_attention_heads",), ("num_key_value_heads",))}
    blocks = layersmith.block_configs(config)
    blocks[1] = Alternative(1, "attention", "head_groups", size=3, query_heads=3).block_config(blocks[1])
    model = layersmith.build(config, blocks).eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        fused = model(ids, use_cache=False).logits
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = "eager"
        assert torch.allclose(model(ids, use_cache=False).logits, fused, atol=1e-5)


def test_heads_in_blocks_and_ranks_are_no_heads() -> None:
    """Its queries and its output both come from latents whose entries can be there twice as well."""
    descriptor = found_of("deepseek_v4")
    assert {sizes.query_heads for sizes in descriptor.findings.sizes} == {(("num_attention_heads",),)}
    assert {sizes.head_blocks for sizes in descriptor.findings.sizes} == {2}


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(3, 3, 16), (3, 1, 16), (2, 1, 24)])
def test_heads_of_odd_numbers_and_of_any_size(heads: int, kv_heads: int, size: int) -> None:
    config = tiny_config("qwen2")
    config.num_attention_heads, config.num_key_value_heads, config.hidden_size = heads, kv_heads, heads * size
    descriptor = layersmith.describe(config)
    assert issubclass(descriptor, InferredDescriptor)
    (sizes,) = descriptor.findings.sizes
    assert sizes.kv_heads == ("num_key_value_heads",)
    assert (sizes.query_heads, sizes.head_size) == ((("num_attention_heads",),), (("head_dim",), size))


def test_layers_that_are_built_alike_may_be_sized_by_other_attributes() -> None:
    """Layers with a window read other attributes for their heads; the full model shows which layers these are."""
    config = tiny_config("inkling_text")
    small = found_of("inkling_text").findings
    names = [(sizes.kv_heads, sizes.query_heads) for sizes in small.sizes]
    windowed = (("swa_num_key_value_heads",), (("swa_num_attention_heads",),))
    full = (("num_key_value_heads",), (("num_attention_heads",),))
    assert sorted(set(names)) == [full, windowed]
    types = config.layer_types
    assert [names[k] == windowed for k in small.of_layer] == ["sliding" in layer_type for layer_type in types]
    for name, by_layer in vars(config).items():
        if isinstance(by_layer, list) and len(by_layer) == len(types):
            setattr(config, name, [*by_layer[::-1], *by_layer, *by_layer])
    config.num_hidden_layers = len(config.layer_types)
    config.num_key_value_heads, config.num_attention_heads, config.vocab_size = 4, 8, 300_000
    descriptor = layersmith.describe(config)
    assert issubclass(descriptor, InferredDescriptor)
    large = descriptor.findings
    for k, layer_type in zip(large.of_layer, config.layer_types, strict=True):
        assert (large.sizes[k].kv_heads, large.sizes[k].query_heads) == (windowed if "sliding" in layer_type else full)
    counts = [block.attention.num_key_value_heads for block in layersmith.block_configs(config)]
    assert counts == [2 if "sliding" in layer_type else 4 for layer_type in config.layer_types]


def test_the_experiment_that_refuted_a_number_is_kept() -> None:
    """Norms over all heads at once do not run with more of them."""
    (sizes,) = found_of("helium").findings.sizes
    assert sizes.query_heads == ()
    (outcome,) = [outcome for outcome in sizes.outcomes if outcome.reason == sizes.no_query_heads]
    assert "num_attention_heads" in outcome.question
    assert not outcome.held
