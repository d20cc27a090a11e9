"""Times on a device that is not here, predicted from its data sheet: a lower bound, not a measurement.

Each part of a model takes as long as its arithmetic or its memory traffic, whichever is longer:

    t = max(operations / rate, bytes / bandwidth)

There are two operations for each active weight and token, and four for each query, key and channel of a head. The
bytes are the weights that are read and the KV cache that is read or written. Routed experts count as far as the tokens
of the batch can reach them. Kernel launches, norms and whatever runs between kernels are not included.

Source: Williams et al., "Roofline: An Insightful Visual Performance Model for Multicore Architectures" (2009).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layersmith.block_config import BlockConfig, has_attention
from layersmith.costs.budget import Workload
from layersmith.costs.counted import ModelShape, sliding_window
from layersmith.costs.table import CostTable
from layersmith.costs.times import Times, Timing
from layersmith.errors import UsageError, did_you_mean
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import LayerAxes


@dataclass(frozen=True)
class Device:
    """A device by its data sheet.

    Attributes:
        operations: Dense operations a second on matrix units, in bfloat16, or float16 if it has no bfloat16.
        operations_fp32: Operations a second in float32.
        bandwidth: Bytes a second of its memory.
        memory: Bytes of its memory.
    """

    operations: float
    operations_fp32: float
    bandwidth: float
    memory: float


# From the manufacturers' data sheets: dense rates, of the SXM or OAM form if there are several.
DEVICES = {
    "A10": Device(125e12, 31.2e12, 600e9, 24e9),
    "A100-40GB": Device(312e12, 19.5e12, 1555e9, 40e9),
    "A100": Device(312e12, 19.5e12, 2039e9, 80e9),
    "B200": Device(2250e12, 75e12, 8000e9, 180e9),
    "H100": Device(989e12, 67e12, 3350e9, 80e9),
    "H100-PCIE": Device(756e12, 51e12, 2000e9, 80e9),
    "H200": Device(989e12, 67e12, 4800e9, 141e9),
    "L4": Device(121e12, 30.3e12, 300e9, 24e9),
    "L40S": Device(362e12, 91.6e12, 864e9, 48e9),
    "MI300X": Device(1307e12, 163.4e12, 5300e9, 192e9),
    "RTX4090": Device(165e12, 82.6e12, 1008e9, 24e9),
    "T4": Device(65e12, 8.1e12, 320e9, 16e9),
    "V100": Device(125e12, 15.7e12, 900e9, 32e9),
}


def device_of(name: str, where: str = "recipe costs.device") -> Device:
    """A device by its name, in any case; ``where`` it was given. Raises: UsageError: The device is unknown."""
    by_name = {known.upper(): device for known, device in DEVICES.items()}
    wanted = name.upper().replace(" ", "-")
    if wanted not in by_name:
        raise UsageError(f"{where}: {name!r} is not known. {did_you_mean(name, DEVICES)}")
    return by_name[wanted]


def predict(
    name: str, parent: ModelShape, alternatives: Sequence[Alternative], costs: CostTable, workload: Workload
) -> Times:
    """Predicted times of every alternative on a device.

    Args:
        name: Name of the device, a key of :data:`DEVICES`.
        parent: Shape of the parent.
        alternatives: All alternatives of the search space.
        costs: Their counted costs for this workload.
        workload: Workload to predict for.

    Raises:
        UsageError: The device is unknown.
    """
    device, language = device_of(name), parent.language
    rate = device.operations if parent.dtype.itemsize <= 2 else device.operations_fp32

    def seconds_for(operations: float, moved: float) -> float:
        return max(operations / rate, moved / device.bandwidth)

    def timing(part: Mapping[str, int], prompt: int, pairs: tuple[float, float] = (0.0, 0.0)) -> Timing:
        parameters, active = part["parameters"], part["active_parameters"]
        seconds = []
        for tokens, phase_pairs in zip((prompt, 1), pairs, strict=True):
            together = workload.batch * tokens
            # Each token reaches other experts, until all are reached.
            reached = min(1.0, active / parameters * together) if parameters else 0.0
            moved = part["weight_bytes"] * reached + part["kv_cache_bytes"]
            seconds.append(seconds_for(2.0 * active * together + 4.0 * phase_pairs * workload.batch, moved))
        return Timing(*seconds)

    by_key = {}
    for a in alternatives:
        block = a.block_config(parent.blocks[a.layer])
        pairs = (0.0, 0.0)
        if a.subblock == "attention" and has_attention(block) and a.traits.runs_subblock:
            pairs = _pairs(language, block, a.layer, parent.axes[a.layer], workload)
        by_key[a.key] = timing(costs.by_key[a.key], workload.prompt, pairs)
    # One row of the embeddings is read for each token, and the whole head once for each sequence.
    vocab, hidden = (getattr(language, key, 0) or 0 for key in ("vocab_size", "hidden_size"))
    head = {
        "parameters": vocab * hidden,
        "active_parameters": vocab * hidden,
        "weight_bytes": vocab * hidden * parent.dtype.itemsize,
        "kv_cache_bytes": 0,
    }
    return Times("predicted", name, workload, by_key, timing(head, 1))


def _pairs(language: Any, block: BlockConfig, layer: int, axes: LayerAxes, workload: Workload) -> tuple[float, float]:
    """Query-key pairs times the channels of all heads: of the prompt, and of one generated token."""
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
