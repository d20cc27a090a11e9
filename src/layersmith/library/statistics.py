"""Importance statistics: what every axis needs to know of the parent's activations, gathered in one pass.

For a projection y = W a with input channels a, the second moment C = E[a a^T] tells everything about what removing
channels does to y in the mean square: removing the set S adds the error e = sum over i in S of w_i a_i, and
E|e|^2 = sum over i, j in S of (w_i . w_j) C_ij. For a linear map in place of a subblock x -> y, the least-squares
solution needs E[x x^T] and E[x y^T].

Sums are accumulated in float64; products are in float32.

Shapes: N rows of activations, F channels, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layersmith.artifacts import read_tensors, write_tensors
from layersmith.execution import first_tensor
from layersmith.heterogeneous.modeling_layersmith import _first_tensor as first_argument
from layersmith.parent import Parent
from layersmith.progress import SILENT, Progress

_SAVE_EVERY_SECONDS = 20.0


@dataclass(frozen=True)
class Probe:
    """One sum to gather: the second moment of what goes into a module, or of its input with its output.

    Attributes:
        name: of the sum, e.g. ``"3.ffn.channels"``.
        layer: index of the decoder layer.
        module: name in the layer of the module that is watched.
        kind: ``"moment"`` for E[a a^T], ``"energy"`` for its diagonal alone, ``"cross"`` for E[x x^T] and E[x y^T].
        bytes: of its sums.
    """

    name: str
    layer: int
    module: str
    kind: str
    bytes: int


def gather(
    parent: Parent,
    probes: Sequence[Probe],
    tokens: torch.Tensor,
    *,
    batch_sequences: int,
    memory_bytes: float,
    checkpoint: Path | None = None,
    inputs: str = "",
    progress: Progress = SILENT,
) -> dict[str, torch.Tensor]:
    """Run the parent over ``tokens`` and gather all probes, in one pass if their sums fit in ``memory_bytes``.

    Args:
        parent: the parent.
        probes: what to gather.
        tokens: ``[N, T]`` ids.
        batch_sequences: rows in one forward pass.
        memory_bytes: for the sums; probes that do not fit wait for another pass.
        checkpoint: a file that keeps the sums so far; an interrupted call goes on from there, to the same sums.
        inputs: digest of everything the sums depend on; a checkpoint of other inputs is not used.
        progress: told of rows done.

    Returns:
        Means over the tokens, in float32: for ``moment`` ``[F, F]``, for ``energy`` ``[F]``, for ``cross`` two
        entries ``name.input`` and ``name.output``, ``[D, D]`` each.
    """
    passes = _passes(probes, memory_bytes)
    batches = [tokens[i : i + batch_sequences] for i in range(0, len(tokens), batch_sequences)]
    sums, done = _resume(checkpoint, inputs)
    saved = time.monotonic()
    with progress.stage("statistics", len(passes) * len(tokens), "sequences") as advance:
        advance(sum(len(batches[i % len(batches)]) for i in range(done)))
        for number, group in enumerate(passes):
            for index, batch in enumerate(batches):
                position = number * len(batches) + index
                if position < done:
                    continue
                _add_batch(parent, group, batch, sums)
                advance(len(batch))
                if checkpoint is not None and time.monotonic() - saved > _SAVE_EVERY_SECONDS:
                    write_tensors(checkpoint, sums, {"inputs": inputs, "done": str(position + 1)})
                    saved = time.monotonic()
    count = tokens.numel()
    return {name: (total / count).float() for name, total in sums.items()}


def _passes(probes: Sequence[Probe], memory_bytes: float) -> list[list[Probe]]:
    passes: list[list[Probe]] = [[]]
    used = 0.0
    for probe in probes:
        if passes[-1] and used + probe.bytes > memory_bytes:
            passes.append([])
            used = 0.0
        passes[-1].append(probe)
        used += probe.bytes
    return passes


def _resume(checkpoint: Path | None, inputs: str) -> tuple[dict[str, torch.Tensor], int]:
    if checkpoint is None or not checkpoint.is_file():
        return {}, 0
    from safetensors import safe_open

    with safe_open(checkpoint, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("inputs") != inputs:
        return {}, 0
    return read_tensors(checkpoint), int(metadata["done"])


@torch.inference_mode()
def _add_batch(parent: Parent, probes: Sequence[Probe], batch: torch.Tensor, sums: dict[str, torch.Tensor]) -> None:
    def add(name: str, value: torch.Tensor) -> None:
        if name in sums:
            sums[name] += value.double().cpu()
        else:
            sums[name] = value.double().cpu()

    def hook(probe: Probe) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = first_argument(args, kwargs).flatten(0, -2).float()
            if probe.kind == "energy":
                add(probe.name, x.square().sum(0))
            elif probe.kind == "moment":
                add(probe.name, x.T @ x)
            else:
                y = first_tensor(output).flatten(0, -2).float()
                add(f"{probe.name}.input", x.T @ x)
                add(f"{probe.name}.output", x.T @ y)

        return watch

    layers = parent.layers
    handles = [
        layers[probe.layer].get_submodule(probe.module).register_forward_hook(hook(probe), with_kwargs=True)
        for probe in probes
    ]
    try:
        parent.model(input_ids=batch.to(parent.runtime.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
