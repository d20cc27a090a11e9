"""Tiny random models of every family, made from the family's own config class.

The sizes are chosen by attribute names that most families share; ``SPECIAL`` has what a family's text model needs
beside them, ``PARTS`` what its vision, audio and other parts need. This is test data: layersmith itself knows none of
it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
)

LAYERS = 4
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim_model": 64,
    "dim": 64,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "decoder_layers": LAYERS,
    # Not fewer than the decoder's: a cache made for an encoder-decoder's config has as many layers as the encoder.
    "encoder_layers": LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "multi_query_group_num": 2,
    "head_dim": 16,
    "dim_head": 16,
    "kv_channels": 16,
    "attention_head_dim": 16,
    "global_head_dim": 16,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "dim_ff": 96,
    "n_inner": 96,
    "ffn_hidden_size": 96,
    "d_ff": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "block_ff_dim": 96,
    "block_dim": 64,
    "intermediate_size_mlp": 96,
    "moe_intermediate_size": 32,
    "expert_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "shared_experts_intermediate_size": 48,
    "share_expert_dim": 48,
    "moe_hidden_size": 64,
    "shared_intermediate_size": 48,
    "expert_ffn_hidden_size": 32,
    "moe_ffn_hidden_size": 32,
    "ffn_intermediate_size": 96,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "num_experts_per_token": 2,
    "moe_top_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "moe_layer_freq": 1,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_seq_len": 256,
    "seq_length": 256,
    "n_ctx": 256,
    "sliding_window": 12,  # shorter than the texts of the checks
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "attention_window_size": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_d_ssm": 128,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "n_mamba_heads": 2,
    "mamba_headdim": 16,
    "mamba_ngroups": 1,
    "mamba_dt_rank": 8,
    "state_size": 8,
    "time_step_rank": 8,
    "lru_width": 64,
    "expand": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 99,
    "rotary_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_mels": 8,
    "word_embed_proj_dim": 64,
    "num_nextn_predict_layers": 0,
    "router_hidden_size": 16,
}

# Of vision and audio towers, which do not run here; they are only in the way of a quick build.
TOWER: dict[str, Any] = {
    "depth": 2,
    "num_hidden_layers": 2,
    "embed_dim": 64,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "output_dim": 64,
    "encoder_embed_dim": 64,
    "projection_dim": 64,
    "projector_hidden_size": 64,
    "projection_hidden_dim": 64,
    "projection_hidden_size": 64,
    "projection_intermediate_size": 96,
    "base_channels": 32,
    "latent_channels": 32,
    "num_embeddings": 64,
    "num_blocks": 2,
    "nemo_conv_channels": 64,
    "ext_pw_out_channel": 64,
    "depthwise_separable_out_channel": 64,
}

# What a family needs beside, or instead of, the shared sizes.
_MLA = {"num_key_value_heads": 4}
_TWO_TYPES = ["sliding_attention", "full_attention"] * 2
_GEMMA4 = {"layer_types": _TWO_TYPES, "per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}}}
_GEMMA3N = {
    "layer_types": _TWO_TYPES,
    "num_kv_shared_layers": 2,
    "intermediate_size": [96] * 4,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
}
_DOTS3 = _MLA | {
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "head_dim": 16,
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 8,  # the scores of few are often zero alike, and which of equals is chosen is open
    "per_layer_config": {
        "1": {"num_attention_heads": 2, "num_key_value_heads": 2},
        "3": {"num_attention_heads": 2, "num_key_value_heads": 2},
    },
}
_KOSMOS = {"layers": LAYERS, "embed_dim": 64}
_COMPASS = {
    "rope_parameters": {k: {"rope_type": "default", "rope_theta": 1e4} for k in _TWO_TYPES},
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}
_NEMOTRON = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "n_groups": 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
}
# Layers that choose tokens for those after them, which pass the choice on.
_SHARED_CHOICE = {
    "indexer_types": ["full", "full", "shared", "shared"],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
}
_INKLING2 = {"unpadded_vocab_size": 99}
# Layers 1 and 2 of 4 run in a loop.
_INKLING2_LOOP = _INKLING2 | {
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    "n_layers_per_attn_res_block": 1,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 3,
    "loop_gate_rank": 8,
}
_LFM2 = {"layer_types": ["conv", "full_attention"] * 2}
_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "hc_lowrank": 8,
    "hc_count": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}


def _mrope(*sections: int) -> dict[str, Any]:
    """The parts of a head that turn with time, height and width; the families' defaults are for wider heads."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm4v", "glm46v", "glm_ocr", "glmga", "qwen2_vl", "qwen2_5_vl"), _mrope(2, 3, 3)),
    **dict.fromkeys(("paddleocr_vl", "qwen2_5_omni_thinker", "cosmos3_edge", "ernie4_5_vl_moe"), _mrope(3, 3, 2)),
    "glm4v_moe": _mrope(1, 1, 2),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), _KOSMOS),
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "deepseek_ocr2": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"] * 2},
    "diffusion_gemma": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "longcat_flash": _MLA | {"head_dim": 8, "zero_expert_num": 2, "n_routed_experts": 8, "moe_topk": 4},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 16},
    "falcon_h1": {"ssm_multipliers": [0.7, 1.3, 0.6, 1.5, 0.8]},
    "mistral4": _MLA,
    **dict.fromkeys(("axk1", "deepseek_v3", "kimi_k25", "sarvam_mla", "youtu"), _MLA | {"head_dim": 8}),
    **dict.fromkeys(("axk2", "deepseek_v32", "minicpm3", "kimi_linear", "glm4_moe_lite"), _MLA),
    "glm_moe_dsa": _MLA | _SHARED_CHOICE,
    "mistral_large4": _MLA | {"head_dim": 8},
    "glm5_next": _MLA
    | {
        "head_dim": 0,
        "qk_rope_head_dim": 0,
        "qk_nope_head_dim": 16,
        "index_topk": 8,
        "index_kpool": 2,
        "index_head_dim": 16,
        "index_n_heads": 8,  # the scores of few are often zero alike, and which of equals is chosen is open
        "linear_num_heads": 4,
        "linear_head_dim": 16,
    },
    "hunyuan_vl": _mrope(2, 2, 2, 2) | {"head_dim": 16},
    "step3p7": {"sliding_window": 32, "num_sliding_attention_heads": 8},
    **dict.fromkeys(("gemma4_text", "gemma4", "gemma4_unified", "gemma4_unified_text"), _GEMMA4),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        _GEMMA4 | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": LAYERS},
    ),
    **dict.fromkeys(("dots3_note", "dots3_note_text"), _DOTS3),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), _QWEN4),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), _GEMMA3N),
    "bailing_hybrid": _MLA
    | {
        "num_expert_group": 2,
        "num_experts": 8,
        "topk_group": 1,
        "linear_num_heads": 4,
        "linear_head_dim": 16,
        "num_experts_per_token": 2,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "head_dim": 8,
    },
    **dict.fromkeys(("cohere_compass", "cohere_compass_text"), _COMPASS),
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm2_vl"), _LFM2),
    **dict.fromkeys(("nemotron_h", "nemotron_h_omni"), _NEMOTRON),
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "adapter_rank": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "cwm": {"eos_token_id": 2},
    **dict.fromkeys(("inkling2_loop", "inkling2_loop_text"), _INKLING2_LOOP),
    **dict.fromkeys(("inkling2", "inkling2_text"), _INKLING2),
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "layer_types": _TWO_TYPES},
    "hy_v4": _SHARED_CHOICE,
    "hy_v4_vl": _mrope(2, 1, 1) | _SHARED_CHOICE | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 8},
    "diffllama": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "deepseek_v2": _MLA | {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"] * LAYERS},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xlm": {"n_words": 99, "emb_dim": 64},
}

# What the parts beside the text model need; "" is the config itself.
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "chameleon": {"": {"vocabulary_map": {"<image>": 98}}},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64, "moe_intermediate_size": 32},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 16},
    },
    "kosmos-2.5": {"": {"latent_query_num": 8}},
    "florence2": {
        "vision_config": {
            "depths": [1] * 4,
            "embed_dim": [16] * 4,
            "num_heads": [2] * 4,
            "num_groups": [2] * 4,
            "projection_dim": 64,
        }
    },
    "muse_glimmer": {"": {"projector_hidden_size": 64, "out_hidden_size": 256}},
    "blt": {"": {"encoder_hash_byte_group_vocab": 64}},
    "granite4_vision": {"": {"downsample_rate": "4/8", "deepstack_layer_map": [[0, 0], [1, 1]]}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0, 1], "text_hidden_size": 64}},
    "muse_spark": {
        "audio_config": {
            "patch_sizes": [16, 6, 5, 4],
            "hidden_sizes": [8, 16, 32, 64],
            "depths": [1, 1, 1, 1],
            "num_hidden_layers": 4,
            "out_hidden_size": 64,
        },
        "": {"projector_hidden_size": 64, "out_hidden_size": 256},
    },
    "inkling_mm_model": {"vision_config": {"patch_size": 8}},
    "nemotron_h_omni": {"": {"projector_hidden_size": 64}, "vision_config": {"video_temporal_patch_size": 2}},
}

# Without these not even a default config can be made.
PARTS_OF_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """A config of ``model_type`` with a few narrow layers, of every kind of layer that its default has."""
    return _shrunk(CONFIG_MAPPING[model_type], SPECIAL.get(model_type, {}), PARTS.get(model_type, {}))


def _shrunk(
    cls: type[PretrainedConfig], special: dict[str, Any], parts: dict[str, Any], own_fields: Sequence[str] = ()
) -> PretrainedConfig:
    """A config of ``cls`` with few, small and narrow layers.

    Args:
        cls: of the config.
        special: values of the text model.
        parts: part to its values, by the part's name in the config; ``""`` is the config itself.
        own: names of the part in its config, from the outermost on.
    """
    default = cls(**PARTS_OF_DEFAULTS.get(cls.model_type, {}))
    subs = getattr(cls, "sub_configs", {})
    values = {name: getattr(default, name) if name in subs else value for name, value in default.to_dict().items()}
    tower = bool(own_fields) and not _is_text(own_fields[-1])
    sizes = SIZES | TOWER if tower else SIZES
    depth = next((values[n] for n in DEPTHS if type(values.get(n)) is int), None)
    kwargs: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PretrainedConfig):
            inner = parts.get(name, {})
            kwargs[name] = _shrunk(type(value), special if _is_text(name) else {}, {"": inner}, [*own_fields, name])
        elif name in sizes and (type(value) is int or (value is None and name == "num_key_value_heads")):
            kwargs[name] = sizes[name]
    kwargs |= _patterns(values, depth, kwargs.get("num_hidden_layers", LAYERS) if tower else LAYERS)
    if not any(isinstance(value, PretrainedConfig) and _is_text(name) for name, value in values.items()):
        kwargs |= special  # names that the default does not have
    kwargs |= parts.get("", {})
    return cls(**kwargs)


def _is_text(name: str) -> bool:
    return name in ("decoder", "language_config", "llm_config") or "text" in name


def _patterns(values: dict[str, Any], depth: int | None, length: int) -> dict[str, Any]:
    """Lists with an entry a layer, shortened so that every combination of entries is there as far as there is room."""
    lists = {n: v for n, v in values.items() if isinstance(v, list) and depth and len(v) == depth and depth > length}
    few = {n: v for n, v in lists.items() if len({str(x) for x in v}) <= LAYERS}
    combinations = list(dict.fromkeys(zip(*few.values(), strict=True)))
    seen: set[tuple[int, Any]] = set()
    chosen = []
    for combination in combinations:  # those first that bring an entry not seen yet
        if not set(enumerate(combination)) <= seen:
            chosen.append(combination)
            seen |= set(enumerate(combination))
    chosen = [*chosen, *(c for c in combinations if c not in chosen)][:length]
    chosen = sorted(chosen, key=combinations.index)
    patterns = {name: [chosen[k % len(chosen)][i] for k in range(length)] for i, name in enumerate(few)}
    return {name: patterns.get(name, value[:length]) for name, value in lists.items()}


def tiny_model(config: PretrainedConfig, seed: int = 0, std: float = 0.08) -> PreTrainedModel:
    """A model of ``config`` with random weights, biases and norms included, in float32."""
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    torch.manual_seed(seed)
    model = auto.from_config(copy.deepcopy(config)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return model
