"""Every use of a private or undocumented part of another project, one function each.

Private names change without notice, so no other module uses them. Each function's docstring names the public behaviour
that it replaces, and ``tests/test_upstream.py`` has one test per function, so that a failure names the function that a
new version breaks. Two modules are exempt and are tested in the same file: ``modeling_layersmith.py`` travels with
checkpoints and imports nothing of layersmith, and ``heterogeneous/auto.py`` runs before Transformers may be imported.

Add a function under the heading of its project.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import CompileConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

# ---------------------------------------------------------------------------------------------- Transformers: models


def model_from_config(cls: type[PreTrainedModel], config: PretrainedConfig, **how: Any) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_config`` for a model class that is chosen already.

    Args:
        cls: The model class.
        config: Config of the model; its dtype is the default.
        how: ``dtype`` and ``attn_implementation``, as ``from_config`` takes them.
    """
    return cls._from_config(config, **how)


def output_size_attribute(module: nn.Module) -> str:
    """The attribute of a linear layer that holds the size of its output; empty for other modules.

    Replaces a common interface of ``nn.Linear`` and of Transformers' transposed ``Conv1D``, as GPT-2 has it.
    """
    return "out_features" if isinstance(module, nn.Linear) else "nf" if isinstance(module, Conv1D) else ""


def compile_on_any_device() -> Any:
    """Settings for ``generate`` that compile the decode step on a CPU too, as ``generate`` does by itself on a GPU."""
    config: Any = CompileConfig(fullgraph=False)
    config._compile_all_devices = True
    return config


def tied_weights(cls: type[PreTrainedModel]) -> dict[str, str]:
    """The names of weights that a model class shares if its config says so, and of those that they are shared with.

    Replaces the public ``all_tied_weights_keys``, which only a model that was built has.
    """
    tied = getattr(cls, "_tied_weights_keys", None)
    return dict(tied) if isinstance(tied, dict) else {}


def tied_in(model: PreTrainedModel) -> dict[str, str]:
    """The names of weights that a model shares with others, and the names of those; empty if it shares none.

    Replaces ``model.tie_weights()`` where the weights are not there yet.
    """
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def shapes_on_disk(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that ``save_pretrained`` writes; the model may be on the meta device.

    Replaces a public way to ask for them: some families rename, merge or split weights when they are saved.
    """
    tied = tied_in(model)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, weights).items()}


def rows_on_disk(model: PreTrainedModel, name: str, shape: Sequence[int]) -> dict[str, list[int]]:
    """The matrices that ``save_pretrained`` writes a stack of matrices as, with the numbers of their rows.

    Replaces a public way to ask for them, like :func:`shapes_on_disk`.

    Args:
        model: The model; it may be on the meta device.
        name: Name of the stack in the model.
        shape: ``[E, out, in]`` of the stack, which need not be the model's.

    Returns:
        Name of a matrix in the file to its rows, numbered through all matrices of the stack; empty if it is written in
        another way.
    """
    numbers = torch.arange(shape[0] * shape[1], dtype=torch.float64).reshape(shape[0], shape[1], 1)
    made = revert_weight_conversion(model, {name: numbers})
    if not all(tensor.ndim == 2 and tensor.shape[1] == 1 for tensor in made.values()):
        return {}
    return {n: [int(number) for number in tensor.flatten().tolist()] for n, tensor in made.items()}


def is_stack_of_experts(module: nn.Module) -> bool:
    """Whether a module has the weights of its experts in stacks ``[E, out, in]``.

    Replaces a public attribute of experts that says whether their matrices are transposed.
    """
    return getattr(module, "is_transposed", None) is False


@contextmanager
def one_expert_at_a_time(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, stacks of experts compute with one matrix after another, as ``experts_implementation="eager"`` does.

    Replaces ``set_experts_implementation`` of a model, for layers alone.
    """
    given: list[Any] = [module.config for module in modules]
    configs = [(config, config._experts_implementation) for config in given]
    for config, _ in configs:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, name in configs:
            config._experts_implementation = name


def divides_models() -> bool:
    """Whether this version of Transformers can divide a model by a plan of single modules (tensor parallelism)."""
    return hasattr(PreTrainedModel, "_expand_parallel_plan")


def tensor_parallel_plan(model: PreTrainedModel) -> dict[str, str]:
    """How Transformers' plan of a model divides it: the style of each module and parameter, by name.

    Replaces ``model.tp_plan``, where all layers have one name.
    """
    plan: dict[str, str] = cast(Any, model)._expand_parallel_plan(model.tp_plan)
    return plan


def divided_dimension(style: str, dimensions: int) -> tuple[int | None, int]:
    """Along which dimension a style divides a parameter, and the number of matrices that the parameter consists of.

    Replaces a public way to ask a style. The dimension is None if every process has the whole parameter. Of several
    matrices that are stored as one, each process gets a part of each.

    Args:
        style: How Transformers' plan divides the parameter.
        dimensions: Number of the parameter's dimensions.
    """
    pieces = 2 if style.startswith("packed") else 1
    if style.startswith("embedding"):
        return int(style.endswith("colwise")), pieces
    if "colwise" in style:
        return max(dimensions - 2, 0), pieces
    if "rowwise" in style:
        return (dimensions - 1 if dimensions > 1 else None), pieces
    return None, 1


def keeps_output_divided(style: str) -> bool:
    """Whether a module computes with a part of the output of one of this style, instead of with the whole output."""
    return style == "colwise"


def divide_by_plan(model: PreTrainedModel, mesh: Any, plan: dict[str, str]) -> None:
    """Divide a model on the meta device over the processes of a mesh; its weights become parts without numbers.

    Replaces ``from_pretrained(distributed_config=DistributedConfig(tp_size=N))``, which follows the whole plan of the
    model and reads all weights itself.
    """
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism  # here: not in older versions

    # It warns when a tensor that is divided along both dimensions of a mesh is gathered, which takes two operations.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    apply_tensor_parallelism(model, mesh, plan)


# ---------------------------------------------------------------------------------------------- Transformers: Trainer


def checkpoint_by(trainer: Trainer, save: Callable[[Path], None], load: Callable[[Path], None]) -> None:
    """Make a Trainer save and load the weights of its model and the states of its optimizer by other functions.

    Replaces an option for the format of checkpoints. Trainer writes weights with ``save_pretrained``, which renames and
    merges those of some families, so that resumed training would not be bit-identical; and the optimizer of the first
    process alone. The learning rate schedule, the states of random numbers and ``TrainerState`` stay Trainer's.

    Args:
        trainer: The Trainer.
        save: Called in every process with the folder of a checkpoint.
        load: Called in every process with the folder of a checkpoint, once the optimizer is made.
    """
    hooks: Any = trainer

    def save_all(output_dir: str) -> None:
        save(Path(output_dir))
        if trainer.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            torch.save(hooks.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def load_all(checkpoint: str | None) -> None:
        if checkpoint is not None:
            load(Path(checkpoint))
            schedule = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
            hooks.lr_scheduler.load_state_dict(schedule)

    hooks._save = lambda output_dir=None, state_dict=None: None
    hooks._load_from_checkpoint = lambda resume_from_checkpoint, model=None: None
    hooks._save_optimizer_and_scheduler, hooks._load_optimizer_and_scheduler = save_all, load_all


def prepared(trainer: Trainer, model: nn.Module) -> None:
    """Prepare a model that is sharded already for a Trainer: autocast, but neither DDP nor FSDP around it.

    Replaces a public way to tell ``Accelerator.prepare`` so, which refuses sharded models of CPUs.
    """
    prepared = trainer.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    prepared._is_accelerate_prepared = True


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Keep Trainer from wrapping the model in ``DataParallel`` on a machine with several GPUs.

    Replaces ``CUDA_VISIBLE_DEVICES=0``, which would have to be set before the process starts.
    """
    arguments._n_gpu = min(1, arguments.n_gpu)


def known_loggers() -> set[str]:
    """The names that ``TrainingArguments.report_to`` takes."""
    from transformers.integrations import integration_utils  # here, because importing it takes a second

    return set(integration_utils.INTEGRATION_TO_CALLBACK)


def restore_forward(model: nn.Module) -> None:
    """Restore the ``forward`` of a model's class after another was set on the instance and accelerate wrapped it.

    Replaces ``accelerate.Accelerator.unwrap_model``, which restores the one on the instance and removes one wrapper.
    """
    vars(model).pop("forward", None)
    vars(model).pop("_original_forward", None)


# ---------------------------------------------------------------------------------------------- Transformers: configs


def is_heterogeneous(config: PretrainedConfig) -> bool:
    """Whether a config has attributes that differ by layer (``per_layer_config``)."""
    return bool(getattr(config, "is_heterogeneous", False))


def per_layer_entries(config: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """The entries of ``per_layer_config`` by the index of the layer.

    Replaces the public attribute of that name, which returns whole configs; only ``to_dict`` has the entries.
    """
    return {int(i): entry for i, entry in (config.to_dict().get("per_layer_config") or {}).items()}


def set_per_layer_entries(config: PretrainedConfig, entries: dict[int, dict[str, Any]]) -> None:
    """Replace the entries of ``per_layer_config``; without entries the config is the same for all layers.

    Replaces the constructor's argument ``per_layer_config`` for a config that already exists.
    """
    by_layer: Any = entries or None
    config.per_layer_config = by_layer


def with_plain_attention(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a config whose models use unfused attention, as ``from_pretrained(attn_implementation="eager")`` sets.

    A model's ``set_attn_implementation`` has no effect on layers that hold copies of the config.
    """
    plain = copy.deepcopy(config)
    plain._attn_implementation = "eager"
    return plain


# ---------------------------------------------------------------------------------------------- Transformers: caches


def cache_slots(cache: Any) -> list[Any]:
    """The slots of a ``Cache``, one for each attention or mixer that writes to it; none for another kind of cache."""
    return list(getattr(cache, "layers", None) or ())


def keys_and_values(slot: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The keys and values of a cache slot, each ``[B, heads, T, head size]``; None if it is empty.

    Replaces the return value of ``DynamicCache.update`` where the cache is filled already.
    """
    kept = getattr(slot, "keys", None), getattr(slot, "values", None)
    return tuple(value if isinstance(value, torch.Tensor) else None for value in kept)  # type: ignore[return-value]


def convolution_states(slot: Any) -> list[torch.Tensor]:
    """The inputs that a short convolution keeps in a cache slot, each ``[B, channels, kernel]``."""
    return _states(slot, "conv_states")


def recurrent_states(slot: Any) -> list[torch.Tensor]:
    """The states of a state-space or linear-attention mixer in a cache slot, each ``[B, heads, ...]``."""
    return _states(slot, "recurrent_states")


def _states(slot: Any, name: str) -> list[torch.Tensor]:
    states = getattr(slot, name, None)
    return [state for state in states.values() if state is not None] if isinstance(states, dict) else []


# ---------------------------------------------------------------------------------------------- PyTorch


@contextmanager
def many_compiled_models() -> Iterator[None]:
    """Let ``torch.compile`` keep the code of thousands of models at once; by default it keeps eight."""
    from torch._dynamo import config  # here, because importing it takes a second

    with config.patch(recompile_limit=4096, accumulated_recompile_limit=16384):
        yield


def attention_counters() -> dict[Any, Any]:
    """The ``custom_mapping`` for ``FlopCounterMode`` to count attention on a CPU; it counts GPU kernels already."""
    from torch.utils.flop_counter import sdpa_flop_count

    def count(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    return {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count}


# ---------------------------------------------------------------------------------------------- accelerate


def take_disk_offload(model: nn.Module) -> dict[str, tuple[Path, str]]:
    """Remove accelerate's hooks from a model with weights on the disk, and return where each weight is.

    Replaces a public way to ask a model loaded with ``device_map="disk"`` for its safetensors files.

    Returns:
        The file of each weight and its name in the file.
    """
    from accelerate.hooks import remove_hook_from_submodules  # here, because only streaming needs it

    places: dict[str, tuple[Path, str]] = {}
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            index = getattr(weights, "dataset", weights).index
            places = {n: (Path(e["safetensors_file"]), e.get("weight_name", n)) for n, e in index.items()}
            break
    remove_hook_from_submodules(model)
    for module in model.modules():  # accelerate leaves a bound method, which keeps the module and its copies alive
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    return places
