"""A model whose weights are sharded over all processes with torch's FSDP2: a layer is whole only while it runs.

Every decoder layer with weights of its own is a unit, whatever its shape. Its weights are gathered before it runs, and
again for its backward pass; then each process keeps its shard of weights and gradients. The input embedding is a unit
too, unless the head shares it. All other weights (head, final norm, and what several layers share) are one more unit,
which is whole during a pass.

Processes may also compute the same rows in groups (:mod:`.tensor_parallel`). Then weights are sharded over the groups,
and "whole" means the part of a weight that a process of a group computes with.

Why not through accelerate: its ``AcceleratorState`` turns FSDP on for GPUs and other accelerators, not for CPUs
(accelerate 1.15), and it shards a model that every process holds whole before. Here weights are read layer by layer, so
that no process ever holds more than its shards and one layer.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from layersmith import upstream
from layersmith.errors import UsageError
from layersmith.execution.files import Files, in_unnamed_file
from layersmith.execution.memory import give_back
from layersmith.execution.parent import Parent
from layersmith.execution.streaming import weights_on_disk
from layersmith.execution.tensor_parallel import divide
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.build import block_configs_of, decoder_layers, num_layers_of
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.describe import describe
from layersmith.run import ranks
from layersmith.run.artifacts import temporary_folder
from layersmith.run.runtime import Runtime

# Dimensions of the mesh of processes: those along the first have different rows, those along the second the same.
_ROWS, _TENSOR = "rows", "tensor"


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are sharded."""
    return isinstance(model, FSDPModule)


@contextmanager
def with_head(model: nn.Module) -> Iterator[None]:
    """While open, the weights outside the units of a sharded model are whole, so that its forward can be called."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def let_go(model: nn.Module) -> None:
    """Free the weights outside the units that a pass without gradients leaves whole."""
    if isinstance(model, FSDPModule):
        model.reshard()


def load_sharded(
    path: str | Path,
    runtime: Runtime,
    descriptor: type[ModelDescriptor] | None = None,
    *,
    near: Path,
    trust_remote_code: bool = False,
    trains: bool = False,
    tensor_parallel: int = 1,
) -> Parent:
    """Load the shards of this process; all processes call this. ``identity`` of the result is empty.

    Args:
        path: A checkpoint folder or hub id; all processes read it.
        runtime: Device and dtype of the weights.
        descriptor: Descriptor of the model family; default: inferred.
        near: A folder, there or not, on the disk that has room for what must be converted.
        trust_remote_code: Let Transformers run code from the checkpoint.
        trains: Whether its weights are trained.
        tensor_parallel: Number of processes that compute the same rows together, each with its part of the weights.

    Raises:
        InputError: Files are missing or damaged.
        UsageError: The model cannot be trained as Transformers' plan divides it.
    """
    ranks.start(runtime)
    descriptor = descriptor or describe(path, trust_remote_code=trust_remote_code)
    model, dtype, files = weights_on_disk(path, runtime, descriptor, near, trust_remote_code)
    mesh = _mesh(runtime, tensor_parallel)
    if tensor_parallel > 1:
        divide(model, descriptor, mesh[_TENSOR])
    for name, source in upstream.tied_in(model).items():
        _set(model, name, model.get_parameter(source))
    _shard(model, descriptor, runtime, mesh[_ROWS], _Reader(model, files, runtime, trains))
    if tensor_parallel > 1 and trains:
        _rehearse(model, _some_ids(model, descriptor, runtime))
    blocks = tuple(block_configs_of(model.config, descriptor))
    return Parent(str(path), model, dtype, descriptor, blocks, "", runtime)


def shard(model: PreTrainedModel, descriptor: type[ModelDescriptor], runtime: Runtime) -> None:
    """Shard a model that every process holds whole, in place; all processes call this."""
    if not is_sharded(model):
        ranks.start(runtime)
        _shard(model, descriptor, runtime, _mesh(runtime)[_ROWS])


class _Reader:
    """Reads the weights of one unit after another from the disk.

    Args:
        model: With weights on the meta device; those that are tied are one.
        files: Its weights by name.
        runtime: Where they are wanted.
        trains: Whether they are trained.
    """

    def __init__(self, model: PreTrainedModel, files: Files, runtime: Runtime, trains: bool):
        self.model, self.files, self.runtime, self.trains = model, files, runtime, trains
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)

    def read(self, unit: nn.Module) -> None:
        for parameter in list(unit.parameters()):
            if isinstance(parameter, DTensor) and not parameter.is_meta:
                continue  # of a unit inside
            names = self._names[id(parameter)]
            if parameter.is_meta:
                stored = next(name for name in names if name in self.files)
                read = self.files.read(stored, self.runtime.device)
                if isinstance(parameter, DTensor):  # every process takes its part of what all have read
                    read = distribute_tensor(read, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter = nn.Parameter(read)
            parameter.requires_grad_(self.trains and parameter.is_floating_point())
            for name in names:
                _set(self.model, name, parameter)


def _shard(
    model: PreTrainedModel,
    descriptor: type[ModelDescriptor],
    runtime: Runtime,
    mesh: DeviceMesh,
    reader: _Reader | None = None,
) -> None:
    units: list[nn.Module] = [*_units(model, descriptor), model]
    for unit in units:
        if reader is not None:
            reader.read(unit)
        fully_shard(unit, mesh=mesh)
        give_back()
    # torch decides at the first pass which module is the outermost.
    with torch.no_grad():
        model(input_ids=_some_ids(model, descriptor, runtime), use_cache=False)
    let_go(model)


def _some_ids(model: PreTrainedModel, descriptor: type[ModelDescriptor], runtime: Runtime) -> torch.Tensor:
    vocab_size = descriptor.get_language_model_config(model.config).vocab_size
    return torch.arange(3, 7, device=runtime.device)[None] % vocab_size


def _rehearse(model: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """Run a divided model forward and backward once, as the plans of some architectures work in inference only.

    Raises:
        UsageError: The model cannot be trained in this way.
    """
    with (
        warnings.catch_warnings(),
        foreign_code("Does a model that is divided by its plan train?", refusal_is_answer=True) as attempt,
    ):
        warnings.filterwarnings("ignore", ".* returned a view tensor")  # nobody changes these logits
        logits = attempt.call(model, input_ids=input_ids, use_cache=False).logits
        attempt.call(logits.float().sum().backward)
    if attempt.failed:
        raise UsageError(
            "recipe distillation.tensor_parallel: a model of this architecture cannot be trained as Transformers' plan "
            f"divides it ({attempt.reason}). Set it to 1."
        ) from attempt.error
    model.zero_grad(set_to_none=True)
    let_go(model)


def _mesh(runtime: Runtime, tensor_parallel: int = 1) -> DeviceMesh:
    """All processes; neighbours belong to the same group."""
    shape = (runtime.world_size // tensor_parallel, tensor_parallel)
    return init_device_mesh(runtime.device.type, shape, mesh_dim_names=(_ROWS, _TENSOR))


def _units(model: PreTrainedModel, descriptor: type[ModelDescriptor]) -> list[nn.Module]:
    """The layers and the input embedding, as far as they have weights, and share none with other modules."""
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    layers = decoder_layers(model, descriptor, num_layers_of(model.config, descriptor))
    modules = {id(m): m for m in (model.get_submodule(descriptor.input_embedding_name()), *layers)}
    made: list[nn.Module] = []
    for module in modules.values():
        inside = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
        if inside and all(uses[parameter] == count for parameter, count in inside.items()):
            made.append(module)
    return made


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    holder, _, last = name.rpartition(".")
    setattr(model.get_submodule(holder), last, parameter)


@torch.no_grad()
def gathered(model: nn.Module, dtype: torch.dtype, near: Path) -> dict[str, torch.Tensor]:
    """The ``state_dict()`` of a sharded model in a dtype, in the first process; the others get nothing.

    The tensors are in files without a name, so the system can take their memory back. All processes call this; one
    tensor after another is whole in each.

    Args:
        model: The model.
        dtype: dtype of the result.
        near: A folder on the disk that has room for it.
    """
    let_go(model)
    near.mkdir(parents=True, exist_ok=True)
    result: dict[str, torch.Tensor] = {}
    made: dict[int, torch.Tensor] = {}  # what is tied is gathered once
    with temporary_folder(near, "gathered") as folder:
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in made:
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                wanted = dtype if whole.is_floating_point() else whole.dtype
                here = whole.detach() if ranks.is_first() else whole.new_empty(0)
                made[id(tensor)] = in_unnamed_file(here, wanted, folder / f"{len(made)}")
            result[name] = made[id(tensor)]
    ranks.together(lambda: None)  # a process that ended earlier would break the connections of others
    return result if ranks.is_first() else {}


def shard_bytes(model: nn.Module) -> int:
    """Bytes of this process's shards."""
    shards = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(shard.numel() * shard.element_size() for shard in shards)
