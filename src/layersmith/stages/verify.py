"""``inspect --verify``: check a descriptor on a small random model with the same kinds of layers.

No weights are read. The checks cover what a child depends on: Every weight is in one group. A child without a subblock
gives the logits of the parent with that subblock silenced. Generation with a cache continues correctly. On every axis,
removing channels that have no effect changes nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig

from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig
from layersmith.errors import LayersmithError, UnsupportedModel
from layersmith.execution.parent import Parent
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.build import block_configs_of, build
from layersmith.heterogeneous.in_memory import Model, checkpoint_of
from layersmith.heterogeneous.plan import SUBBLOCKS, linear_records, no_op_records
from layersmith.library.axes.axis import INNER_ROLES, LayerAxes
from layersmith.library.axes.find import find_axes
from layersmith.library.axes.prove import prove
from layersmith.library.axes.trial import Trial
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.describe import describe, read_config
from layersmith.model_descriptor.infer.removal import silent_stay_silent
from layersmith.model_descriptor.infer.shrink import shrunk
from layersmith.model_descriptor.infer.specimen import Specimen, cache_argument
from layersmith.model_descriptor.stock import causal_lm_config, stock_class, stock_model
from layersmith.modeling_layersmith import as_parent
from layersmith.run.runtime import Runtime
from layersmith.tables import Shown, Table

OK = "ok"


@dataclass(frozen=True)
class Verification(Shown):
    """The checks of ``inspect --verify`` and their results.

    Attributes:
        name: Path or hub id of the model.
        architecture: Class of the model.
        descriptor: Name of its descriptor.
        specimen: The small model in words.
        seconds: The time that the checks took.
        whole: Each check of the whole model, and ``"ok"`` or what went wrong.
        layers: For every kind of layer its layers, and each check with ``"ok"`` or the reason.
        refuted: Questions of experiments that refuted a no-op, or an attribute that looked like a size, with reasons.
    """

    name: str
    architecture: str
    descriptor: str
    specimen: str
    seconds: float
    whole: dict[str, str]
    layers: list[tuple[str, dict[str, str]]]
    refuted: list[str]

    @property
    def failed(self) -> bool:
        """Whether a check of the whole model failed."""
        return any(verdict != OK for verdict in self.whole.values())

    def tables(self) -> list[Table]:
        """The checks of the whole model and of each kind of layer."""
        checks = [("whole model", self.whole), *((f"layers like {layers}", each) for layers, each in self.layers)]
        return [Table(title, ("check", "result"), list(verdicts.items())) for title, verdicts in checks]


def verify(
    parent: Model, descriptor: type[ModelDescriptor] | None = None, trust_remote_code: bool = False
) -> Verification:
    """Run all checks on a small random model with the same kinds of layers.

    Args:
        parent: Folder or hub id of the parent, or a ``PreTrainedModel``.
        descriptor: Descriptor of the parent's model family. Default: from ``describe``.
        trust_remote_code: Let Transformers run code in the folder.

    Raises:
        InputError: The parent has no config.
        UnsupportedModel: The model family cannot be described, or no small model of it can be built.
    """
    started = time.perf_counter()
    parent = checkpoint_of(parent)
    config = causal_lm_config(as_parent(read_config(parent, trust_remote_code=trust_remote_code)))
    descriptor = descriptor or describe(config)
    small = shrunk(config, stock_model(config))
    specimen = specimen_parent(small, descriptor)
    axes = prove(Trial(specimen, sample_tokens(specimen)), find_axes(specimen.descriptor, small, specimen.blocks))
    kinds: dict[str, tuple[list[int], dict[str, str]]] = {}
    for i in range(len(specimen.blocks)):
        verdicts = layer_verdicts(specimen, i, axes[i])
        kinds.setdefault(f"{type(specimen.layers[i]).__name__}{verdicts}", ([], verdicts))[0].append(i)
    parameters = sum(p.numel() for p in specimen.model.parameters())
    refuted = [question for i in range(len(specimen.blocks)) for question in specimen.descriptor.layer_facts(i).refuted]
    whole = whole_verdicts(specimen)
    return Verification(
        name=str(parent),
        architecture=stock_class(config).__name__,
        descriptor=descriptor.__name__,
        specimen=f"{len(specimen.blocks)} layers, {parameters:,} parameters",
        seconds=time.perf_counter() - started,
        whole=whole,
        layers=[(", ".join(map(str, layers)), verdicts) for layers, verdicts in kinds.values()],
        refuted=list(dict.fromkeys(refuted)),
    )


def specimen_parent(small: PretrainedConfig, descriptor: type[ModelDescriptor]) -> Parent:
    """A small random model as a parent."""
    descriptor = descriptor.for_config(small)
    model: Any = Specimen(small).model.requires_grad_(False)
    blocks = tuple(block_configs_of(small, descriptor))
    return Parent("", model, torch.float32, descriptor, blocks, "", Runtime(torch.device("cpu"), torch.float32))


def sample_tokens(parent: Parent, length: int = 32) -> torch.Tensor:
    """Token ids ``[1, T]``; a proof does not depend on which."""
    return torch.arange(length)[None] * 31 % parent.language_config.vocab_size


# ---------------------------------------------------------------------------------------------- a layer


def layer_verdicts(parent: Parent, i: int, axes: LayerAxes) -> dict[str, str]:
    """The checks of one layer: each kind of alternative, and ``"ok"`` or the reason why it is not possible."""
    verdicts = {}
    for subblock in SUBBLOCKS:
        label = "attention" if subblock == "attention" else "FFN"
        verdicts[f"{label} no-op"] = _verdict(partial(_try_no_op, parent, i, subblock))
        verdicts[f"{label} linear"] = _verdict(partial(_try_linear, parent, i, subblock))
    return verdicts | axis_verdicts(axes, parent.blocks[i])


def axis_verdicts(axes: LayerAxes, block: BlockConfig) -> dict[str, str]:
    """The axes of a layer, each with ``"ok"`` or the reason why the layer cannot shrink along it."""
    reasons, moe, heads = axes.reasons, block.ffn.moe, axes.kv
    no_experts = reasons.get("experts", "its FFN has no experts")
    no_mixer = "it keeps no state of fixed size in the cache"
    attention = reasons.get("attention", "")
    of_inner = {name.removeprefix("inner."): why for name, why in reasons.items() if name.startswith("inner.")}
    inner = "; ".join(f"{name}: {why}" for name, why in of_inner.items())
    inner = inner or "no attribute of its config sets it alone"
    roles = {axis.role for axis in axes.inner}
    return {
        "KV heads": OK if heads and heads.fewer_kv else reasons.get("kv_heads") or attention,
        "query heads": OK
        if heads and (heads.fewer_queries or heads.fewer_groups)
        else reasons.get("query_heads") or attention,
        "mixer heads": OK if axes.mixer else reasons.get("mixer", no_mixer),
        "mixer head size": OK if axes.mixer_size else reasons.get("mixer_size", no_mixer),
        "state sizes": OK if axes.state else reasons.get("state", no_mixer),
        **{role: OK if role in roles else inner for role in INNER_ROLES},
        "window": OK if axes.window else reasons.get("window", ""),
        "FFN width": (OK if axes.ffn else reasons.get("ffn", "")) if moe is None else "its FFN consists of experts",
        "experts": (OK if axes.experts else reasons.get("experts", "")) if moe else no_experts,
        "expert width": (OK if axes.ffn else reasons.get("ffn", "")) if moe else no_experts,
        "experts per token": no_experts
        if moe is None
        else OK
        if axes.experts and axes.experts.fewer_per_token
        else "a token uses one"
        if moe.num_experts_per_tok == 1
        else reasons.get("experts", "no config attribute sets it"),
        "shared width": no_experts
        if moe is None
        else OK
        if axes.shared
        else reasons.get("shared", "it follows the width of the other experts, or no expert is shared"),
    }


def over_layers(verdicts: Sequence[dict[str, str]]) -> dict[str, str]:
    """The checks of a model: ``"ok"`` where a check passes for some layer, else the reasons of all layers."""
    merged = {}
    for check in verdicts[0]:
        results = list(dict.fromkeys(verdict[check] for verdict in verdicts))
        merged[check] = OK if OK in results else "; ".join(results)
    return merged


def _verdict(check: Callable[[], str]) -> str:
    """The result of a check; an error of the family's code is the reason why it fails."""
    verdict = ""
    try:
        with foreign_code("Does the family's code run in this check?") as attempt:
            verdict = check()
    except LayersmithError as error:
        return str(error)
    return verdict or f"{type(attempt.error).__name__}: {attempt.reason}"


def without(block: BlockConfig, *subblocks: str) -> BlockConfig:
    """A copy of a block config with no-ops for some subblocks."""
    attention = AttentionConfig(no_op=True) if "attention" in subblocks else block.attention
    return BlockConfig(attention, FFNConfig(no_op=True) if "ffn" in subblocks else block.ffn)


def _try_no_op(parent: Parent, i: int, subblock: str) -> str:
    """Check that the child's logits are, bit for bit, the parent's with that subblock's output silenced."""
    layer, block = parent.layers[i], parent.blocks[i]
    if block.subblock(subblock).no_op:
        return "this kind of layer has none"
    records = no_op_records(parent.descriptor, layer, subblock)
    prefix = parent.descriptor.layer_block_name(i)
    silenced = {f"{prefix}.{name}": r.get("of") for name, r in records.items() if r["is"] in ("zeros", "argument")}
    after = [f"{prefix}.{name}" for name, r in records.items() if r["is"] == "same"]
    child = _child(parent, [without(other, subblock) if j == i else other for j, other in enumerate(parent.blocks)])
    tokens = sample_tokens(parent)
    with torch.no_grad():
        with Specimen.silenced_in(parent.model, silenced), silent_stay_silent(parent.model, after):
            wanted = parent.model(input_ids=tokens, use_cache=False).logits
        seen = child(input_ids=tokens, use_cache=False).logits
    return OK if torch.equal(seen, wanted) else f"its logits differ by {float((seen - wanted).abs().max()):.1e}"


def _try_linear(parent: Parent, i: int, subblock: str) -> str:
    if parent.blocks[i].subblock(subblock).no_op:
        return "this kind of layer has none"
    linear_records(parent.descriptor, parent.layers[i], subblock)
    linear: Any = dataclasses.replace(parent.blocks[i].subblock(subblock), replace_with_linear=True)
    changed = dataclasses.replace(parent.blocks[i], **{subblock: linear})
    child = build(
        parent.config, [changed if j == i else b for j, b in enumerate(parent.blocks)], descriptor=parent.descriptor
    )
    with torch.no_grad():
        child.eval()(input_ids=sample_tokens(parent), use_cache=False)
    return OK


def _child(parent: Parent, blocks: Sequence[BlockConfig]) -> Any:
    child = build(parent.config, blocks, dtype=torch.float32, descriptor=parent.descriptor)
    weights = parent.model.state_dict()
    child.load_state_dict({name: weights[name] for name in child.state_dict()}, strict=True)
    return child.eval()


# ---------------------------------------------------------------------------------------------- the whole model


def whole_verdicts(parent: Parent) -> dict[str, str]:
    """The checks of the whole model."""
    return {
        "every weight in one group": _verdict(lambda: _try_groups(parent)),
        "cached generation without the first attention": _verdict(lambda: _try_cache(parent)),
    }


def _try_groups(parent: Parent) -> str:
    predicates = parent.descriptor.layer_name_predicates(len(parent.blocks))
    for name in parent.model.state_dict():
        groups = [group for group, pattern in predicates.items() if pattern.match(name)]
        if len(groups) != 1:
            return f"{name} is in {len(groups)} groups"
    return OK


def _try_cache(parent: Parent) -> str:
    """Check that a child gives the same logits in pieces with a cache and in one pass, as the parent has to."""
    first = next((i for i, b in enumerate(parent.blocks) if not b.attention.no_op), None)
    if first is None or sum(not b.attention.no_op for b in parent.blocks) < 2:
        return "the model has fewer than two attentions"
    if not parent.descriptor.attn_no_op_supported():
        return "its descriptor has no attention no-op"
    # Some models read the length of the cache from a layer without keys; `generate` passes positions to them.
    change, with_positions = _in_pieces(parent, parent.model, with_positions=False), False
    if change > _CACHE_TOLERANCE:
        with suppress(TypeError):  # the model takes no positions
            with_positions = _in_pieces(parent, parent.model, with_positions=True) <= _CACHE_TOLERANCE
        if not with_positions:
            raise UnsupportedModel(f"the logits of the parent itself differ with a cache (by {change:.0e})")
    child = _child(parent, [without(b, "attention") if i == first else b for i, b in enumerate(parent.blocks)])
    change = _in_pieces(parent, child, with_positions)
    return OK if change < _CACHE_TOLERANCE else f"its logits differ by {change:.0e} of the largest"


_CACHE_TOLERANCE = 2e-3


def _in_pieces(parent: Parent, model: Any, with_positions: bool) -> float:
    """The largest difference between logits of a text in pieces and in one pass, relative to the largest logit.

    Args:
        parent: The parent, which has the vocabulary.
        model: The model that runs.
        with_positions: Whether it gets the positions of the tokens.
    """
    tokens = sample_tokens(parent, 12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
        pieces = []
        for start, end in ((0, 7), (7, 8), (8, 9), (9, 12)):
            optional = {"position_ids": torch.arange(start, end)[None]} if with_positions else {}
            output = model(input_ids=tokens[:, start:end], use_cache=True, **{cache_argument(model): cache}, **optional)
            pieces.append(output.logits[:, -1])
    return float((torch.stack(pieces, 1) - whole[:, [6, 7, 8, 11]]).abs().max() / whole.abs().max().clamp_min(1e-9))
