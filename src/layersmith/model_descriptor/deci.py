"""Configs of the DeciLM layout (``nemotron-nas``), as NVIDIA publishes its heterogeneous Llamas.

Every layer has an entry in ``block_configs``. The number of KV heads follows from ``n_heads_in_group``, the query heads
per KV head; the width of the FFN is ``intermediate_size``, or follows from ``ffn_mult``. The layers compute what
Llama's do, or Qwen2's where ``qkv_bias`` is set, and the tensors have Llama's names.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from annotated_types import Gt
from pydantic import PositiveInt
from typing_extensions import TypedDict

from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig
from layersmith.errors import UnsupportedModel
from layersmith.records import check

MODEL_TYPE, ARCHITECTURE = "nemotron-nas", "DeciLMForCausalLM"
# Tensors of linear subblocks, in this layout and in layersmith's.
LINEAR_NAMES = {"self_attn.linear_attn.": "self_attn.linear.", "mlp.linear_mlp.": "mlp.linear."}
# Widths that follow from ``ffn_mult`` are multiples of this.
WIDTH_MULTIPLE = 256


class _Attention(TypedDict):
    n_heads_in_group: NotRequired[PositiveInt | None]
    no_op: NotRequired[bool | None]
    replace_with_linear: NotRequired[bool | None]
    window_length: NotRequired[int | None]
    num_sink_tokens: NotRequired[int | None]


class _FFN(TypedDict):
    ffn_mult: NotRequired[Annotated[float, Gt(0)] | PositiveInt | None]
    intermediate_size: NotRequired[PositiveInt | None]
    no_op: NotRequired[bool | None]
    replace_with_linear: NotRequired[bool | None]
    hidden_act: NotRequired[str | None]


class _Block(TypedDict):
    attention: _Attention
    ffn: _FFN


class _Config(TypedDict):
    block_configs: list[_Block]
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_hidden_layers: PositiveInt


# Entries of the config that are not passed on: those of the layout, and what depends on the tool that wrote it.
_OWN = ("architectures", "auto_map", "block_configs", "model_type", "num_key_value_heads", "qkv_bias", "bias",
        "intermediate_size", "transformers_version", "_name_or_path", "position_embedding_type")  # fmt: skip


def from_deci(data: dict[str, Any], where: object) -> dict[str, Any]:
    """The config of an ordinary model with block configs.

    Args:
        data: ``config.json`` of a DeciLM checkpoint, which someone else may have written.
        where: Its path, for messages.

    Raises:
        InputError: A field has another type.
        UnsupportedModel: A layer has a part that layersmith does not know.
    """
    config: Any = check(data, _Config, where)
    if len(config["block_configs"]) != config["num_hidden_layers"]:
        raise UnsupportedModel(
            f"{where}: {len(config['block_configs'])} block_configs for {config['num_hidden_layers']} layers."
        )
    if data.get("position_embedding_type") in ("mistral_yarn", "rope_llama4"):
        raise UnsupportedModel(f"{where}: its positions ({data['position_embedding_type']}) are not Llama's.")
    blocks = [_block(config, i, where) for i in range(config["num_hidden_layers"])]
    widths = [b.ffn.intermediate_size for b in blocks if b.ffn.intermediate_size]
    heads = [b.attention.num_key_value_heads for b in blocks if b.attention.num_key_value_heads]
    ordinary = {name: value for name, value in data.items() if name not in _OWN}
    ordinary |= {
        "model_type": "qwen2" if data.get("qkv_bias") and not data.get("attention_bias") else "llama",
        "num_key_value_heads": max(heads, default=1),
        "intermediate_size": max(widths, default=config["hidden_size"]),
        "block_configs": [b.to_dict() for b in blocks],
    }
    if data.get("bias"):
        ordinary["attention_bias"] = True
    if ordinary["model_type"] == "qwen2":
        ordinary.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return ordinary


def _block(config: _Config, i: int, where: object) -> BlockConfig:
    attention, ffn = config["block_configs"][i]["attention"], config["block_configs"][i]["ffn"]
    for name in ("window_length", "num_sink_tokens"):
        if attention.get(name):
            raise UnsupportedModel(f"{where}: layer {i} has {name} {attention[name]}, which layersmith does not read.")
    group, size = attention.get("n_heads_in_group"), config["hidden_size"]
    is_removed = bool(attention.get("no_op")), bool(ffn.get("no_op"))
    is_linear = bool(attention.get("replace_with_linear")), bool(ffn.get("replace_with_linear"))
    if not (is_removed[0] or is_linear[0]) and (not group or config["num_attention_heads"] % group):
        raise UnsupportedModel(
            f"{where}: layer {i} has {group} query heads per KV head and {config['num_attention_heads']} in all."
        )
    width, multiple = ffn.get("intermediate_size"), ffn.get("ffn_mult")
    if multiple:
        width = width_of(multiple, size)
    elif width is None and not (is_removed[1] or is_linear[1]):
        raise UnsupportedModel(f"{where}: layer {i} has neither ffn_mult nor intermediate_size.")
    return BlockConfig(
        AttentionConfig(
            no_op=is_removed[0],
            replace_with_linear=is_linear[0],
            num_key_value_heads=config["num_attention_heads"] // group if group else None,
        ),
        FFNConfig(no_op=is_removed[1], replace_with_linear=is_linear[1], intermediate_size=width),
    )


def width_of(multiple: float, hidden_size: int) -> int:
    """The width of an FFN by its ``ffn_mult``: ``2 * multiple * hidden_size / 3``, rounded up to a multiple of 256."""
    return -(-int(2 * multiple * hidden_size / 3) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def multiple_of(width: int, hidden_size: int) -> float | None:
    """The ``ffn_mult`` of a width; None if no multiple gives it."""
    multiple = 1.5 * width / hidden_size
    return multiple if width_of(multiple, hidden_size) == width else None
