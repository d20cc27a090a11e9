"""Configs of the AnyModel layout, of NVIDIA's vLLM: a stock config with ``per_layer_config`` and ``base_architecture``.

``per_layer_config`` maps the index of a layer to the config attributes that differ there; ``skip`` lists its removed
subblocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from layersmith.block_config import BlockConfig
from layersmith.errors import UnsupportedModel, did_you_mean
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.records import check

ARCHITECTURE, BASE, PER_LAYER = "AnyModel", "base_architecture", "per_layer_config"
SKIPPED = {"attention": "attention", "mixer": "attention", "mlp": "ffn"}

# Fields of block configs that are sizes, as paths; a probe gives each another value and sees which attribute has it.
_SIZES = (
    "attention.num_key_value_heads", "attention.num_attention_heads", "ffn.intermediate_size",
    "ffn.moe.num_local_experts", "ffn.moe.num_experts_per_tok", "ffn.moe.expert_intermediate_dim",
    "ffn.moe.shared_expert_intermediate_dim",
)  # fmt: skip


def attributes_of(descriptor: type[ModelDescriptor], block: BlockConfig) -> dict[str, str]:
    """The config attribute that sets each size of a block, by the size's path in a block config."""
    found = {}
    for path in _SIZES:
        part, *nested = path.split(".")
        sizes = 2 if path.endswith("num_experts_per_tok") else 4099
        value: dict[str, Any] = {nested[-1]: sizes}
        if nested[0] == "moe":
            if block.ffn.moe is None:
                continue
            value = {"moe": {"num_local_experts": 4097, "num_experts_per_tok": 1} | value}
        elif nested[0] == "intermediate_size" and block.ffn.moe is not None:
            continue
        probe = BlockConfig.from_dict({part: value})
        overrides = descriptor.block_config_to_layer_overrides(probe)
        if names := [name for name, v in overrides.items() if type(v) is int and v == sizes]:
            found[path] = names[0]
    return found


def from_any_model(
    entries: Mapping[str, Any], descriptor: type[ModelDescriptor], config: Any, where: object
) -> list[BlockConfig]:
    """The block configs that ``per_layer_config`` describes.

    Raises:
        InputError: It is not a mapping of layers to attributes.
        UnsupportedModel: An attribute sets no size of a layer of this family.
    """
    shape = dict[Annotated[str, Field(pattern=r"^\d+$")], dict[str, Any]]
    entries = check(dict(entries), shape, f"{where}: {PER_LAYER}")
    canonical = getattr(descriptor.get_language_model_config(config), "attribute_map", None) or {}
    blocks = list(descriptor.parent_blocks(config))
    for index, entry in entries.items():
        i = int(index)
        if i >= len(blocks):
            raise UnsupportedModel(f"{where}: {PER_LAYER} has layer {i} of {len(blocks)}.")
        names = {canonical.get(n, n): path for path, n in attributes_of(descriptor, blocks[i]).items()}
        data = blocks[i].to_dict()
        for name, value in entry.items():
            if name == "skip":
                continue
            path = names.get(canonical.get(name, name))
            if path is None or type(value) is not int:
                raise UnsupportedModel(
                    f"{where}: layer {i} sets {name} to {value!r}, which cannot differ between layers of this family. "
                    f"{did_you_mean(name, names)}"
                )
            part, *nested = path.split(".")
            place = data[part] if len(nested) == 1 else data[part]["moe"]
            place[nested[-1]] = value
        for skipped in check(entry.get("skip", []), list[str], f"{where}: {PER_LAYER}[{i}].skip"):
            if skipped not in SKIPPED:
                raise UnsupportedModel(f"{where}: layer {i} skips {skipped}. {did_you_mean(skipped, SKIPPED)}")
            data[SKIPPED[skipped]] = {"no_op": True}
        blocks[i] = BlockConfig.from_dict(data, f"{where}: layer {i}")
    return blocks
