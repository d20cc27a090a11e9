"""Full sizes that do not go together once each is divided by the same number."""

from __future__ import annotations

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layersmith.model_descriptor.infer.shrink import shrunk
from layersmith.model_descriptor.stock import stock_model


@pytest.mark.parametrize(
    "model_type",
    [
        "falcon_h1",  # a mixer whose size is 128 heads of 8
        "falcon",  # 71 heads of 64
        "helium",  # 20 heads of 128, which are as long as the hidden states: neither both nor one can be divided much
    ],
)
def test_a_smaller_model_of_the_same_layers_is_found(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    small = stock_model(shrunk(config, stock_model(config)))
    assert sum(p.numel() for p in small.parameters()) < 30_000_000


def test_a_narrow_model_with_a_few_large_numbers_becomes_small() -> None:
    """Among them are those of layers that differ from the rest, in ``per_layer_config``."""
    cls = CONFIG_MAPPING["dots3_note_text"]
    patterns = {name: getattr(cls(), name)[:4] for name in ("layer_types", "mlp_layer_types")}
    config = cls(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, **patterns,
    )  # fmt: skip
    small = stock_model(shrunk(config, stock_model(config)))
    assert sum(p.numel() for p in small.parameters()) < 3_000_000
