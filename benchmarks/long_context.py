"""Whether scores see what a window forgets: one parent, scored on ordinary rows and on long rows with questions.

    python -m benchmarks.long_context --out benchmarks/results/long-context.md

The parent is trained for two minutes: two layers of width 64, of which one sees 8 tokens and one sees everything. Its
text is random tokens, and the second half of most training rows repeats spans of the first, so it learns to copy what
follows a key. Then the full attention gets the window, as an alternative of its library, and is scored exactly: on rows
of 16 tokens of plain text, and on the same tokens joined to rows of 64 that end with questions.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen2Config

import layersmith
from benchmarks.quality import commit
from layersmith.data.retrieval import SHARE, long_rows
from layersmith.execution.parent import Parent
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.library.survey import survey
from layersmith.model_descriptor.stock import stock_model
from layersmith.recipe import LibraryRecipe
from layersmith.run.runtime import Runtime
from layersmith.scoring.exact import run_exactly

_VOCABULARY, _WINDOW, _ORDINARY, _LONG, _SPAN = 128, 8, 16, 64, 8
_ASKED, _PLAIN = 24, 8  # rows of a training step


def config() -> Qwen2Config:
    """Windows and full attention in turn."""
    return Qwen2Config(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        layer_types=["sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=_WINDOW,
        max_position_embeddings=_LONG,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )


def text(rows: int, length: int, seed: int) -> torch.Tensor:
    """``[N, T]`` random token ids."""
    return torch.randint(0, _VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def repeating(rows: int, seed: int) -> torch.Tensor:
    """``[N, T]`` random ids whose second half has the spans of the first in another order."""
    first = text(rows, _LONG // 2, seed).view(rows, -1, _SPAN)
    order = torch.rand(first.shape[:2], generator=torch.Generator().manual_seed(seed)).argsort(1)
    again = first.gather(1, order[:, :, None].expand(-1, -1, _SPAN))
    return torch.cat([first, again], 1).flatten(1)


def train(model: torch.nn.Module, steps: int) -> float:
    """Train, mostly on rows that repeat; returns the share of values asked for in long rows that are predicted then."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 100, 5 * (1 - step / steps) + 0.01)
    )
    for step in range(steps):
        rows = torch.cat([repeating(_ASKED, step), text(_PLAIN, _LONG, steps + step)])
        labels = rows.clone()
        labels[:_ASKED, : _LONG // 2] = -100  # random text, which nothing predicts
        loss = model(input_ids=rows, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.2f}, {accuracy(model):.1%}", file=sys.stderr, flush=True)
    return accuracy(model)


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    """The share of asked values that a model predicts, on new rows."""
    asked = int(_LONG * SHARE)
    rows = long_rows(text(64 * _LONG // _ORDINARY, _ORDINARY, 2**30), _LONG, 0)
    predicted = model(input_ids=rows).logits[:, -asked - 1 : -1].argmax(-1)
    is_value = torch.arange(asked) % _SPAN >= _SPAN // 2
    return float((predicted == rows[:, -asked:])[:, is_value].float().mean())


def scores(library: Library, rows: torch.Tensor) -> dict[str, tuple[float, float]]:
    """The KL divergence a token of every window, and its standard error over rows."""
    windows = [a for a in library.alternatives if a.kind == "window"]
    result = {}
    for measured in run_exactly(library, None, [[a] for a in windows], rows):
        if isinstance(measured.alternative, Alternative):
            losses = torch.tensor([float(row["kl_divergence"]) for row in measured.rows])
            result[measured.alternative.key] = float(losses.mean()), float(losses.std() / len(losses) ** 0.5)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="training steps")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = stock_model(config(), "cpu", torch.float32)
    started = time.process_time()
    found = train(model.train(), arguments.steps)
    seconds = time.process_time() - started
    blocks = tuple(layersmith.block_configs(model.config))
    runtime = Runtime(torch.device("cpu"), torch.float32)
    parent = Parent(
        "", model.eval().requires_grad_(False), torch.float32, layersmith.describe(model.config), blocks, "", runtime
    )
    space = survey(parent, LibraryRecipe(linear=(), no_op=()))
    library = Library(parent, space.axes, space.alternatives, orders={}, maps={}, notes=[])
    ordinary = text(64, _ORDINARY, 2**29)
    on_ordinary, on_long = scores(library, ordinary), scores(library, long_rows(ordinary, _LONG, 0))
    lines = [
        f"commit {commit()}, torch {torch.__version__}, {arguments.steps} steps in {seconds:.0f} CPU s; "
        f"the parent predicts {found:.0%} of the values that are asked for.",
        "",
        f"| alternative | KL a token, rows of {_ORDINARY} | rows of {_LONG} that end with questions |",
        "| --- | --- | --- |",
    ]
    for key in on_ordinary:
        cells = (f"{mean:.4f} ± {error:.4f}" for mean, error in (on_ordinary[key], on_long[key]))
        lines.append(f"| {key} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
