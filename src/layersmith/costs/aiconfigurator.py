"""Times on a GPU that is not here, under a server's load, from NVIDIA's AIConfigurator (arXiv 2601.06288).

AIConfigurator has tables of operators that were timed on real GPUs, and a model of how a server mixes prefills with
decode steps when many requests are in flight. It is asked for homogeneous models of the parent's family, one for each
shape of attention and of FFN in the search space. Each answer lists its operators, whose times add up, so a subblock
takes the sum over its own operators in one layer:

    time per token       = (mixed steps x time of one + decode steps x time of one) / all steps
    time to first token  = a x time of a mixed step + b, with a and b fitted to all answers

Attention with a number of KV heads that AIConfigurator has no data for, e.g. 3, is interpolated between the powers of
two next to it. A subblock that a layer does without takes no time. What AIConfigurator does not know by its shape, a
window or a linear replacement, takes as long as the parent's subblock.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from layersmith.block_config import BlockConfig
from layersmith.costs.budget import Workload
from layersmith.costs.counted import ModelShape
from layersmith.costs.times import ZERO, Times, Timing
from layersmith.errors import UnsupportedModel, UsageError
from layersmith.foreign import foreign_code
from layersmith.library.alternative import Alternative
from layersmith.run.artifacts import fingerprint

PACKAGE = "aiconfigurator"
# The names that AIConfigurator has for the servers.
SERVERS = {"vllm": "vllm", "sglang": "sglang", "tensorrt-llm": "trtllm"}
# Parts of the names of operators outside the layers, and of those of an FFN; all others belong to the attention.
_OUTSIDE = ("embedding", "logits", "p2p")
_OF_FFN = ("ffn", "mlp", "act_gate", "add_norm_2", "moe", "router", "expert", "shared", "ar_2")
# The names that it has for formats of weights alone, whatever the size of the groups. Activations stay in bfloat16.
_MODES = {"int8": "int8_wo"} | {f"int4-g{size}{rest}": "int4_wo" for size in (32, 64, 128) for rest in ("", "-asym")}
# Keys of a config that are of no use to AIConfigurator, or that refuse to be read without Transformers.
_DROPPED = ("per_layer_config", "block_configs", "auto_map", "quantization_config")

_KV_HEADS = "num_key_value_heads"

# The newest version of a server that there is data for on a GPU. Finding it takes AIConfigurator a second or two.
_newest: dict[tuple[str, str], str] = {}

Subblock = Any


@dataclass(frozen=True)
class Answer:
    """What AIConfigurator says of one homogeneous model, in seconds.

    Attributes:
        mixed, decode: Time of each operator in a step that also processes part of a prompt, and in one that does not.
        mixed_share: Share of the steps that are mixed.
        ttft: Time to first token.
    """

    mixed: Mapping[str, float]
    decode: Mapping[str, float]
    mixed_share: float
    ttft: float

    def of(self, part: str) -> tuple[float, float]:
        """Seconds of a mixed step and for each token: of the ``attention``, the ``ffn``, or ``outside`` the layers."""
        mixed, decode = (sum(s for name, s in ops.items() if _part(name) == part) for ops in (self.mixed, self.decode))
        return mixed, self.mixed_share * mixed + (1 - self.mixed_share) * decode

    @property
    def whole(self) -> Timing:
        """Time to first token, and seconds for each token, of the whole model."""
        return Timing(self.ttft, sum(self.of(part)[1] for part in ("attention", "ffn", "outside")))


def _part(operator: str) -> str:
    if any(name in operator for name in _OUTSIDE):
        return "outside"
    return "ffn" if any(name in operator for name in _OF_FFN) else "attention"


def predict_served(
    system: str, server: str, parent: ModelShape, alternatives: Sequence[Alternative], workload: Workload
) -> Times:
    """Predicted times of every alternative on a GPU under the load of a server, in bfloat16 without a format.

    Args:
        system: The GPU, as AIConfigurator names it, e.g. ``h200_sxm``.
        server: A key of :data:`SERVERS`.
        parent: Shape of the parent.
        alternatives: All alternatives of the search space, also in formats.
        workload: Requests in flight (``batch``), tokens of prompt and answer.

    Returns:
        Times whose time to first token is that of one request among the others.

    Raises:
        UsageError: The package is missing, or the GPU, server or a format is unknown.
        UnsupportedModel: AIConfigurator does not know this family, or has no data for a shape.
    """
    _check_names(system, server)
    depth, modes = len(parent.blocks), _modes(alternatives)
    of_mode: dict[str | None, dict[str, dict[str, Subblock]]]
    of_mode = {mode: {"attention": {}, "ffn": {}} for mode in (None, *modes.values())}
    shapes: dict[str, tuple[str | None, str, str] | None] = {}
    for a in alternatives:
        block = a.block_config(parent.blocks[a.layer])
        mine = getattr(block, a.subblock)
        if mine.no_op:
            shapes[a.key] = None
            continue
        if getattr(mine, "replace_with_linear", False) or a.kind == "window":
            mine = getattr(parent.blocks[a.layer], a.subblock)
        key, mode = fingerprint(mine.to_dict()), modes.get(a.format)
        of_mode[mode][a.subblock][key] = mine
        shapes[a.key] = mode, a.subblock, key
    answers: dict[tuple[str | None, str, str], Answer] = {}
    for mode, of_subblock in of_mode.items():
        asked = _ask_all(system, server, parent, of_subblock, workload, mode)
        answers |= {(mode, s, key): answer for s, by_key in asked.items() for key, answer in by_key.items()}
    slope, constant = _prefill_from_mixed(answers.values())

    def timing(answer: Answer, part: str, layers: int) -> Timing:
        mixed, token = answer.of(part)
        return Timing(slope * mixed / layers, token / layers)

    by_key = {}
    for key, shape in shapes.items():
        by_key[key] = ZERO if shape is None else timing(answers[shape], shape[1], depth)
    first = next(iter(answers.values()))
    fixed = timing(first, "outside", 1) + Timing(constant, 0.0)
    name = f"{system}, {server} (AIConfigurator {version(PACKAGE)})"
    return Times("predicted", name, workload, by_key, fixed)


def _modes(alternatives: Sequence[Alternative]) -> dict[str, str]:
    """Each format of the alternatives to AIConfigurator's name for it."""
    formats = {a.format for a in alternatives} - {""}
    if unknown := sorted(formats - _MODES.keys()) or sorted({a.kv_format for a in alternatives} - {""}):
        raise UsageError(
            f"formats {', '.join(unknown)}: AIConfigurator has no times for them. It has times for weights in "
            f"{', '.join(_MODES)}."
        )
    return {name: _MODES[name] for name in sorted(formats)}


def _check_names(system: str, server: str) -> None:
    if find_spec(PACKAGE) is None:
        raise UsageError(
            f"recipe costs.server: times for a server need the package {PACKAGE}: pip install 'layersmith[serving]'. "
            "Without costs.server, times for a device come from its data sheet."
        )
    if server not in SERVERS:
        raise UsageError(f"recipe costs.server: {server!r} is not known. Known are: {', '.join(SERVERS)}.")
    systems = _systems()
    if system not in systems:
        raise UsageError(f"recipe costs.device: {system!r} is not known to AIConfigurator. Known are: {systems}.")


@cache
def _systems() -> str:
    """The GPUs that AIConfigurator has data for, separated by commas."""
    spec = find_spec("aiconfigurator_core")
    folder = Path(str(spec.origin if spec else "")).parent / "systems"
    return ", ".join(sorted(file.stem for file in folder.glob("*.yaml") if (folder / "data" / file.stem).is_dir()))


def _ask_all(
    system: str,
    server: str,
    parent: ModelShape,
    shapes: dict[str, dict[str, Subblock]],
    workload: Workload,
    mode: str | None,
) -> dict[str, dict[str, Answer]]:
    """The answer for each shape of a subblock. One answer serves a shape of the attention and one of the FFN."""
    attentions, ffns = (list(shapes[subblock].items()) for subblock in ("attention", "ffn"))
    answers: dict[str, dict[str, Answer]] = {"attention": {}, "ffn": {}}
    base = parent.blocks[0]
    for i in range(max(len(attentions), len(ffns))):
        block, keys = base, {}
        for subblock, members in (("attention", attentions), ("ffn", ffns)):
            if members:
                keys[subblock], config = members[min(i, len(members) - 1)]
                block = replace(block, **{subblock: config})
        answer = _ask_or_interpolate(system, server, config_of(parent, block), workload, mode)
        for subblock, key in keys.items():
            answers[subblock][key] = answer
    return answers


def _ask_or_interpolate(
    system: str, server: str, config: dict[str, Any], workload: Workload, mode: str | None
) -> Answer:
    """:func:`ask`; for a number of KV heads without data, between the powers of two that are next to it."""
    heads = config.get(_KV_HEADS)
    try:
        return ask(system, server, config, workload, mode)
    except UnsupportedModel:
        if not isinstance(heads, int) or heads < 2 or heads & (heads - 1) == 0:
            raise
    low = 1 << (heads.bit_length() - 1)
    fewer, more = (ask(system, server, config | {_KV_HEADS: n}, workload, mode) for n in (low, 2 * low))
    share = (heads - low) / low
    mixed, decode = (
        {name: (1 - share) * seconds + share * of_more[name] for name, seconds in of_fewer.items()}
        for of_fewer, of_more in ((fewer.mixed, more.mixed), (fewer.decode, more.decode))
    )
    return Answer(mixed, decode, fewer.mixed_share, (1 - share) * fewer.ttft + share * more.ttft)


def config_of(parent: ModelShape, block: BlockConfig) -> dict[str, Any]:
    """The config of a model of the parent's family whose layers are all like ``block``."""
    config = parent.language.to_dict()
    config = {key: value for key, value in config.items() if key not in _DROPPED and value is not None}
    config["architectures"] = getattr(parent.config, "architectures", None) or [type(parent.config).__name__]
    config["torch_dtype"] = "bfloat16"
    overrides = parent.descriptor.block_config_to_layer_overrides(block)
    if "head_dim" not in config and "num_attention_heads" in overrides:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    return config | overrides


def ask(system: str, server: str, config: Mapping[str, Any], workload: Workload, mode: str | None = None) -> Answer:
    """Ask AIConfigurator for one model.

    Args:
        system: The GPU.
        server: A key of :data:`SERVERS`.
        config: The model's config as JSON data.
        workload: Requests in flight, tokens of prompt and answer.
        mode: AIConfigurator's name of the format of the weights. Default: bfloat16.

    Raises:
        UnsupportedModel: AIConfigurator cannot say.
    """
    from aiconfigurator.cli.api import cli_estimate  # an optional package, which takes seconds to import

    counts_of_experts = ("num_experts", "num_local_experts", "n_routed_experts")
    is_mixture = any(isinstance(config.get(key), int) for key in counts_of_experts)
    experts: dict[str, Any] = {"moe_tp_size": 1, "moe_ep_size": 1, "moe_quant_mode": mode} if is_mixture else {}
    # A model is remembered by its folder, so each has its own.
    question = "What does AIConfigurator say?"
    with tempfile.TemporaryDirectory() as folder, _quiet(), foreign_code(question, refusal_is_answer=True) as said:
        Path(folder, "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
        result = said.call(
            cli_estimate, folder, system, backend_name=SERVERS[server], database_mode="HYBRID", isl=workload.prompt,
            osl=workload.generated, batch_size=workload.batch, backend_version=_newest.get((system, server)),
            gemm_quant_mode=mode, **experts,
        )  # fmt: skip
        _newest[system, server] = result.backend_version
        steps = result.per_ops_data
        counts = steps["scheduling"]["num_mix_steps"], steps["scheduling"]["num_genonly_steps"]
    if said.failed:
        raise UnsupportedModel(f"AIConfigurator has no times for this model on {system} with {server}: {said.reason}")
    mixed, decode = ({name: float(ms) / 1e3 for name, ms in steps[key].items()} for key in ("mix_step", "genonly_step"))
    return Answer(mixed, decode, counts[0] / sum(counts), float(result.ttft) / 1e3)


def ask_whole(
    system: str, server: str, parent: ModelShape, blocks: Sequence[BlockConfig], workload: Workload
) -> Timing:
    """Times of a whole child of a Llama-like parent, asked in the DeciLM layout.

    Raises:
        UnsupportedModel: The layout cannot express a layer, or AIConfigurator has no data for it.
    """
    language, entries = parent.language, []
    queries = language.num_attention_heads
    for i, block in enumerate(blocks):
        attention, ffn = block.attention, block.ffn
        other_heads = attention.num_attention_heads not in (None, queries)
        if attention.replace_with_linear or ffn.replace_with_linear or other_heads or ffn.moe is not None:
            raise UnsupportedModel(f"AIConfigurator is not asked for the whole child: layer {i} is none of Llama's")
        kv = attention.num_key_value_heads or getattr(language, _KV_HEADS, None) or queries
        width = 1.5 * (ffn.intermediate_size or language.intermediate_size) / language.hidden_size
        entries.append(
            {
                "attention": _entry(attention, "n_heads_in_group", queries // kv),
                "ffn": _entry(ffn, "ffn_mult", width),
            }
        )
    config = config_of(parent, parent.blocks[0]) | {"architectures": ["DeciLMForCausalLM"], "block_configs": entries}
    config |= {"model_type": "nemotron-nas", _KV_HEADS: None, "intermediate_size": None}
    return ask(system, server, config, workload).whole


def _entry(subblock: Subblock, name: str, size: float) -> dict[str, Any]:
    return {name: None if subblock.no_op else size, "no_op": subblock.no_op, "replace_with_linear": False}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what AIConfigurator prints and logs off the screen."""
    loggers = [logging.getLogger(name) for name in (PACKAGE, f"{PACKAGE}_core")]
    before = [logger.level for logger in loggers]
    with redirect_stdout(StringIO()):
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _prefill_from_mixed(answers: Iterable[Answer]) -> tuple[float, float]:
    """Slope and constant of the time to first token as a function of the time of a mixed step."""
    seen = {sum(answer.mixed.values()): answer.ttft for answer in answers}
    if len(seen) < 2:
        (mixed, ttft), *_ = seen.items()
        return ttft / mixed, 0.0
    slope, constant = np.polyfit(list(seen), list(seen.values()), 1)
    return (float(slope), float(constant)) if slope > 0 and constant >= 0 else (max(seen.values()) / max(seen), 0.0)
