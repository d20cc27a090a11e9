"""Trains a child of a folder against its parent as one of several processes; see test_sharded.py.

    python -m torch.distributed.run ... tests/distillation/sharded.py PARENT CHILD OUT STEPS [TENSOR_PARALLEL]

With STEPS, every process ends without a word after that many steps, as if it was killed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from layersmith.distillation import train as training
from layersmith.distillation.train import GlobalSetup, Trained, TrainingRows
from layersmith.execution.parent import Parent
from layersmith.execution.sharded import is_sharded, load_sharded, shard_bytes
from layersmith.recipe import DistillationRecipe
from layersmith.run import ranks
from layersmith.run.runtime import Runtime

TOKENS, DTYPE = 2048, torch.float32
RECIPE = DistillationRecipe(
    batch_tokens=192, device_tokens=64, learning_rate=0.003, log_every=1, save_seconds=0.0, lm=0.1, eval_every=4
)


def rows() -> torch.Tensor:
    return torch.randint(3, 500, (24, 32), generator=torch.Generator().manual_seed(5))


def learn(parent: Parent, child: Parent, out: Path, recipe: DistillationRecipe = RECIPE) -> Trained:
    """Train as the recipe says."""
    setup = GlobalSetup(
        recipe=recipe, tokens=TOKENS, seed=0, folder=out / "checkpoints", curve=out / "log.json", name="test"
    )
    return training.train(parent, child.model, TrainingRows(rows(), validation=rows()[:6]), setup)


class _Ends(TrainerCallback):
    """Ends the process after a checkpoint."""

    def __init__(self, after: int):
        self.after = after

    def on_step_begin(self, args: object, state: object, control: object, **more: object) -> None:
        if state.global_step == self.after:  # type: ignore[attr-defined]
            ranks.together(lambda: None)
            os._exit(7)


def main() -> None:
    parent_path, child_path, out, steps = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    together = int(sys.argv[5]) if len(sys.argv) > 5 else 1
    torch.set_num_threads(1)
    runtime = Runtime.detect("cpu", "float32")
    parent = load_sharded(parent_path, runtime, near=out, tensor_parallel=together)
    child = load_sharded(child_path, runtime, parent.descriptor, near=out, trains=True, tensor_parallel=together)
    assert is_sharded(parent.model)
    assert is_sharded(child.model)
    held = {name: shard_bytes(model.model) for name, model in (("parent", parent), ("child", child))}
    (out / f"held-{runtime.rank}.json").write_text(json.dumps(held))
    if steps:
        made = training.CurveAndCheckpoints

        def with_end(*given: object) -> object:
            callback = made(*given)  # type: ignore[arg-type]
            callback.on_step_begin = _Ends(steps).on_step_begin  # type: ignore[method-assign]
            return callback

        training.CurveAndCheckpoints = with_end  # type: ignore[assignment,misc]
    trained = learn(parent, child, out, dataclasses.replace(RECIPE, tensor_parallel=together))
    if ranks.is_first():
        assert trained.state is not None
        torch.save({name: tensor.clone() for name, tensor in trained.state.items()}, out / "trained.pt")
        (out / "validation.json").write_text(json.dumps(trained.validation))


if __name__ == "__main__":
    main()
