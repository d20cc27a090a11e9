"""Names of other projects that layersmith assumes, in one table.

Almost everything about a model family is found by experiment. Where a name is assumed all the same, it is listed here,
with what layersmith uses it for and what happens in a family that uses another name.
"""

from __future__ import annotations

# --------------------------------------------------------------------------------------- attributes of configs

# Read only to explain a refusal, and to try a number that changes no shape: which attribute a reader would expect to be
# the number of key-value heads or of query heads. A family with another name gets a less specific reason.
KV_HEADS = "num_key_value_heads"
QUERY_HEADS = "num_attention_heads"

# Whole numbers that never set a size of a layer. Others like them only cost time: their experiments show no effect.
NOT_SIZES = ("_token_id", "dtype")

# Names the attributes that a Transformers config lets differ from layer to layer, in `per_layer_config`.
PER_LAYER = "per_layer_attributes"
