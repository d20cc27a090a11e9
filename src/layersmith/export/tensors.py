"""Write a checkpoint tensor by tensor, so that at most one file of it is in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from layersmith.heterogeneous.weight_files import INDEX
from layersmith.run.artifacts import saying_disk_full, write_json, write_tensors

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
    index: dict[str, str] = {}
    total = 0
    with saying_disk_full(folder):
        for number, names in enumerate(shards, 1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {name: make(name) for name in names}
            total += sum(t.numel() * t.element_size() for t in tensors.values())
            write_tensors(folder / file, tensors, {"format": "pt"})
            index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
