"""Every target for a child of every family: exported and proved, or refused and why, as tables of Markdown.

    python -m tests.export.matrix

The children are small, with random weights: no attention in layer 0, no FFN in layer 1, other KV heads and widths in
every layer, fewer query heads in one; of mixtures, fewer experts than the parent's and of other widths.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import layersmith
from layersmith.block_config import BlockConfig
from layersmith.demo.job import MODEL
from layersmith.errors import LayersmithError
from layersmith.export.target import TARGETS
from tests.export.children import ALIKE, ALIKE_EXPERTS, MIXED, PRUNED_EXPERTS, write_child

CHILDREN: dict[str, tuple[str, tuple[BlockConfig, ...], dict[str, Any]]] = {
    "Llama": ("llama", MIXED, {}),
    "Llama with biases": ("llama_tied", MIXED, {}),
    "Mistral": ("mistral_plain", MIXED, {}),
    "Mistral with a window": ("mistral", MIXED, {}),
    "Qwen2": ("qwen2", MIXED, {}),
    "Qwen3": ("qwen3", MIXED, {"tie_word_embeddings": False}),
    "Qwen3, tied embeddings": ("qwen3", MIXED, {"tie_word_embeddings": True}),
    "Qwen3, layers alike": ("qwen3", ALIKE, {}),
    "Gemma": ("gemma", MIXED, {}),
    "Qwen3-MoE": ("qwen3_moe", PRUNED_EXPERTS, {}),
    "Qwen3-MoE, layers alike": ("qwen3_moe", ALIKE_EXPERTS, {}),
}


def main() -> int:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    refusals: dict[str, int] = {}
    print("| child | " + " | ".join(f"`{target}`" for target in TARGETS) + " |")
    print("|---" * (len(TARGETS) + 1) + "|")
    for name, (family, blocks, more) in CHILDREN.items():
        with tempfile.TemporaryDirectory() as folder:
            child = write_child(Path(folder, "child"), family, blocks, vocab_size=len(tokenizer), **more)
            tokenizer.save_pretrained(child)
            cells = [cell(child, Path(folder, target), target, refusals) for target in TARGETS]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print("", *(f"{number}. {reason}" for reason, number in refusals.items()), sep="\n")
    return 0


def cell(child: Path, out: Path, target: str, refusals: dict[str, int]) -> str:
    """The class that the export names, or the number of the refusal."""
    try:
        exported = layersmith.export(child, out, target)
    except LayersmithError as error:
        return f"no ({refusals.setdefault(str(error), len(refusals) + 1)})"
    return exported.layout or "yes"


if __name__ == "__main__":
    sys.exit(main())
