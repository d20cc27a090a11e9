"""Targets ``vllm``, ``sglang`` and ``tensorrt-llm``: the DeciLM layout (``nemotron-nas``), which all three read.

Its layers are those of Llama. An experiment decides whether those of a family compute the same: a small random model
of the family and one of the layout get the same weights and must give the same logits. The servers differ in what they
read, see :class:`Server`. All layers have as many query heads; where a child has fewer, the layout gets heads of zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layersmith.block_config import BlockConfig, read_block_configs
from layersmith.export.grow import Grown, of_query_heads, shapes_of
from layersmith.export.source import CannotExport, Heads, Source
from layersmith.export.tensors import write_shards
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.build import build
from layersmith.model_descriptor import deci
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.infer.shrink import shrunk
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.stock import language_config, stock_model
from layersmith.run.artifacts import write_json, write_text
from layersmith.upstream import shapes_on_disk


@dataclass(frozen=True)
class Server:
    """What a server reads of the layout.

    Attributes:
        target: Name of the target.
        name: Name of the server.
        any_width: Whether it reads ``intermediate_size``; if not, widths are filled up to multiples of 256.
        qkv_bias: Whether queries, keys and values can have a bias and the output none.
        biases: Whether there can be biases at all.
        linear: Whether one linear map can replace a subblock.
        starts_with_attention: Whether the first layer that has an FFN needs an attention in it or before it.
    """

    target: str
    name: str
    any_width: bool = False
    qkv_bias: bool = False
    biases: bool = True
    linear: bool = False
    starts_with_attention: bool = True


# As nemotron_nas.py of vLLM 0.33 and of SGLang 0.5 and modeling_nemotron_nas.py of TensorRT-LLM 1.2 read it.
VLLM = Server("vllm", "vLLM", any_width=True, qkv_bias=True)
SGLANG = Server("sglang", "SGLang")
TENSORRT_LLM = Server("tensorrt-llm", "TensorRT-LLM", biases=False, linear=True, starts_with_attention=False)

CONFIG_FILE = "configuration_decilm.py"
# The config class that vLLM and SGLang import with --trust-remote-code: they read entries as attributes.
CONFIG_CLASS = '''\
"""The config of this checkpoint: Llama's, with an entry for every layer in ``block_configs``. layersmith wrote it."""

from transformers import LlamaConfig


class Entry(dict):
    """A mapping whose keys are attributes too."""

    def __init__(self, entries):
        super().__init__({k: Entry(v) if isinstance(v, dict) else v for k, v in entries.items()})

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [Entry(block) for block in block_configs or []]
'''
_FIELDS = (
    "vocab_size", "hidden_size", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# Largest difference of the logits of two small models, relative to the largest logit.
_SAME = 1e-4


def prepare(server: Server, source: Source) -> Callable[[Path], None]:
    """Lay out the child for a server.

    Returns:
        Writes into a folder.

    Raises:
        CannotExport: The server cannot read such a layer, or the family is not like Llama.
    """
    _refuse_layers(server, source)
    names = shapes_on_disk(stock_model(source.parent_config)).keys()
    _refuse_family(server, source, names)
    for queries in sorted({max((h.queries for h in _all_heads(source)), default=1), source.num_query_heads}):
        heads = of_query_heads(source, queries)
        data = config_json(server, source, names, queries) | {"torch_dtype": str(source.dtype).removeprefix("torch.")}
        if (config := _read(data)) is not None:
            break
    else:
        raise CannotExport(f"--to {server.target}: Llama's config refuses the child's heads ({queries} query heads).")
    blocks = tuple(read_block_configs(config.block_configs, "block_configs"))
    larger = tuple(h or _of(block, queries) for h, block in zip(heads, blocks, strict=True))
    grown = Grown(source, larger, blocks, shapes_of(source, build(config, blocks, device="meta")))
    try:
        grown.check()
    except (CannotExport, ValueError) as reason:
        raise CannotExport(f"--to {server.target}: {reason}.") from reason
    return partial(_write, data, grown)


def _all_heads(source: Source) -> list[Heads]:
    return [h for i in range(len(source.blocks)) if (h := source.heads(i)) is not None]


def _of(block: BlockConfig, queries: int) -> Heads | None:
    """Heads of an attention that only the layout has."""
    kv = block.attention.num_key_value_heads
    return None if block.attention.no_op or kv is None else Heads(queries, kv)


def _write(data: dict[str, Any], grown: Grown, folder: Path) -> None:
    write_json(folder / "config.json", data)
    write_text(folder / CONFIG_FILE, CONFIG_CLASS)
    names = {_linear_name(name): name for name in grown.shapes}
    shapes = {new: grown.shapes[name] for new, name in names.items()}
    write_shards(folder, shapes, lambda new: grown.tensor(names[new]), grown.source.dtype.itemsize)
    grown.write_formats(folder)


def _linear_name(name: str) -> str:
    for theirs, ours in deci.LINEAR_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _read(data: dict[str, Any]) -> PretrainedConfig | None:
    """The config that layersmith reads of the layout; None if the config class refuses it."""
    ordinary = deci.from_deci(data, "config.json")
    with foreign_code("does the config class take these sizes?", refusal_is_answer=True) as attempt:
        return attempt.call(CONFIG_MAPPING[ordinary["model_type"]].from_dict, ordinary)
    return None


# ---------------------------------------------------------------------------------------------- config.json


def config_json(server: Server, source: Source, names: Any, queries: int) -> dict[str, Any]:
    """``config.json`` of a child without its dtype; no weights are needed.

    Args:
        server: Who reads it.
        source: The child.
        names: Names of the parent's tensors.
        queries: Query heads of every attention.
    """
    return _fields(server, source.language, names) | {
        "num_attention_heads": queries,
        "num_hidden_layers": len(source.blocks),
        "block_configs": _entries(server, source, of_query_heads(source, queries)),
    }


def _fields(server: Server, language: Any, names: Any) -> dict[str, Any]:
    """``config.json`` without what depends on the layers."""
    rope = dict(getattr(language, "rope_parameters", None) or {})
    theta = rope.pop("rope_theta", 10000.0)
    head_dim = getattr(language, "head_dim", None) or language.hidden_size // language.num_attention_heads
    data = {name: getattr(language, name, None) for name in _FIELDS} | {
        "architectures": [deci.ARCHITECTURE],
        "auto_map": {"AutoConfig": f"{CONFIG_FILE.removesuffix('.py')}.DeciLMConfig"},
        "model_type": deci.MODEL_TYPE,
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "attention_bias": _has(names, "o_proj.bias"),
        "mlp_bias": _has(names, "down_proj.bias"),
    }
    if _has(names, "q_proj.bias") and not data["attention_bias"]:
        # Where a server has no qkv_bias, the output gets a bias of zeros.
        data |= {"qkv_bias": True} if server.qkv_bias else {"attention_bias": True}
    return data


def _has(names: Any, end: str) -> bool:
    return any(name.endswith(end) for name in names)


def _entries(server: Server, source: Source, heads: tuple[Heads | None, ...]) -> list[dict[str, Any]]:
    """``block_configs``."""
    entries: list[dict[str, Any]] = []
    started = not server.starts_with_attention
    size = int(source.language.hidden_size)
    for i, block in enumerate(source.blocks):
        has_ffn, own = not block.ffn.no_op, heads[i]
        attention: dict[str, Any] = {"no_op": block.attention.no_op, "n_heads_in_group": own.group if own else None}
        if not started and has_ffn and own is None:  # an attention of zeros with one KV head
            queries = next((h.queries for h in heads if h is not None), source.num_query_heads)
            attention = {"no_op": False, "n_heads_in_group": queries}
        started = started or not attention["no_op"]
        ffn: dict[str, Any] = {"no_op": block.ffn.no_op}
        width = block.ffn.intermediate_size or source.of_parent[i].ffn.intermediate_size
        if has_ffn and not block.ffn.replace_with_linear and width is not None:
            width = width if server.any_width else -(-width // deci.WIDTH_MULTIPLE) * deci.WIDTH_MULTIPLE
            ffn["intermediate_size"] = width
            if (multiple := deci.multiple_of(width, size)) is not None:
                ffn["ffn_mult"] = multiple
        for part, config in ((attention, block.attention), (ffn, block.ffn)):
            part["replace_with_linear"] = config.replace_with_linear
        entries.append({"attention": attention, "ffn": ffn})
    return entries


# ---------------------------------------------------------------------------------------------- refusals


def _refuse_layers(server: Server, source: Source) -> None:
    to = f"--to {server.target}"
    for i in source.windows:
        raise CannotExport(
            f"{to}: layer {i} attends to the last {source.language.sliding_window} tokens only; the DeciLM layout has "
            "no windows. Export to padded, or take a parent without windows."
        )
    for i, block in enumerate(source.blocks):
        for name, part in (("attention", block.attention), ("FFN", block.ffn)):
            if part.replace_with_linear and not server.linear:
                raise CannotExport(
                    f"{to}: layer {i}: its {name} is one linear map, which {server.name} does not read in this layout. "
                    "Search with --set library.linear=[]."
                )
        if block.ffn.moe is not None or block.attention.mamba is not None:
            what = "experts" if block.ffn.moe is not None else "a mixer with a state"
            raise CannotExport(
                f"{to}: layer {i} has {what}, which the DeciLM layout has no place for. Search with --set "
                "search.uniform_groups=0 and export to padded, which is then an ordinary checkpoint."
            )


def _refuse_family(server: Server, source: Source, names: Any) -> None:
    to = f"--to {server.target}"
    for end in ("q_proj.bias", "o_proj.bias", "down_proj.bias"):
        if _has(names, end) and not (server.biases and (end != "down_proj.bias" or server.qkv_bias)):
            raise CannotExport(
                f"{to}: layer 0 has {end}, and {server.name} reads no such bias in the DeciLM layout. Export to padded."
            )
    if reason := why_not_llama(server, source.parent_config, source.descriptor):
        raise CannotExport(
            f"{to}: layer 0: {reason}, so the DeciLM layout, which has Llama's layers, cannot express this family. "
            "Export to padded."
        )


def why_not_llama(server: Server, config: PretrainedConfig, descriptor: type[ModelDescriptor]) -> str:
    """Why a family does not compute what the layout does; empty if it does. Two small random models are compared."""
    small = shrunk(config, stock_model(config))
    model: Any = Specimen(small).model
    language, names = language_config(small), shapes_on_disk(model).keys()
    if not hasattr(language, "intermediate_size") or not hasattr(language, "rms_norm_eps"):
        return "its config has no intermediate_size or no RMS norm"
    group = language.num_attention_heads // (getattr(language, "num_key_value_heads", None) or 1)
    entry = {"attention": {"n_heads_in_group": group}, "ffn": {"intermediate_size": language.intermediate_size}}
    data = _fields(server, language, names) | {
        "num_attention_heads": language.num_attention_heads,
        "num_hidden_layers": language.num_hidden_layers,
        "block_configs": [entry] * language.num_hidden_layers,
    }
    other: Any = None
    with foreign_code("does Llama's config take the family's fields?", refusal_is_answer=True):
        read = deci.from_deci(data, "config.json")
        del read["block_configs"]
        other = stock_model(CONFIG_MAPPING[read["model_type"]].from_dict(read), "cpu", torch.float32)
    if other is None:
        return "its config is not like Llama's"
    weights = model.state_dict()
    expected = other.state_dict()
    for name in sorted(weights.keys() - expected.keys()):
        return f"Llama's layers have no {name}"
    missing = [n for n in expected if n not in weights and not n.endswith("o_proj.bias")]
    if missing or any(expected[n].shape != t.shape for n, t in weights.items()):
        return f"its tensors are not Llama's ({', '.join(missing[:1]) or 'other shapes'})"
    zeros = {n: torch.zeros_like(t) for n, t in expected.items() if n not in weights}
    other.load_state_dict({**weights, **zeros})
    tokens = torch.arange(24)[None] * 31 % language.vocab_size
    with torch.no_grad():
        wanted, seen = (m.eval()(input_ids=tokens, use_cache=False).logits.float() for m in (model, other))
    difference = float((wanted - seen).abs().max() / wanted.abs().max().clamp_min(1e-9))
    return "" if difference <= _SAME else f"with the same weights its logits differ from Llama's by {difference:.0e}"
