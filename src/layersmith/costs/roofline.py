"""Times of a device that is not here, predicted from its maker's figures: a lower bound, never a measurement.

A part of a model takes as long as its arithmetic or its memory traffic, whichever is longer (Williams et al.,
"Roofline", 2009):

    t = max(operations / rate, bytes / bandwidth)

Operations are two for each active weight and token, and four for each pair of a query and a key and each channel of a
head. Bytes are the weights that are read and the KV cache that is read or written. Routed experts are read as far as
the batch's tokens can reach them. Launches, norms and what lies between kernels are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layersmith.block_config import BlockConfig, has_attention
from layersmith.costs.counted import Workload, sliding_window
from layersmith.costs.table import CostTable
from layersmith.costs.times import Times, Timing
from layersmith.errors import UsageError, did_you_mean
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import LayerAxes


@dataclass(frozen=True)
class Device:
    """What a maker says of a device.

    Attributes:
        operations: a second, dense, in bfloat16 (float16 where there is none), on matrix units.
        operations_fp32: a second in float32.
        bandwidth: of its memory, bytes a second.
    """

    operations: float
    operations_fp32: float
    bandwidth: float


# From the makers' data sheets; dense rates, SXM or OAM forms where there are several.
DEVICES = {
    "A10": Device(125e12, 31.2e12, 600e9),
    "A100-40GB": Device(312e12, 19.5e12, 1555e9),
    "A100": Device(312e12, 19.5e12, 2039e9),
    "B200": Device(2250e12, 75e12, 8000e9),
    "H100": Device(989e12, 67e12, 3350e9),
    "H100-PCIE": Device(756e12, 51e12, 2000e9),
    "H200": Device(989e12, 67e12, 4800e9),
    "L4": Device(121e12, 30.3e12, 300e9),
    "L40S": Device(362e12, 91.6e12, 864e9),
    "MI300X": Device(1307e12, 163.4e12, 5300e9),
    "RTX4090": Device(165e12, 82.6e12, 1008e9),
    "T4": Device(65e12, 8.1e12, 320e9),
    "V100": Device(125e12, 15.7e12, 900e9),
}


def device_of(name: str) -> Device:
    """Raises: UsageError: a device that is not known."""
    found = {known.upper(): device for known, device in DEVICES.items()}
    wanted = name.upper().replace(" ", "-")
    if wanted not in found:
        raise UsageError(f"recipe costs.device: {name!r} is not known. {did_you_mean(name, DEVICES)}")
    return found[wanted]


def predict(
    name: str,
    language: Any,
    blocks: Sequence[BlockConfig],
    axes: Sequence[LayerAxes],
    alternatives: Sequence[Alternative],
    costs: CostTable,
    dtype: torch.dtype,
    workload: Workload,
) -> Times:
    """Times of every alternative on a device that has a name here.

    Args:
        name: of the device.
        language: config of the language model.
        blocks, axes: of the parent, one a layer.
        alternatives: of all layers.
        costs: what is counted of them, for this workload.
        dtype: of weights and cache.
        workload: batch, prompt, context.

    Raises:
        UsageError: an unknown device.
    """
    device = device_of(name)
    rate = device.operations if dtype.itemsize <= 2 else device.operations_fp32

    def took(operations: float, moved: float) -> float:
        return max(operations / rate, moved / device.bandwidth)

    def of(own: Mapping[str, int], prompt: int, pairs: tuple[float, float] = (0.0, 0.0)) -> Timing:
        parameters, active = own["parameters"], own["active_parameters"]
        seconds = []
        for tokens, own_pairs in zip((prompt, 1), pairs, strict=True):
            together = workload.batch * tokens
            # Each token reaches its own experts; all of them at most.
            reached = min(1.0, active / parameters * together) if parameters else 0.0
            moved = own["weight_bytes"] * reached + own["kv_cache_bytes"]
            seconds.append(took(2.0 * active * together + 4.0 * own_pairs * workload.batch, moved))
        return Timing(*seconds)

    by_key = {}
    for a in alternatives:
        block = a.block_config(blocks[a.layer])
        pairs = (0.0, 0.0)
        if a.subblock == "attention" and has_attention(block) and a.traits.runs_subblock:
            pairs = _pairs(language, block, a.layer, axes[a.layer], workload)
        by_key[a.key] = of(costs.by_key[a.key], workload.prompt, pairs)
    # Of the embeddings a row a token is read, of the head everything, once for each sequence.
    vocab, hidden = (getattr(language, key, 0) or 0 for key in ("vocab_size", "hidden_size"))
    head = {
        "parameters": vocab * hidden,
        "active_parameters": vocab * hidden,
        "weight_bytes": vocab * hidden * dtype.itemsize,
        "kv_cache_bytes": 0,
    }
    return Times("predicted", name, workload, by_key, of(head, 1))


def _pairs(language: Any, block: BlockConfig, layer: int, axes: LayerAxes, workload: Workload) -> tuple[float, float]:
    """Pairs of a query and a key, times the channels of all heads: of a prompt, and of a token after it."""
    heads = block.attention.num_attention_heads or (axes.kv.num_heads * axes.kv.together if axes.kv else None)
    heads = heads or getattr(language, "num_attention_heads", 0) or 0
    head_dim = (axes.kv.head_dim if axes.kv else None) or getattr(language, "head_dim", None)
    head_dim = head_dim or (getattr(language, "hidden_size", 0) or 0) // (
        getattr(language, "num_attention_heads", 0) or 1
    )
    window = sliding_window(language, layer, block.attention.layer_type)
    prompt, context = workload.prompt, workload.prompt + workload.generated // 2
    seen = min(context, window) if window else context
    if window and prompt > window:
        of_prompt = window * (window + 1) / 2 + (prompt - window) * window
    else:
        of_prompt = prompt * (prompt + 1) / 2
    return of_prompt * heads * head_dim, float(seen * heads * head_dim)
