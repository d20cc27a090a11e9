"""The parent: a loaded model and the facts about it that other modules need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from layersmith.block_config import BlockConfig
from layersmith.errors import UnsupportedModel
from layersmith.execution.streaming import WeightStream, load_streamed
from layersmith.heterogeneous.build import block_configs_of, decoder_layers, head_of
from layersmith.heterogeneous.checkpoint import load, read_header, weight_files
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.describe import describe
from layersmith.run.artifacts import file_digest, fingerprint, plain
from layersmith.run.runtime import Runtime

# Weights up to this size are hashed whole. Of larger ones only size, header and both ends of each file are, because
# hashing hundreds of GiB would take longer than reading the model.
_WHOLE_HASH_BYTES = 2 * 1024**3


@dataclass(frozen=True, eq=False)
class Parent:
    """The model that is compressed.

    Attributes:
        path: folder or hub id.
        model: in the dtype of the computation, in evaluation mode, without gradients.
        dtype: dtype of the checkpoint, in which the child is written.
        descriptor: Descriptor of the model's family.
        blocks: the block config of every layer.
        identity: digest of its config and weights.
        runtime: device and dtype of the computation.
        stream: reads weights that stay on the disk when a layer runs; None if all weights are in memory.
    """

    path: str
    model: PreTrainedModel
    dtype: torch.dtype
    descriptor: type[ModelDescriptor]
    blocks: tuple[BlockConfig, ...]
    identity: str
    runtime: Runtime
    stream: WeightStream | None = None
    _answers: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def language_config(self) -> PretrainedConfig:
        return self.descriptor.get_language_model_config(self.model.config)

    @property
    def positions(self) -> int | None:
        """The longest context that it was made for; None if its config does not say."""
        positions: int | None = getattr(self.language_config, "max_position_embeddings", None)
        return positions

    @property
    def layers(self) -> list[nn.Module]:
        return decoder_layers(self.model, self.descriptor, len(self.blocks))

    @property
    def head(self) -> nn.Module:
        """The language-model head."""
        return head_of(self.model, self.descriptor)

    def once(self, question: str, find: Callable[[], Any]) -> Any:
        """The answer to a question about this model; ``find`` runs the first time that it is asked."""
        if question not in self._answers:
            self._answers[question] = find()
        return self._answers[question]

    def layer(self, i: int) -> nn.Module:
        """A decoder layer with its weights in memory."""
        layer = self.layers[i]
        if self.stream is not None:
            self.stream.need(layer)
        return layer

    def let_go(self) -> None:
        """Free the memory of streamed weights; they are read again when a layer runs."""
        if self.stream is not None:
            self.stream.release()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its ``state_dict()``; streamed weights are mapped into memory from their files."""
        result: dict[str, torch.Tensor] = self.model.state_dict()
        if self.stream is not None:
            self.stream.release()
            files = self.stream.files
            result |= {name: files.view(name).to(self.runtime.dtype) for name, t in result.items() if t.is_meta}
        return result

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """A computed weight as the checkpoint will hold it, in the dtype of the computation."""
        return tensor.to(self.dtype).to(self.runtime.dtype)


def load_parent(
    path: str | Path,
    runtime: Runtime,
    descriptor: type[ModelDescriptor] | None = None,
    trust_remote_code: bool = False,
    *,
    stream_near: Path | None = None,
) -> Parent:
    """Load and check a parent.

    Args:
        path: checkpoint folder or hub id.
        runtime: device and dtype of the computation.
        descriptor: Descriptor of the model's family; default: inferred.
        trust_remote_code: let Transformers run code from the checkpoint.
        stream_near: if given, weights stay on the disk until a layer runs, converted ones near this folder.

    Raises:
        InputError: files are missing or damaged, or config and weights disagree.
        UnsupportedModel: its family cannot be described, or needs remote code that is not allowed.
    """
    stream: WeightStream | None = None
    if stream_near is None:
        model = load(path, descriptor=descriptor, trust_remote_code=trust_remote_code)
        descriptor = descriptor or describe(model)
        dtype = model.dtype
        module: nn.Module = model
        module.to(device=runtime.device, dtype=runtime.dtype).eval().requires_grad_(False)
    else:
        descriptor = descriptor or describe(path, trust_remote_code=trust_remote_code)
        model, dtype, stream = load_streamed(path, runtime, descriptor, stream_near, trust_remote_code)
    if descriptor.requires_trust_remote_code() and not trust_remote_code:
        raise UnsupportedModel(f"{path}: its family runs code from the checkpoint. Allow it with trust_remote_code.")
    blocks = tuple(block_configs_of(model.config, descriptor))
    for i in range(len(blocks)):
        name = descriptor.layer_block_name(i)
        try:
            model.get_submodule(name)
        except AttributeError as error:
            raise UnsupportedModel(f"{descriptor.__name__}: the model has no layer {name!r} ({error}).") from error
    descriptor.get_weight_groups(model.state_dict(), len(blocks))
    return Parent(str(path), model, dtype, descriptor, blocks, identity_of(path, model.config), runtime, stream)


def identity_of(path: str | Path, config: PretrainedConfig) -> str:
    """A digest of a checkpoint: equal for equal contents, whatever the folder."""
    data: dict[str, Any] = config.to_dict()
    data.pop("_name_or_path", None)
    folder = Path(path)
    files = weight_files(folder) if folder.is_dir() else []
    total = sum(file.stat().st_size for file in files)
    digests = {file.name: file_digest(file) if total <= _WHOLE_HASH_BYTES else _ends_digest(file) for file in files}
    return fingerprint({"config": plain(data), "files": digests, "hub": None if files else str(path)})


def _ends_digest(file: Path) -> str:
    """Digest of a large file's header, size, and the first and last MiB of its data."""
    _, data_start = read_header(file)
    with open(file, "rb") as opened:
        opened.seek(8)
        start = opened.read(data_start - 8 + 1024**2)
        opened.seek(max(0, file.stat().st_size - 1024**2))
        return fingerprint([file.stat().st_size, start.hex(), opened.read().hex()])
