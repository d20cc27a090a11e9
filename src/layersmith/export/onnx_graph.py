"""Target ``onnx``: one graph from token ids to logits, by PyTorch's own exporter, for onnxruntime.

The graph takes ``input_ids`` and ``attention_mask`` ``[B, T]`` of any size and has no KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layersmith.export.source import CannotExport, Source
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.checkpoint import load

FILE = "model.onnx"
_INPUTS = ("input_ids", "attention_mask")


class _Logits(nn.Module):
    """A model without cache that returns one tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def prepare(source: Source) -> Callable[[Path], None]:
    """Returns a function that traces the child into a folder; it raises ``CannotExport`` if it cannot be traced."""
    return partial(_write, source)


def _write(source: Source, folder: Path) -> None:
    child = load(source.folder, dtype=torch.float32).eval()
    if any(block.ffn.moe is not None for block in source.blocks):
        child.set_experts_implementation("batched_mm")  # the usual one has an operator that ONNX does not have
    model = _Logits(child)
    ids = torch.arange(24).view(2, 12) % source.language.vocab_size
    longest = getattr(source.language, "max_position_embeddings", None) or 2**16
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=longest)}
    with foreign_code("can PyTorch's exporter trace the child?", refusal_is_answer=True) as attempt:
        attempt.call(
            torch.onnx.export, model, (ids, torch.ones_like(ids)), str(folder / FILE), dynamo=True, verbose=False,
            input_names=list(_INPUTS), output_names=["logits"], dynamic_shapes=(sizes, sizes),
        )  # fmt: skip
    if attempt.failed:
        raise CannotExport(
            f"--to onnx: PyTorch's exporter cannot trace this family ({attempt.reason}). Export to another target."
        ) from attempt.error


@dataclass(frozen=True)
class OnnxReader:
    """A session of onnxruntime on the CPU."""

    session: Any

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        given = dict(zip(_INPUTS, (tokens.numpy(), torch.ones_like(tokens).numpy()), strict=True))
        return torch.from_numpy(self.session.run(None, given)[0]).float()

    def greedy(self, tokens: torch.Tensor, count: int) -> list[int]:
        for _ in range(count):
            tokens = torch.cat([tokens, self.logits(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
        return [int(t) for t in tokens[0, -count:]]


def read(folder: Path) -> OnnxReader:
    """onnxruntime's session of a folder."""
    import onnxruntime  # here, since it is an extra

    return OnnxReader(onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"]))
