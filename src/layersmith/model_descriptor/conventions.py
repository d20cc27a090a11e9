"""Names of other projects that layersmith assumes, in one table.

Almost everything about a model family is inferred by experiment. The names that are assumed are listed here, with their
use and what happens in a family that uses another name.
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

# Read from the config of a model with a third party's descriptor, which does not describe the parent's layers. With
# other names the parent's block configs have no FFN width, and the number of layers is not known.
FFN_WIDTH = "intermediate_size"
NUM_LAYERS = "num_hidden_layers"

# Attributes that say nothing about a model's structure; configs that differ in them alone have the same descriptor.
NOT_STRUCTURE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")

# Attributes that models read when they are built and configs seldom read. A child whose layers differ in nothing that a
# config can say gets one of them as an override, so that stock Transformers stops. Without any, stock Transformers
# stops only at the weights.
READ_BY_MODELS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "hidden_act", "hidden_size")

# How a small config is made of a large one: token ids stay inside the vocabulary, which is cut, and the sections and
# factors of rotary embeddings are divided like the heads. In a family with other names the small model may not run, and
# another divisor is tried.
TOKEN_ID = "_token_id"
TOKEN = "token"
VOCABULARY = "vocab"
ROTARY = "rope"

# --------------------------------------------------------------------------------------- arguments and modules

# What a model may call the cache that it takes and returns, besides `past_key_values`. With another name the checks of
# cached generation give the cache to no one and fail.
CACHES = ("cache", "cache_params", "state", "past_buckets_states")

# The name of an attention module contains one of these. Read only where a linear layer replaced a module that the
# patterns of a third party's descriptor do not match; with another name its weights go to the FFN's group.
ATTENTION = ("attn", "attention")

# Attributes of an attention module: the size of a head, and how many heads of some kind it has. Read where the plan of
# Transformers divides the attention over processes by heads; in a family with other names an attention whose heads
# cannot be shared equally fails when it first runs.
HEAD_SIZE = "head_dim"
HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads")

# Part of the names of a config's attributes that are epsilons of norms. A parent with a smaller hidden size has smaller
# ones; in a family with other names, its norms differ from the parent's in what an epsilon adds.
EPSILON = "eps"
