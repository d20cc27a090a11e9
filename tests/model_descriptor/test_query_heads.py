"""What is a number of query heads and what only behaves like one."""

from __future__ import annotations

import pytest

import layersmith
from layersmith.model_descriptor.inferred import InferredDescriptor
from tests.conformance.tiny import tiny_config


def found_of(family: str) -> type[InferredDescriptor]:
    descriptor = layersmith.describe(tiny_config(family))
    assert issubclass(descriptor, InferredDescriptor)
    return descriptor


@pytest.mark.parametrize("family", ["cohere2", "deepseek_v3", "lfm2", "qwen3"])
def test_heads(family: str) -> None:
    """With logits that are small, a latent of queries, a size that goes along, and a norm of each head."""
    found = {sizes.query_heads for sizes in found_of(family).findings.sizes}
    assert (("num_attention_heads",),) in found
    assert found <= {(("num_attention_heads",),), ()}


def test_heads_in_groups_are_not_sliced_and_ranks_are_no_heads() -> None:
    """Its queries and its output both come from latents whose entries can be there twice as well."""
    descriptor = found_of("deepseek_v4")
    assert {sizes.query_heads for sizes in descriptor.findings.sizes} == {()}
    assert descriptor.why_no_query_heads(0) == (
        "its heads end in groups of self_attn.o_a_proj.weight, each of which reads other heads by the same entries"
    )
