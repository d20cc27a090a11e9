"""Weights that stay on the disk until a layer runs, for a parent that is larger than memory.

A model is loaded without its weights. Each decoder layer, and each module outside the layers with large weights, is a
unit. Before a unit runs, its weights are read and those of the unit before are dropped. Meanwhile a thread reads the
unit that will run next, if there is memory for a second one: the one that came next when the same two units ran before,
or else the next one of the model. So at most two layers' weights are in memory, besides those of alternatives. Of the
input embedding, only the rows that a batch needs are read.

Among several processes each keeps the layers that are dealt to it in memory, if they fit, and reads others when it has
to run them. So n processes hold a model together, and no layer is read twice while each works on its own. Then nothing
is read in advance.

Gradients pass through a model on the disk if each layer is run again for its backward pass, when its weights are read
once more (:meth:`WeightStream.run_again_in_backward`).

Transformers decides which tensor of which file is which weight. Weights that it has to convert while it loads (experts
that become one tensor) are written once into files of a scratch folder. These are unlinked as soon as they are open, so
a killed process leaves nothing behind.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from layersmith import upstream
from layersmith.errors import InputError
from layersmith.execution.dealing import group_size, owners_of
from layersmith.execution.files import Files
from layersmith.execution.memory import free_memory, give_back
from layersmith.heterogeneous.build import decoder_layers, num_layers_of
from layersmith.heterogeneous.checkpoint import check_finite, class_of, read_weights
from layersmith.heterogeneous.weight_files import check_files, weight_files
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.stock import casting, quiet_transformers
from layersmith.run.artifacts import saying_disk_full, temporary_folder
from layersmith.run.runtime import Runtime
from layersmith.untrusted import read_safetensors_header

# Units smaller than this share of the largest are read once and stay in memory; dropping them would save little.
_SMALL_SHARE = 0.01
# Weights may take this share of the free memory; activations and alternatives need the rest.
SHARE_OF_MEMORY = 0.75
# A second unit is read in advance if two take no more than this share.
SHARE_FOR_TWO = 0.25
# A parameter: its module, its name there, and its name in the files.
_Place = tuple[nn.Module, str, str]


class _Ahead:
    """Reads the unit that will be needed next while another one runs.

    Args:
        read: Reads the weights of a unit.
        units: All units, in the order in which a forward pass needs them.
    """

    def __init__(self, read: Callable[[nn.Module], list[torch.Tensor]], units: Iterable[nn.Module]):
        self._read, self._thread = read, ThreadPoolExecutor(1, "weights")
        order = list(units)
        self._first, self._next = order[:1], dict(pairwise(order))
        self._seen: dict[tuple[nn.Module | None, nn.Module], nn.Module] = {}
        self._last: tuple[nn.Module | None, nn.Module | None] = (None, None)
        self._reading: tuple[nn.Module, Future[list[torch.Tensor]]] | None = None

    def take(self, unit: nn.Module) -> list[torch.Tensor]:
        """The weights of a unit; begins to read those of the next."""
        before, last = self._last
        if last is not None:
            self._seen[before, last] = unit
        reading = self._reading
        tensors = reading[1].result() if reading is not None and reading[0] is unit else self._read(unit)
        self.forget()
        self._last = last, unit
        following = self._seen.get((last, unit), self._next.get(unit))
        if following is not None and not self._begins_a_pass(following, unit):  # there may be no other pass
            self._reading = following, self._thread.submit(self._read, following)
        return tensors

    def _begins_a_pass(self, following: nn.Module, unit: nn.Module) -> bool:
        """Whether it is the first unit, and not reached backward from the second."""
        return [following] == self._first and self._next.get(following) is not unit

    def forget(self) -> None:
        """Let go of what was read in advance."""
        if self._reading is not None:
            self._reading[1].cancel()
        self._reading, self._last = None, (None, None)


class WeightStream:
    """Gives the units of a model their weights when they run; see the module's docstring.

    Args:
        model: with weights on the meta device.
        layers: its decoder layers.
        embedding: its input embedding.
        files: its weights by their names in ``state_dict()``.
        device: where they are wanted.
        held: those of its layers that are read at once and stay.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[nn.Module],
        embedding: nn.Module,
        files: Files,
        device: torch.device,
        held: Sequence[nn.Module] = (),
    ):
        self.files, self.device, self.layers = files, device, layers
        give_back()
        self._units: dict[nn.Module, list[_Place]] = {}
        self._resident: nn.Module | None = None
        self._ahead: _Ahead | None = None
        names = {id(module): name for name, module in model.named_modules()}
        inside = {id(m): layer for layer in layers for m in layer.modules()}
        for module in model.modules():
            unit = inside.get(id(module), module)
            for local, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    name = f"{names[id(module)]}.{local}".removeprefix(".")
                    self._units.setdefault(unit, []).append((module, local, name))
        largest = max((self._bytes(unit) for unit in self._units), default=0)
        for unit in list(self._units):
            is_small = unit not in layers and self._bytes(unit) < _SMALL_SHARE * largest
            if is_small or unit in held:
                self._fill(unit, self._read(unit))
                del self._units[unit]
            elif unit is embedding and isinstance(unit, nn.Embedding):
                ((_, _, name),) = self._units.pop(unit)
                unit.padding_idx = None  # which only training asks for
                unit.register_forward_pre_hook(self._hook_of_rows(name))
                unit.register_forward_hook(_emptied)
            else:
                unit.register_forward_pre_hook(self._hook_of(unit))
        if not held and 2 * largest <= SHARE_FOR_TWO * free_memory(device):
            self._ahead = _Ahead(self._read, self._units)

    def need(self, unit: nn.Module) -> None:
        """Read a unit's weights, unless they are there; those of the unit before go."""
        if unit is self._resident or unit not in self._units:
            return
        self._drop()
        self._fill(unit, self._read(unit) if self._ahead is None else self._ahead.take(unit))
        self._resident = unit

    def release(self) -> None:
        """Let go of the weights that are there, and of those that were read in advance."""
        if self._ahead is not None:
            self._ahead.forget()
        self._drop()

    def run_again_in_backward(self) -> None:
        """From now on keep only the inputs of a layer for its backward pass, in which it is run again.

        So autograd holds the weights of no layer but the one that has its turn.
        """
        for layer in self.layers:
            layer.forward = self._again(layer, layer.forward)

    def _again(self, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            self.need(layer)
            return forward(*args, **named)

        return lambda *args, **named: checkpoint(run, *args, use_reentrant=False, **named)

    def _drop(self) -> None:
        if self._resident is not None:
            for module, local, _ in self._units[self._resident]:
                _set(module, local, torch.empty_like(getattr(module, local), device="meta"))
            self._resident = None
        give_back()

    def _read(self, unit: nn.Module) -> list[torch.Tensor]:
        return [self.files.read(name, self.device) for _, _, name in self._units[unit]]

    def _fill(self, unit: nn.Module, tensors: Sequence[torch.Tensor]) -> None:
        for (module, local, _), tensor in zip(self._units[unit], tensors, strict=True):
            _set(module, local, tensor)

    def _bytes(self, unit: nn.Module) -> int:
        parameters = [getattr(module, local) for module, local, _ in self._units[unit]]
        return sum(p.numel() * p.element_size() for p in parameters)

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
            _set(module, "weight", rows)
            return args

        return only_what_is_read


def _emptied(module: nn.Module, args: Any, output: Any) -> None:
    assert isinstance(module, nn.Embedding)
    shape = (module.num_embeddings, module.embedding_dim)
    _set(module, "weight", torch.empty(shape, dtype=module.weight.dtype, device="meta"))


def _set(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    setattr(module, name, nn.Parameter(tensor, requires_grad=False))


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
        descriptor: Descriptor of the model family.
        scratch: a folder, there or not, on the disk that has room for what must be converted.
        trust_remote_code: let Transformers run code from the checkpoint.

    Raises:
        InputError: files are missing or damaged, or cannot be read one by one.
    """
    model, dtype, files = weights_on_disk(path, runtime, descriptor, scratch, trust_remote_code)
    layers = decoder_layers(model, descriptor, num_layers_of(model.config, descriptor))
    embedding = model.get_submodule(descriptor.input_embedding_name())
    held = _held(layers, runtime)
    return model, dtype, WeightStream(model, layers, embedding, files, runtime.device, held)


def weights_on_disk(
    path: str | os.PathLike[str],
    runtime: Runtime,
    descriptor: type[ModelDescriptor],
    scratch: Path,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, torch.dtype, Files]:
    """A model with its weights on the meta device, except a few; the dtype in which they are stored; and the weights.

    Arguments and errors are those of :func:`load_streamed`.
    """
    cls, config = class_of(path, descriptor, trust_remote_code)
    with torch.device("meta"), quiet_transformers():
        skeleton = upstream.model_from_config(cls, copy.deepcopy(config))
    stays = descriptor.final_norm_name().removesuffix(".weight")
    while not scratch.is_dir():
        scratch = scratch.parent
    with saying_disk_full(scratch), temporary_folder(scratch, "weights") as folder:
        how = {"device_map": _all_on_disk_but(skeleton, stays), "offload_folder": str(folder)}
        model = read_weights(cls, path, copy.deepcopy(config), dtype="auto", **how)
        dtype, files = model.dtype, Files(upstream.take_disk_offload(model), runtime.dtype)
    vars(model).pop("hf_device_map", None)  # Trainer refuses models whose weights are on the disk
    missing = [name for name, p in model.named_parameters() if p.is_meta and name not in files]
    if missing:
        raise InputError(f"{path}: weights cannot be read from the disk one by one: {', '.join(missing[:3])}.")
    with casting(model, runtime.dtype):
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
                wanted = runtime.dtype if buffer.is_floating_point() else buffer.dtype
                setattr(module, name, buffer.to(runtime.device, wanted))
    for module in model.modules():
        check_finite(module.named_parameters(recurse=False), str(path))
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            # A copy, or it would keep a map of its file, with what was read around it.
            _set(module, name, parameter.to("meta" if parameter.is_meta else runtime.device, runtime.dtype, copy=True))
    return model.eval(), dtype, files


def _held(layers: Sequence[nn.Module], runtime: Runtime) -> list[nn.Module]:
    """The layers of this process, if there are others and its share of the free memory holds them."""
    if runtime.world_size == 1:
        return []
    owners = owners_of(layers, runtime.world_size)
    place = runtime.rank % group_size(len(layers), runtime.world_size)
    mine = [layer for layer, owner in zip(layers, owners, strict=True) if owner == place]
    size = sum(p.numel() * p.element_size() for layer in mine for p in layer.parameters())
    return mine if size <= SHARE_OF_MEMORY * free_memory(runtime.device) / runtime.processes_on_device else []


def has_weights_on_disk(model: nn.Module) -> bool:
    """Whether some weights of a model are not in memory."""
    return any(parameter.is_meta for parameter in model.parameters())


def is_too_large(path: str | os.PathLike[str], runtime: Runtime) -> bool:
    """Whether a checkpoint's weights, once for each process, would take most of the memory that is free for them."""
    folder = Path(path)
    if not folder.is_dir():
        return False  # not here yet
    check_files(folder)
    count = 0
    for file in weight_files(folder):
        entries, _ = read_safetensors_header(file)
        count += sum(math.prod(entry["shape"]) for name, entry in entries.items() if name != "__metadata__")
    size = count * runtime.dtype.itemsize * runtime.processes_on_device
    return size > SHARE_OF_MEMORY * free_memory(runtime.device)


def _all_on_disk_but(model: nn.Module, stays: str) -> dict[str, str]:
    """A device map for Transformers, which takes none without a device in it."""
    result: dict[str, str] = {}
    inner, before = model, ""
    for part in stays.split("."):
        result |= {f"{before}{name}": "disk" for name, _ in inner.named_children() if name != part}
        inner, before = inner.get_submodule(part), f"{before}{part}."
    return {**result, stays: "cpu"}
