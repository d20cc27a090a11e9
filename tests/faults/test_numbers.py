"""Parents with unusual numbers: each gives a right child, or is refused for a true reason.

``LAYERSMITH_FAULTS=all`` runs all cases; otherwise a spread of them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import layersmith
from layersmith.errors import InputError
from layersmith.run.progress import Progress
from layersmith.stages.inspect import inspect
from tests.faults.bad_inputs import RECIPE

Tensors = dict[str, torch.Tensor]
Harm = Callable[[Tensors, dict[str, Any]], object]

_WHOLE = os.environ.get("LAYERSMITH_FAULTS") == "all"


class Notes(Progress):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def compressed(
    make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, layersmith.Result]]:
    """Harms a parent and compresses it; returns the parent's folder and the result."""
    monkeypatch.setenv("LAYERSMITH_STORE", "off")

    def run(
        harm: Harm, budget: float | str = 0.9, progress: Progress | None = None, settings: dict[str, Any] | None = None,
        **sizes: Any,
    ) -> tuple[Path, layersmith.Result]:  # fmt: skip
        parent = Path(shutil.copytree(make_parent("llama", **{"num_hidden_layers": 2} | sizes), tmp_path / "parent"))
        tensors = load_file(parent / "model.safetensors")
        config = json.loads((parent / "config.json").read_text())
        harm(tensors, config)
        save_file(tensors, parent / "model.safetensors", {"format": "pt"})
        (parent / "config.json").write_text(json.dumps(config))
        recipe = yaml.safe_load(RECIPE) | (settings or {})
        result = layersmith.compress(
            parent, tmp_path / "run", data=text_folder, budget=budget, recipe=recipe, progress=progress or Notes()
        )
        return parent, result

    return run


def nothing(tensors: Tensors, config: dict[str, Any]) -> None:
    """No harm."""


def zero(*parts: str) -> Harm:
    """All weights whose names contain one of these."""
    return lambda tensors, config: [t.zero_() for n, t in tensors.items() if any(part in n for part in parts)]


def scaled(factor: float, *parts: str) -> Harm:
    return lambda tensors, config: [t.mul_(factor) for n, t in tensors.items() if any(part in n for part in parts)]


def as_float16(then: Harm = nothing) -> Harm:
    def harm(tensors: Tensors, config: dict[str, Any]) -> None:
        then(tensors, config)
        tensors |= {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
        config["dtype"] = "float16"

    return harm


def config_says(**changes: Any) -> Harm:
    return lambda tensors, config: config.update(changes)


def loss_and_kl(parent: Path, child: Path, rows: torch.Tensor) -> tuple[float, float]:
    """The child's loss, and its KL divergence from the parent, computed with stock Transformers and plain torch."""
    logits = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=rows).logits.double()
        for path in (parent, child)
    ]
    p, q = (x.log_softmax(-1) for x in logits)
    loss = -q[:, :-1].gather(-1, rows[:, 1:, None]).mean()
    return float(loss), float((p.exp() * (p - q)).sum(-1).mean())


def check_child(parent: Path, result: layersmith.Result) -> dict[str, dict[str, Any]]:
    """The child is finite and does what the report says; returns the rows of its evaluation."""
    run = result.child.parent
    assert all(bool(torch.isfinite(t).all()) for t in load_file(result.child / "model.safetensors").values())
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
    rows = {row["metric"]: row for row in evaluation["rows"]}
    tokens = load_file(run / "data" / "tokens.safetensors")["evaluation"].long()
    with torch.no_grad():
        loss, kl = loss_and_kl(parent, result.child, tokens)
    assert rows["loss"]["child"] == pytest.approx(loss, rel=1e-3)
    assert rows["kl_divergence"]["child"] == pytest.approx(kl, rel=2e-2, abs=1e-4)
    return rows


TRAINED = {"local_distillation": {"tokens": 64, "coupled_tokens": 64}}

# What is unusual: the harm, more of the recipe and the parent's sizes, and the largest KL divergence of its child.
RIGHT: dict[str, tuple[Harm, dict[str, Any], float]] = {
    "a dead FFN": (zero("layers.0.mlp"), {"settings": TRAINED, "budget": 0.92}, 1e-6),
    "an untied head under a tied config": (config_says(tie_word_embeddings=True), {}, 0.5),
    "float16 with weights near its limit": (as_float16(scaled(30.0, "down_proj")), {"settings": TRAINED}, 5.0),
    "embeddings times 1e4": (scaled(1e4, "embed_tokens", "lm_head"), {"budget": 0.97}, 1e9),
    "a layer of zeros": (zero("layers.1."), {"settings": TRAINED, "budget": 0.87}, 1e-6),
    "one layer, one head, FFN width 1": (
        nothing,
        {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 1,
         "budget": 0.97},
        1.0,
    ),
    "a dead attention": (zero("layers.0.self_attn"), {"settings": TRAINED, "budget": 0.92}, 1e-6),
    "all layers zero": (zero("layers."), {"settings": TRAINED, "budget": 0.87}, 1e-6),
    "all weights zero": (zero(""), {"settings": TRAINED, "budget": 0.87}, 1e-6),
    "a dead FFN unit": (
        lambda tensors, config: [tensors[f"model.layers.0.mlp.{n}_proj.weight"][:32].zero_() for n in ("up", "gate")],
        {"settings": TRAINED, "budget": 0.96},
        1e-6,
    ),
    "float16": (as_float16(), {}, 0.5),
    "positions 2": (
        config_says(max_position_embeddings=2),
        {"settings": {"data": yaml.safe_load(RECIPE)["data"] | {"overlap": "allow"}}},
        0.5,
    ),
    "one KV head": (nothing, {"num_key_value_heads": 1, "budget": 0.93}, 0.5),
    "no end token": (config_says(eos_token_id=None, pad_token_id=None), {}, 0.5),
    "the whole budget": (nothing, {"budget": 1.0}, 1e-9),
    "streamed, an untied head under a tied config": (
        config_says(tie_word_embeddings=True), {"settings": {"stream": "always"}}, 0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(RIGHT) if _WHOLE else list(RIGHT)[:6])
def test_a_right_child(name: str, compressed: Callable[..., tuple[Path, layersmith.Result]]) -> None:
    harm, more, largest = RIGHT[name]
    parent, result = compressed(harm, **more)
    rows = check_child(parent, result)
    assert rows["kl_divergence"]["child"] <= largest
    if "untied" in name:
        of_parent, of_child = (load_file(path / "model.safetensors") for path in (parent, result.child))
        assert torch.equal(of_child["lm_head.weight"], of_parent["lm_head.weight"])
        assert inspect(parent).total["parameters"] == sum(tensor.numel() for tensor in of_parent.values())


REFUSED: dict[str, tuple[Harm, dict[str, Any], str]] = {
    "weights of 1e30": (scaled(1e30, "layers."), {}, "layer 0"),
    "one position": (config_says(max_position_embeddings=1), {}, "position"),
    "a tied head under an untied config": (lambda tensors, config: tensors.pop("lm_head.weight"), {}, "lm_head"),
    "an embedding row of NaN that the text may not use": (
        lambda tensors, config: tensors["model.embed_tokens.weight"][511].fill_(float("nan")),
        {},
        "model.embed_tokens.weight has 32 values that are NaN or infinite in float32, the first in row 511",
    ),
    "activations that overflow float32": (scaled(1e20, "gate_proj", "up_proj"), {}, "output of layer 0"),
}


@pytest.mark.parametrize("name", list(REFUSED) if _WHOLE else list(REFUSED)[:2])
def test_a_true_refusal(name: str, compressed: Callable[..., Any]) -> None:
    harm, more, word = REFUSED[name]
    with pytest.raises(InputError, match=word):
        compressed(harm, **more)


def test_a_parent_that_overflows_float16_is_run_in_a_wider_type(compressed: Callable[..., Any]) -> None:
    notes = Notes()
    parent, result = compressed(
        as_float16(scaled(600.0, "up_proj", "down_proj")), progress=notes, settings={"dtype": "float16"}
    )
    assert any("overflow float16" in note for note in notes.notes)
    check_child(parent, result)
