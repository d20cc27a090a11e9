"""Export a run as a recipe of another trainer: the child learns from the parent there."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from layersmith.distillation.steps import Steps
from layersmith.errors import InputError, UsageError
from layersmith.export.source import CannotExport
from layersmith.recipe import DistillationRecipe, Recipe
from layersmith.run.artifacts import read_json, whole_folder, write_text
from layersmith.run.folder import Run
from layersmith.stages.distill import DISTILLED
from layersmith.stages.realize import CHILD

# The version of NeMo AutoModel whose field names are used, and against which `make test-recipes` checks them.
AUTOMODEL = "0.7.0"
RECIPE = "kd.yaml"

# Schedules of Transformers, by what AutoModel calls them. All begin with a warmup.
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
_MODEL = "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained"
_CHECKPOINTS = 10


@dataclass(frozen=True)
class ExportedRecipe:
    """A recipe for another trainer.

    Attributes:
        folder: Where it is.
        target: The trainer.
        recipe: Its recipe file.
        left_out: What the run's recipe asks for and the trainer does not have, in words.
    """

    folder: Path
    target: str
    recipe: Path
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        notes = "".join(f"\nleft out: {note}" for note in self.left_out)
        return f"{self.recipe}: written for {self.target} {AUTOMODEL}; README.md there says how to start it.{notes}"


def export_recipe(
    run: str | os.PathLike[str], out: str | os.PathLike[str], tokens: int | None = None
) -> ExportedRecipe:
    """Write the recipe with which NeMo AutoModel distils a run's parent into its child.

    The recipe names both models where they are; no weights are copied. The student is the distilled child if the run
    has one, the teacher the first parent.

    Args:
        run: Folder of a run that has a child.
        out: The new folder; if it exists, it must be empty.
        tokens: Training tokens; default: ``distillation.tokens`` of the run's recipe.

    Raises:
        UsageError: Not a run folder, or no training tokens are given.
        InputError: The run has no child, or the folder is not empty.
        CannotExport: AutoModel has no counterpart for a setting without which the recipe would be another one.
    """
    folder, opened = Path(out).absolute(), Run.existing(Path(run).absolute())
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: already there and not empty. Choose another folder.")
    opened.require(CHILD.name)
    header = opened.header()
    recipe = Recipe.from_dict(header["recipe"], str(opened.folder / "run.json"))
    if not (tokens := recipe.distillation.tokens if tokens is None else tokens):
        raise UsageError("--to automodel: the run's recipe has no training tokens. Give --tokens, e.g. 1000000000.")
    student = opened.folder / (DISTILLED.name if DISTILLED.name in opened.made() else CHILD.name)
    config = read_json(student / "config.json")
    _refuse_what_cannot_be_said(recipe.distillation, config)
    teacher = opened.path_as_meant(header.get("first_parent") or header["parent"]["path"])
    if teacher.endswith(".gguf"):
        raise CannotExport(f"--to automodel: {teacher} is a GGUF file, and the teacher must be a checkpoint folder.")
    text = config.get("text_config") or config
    rate = recipe.distillation.rate(text["hidden_size"])
    settings = automodel_recipe(recipe, tokens, rate, student, teacher, folder)
    left_out = tuple(_left_out(recipe.distillation))
    with Run.locked_around(folder), whole_folder(folder) as made:
        write_text(made / RECIPE, yaml.safe_dump(settings, sort_keys=False))
        write_text(made / "README.md", _readme(settings, folder, left_out))
    return ExportedRecipe(folder, "automodel", folder / RECIPE, left_out)


def automodel_recipe(
    recipe: Recipe, tokens: int, rate: float, student: Path, teacher: str, folder: Path
) -> dict[str, Any]:
    """The settings of AutoModel's ``KnowledgeDistillationRecipeForNextTokenPrediction``.

    Its loss is ``(1 - kd_ratio) * cross-entropy + kd_ratio * KL divergence``.
    """
    ours = recipe.distillation
    steps = Steps.of(ours, tokens, recipe.data.sequence_length)
    # Liger's kernels are made for the stock classes, and the child's layers differ from those.
    model = {"_target_": _MODEL, "force_hf": True, "use_liger_kernel": False, "attn_implementation": "sdpa"}
    return {
        "recipe": "KnowledgeDistillationRecipeForNextTokenPrediction",
        "seed": recipe.seed,
        "dist_env": {"backend": "nccl", "timeout_minutes": 30},
        "rng": {
            "_target_": "nemo_automodel.components.training.rng.StatefulRNG",
            "seed": recipe.seed,
            "ranked": True,
        },
        "step_scheduler": {
            "global_batch_size": steps.rows,
            "local_batch_size": steps.rows_at_once,
            "max_steps": steps.count,
            "num_epochs": 1,
            "ckpt_every_steps": math.ceil(steps.count / _CHECKPOINTS),
        },
        # Weights in float32 are computed with in bfloat16 by AutoModel's default.
        "model": model
        | {"pretrained_model_name_or_path": str(student), "trust_remote_code": True, "torch_dtype": "float32"},
        "teacher_model": model | {"pretrained_model_name_or_path": teacher, "torch_dtype": "bfloat16"},
        "kd_ratio": ours.kl / (ours.kl + ours.lm),
        "kd_loss_fn": {
            "_target_": "nemo_automodel.components.loss.kd_loss.KDLoss",
            "temperature": ours.temperature,
        },
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": rate, "weight_decay": ours.weight_decay},
        "lr_scheduler": {
            "lr_decay_style": _SCHEDULES[ours.schedule],
            "lr_warmup_steps": math.ceil(ours.warmup * steps.count),
            "init_lr": 0.0,
            "min_lr": 0.0,
        },
        **_data_and_storage(recipe, folder),
    }


def _data_and_storage(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Settings of the text, the division among devices, and checkpoints."""
    return {
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.nanogpt_dataset.NanogptDataset",
            "file_pattern": str(folder / "data" / "*.bin"),
            "seq_len": recipe.data.sequence_length,
            "shuffle_files": True,
        },
        "dataloader": {
            "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
            "collate_fn": "nemo_automodel.components.datasets.utils.default_collater",
        },
        "distributed": {
            "strategy": "fsdp2",
            "tp_size": 1,
            "cp_size": 1,
            "activation_checkpointing": recipe.distillation.gradient_checkpointing,
        },
        "checkpoint": {
            "enabled": True,
            "checkpoint_dir": str(folder / "checkpoints"),
            "model_save_format": "safetensors",
            "save_consolidated": "final",
        },
    }


def _refuse_what_cannot_be_said(ours: DistillationRecipe, config: dict[str, Any]) -> None:
    """Raises: CannotExport: The child or a setting has no counterpart."""
    if config.get("quantization_config"):
        raise CannotExport("--to automodel: the child has number formats, which AutoModel would not train.")
    if not ours.kl:
        raise CannotExport("--to automodel: distillation.kl is 0, and AutoModel knows no other loss to a teacher.")
    if ours.schedule not in _SCHEDULES:
        known = ", ".join(_SCHEDULES)
        raise CannotExport(f"--to automodel: distillation.schedule {ours.schedule} is none of {known}.")


def _left_out(ours: DistillationRecipe) -> list[str]:
    """What the recipe asks for and AutoModel's recipe does not have."""
    asked = {
        "distillation.hidden: AutoModel does not compare hidden states": ours.hidden,
        "distillation.optimizer muon: AdamW at the same rate instead": ours.optimizer == "muon",
        "distillation.lora_rank: all weights are trained, at the rate of adapters": ours.lora_rank,
        "distillation.long_tokens: rows have one length": ours.long_tokens,
        "distillation.cache_top: the teacher runs": ours.cache_top,
        "distillation.finalists: this child only": ours.finalists > 1,
        "distillation.tensor_parallel: no plan for layers that differ": ours.tensor_parallel > 1,
        "distillation.trainer: fields of another trainer": ours.trainer,
    }
    return [note for note, wanted in asked.items() if wanted]


def _readme(settings: dict[str, Any], folder: Path, left_out: tuple[str, ...]) -> str:
    steps, length = settings["step_scheduler"], settings["dataset"]["seq_len"]
    rows, at_once = steps["global_batch_size"], steps["local_batch_size"]
    tokens = rows * steps["max_steps"] * length
    notes = "".join(f"- {note}\n" for note in left_out)
    return f"""# Distil the child with NeMo AutoModel

Written by layersmith for NeMo AutoModel {AUTOMODEL} (`pip install nemo-automodel=={AUTOMODEL}`).

1. Put at least {tokens:,} tokens into `{settings["dataset"]["file_pattern"]}`: shards in the format that AutoModel's
   `tools/nanogpt_data_processor.py` writes, cut by the student's tokenizer,
   `{settings["model"]["pretrained_model_name_or_path"]}`.
2. Start it: `automodel {folder / RECIPE} --nproc-per-node 8`.

`global_batch_size` ({rows}) must be divisible by `local_batch_size` ({at_once}) times the number of processes.
The student runs the code in its folder (`trust_remote_code`). Tensor and pipeline parallelism are not set: their plans
are made for layers that are alike.
{f"{chr(10)}Settings of the run that AutoModel does not have:{chr(10)}{chr(10)}{notes}" if notes else ""}"""
