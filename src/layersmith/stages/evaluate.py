"""Compare the child with its parent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from layersmith.evaluation.compare import compare, complete
from layersmith.execution.parent import Parent
from layersmith.execution.streaming import load_streamed
from layersmith.heterogeneous.checkpoint import load
from layersmith.recipe import Recipe
from layersmith.run.artifacts import read_json, write_json
from layersmith.run.folder import Run
from layersmith.run.progress import Progress


def evaluate_child(
    run: Run,
    inputs: str,
    model: Parent,
    recipe: Recipe,
    tokens: torch.Tensor,
    tokenizer: Any,
    progress: Progress,
) -> dict[str, Any]:
    """Compare the child, as it lies on the disk, with its parent."""

    def make(folder: Path) -> None:
        child: Any
        if model.stream is None:
            child = load(run.folder / "child", dtype=model.runtime.dtype, device=model.runtime.device).eval()
        else:
            child, _, _ = load_streamed(run.folder / "child", model.runtime, model.descriptor, run.folder)
        comparison = compare(
            model.model, child, tokens, batch_sequences=recipe.scoring.rows_at_once(tokens.shape[1]), progress=progress
        )
        samples = []
        if recipe.completion_tokens and model.stream is None:  # each token would read all weights
            prompts = recipe.prompts or (tokenizer.decode(tokens[0][: min(48, len(tokens[0]) // 2)]),)
            for prompt in prompts:
                written = [complete(m, tokenizer, prompt, recipe.completion_tokens) for m in (model.model, child)]
                samples.append({"prompt": prompt, "parent": written[0], "child": written[1]})
        write_json(folder / "evaluation.json", comparison.to_dict() | {"samples": samples})

    run.do("evaluation", inputs, make)
    return read_json(run.folder / "evaluation" / "evaluation.json")
