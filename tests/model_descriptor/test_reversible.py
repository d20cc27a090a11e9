"""Reversible layers: two residual streams, no gradients outside training, outputs by name, a cache without gaps."""

from __future__ import annotations

import pytest
import torch

import layersmith
from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig
from layersmith.model_descriptor.infer.descriptor import InferredDescriptor
from layersmith.model_descriptor.infer.specimen import Specimen
from tests.conformance.tiny import tiny_config, tiny_model

CONFIG = tiny_config("reformer")
IDS = torch.randint(5, 90, (2, 20), generator=torch.Generator().manual_seed(2))


def child_without(attentions: set[int], ffns: set[int]) -> torch.nn.Module:
    blocks = [
        BlockConfig(
            AttentionConfig(no_op=True) if i in attentions else block.attention,
            FFNConfig(no_op=True) if i in ffns else block.ffn,
        )
        for i, block in enumerate(layersmith.block_configs(CONFIG))
    ]
    child = layersmith.build(CONFIG, blocks, dtype=torch.float32)
    weights = tiny_model(CONFIG).state_dict()
    child.load_state_dict({name: weights[name] for name in child.state_dict()})
    return child.eval()


def test_a_branch_that_is_gone_adds_zero_to_its_stream() -> None:
    descriptor = layersmith.describe(CONFIG)
    assert issubclass(descriptor, InferredDescriptor)
    assert descriptor.appends_to_cache()
    parent = tiny_model(CONFIG)
    child = child_without({0, 2}, {1, 2})
    assert not any(name.startswith("reformer.encoder.layers.2.") for name in child.state_dict())
    layers = "reformer.encoder.layers"
    silent = dict.fromkeys(f"{layers}.{i}.attention" for i in (0, 2)) | dict.fromkeys(
        f"{layers}.{i}.feed_forward" for i in (1, 2)
    )
    with torch.no_grad():
        with Specimen.silenced_in(parent, silent):
            wanted = parent(input_ids=IDS, use_cache=False).logits
        assert torch.equal(child(input_ids=IDS, use_cache=False).logits, wanted)


@pytest.mark.parametrize("gone", [{0}, {1}, {1, 2}, {0, 3}])
def test_later_layers_move_up_in_the_cache(gone: set[int]) -> None:
    child = child_without(gone, set())
    with torch.no_grad():
        full = child(input_ids=IDS, use_cache=False).logits
        cache, seen = None, []
        for piece in (IDS[:, :7], *IDS[:, 7:].split(1, dim=1)):
            output = child(input_ids=piece, past_buckets_states=cache, use_cache=True)
            cache = output.past_buckets_states
            seen.append(output.logits[:, -1])
    assert len(cache.states_cache) == len(CONFIG.attn_layers) - len(gone)
    assert torch.allclose(torch.stack(seen, 1), full[:, 6:], atol=1e-4, rtol=1e-4)
