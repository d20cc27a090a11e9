"""Attentions whose keys and values have a number format in the KV cache."""

from pathlib import Path

import pytest
import torch

import layersmith
from layersmith.block_config import AttentionConfig, BlockConfig
from layersmith.errors import LayersmithError
from layersmith.export.run import export
from layersmith.modeling_layersmith import rounded_cache
from layersmith.quantization.formats import KV_FORMATS
from tests.conformance.tiny import tiny_config
from tests.conftest import child_model, stock_model

IDS = torch.arange(3, 15)[None]


@pytest.mark.parametrize(("name", "error"), [("fp8", 0.04), ("int4", 0.06)])
def test_rounded_numbers_have_few_levels_and_full_gradients(name: str, error: float) -> None:
    x = torch.randn(2, 3, 5, 64, requires_grad=True)
    made = rounded_cache(x, name)
    assert 0 < float((made - x).detach().norm() / x.detach().norm()) < 2 * error
    if name == "int4":
        assert max(len(head.unique()) for head in made.detach().reshape(-1, 64)) <= 16
        assert torch.equal(made[..., 0, :], rounded_cache(x[..., 0, :], name))  # each token by itself
    made.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    with pytest.raises(ValueError, match="no KV cache has the number format int3"):
        rounded_cache(x, "int3")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("name", KV_FORMATS)
def test_a_child_computes_with_it(family: str, name: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    blocks = list(layersmith.block_configs(config))
    parent = stock_model(config)
    blocks[1] = BlockConfig(
        AttentionConfig(**{**blocks[1].attention.to_dict(), "kv_cache_format": name}), blocks[1].ffn
    )
    child = child_model(config, blocks)
    with torch.no_grad():
        whole, plain = child(input_ids=IDS).logits, parent(input_ids=IDS).logits
        assert float((whole - plain).abs().max()) > 0
        cache, steps = None, []
        for token in IDS[0]:
            out = child(input_ids=token[None, None], past_key_values=cache, use_cache=True)
            cache, steps = out.past_key_values, [*steps, out.logits]
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    layersmith.save(child, tmp_path / "child")
    again = layersmith.load(tmp_path / "child")
    assert layersmith.block_configs(again.config)[1].attention.kv_cache_format == name
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, whole)
    with pytest.raises(LayersmithError, match="layers 1: their KV caches have number formats"):
        export(tmp_path / "child", tmp_path / "export", "padded")
