"""Weights that stay on the disk until a layer runs: a parent that is larger than memory.

A model is loaded without its weights; each decoder layer, and each module outside the layers that has large weights, is
a unit. Before a unit runs, its weights are read and those of the unit before are let go, so at most one layer's lie in
memory, besides what alternatives of that layer have of their own. The rows of the input embedding that a batch needs
are read alone.

Transformers finds which tensor of which file is which weight. What it has to convert while it loads (experts that
become one tensor) it writes once into files of a scratch folder, which are unlinked as soon as they are open, so a
killed process leaves nothing behind.
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from layersmith.errors import InputError
from layersmith.heterogeneous.build import decoder_layers, num_layers_of
from layersmith.heterogeneous.checkpoint import class_of, read_weights, weight_files
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.stock import quiet_transformers
from layersmith.run.artifacts import saying_disk_full
from layersmith.run.runtime import Runtime

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Read and converted at once.
_CHUNK_BYTES = 8 * 1024**2
# Units of less than this share of the largest are read once and stay.
_SMALL_SHARE = 0.01


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies: a file that is open, and a place in it."""

    file: int
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Files:
    """Tensors of safetensors files, read when they are asked for.

    Args:
        places: name to a file and the tensor's name in it.
        dtype: in which floating-point tensors are read.
    """

    def __init__(self, places: Mapping[str, tuple[Path, str]], dtype: torch.dtype):
        self.dtype = dtype
        self._open: dict[Path, int] = {}
        headers: dict[Path, dict[str, Any]] = {}
        self._tensors: dict[str, _Tensor] = {}
        for name, (file, inside) in places.items():
            if file not in headers:
                self._open[file] = os.open(file, os.O_RDONLY)
                headers[file] = _header(file)
            entry, base = headers[file][inside], headers[file][""]
            if entry["dtype"] not in DTYPES:
                raise InputError(f"{file}: {inside} is of type {entry['dtype']}, which is not read from the disk.")
            start = base + entry["data_offsets"][0]
            self._tensors[name] = _Tensor(self._open[file], start, tuple(entry["shape"]), DTYPES[entry["dtype"]])

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """A whole tensor."""
        tensor = self._tensors[name]
        result = torch.empty(tensor.shape, dtype=self._dtype_of(tensor))
        flat = result.view(-1)
        step = flat.numel() if result.dtype == tensor.dtype else _CHUNK_BYTES // tensor.dtype.itemsize
        for first in range(0, flat.numel(), max(1, step)):
            _fill(flat[first : first + step], tensor, first)
        return result.to(device)

    def rows(self, name: str, indices: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Some rows of a matrix; ``indices`` ascend."""
        tensor = self._tensors[name]
        result = torch.empty((len(indices), *tensor.shape[1:]), dtype=self._dtype_of(tensor))
        width = result[0].numel() if len(indices) else 0
        for own, index in zip(result.view(len(indices), -1), indices.tolist(), strict=True):
            _fill(own, tensor, index * width)
        return result.to(device)

    def view(self, name: str) -> torch.Tensor:
        """A whole tensor as it is stored, mapped into memory: its pages come when they are read, and may go again."""
        tensor = self._tensors[name]
        size = tensor.dtype.itemsize * _count(tensor.shape)
        path = f"/proc/self/fd/{tensor.file}"
        whole = torch.from_file(path, shared=False, size=tensor.start + size, dtype=torch.uint8)
        return whole[tensor.start :].view(tensor.dtype).view(tensor.shape)

    def _dtype_of(self, tensor: _Tensor) -> torch.dtype:
        return self.dtype if tensor.dtype.is_floating_point else tensor.dtype


def _header(file: Path) -> dict[str, Any]:
    """Entries of a safetensors file; under the empty name where its data starts."""
    with open(file, "rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        entries: dict[str, Any] = json.loads(opened.read(size))
    return {**entries, "": 8 + size}


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _fill(into: torch.Tensor, tensor: _Tensor, first: int) -> None:
    """Read as many elements of a stored tensor as ``into`` ``[n]`` has, from the first on."""
    raw = into if into.dtype == tensor.dtype else torch.empty(into.numel(), dtype=tensor.dtype)
    memory = memoryview(raw.view(torch.uint8).numpy())  # type: ignore[arg-type]
    at = tensor.start + first * tensor.dtype.itemsize
    while memory:
        done = os.preadv(tensor.file, [memory], at)
        if done == 0:
            raise InputError("a checkpoint's file became shorter while it was read. Run the same command again.")
        memory, at = memory[done:], at + done
    if raw is not into:
        into.copy_(raw)


# ---------------------------------------------------------------------------------------------- units


class WeightStream:
    """Gives the units of a model their weights when they run; see the module's docstring.

    Args:
        model: with weights on the meta device.
        layers: its decoder layers.
        embedding: its input embedding.
        files: its weights by their names in ``state_dict()``.
        device: where they are wanted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[nn.Module],
        embedding: nn.Module,
        files: Files,
        device: torch.device,
    ):
        self.files, self.device = files, device
        _give_back()
        self._units: dict[nn.Module, list[tuple[nn.Module, str, str]]] = {}
        self._resident: nn.Module | None = None
        names = {id(module): name for name, module in model.named_modules()}
        inside = {id(m): layer for layer in layers for m in layer.modules()}
        for module in model.modules():
            unit = inside.get(id(module), module)
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    name = f"{names[id(module)]}.{own}".removeprefix(".")
                    self._units.setdefault(unit, []).append((module, own, name))
        largest = max((self._bytes(unit) for unit in self._units), default=0)
        for unit in list(self._units):
            if unit not in layers and self._bytes(unit) < _SMALL_SHARE * largest:
                self._fill(self._units.pop(unit))
            elif unit is embedding and isinstance(unit, nn.Embedding):
                ((_, _, name),) = self._units.pop(unit)
                unit.padding_idx = None  # which only training asks for
                unit.register_forward_pre_hook(self._hook_of_rows(name))
                unit.register_forward_hook(_emptied)
            else:
                unit.register_forward_pre_hook(self._hook_of(unit))

    def need(self, unit: nn.Module) -> None:
        """Read a unit's weights, unless they are there; those of the unit before go."""
        if unit is self._resident or unit not in self._units:
            return
        self.release()
        self._fill(self._units[unit])
        self._resident = unit

    def release(self) -> None:
        """Let go of the weights that are there."""
        if self._resident is not None:
            for module, own, _ in self._units[self._resident]:
                module._parameters[own] = _on_meta(module._parameters[own])
            self._resident = None
        _give_back()

    def _fill(self, places: Sequence[tuple[nn.Module, str, str]]) -> None:
        for module, own, name in places:
            module._parameters[own] = nn.Parameter(self.files.read(name, self.device), requires_grad=False)

    def _bytes(self, unit: nn.Module) -> int:
        parameters = [module._parameters[own] for module, own, _ in self._units[unit]]
        return sum(p.numel() * p.element_size() for p in parameters if p is not None)

    # Hooks are plain functions: a copy of a module shares them, and does not copy the model that they know.

    def _hook_of(self, unit: nn.Module) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: self.need(unit) if module is unit else None  # copies have weights of their own

    def _hook_of_rows(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def only_what_is_read(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if args and args[0].dtype in (torch.int64, torch.int32):
                ids, places = args[0].unique(return_inverse=True)
                rows = self.files.rows(name, ids.cpu(), self.device)
                args = (places, *args[1:])
            else:
                rows = self.files.read(name, self.device)
            module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
            return args

        return only_what_is_read


_M_MMAP_THRESHOLD = -3
_OWN_MAPPING_BYTES = 1024**2


@cache
def _c_library() -> Any:
    """GNU's C library, told to map large pieces of memory one by one: others stay with the process once let go of."""
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)
        return library
    except (OSError, AttributeError):
        return None


def _give_back() -> None:
    """Give memory that was let go of back to the system."""
    if (library := _c_library()) is not None:
        library.malloc_trim(0)


def _emptied(module: nn.Module, args: Any, output: Any) -> None:
    rows = module._parameters["weight"]
    assert isinstance(module, nn.Embedding)
    assert rows is not None
    shape = (module.num_embeddings, module.embedding_dim)
    module._parameters["weight"] = nn.Parameter(torch.empty(shape, dtype=rows.dtype, device="meta"), False)


def _on_meta(parameter: nn.Parameter | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


# ---------------------------------------------------------------------------------------------- loading


def load_streamed(
    path: str | os.PathLike[str],
    runtime: Runtime,
    descriptor: type[ModelDescriptor],
    scratch: Path,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, torch.dtype, WeightStream]:
    """Load a model without its weights; the dtype in which they are stored; and what gives the model its weights.

    Args:
        path: a checkpoint folder or hub id.
        runtime: device and dtype of the computation.
        descriptor: of the family.
        scratch: a folder, there or not, on the disk that has room for what must be converted.
        trust_remote_code: let Transformers run code from the checkpoint.

    Raises:
        InputError: files are missing or damaged, or cannot be read one by one.
    """
    cls, config = class_of(path, descriptor, trust_remote_code)
    with torch.device("meta"), quiet_transformers():
        skeleton = cls._from_config(copy.deepcopy(config))
    stays = descriptor.final_norm_name().removesuffix(".weight")
    folder = _folder_near(scratch)
    try:
        with saying_disk_full(folder):
            how = {"device_map": _all_on_disk_but(skeleton, stays), "offload_folder": str(folder)}
            model = read_weights(cls, path, copy.deepcopy(config), dtype="auto", **how)
        dtype, files = model.dtype, Files(_places(model), runtime.dtype)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    missing = [name for name, p in model.named_parameters() if p.is_meta and name not in files]
    if missing:
        raise InputError(f"{path}: weights cannot be read from the disk one by one: {', '.join(missing[:3])}.")
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                wanted = runtime.dtype if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = buffer.to(runtime.device, wanted)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # A copy, or it would keep a map of its file, with what was read around it.
                moved = parameter.to("meta" if parameter.is_meta else runtime.device, runtime.dtype, copy=True)
                module._parameters[name] = nn.Parameter(moved, requires_grad=False)
    layers = decoder_layers(model, descriptor, num_layers_of(model.config, descriptor))
    embedding = model.get_submodule(descriptor.input_embedding_name())
    return model.eval(), dtype, WeightStream(model, layers, embedding, files, runtime.device)


def is_too_large(path: str | os.PathLike[str], runtime: Runtime) -> bool:
    """Whether a checkpoint's weights would take more than three quarters of the memory that is free for them."""
    folder = Path(path)
    if not folder.is_dir():
        return False  # not here yet
    count = 0
    for file in weight_files(folder):
        if not file.is_file():
            return False  # which loading will say
        count += sum(
            _count(entry["shape"]) for name, entry in _header(file).items() if name not in ("", "__metadata__")
        )
    return count * runtime.dtype.itemsize > 0.75 * free_memory(runtime.device)


def free_memory(device: torch.device) -> float:
    """Bytes; of a control group's limit, where there is one, what it has left."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float("inf")
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * float(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError):  # "max" is no number
        group = Path("/sys/fs/cgroup")
        used = float((group / "memory.current").read_text()) - _of_files(group / "memory.stat")
        free = min(free, float((group / "memory.max").read_text()) - used)
    return free


def _of_files(statistics: Path) -> float:
    """Bytes of a control group that are files' pages, which can go."""
    fields = dict(line.split() for line in statistics.read_text().splitlines())
    return float(fields.get("inactive_file", 0)) + float(fields.get("active_file", 0))


def _all_on_disk_but(model: nn.Module, stays: str) -> dict[str, str]:
    """A device map for Transformers, which takes none without a device in it."""
    result: dict[str, str] = {}
    inner, before = model, ""
    for part in stays.split("."):
        result |= {f"{before}{name}": "disk" for name, _ in inner.named_children() if name != part}
        inner, before = inner.get_submodule(part), f"{before}{part}."
    return {**result, stays: "cpu"}


def _places(model: PreTrainedModel) -> dict[str, tuple[Path, str]]:
    """Where Transformers found the weights that it left on the disk; its own hooks go."""
    from accelerate.hooks import remove_hook_from_submodules

    places: dict[str, tuple[Path, str]] = {}
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            index = getattr(weights, "dataset", weights).index
            places = {n: (Path(e["safetensors_file"]), e.get("weight_name", n)) for n, e in index.items()}
            break
    remove_hook_from_submodules(model)
    for module in model.modules():  # it leaves each a method of its own, by which it and copies of it outlive their use
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    return places


def _folder_near(folder: Path) -> Path:
    """A new folder in this one, or in the first above it that is there."""
    while not folder.is_dir():
        folder = folder.parent
    with saying_disk_full(folder):
        return Path(tempfile.mkdtemp(prefix=".layersmith.", dir=folder))
