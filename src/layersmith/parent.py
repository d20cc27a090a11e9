"""The parent: a loaded model, and what every stage asks about it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from layersmith.artifacts import file_digest, fingerprint, plain
from layersmith.block_config import BlockConfig
from layersmith.errors import UnsupportedModel
from layersmith.heterogeneous.build import block_configs_of, decoder_layers
from layersmith.heterogeneous.checkpoint import load, weight_files
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.describe import describe
from layersmith.runtime import Runtime

# Up to this size weights are hashed whole; above, each file's header, size and ends are.
_WHOLE_HASH_BYTES = 2 * 1024**3


@dataclass(frozen=True, eq=False)
class Parent:
    """A model that is about to be made smaller.

    Attributes:
        path: folder or hub id.
        model: in the dtype of the computation, in evaluation mode, without gradients.
        dtype: of the checkpoint; the child is written in it.
        descriptor: of its family.
        blocks: the block config of every layer.
        identity: digest of its config and weights.
    """

    path: str
    model: PreTrainedModel
    dtype: torch.dtype
    descriptor: type[ModelDescriptor]
    blocks: tuple[BlockConfig, ...]
    identity: str
    runtime: Runtime

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def language_config(self) -> PretrainedConfig:
        return self.descriptor.get_language_model_config(self.model.config)

    @property
    def layers(self) -> list[nn.Module]:
        return decoder_layers(self.model, self.descriptor, len(self.blocks))

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """A computed weight as the checkpoint will hold it, in the dtype of the computation."""
        return tensor.to(self.dtype).to(self.runtime.dtype)


def load_parent(
    path: str | Path, runtime: Runtime, descriptor: type[ModelDescriptor] | None = None, trust_remote_code: bool = False
) -> Parent:
    """Load and check a parent.

    Raises:
        InputError: files are missing or damaged, or config and weights disagree.
        UnsupportedModel: its family cannot be described, or needs remote code that is not allowed.
    """
    model = load(path, descriptor=descriptor, trust_remote_code=trust_remote_code)
    descriptor = descriptor or describe(model)
    if descriptor.requires_trust_remote_code() and not trust_remote_code:
        raise UnsupportedModel(f"{path}: its family runs code from the checkpoint. Allow it with trust_remote_code.")
    dtype = model.dtype
    module: nn.Module = model
    module.to(device=runtime.device, dtype=runtime.dtype).eval().requires_grad_(False)
    blocks = tuple(block_configs_of(model.config, descriptor))
    for i in range(len(blocks)):
        name = descriptor.layer_block_name(i)
        try:
            model.get_submodule(name)
        except AttributeError as error:
            raise UnsupportedModel(f"{descriptor.__name__}: the model has no layer {name!r} ({error}).") from error
    descriptor.get_weight_groups(model.state_dict(), len(blocks))
    return Parent(str(path), model, dtype, descriptor, blocks, identity_of(path, model.config), runtime)


def identity_of(path: str | Path, config: PretrainedConfig) -> str:
    """A digest of a checkpoint: equal for equal contents, wherever the folder lies."""
    data: dict[str, Any] = config.to_dict()
    data.pop("_name_or_path", None)
    folder = Path(path)
    files = weight_files(folder) if folder.is_dir() else []
    total = sum(file.stat().st_size for file in files)
    digests = {file.name: file_digest(file) if total <= _WHOLE_HASH_BYTES else _ends_digest(file) for file in files}
    return fingerprint({"config": plain(data), "files": digests, "hub": None if files else str(path)})


def _ends_digest(file: Path) -> str:
    with open(file, "rb") as opened:
        (header_bytes,) = struct.unpack("<Q", opened.read(8))
        start = opened.read(header_bytes + 1024**2)
        opened.seek(max(0, file.stat().st_size - 1024**2))
        return fingerprint([file.stat().st_size, start.hex(), opened.read().hex()])
