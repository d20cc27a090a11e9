"""The descriptor of a model whose structure was inferred by experiment.

``infer`` returns it. It reads the findings about a model from the disk, or runs the experiments of ``inference.py``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from layersmith.block_config import BlockConfig
from layersmith.errors import UnsupportedModel
from layersmith.model_descriptor.infer import findings_cache
from layersmith.model_descriptor.infer.blocks import overrides_for
from layersmith.model_descriptor.infer.capabilities import InferredCapabilities
from layersmith.model_descriptor.infer.findings import Findings
from layersmith.model_descriptor.infer.inference import find
from layersmith.model_descriptor.infer.removal import put
from layersmith.model_descriptor.infer.subblocks import Subblock
from layersmith.model_descriptor.patterns import weight_groups
from layersmith.model_descriptor.stock import causal_lm_config, language_config, restore_buffers

_known: dict[str, type[InferredDescriptor]] = {}


def infer(config: PretrainedConfig) -> type[InferredDescriptor]:
    """The descriptor of the model that a config describes. The experiments run once and are remembered on disk.

    Raises:
        UnsupportedModel: The experiments could not determine the structure, for the reason given.
    """
    key = findings_cache.key_of(config)
    if key not in _known:
        findings = findings_cache.read(key)
        if findings is None:
            findings = find(config)
            findings_cache.write(key, findings)
        _known[key] = descriptor_of(replace(findings, config=causal_lm_config(config)))
    return _known[key]


class InferredDescriptor(InferredCapabilities):
    """The interface of the spec, implemented by findings. Each model has a subclass with its findings."""

    findings: Findings

    @classmethod
    def for_config(cls, config: PretrainedConfig) -> type[InferredDescriptor]:
        """This descriptor if it was made from an equal config, else the descriptor of that config."""
        described = cls.findings.config
        if described is None or findings_cache.key_of(described) == findings_cache.key_of(config):
            return cls
        return infer(config)

    @classmethod
    def decoder_layer_cls(cls) -> type[nn.Module] | list[type[nn.Module]]:
        classes = cls.findings.classes
        return classes[0] if len(classes) == 1 else list(classes)

    @classmethod
    def block_config_to_layer_overrides(cls, block_config: BlockConfig) -> dict[str, Any]:
        return overrides_for(cls.findings, language_config(cls.findings.config), block_config)

    @classmethod
    def input_embedding_name(cls) -> str:
        return cls.findings.structure.embedding

    @classmethod
    def output_embedding_name(cls) -> str:
        return cls.findings.structure.head

    @classmethod
    def final_norm_name(cls) -> str:
        return cls.findings.structure.final_norm

    @classmethod
    def layer_block_name(cls, index: int) -> str:
        return f"{cls.findings.structure.layers}.{index}"

    @classmethod
    def layer_name_predicates(cls, num_layers: int) -> dict[str, re.Pattern[str]]:
        findings = cls.findings
        kinds = [findings.kinds[k] for k in findings.of_layer]
        return weight_groups(findings.structure.layers, findings.groups, kinds, num_layers)

    @staticmethod
    def init_rotary_embedding(model: nn.Module, runtime: Any) -> None:
        restore_buffers(model, runtime)

    @staticmethod
    def get_language_model_config(config: Any) -> Any:
        return language_config(config)

    @classmethod
    def requires_trust_remote_code(cls) -> bool:
        return cls.findings.remote_code

    @classmethod
    def remove(cls, decoder_layer: nn.Module, subblock: str) -> None:
        """Apply the proved no-op of a subblock to a layer.

        Raises:
            UnsupportedModel: Every no-op was refuted for this kind of layer.
        """
        kind = cls.findings.kind_of(decoder_layer)
        removed: Subblock | None = getattr(kind, subblock)
        if removed is None:
            return  # this kind of layer has no such subblock
        if not removed.removable:
            raise UnsupportedModel(f"{type(decoder_layer).__name__} has no {subblock} no-op: {removed.reason}.")
        for name, record in removed.replaced:
            put(decoder_layer, name, record)
        others = [n for s in (kind.attention, kind.ffn) if s is not None and s is not removed for n in s.modules]
        if others and not any(list(decoder_layer.get_submodule(name).parameters()) for name in others):
            for name, record in kind.shared:  # the other subblock was removed before, so modules that both use go too
                put(decoder_layer, name, record)


def descriptor_of(findings: Findings) -> type[InferredDescriptor]:
    """A descriptor class for findings, with a no-op for each subblock that can be removed in some kind of layer."""
    config = findings.config
    family = re.sub(r"[^0-9A-Za-z]+", " ", str(getattr(config, "model_type", "") or type(config).__name__)).title()
    name = family.replace(" ", "") + "Inferred"
    made: type[InferredDescriptor] = type(name, (InferredDescriptor,), {"findings": findings, "__module__": __name__})
    for subblock, no_op in (("attention", "attn_no_op_post_init"), ("ffn", "mlp_no_op_post_init")):
        examined: list[Subblock | None] = [getattr(kind, subblock) for kind in findings.kinds]
        # If no layer has such a subblock, the no-op does nothing and is supported.
        if any(s is not None and s.removable for s in examined) or not any(examined):
            setattr(made, no_op, staticmethod(partial(made.remove, subblock=subblock)))
    return made
