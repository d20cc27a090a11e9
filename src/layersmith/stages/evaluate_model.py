"""The command ``evaluate``: any model on text and tasks, without a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layersmith.data.in_memory import Text, source_of
from layersmith.data.splits import check_vocabulary, evaluation_rows, load_tokenizer
from layersmith.errors import InputError, UsageError
from layersmith.evaluation.compare import compare
from layersmith.evaluation.tasks import require_tasks, run_tasks, task_rows
from layersmith.heterogeneous.checkpoint import load
from layersmith.heterogeneous.convert import ordinary_checkpoint
from layersmith.heterogeneous.in_memory import Model, checkpoint_of
from layersmith.recipe import DataRecipe, EvaluationRecipe, ScoringRecipe
from layersmith.records import parse
from layersmith.report.data import Evaluation
from layersmith.run.progress import Callback, Progress, progress_of
from layersmith.run.runtime import Runtime


def evaluate(
    model: Model,
    data: Text | None = None,
    *,
    parent: Model | None = None,
    tasks: Sequence[str] = (),
    items: int | None = None,
    shots: int = 0,
    sequences: int = DataRecipe.evaluation_sequences,
    sequence_length: int = DataRecipe.sequence_length,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | bool = True,
    callback: Callback | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Measure loss, perplexity, agreement with a parent and accuracy on tasks, each with its standard error.

    Args:
        model: Checkpoint folder, hub id or GGUF file; or a ``PreTrainedModel``, or a pair of one and its tokenizer.
        data: Text as ``compress`` takes it.
        parent: Model to compare with, e.g. the parent of a child; default: the model itself.
        tasks: Names of tasks in lm-eval, or JSONL files.
        items: Number of items of each task; default: all.
        shots: Number of solved examples before each item.
        sequences: Number of rows of text.
        sequence_length: Tokens in a row, at most the model's longest context.
        seed: Seed of the order in which documents are drawn.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        progress: Whether to show progress; or a progress that receives it.
        callback: Called with an :class:`~layersmith.run.progress.Event` when a stage begins, does steps, or ends.
        trust_remote_code: Let Transformers run code from the checkpoints.

    Returns:
        One row for each metric; losses are in nats per token. Notebooks show it as a table.

    Raises:
        UsageError: Sizes are not positive, or neither text nor tasks are given.
        InputError: A checkpoint or the text is missing or damaged, or the models have different vocabularies.
    """
    asked = EvaluationRecipe(tasks=tuple(tasks), task_items=items, task_shots=shots)
    if data is None and not asked.tasks:
        raise UsageError("give text to evaluate on (--data), tasks (--tasks), or both.")
    require_tasks(asked.tasks)
    if sequences < 1 or sequence_length < 2:
        raise UsageError("--sequences must be at least 1 and --sequence-length at least 2.")
    shown = progress_of(progress, callback)
    pair = _load_pair(model, parent, device, trust_remote_code)
    table: dict[str, Any] = {"sequences": 0, "tokens": 0, "rows": []}
    if data is not None:
        length = min(sequence_length, _longest(pair.model) or sequence_length)
        wanted = DataRecipe(sequence_length=length, evaluation_sequences=sequences)
        table = pair.on_text(source_of(data), wanted, seed, shown)
    if asked.tasks:
        table["rows"] += pair.on_tasks(asked, shown)
    return parse(Evaluation, table, "evaluation: ")


@dataclass(frozen=True)
class _Pair:
    model: Any
    parent: Any
    tokenizer: Any

    def on_text(self, source: str, recipe: DataRecipe, seed: int, progress: Progress) -> dict[str, Any]:
        rows = evaluation_rows(source, self.tokenizer, recipe, seed)
        check_vocabulary(int(rows.max()) + 1, _vocabulary(self.model))
        batch = max(1, ScoringRecipe.batch_tokens // rows.shape[1])
        return compare(
            self.parent, self.model, rows, batch_sequences=batch, tokenizer=self.tokenizer, progress=progress
        ).to_dict()

    def on_tasks(self, recipe: EvaluationRecipe, progress: Progress) -> list[dict[str, Any]]:
        results = run_tasks(self.model, self.tokenizer, recipe, progress)
        same = self.parent is self.model
        return task_rows(results if same else run_tasks(self.parent, self.tokenizer, recipe, progress), results)


def _load_pair(model: Model, parent: Model | None, device: str, trust_remote_code: bool) -> _Pair:
    runtime = Runtime.detect(device, "auto")
    given = [checkpoint_of(each) for each in (model, parent) if each is not None]
    paths = [ordinary_checkpoint(path, trust_remote_code=trust_remote_code) for path in given]
    loaded = [
        load(path, dtype=runtime.dtype, device=runtime.device, trust_remote_code=trust_remote_code).eval()
        for path in paths
    ]
    sizes = [_vocabulary(each) for each in loaded]
    if sizes[0] != sizes[-1]:
        raise InputError(
            f"{given[-1]}: has a vocabulary of {sizes[-1]:,}, and {given[0]} of {sizes[0]:,}; give one parent's."
        )
    return _Pair(loaded[0], loaded[-1], load_tokenizer(paths[0], trust_remote_code=trust_remote_code))


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _longest(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
