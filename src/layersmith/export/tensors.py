"""Write a checkpoint tensor by tensor, so that at most one file of it is in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from layersmith.heterogeneous.weight_files import write_files

MAX_SHARD_BYTES = 2 * 1024**3


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], torch.Tensor],
    itemsize: int,
    most: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors into safetensors files as ``save_pretrained`` does: one file, or several with an index.

    Args:
        folder: Receives the files.
        shapes: Names and shapes of all tensors.
        make: Returns the tensor of a name.
        itemsize: Bytes of an element, by which tensors are divided among files.
        most: Bytes of a file, unless one tensor is larger.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        of_tensor = math.prod(shape) * itemsize
        if shards[-1] and size + of_tensor > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += of_tensor
    files = {"model.safetensors": shards[0]}
    if len(shards) > 1:
        files = {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)}
    write_files(folder, files, make, with_index=len(shards) > 1)
