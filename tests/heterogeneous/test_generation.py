"""A child's caches: every way to feed tokens gives what one full forward gives."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen2ForCausalLM, StaticCache

import layersmith
from layersmith.block_config import has_attention
from layersmith.heterogeneous.patcher import deci_x_patcher
from tests.conftest import FAMILIES, NO_ATTENTION, block, child_model, randomize

LINEAR = {"replace_with_linear": True}
IDS = torch.randint(1, 512, (2, 30), generator=torch.Generator().manual_seed(1))

PATTERNS: dict[str, list[dict[str, Any] | None]] = {
    "parent": [None, None, None, None],
    "first": [NO_ATTENTION, None, None, None],
    "middle": [None, NO_ATTENTION, None, None],
    "last": [None, None, None, NO_ATTENTION],
    "first of each type": [NO_ATTENTION, None, NO_ATTENTION, None],
    "first two": [NO_ATTENTION, NO_ATTENTION, None, None],
    "last two": [None, None, NO_ATTENTION, NO_ATTENTION],
    "all but the first": [None, NO_ATTENTION, NO_ATTENTION, NO_ATTENTION],
    "all but the second": [NO_ATTENTION, None, NO_ATTENTION, NO_ATTENTION],
    "all but the last": [NO_ATTENTION, NO_ATTENTION, NO_ATTENTION, None],
    "linear first": [LINEAR, None, None, None],
    "fewer KV heads": [NO_ATTENTION, {"num_key_value_heads": 1}, {"num_key_value_heads": 2}, None],
}


@pytest.fixture(params=sorted(PATTERNS))
def model(request: pytest.FixtureRequest, family: str) -> Any:
    return child_model(FAMILIES[family](), [block(attention) for attention in PATTERNS[request.param]])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_every_cache_mode(model: Any) -> None:
    full = model(IDS).logits
    caches = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=40),
    }
    for make in caches.values():
        for pieces in ([1] * 30, [7, 1, 1, 9, 12], [30], [15, 15]):
            cache, logits, start = make(), [], 0
            for piece in pieces:
                logits.append(model(IDS[:, start : start + piece], past_key_values=cache, use_cache=True).logits)
                start += piece
                assert int(cache.get_seq_length()) == start
            close(torch.cat(logits, 1), full)


@torch.no_grad()
def test_left_padding(model: Any) -> None:
    short = IDS[:1, 5:17]
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), short], 1)
    ids = torch.cat([padded, IDS[1:, :18]])
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    alone = model.generate(
        short, max_new_tokens=8, min_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(short)
    )
    other = model.generate(
        IDS[1:, :18], max_new_tokens=8, min_new_tokens=8, do_sample=False, attention_mask=torch.ones(1, 18).long()
    )
    assert torch.equal(generated[0, 18:], alone[0, 12:])
    assert torch.equal(generated[1, 18:], other[0, 18:])


@torch.no_grad()
def test_generate_in_every_mode(model: Any) -> None:
    same = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    without_cache = model.generate(IDS, use_cache=False, **same)
    for mode in (
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 4},
        {"num_beams": 1},
    ):
        assert torch.equal(model.generate(IDS, **same, **mode), without_cache), mode


@torch.no_grad()
@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_models_built_under_the_patcher_alone(pattern: str) -> None:
    """With windows in some layers, and without the config that `build` writes, as long as both types remain."""
    config = FAMILIES["qwen2_windows"]()
    blocks = [block(attention) for attention in PATTERNS[pattern]]
    remaining = {t for t, b in zip(config.layer_types, blocks, strict=True) if has_attention(b)}
    if remaining != set(config.layer_types):
        pytest.skip("a type of layer is gone, which only the config can say")
    with deci_x_patcher(layersmith.describe(config), blocks):
        model = randomize(Qwen2ForCausalLM(config)).eval()
    full, cache = model(IDS).logits, DynamicCache(config=config)
    pieces = [
        model(IDS[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 11), (11, 12), (12, 30))
    ]
    close(torch.cat(pieces, 1), full)


def test_model_without_any_attention() -> None:
    model = child_model(FAMILIES["llama"](), [block(NO_ATTENTION)] * 4)
    out = model.generate(IDS, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(IDS))
    assert out.shape == (2, 33)
