"""The parent: a loaded model and the facts about it that other modules need."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from layersmith.block_config import BlockConfig
from layersmith.errors import ALLOW_CODE, UnsupportedModel
from layersmith.execution.dealing import owners_of
from layersmith.execution.streaming import WeightStream, load_streamed
from layersmith.heterogeneous.build import block_configs_of, decoder_layers, head_of
from layersmith.heterogeneous.checkpoint import load
from layersmith.heterogeneous.weight_files import weight_files
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.describe import describe
from layersmith.model_descriptor.stock import casting
from layersmith.run import ranks
from layersmith.run.artifacts import fingerprint, plain
from layersmith.run.digests import digest, remembered
from layersmith.run.runtime import Runtime
from layersmith.untrusted import read_safetensors_header

_READ_BYTES = 4 * 1024**2


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

    @property
    def owners(self) -> list[int]:
        """The process that has each layer where the layers are dealt to all processes."""
        found: list[int] = self.once("owners", lambda: owners_of(self.layers, ranks.count()))
        return found

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
        return as_stored(tensor, self.dtype).to(self.runtime.dtype)


def as_stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A computed weight in the dtype of a checkpoint; what that cannot hold becomes its largest number."""
    most = torch.finfo(dtype).max
    return tensor.clamp(-most, most).to(dtype)


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
        with casting(model, runtime.dtype):
            module.to(device=runtime.device, dtype=runtime.dtype).eval().requires_grad_(False)
    else:
        descriptor = descriptor or describe(path, trust_remote_code=trust_remote_code)
        model, dtype, stream = load_streamed(path, runtime, descriptor, stream_near, trust_remote_code)
    if descriptor.requires_trust_remote_code() and not trust_remote_code:
        raise UnsupportedModel(f"{path}: its family runs code from the checkpoint. {ALLOW_CODE}")
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
    """A digest of a checkpoint: equal for equal contents, whatever the folder and the division into files.

    All weights count, and code that the config names. Of a model of the hub the commit counts.
    """
    data: dict[str, Any] = config.to_dict()
    data.pop("_name_or_path", None)
    folder = Path(path)
    files = weight_files(folder) if folder.is_dir() else []
    tensors = {k: v for file in files for k, v in remembered("tensors", file, _tensor_digests).items()}
    code = [digest(file) for file in sorted(folder.glob("*.py"))] if files and hasattr(config, "auto_map") else []
    hub = None if files else [str(path), getattr(config, "_commit_hash", None)]
    return fingerprint({"config": plain(data), "tensors": tensors, "code": code, "hub": hub})


def _tensor_digests(file: Path) -> dict[str, str]:
    """SHA-256 of each tensor of a safetensors file, with dtype and shape; several are read at once."""
    entries, start = read_safetensors_header(file)
    entries.pop("__metadata__", None)
    with open(file, "rb") as opened, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def of(entry: dict[str, Any]) -> str:
            begin, end = (start + offset for offset in entry["data_offsets"])
            found = hashlib.sha256(fingerprint([entry["dtype"], entry["shape"]]).encode())
            for offset in range(begin, end, _READ_BYTES):
                found.update(os.pread(opened.fileno(), min(_READ_BYTES, end - offset), offset))
            return found.hexdigest()

        return dict(zip(entries, pool.map(of, entries.values()), strict=True))
