"""The table of targets. To add one:

1. Write a module with ``prepare(source)``. It gets a :class:`~layersmith.export.source.Source`, raises
   :class:`~layersmith.export.source.CannotExport` if the layout cannot express the child (which layer, why, what would
   make it fit), and returns a function that writes into a folder. Nothing is written before. Write tensor by tensor:
   :func:`layersmith.export.tensors.write_shards`.
2. Give it a reader: a function from the folder to a :class:`~layersmith.export.proof.Reader`, which loads what was
   written as the target does. ``with_layersmith`` reads every layout that ``layersmith.load`` reads.
3. Add a row to :data:`TARGETS`, a row to the table of ``docs/serving.md``, and a test of the round trip in
   ``tests/export/``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from layersmith.export import decilm, gguf, onnx_graph, padded, puzzletron, served
from layersmith.export.proof import TOLERANCE, Reader, with_layersmith, with_stock_transformers
from layersmith.export.source import Source
from layersmith.heterogeneous.nested import NESTED, SIZES


def _prepare_copy(source: Source) -> Callable[[Path], None]:
    """Copies the child's folder without the nested children in it."""

    def write(folder: Path) -> None:
        shutil.copytree(source.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SIZES, NESTED))

    return write


@dataclass(frozen=True)
class Target:
    """A layout that children are exported to.

    Attributes:
        purpose: What it is for, in a few words.
        prepare: Refuses what the layout cannot express; returns a function that writes into a folder.
        reader: What loads the export for the proof, in words.
        read: Loads it.
        extra: The extra of layersmith that it needs, by the package that is imported; empty for none.
        tolerance: Largest difference of logits, relative to the largest logit.
        quantize: Stores the proved export with quantized weights, and says what that changed.
        keeps_inner_sizes: Whether layers may differ in sizes inside subblocks, such as the size of heads.
        keeps_formats: Whether weights keep formats of compressed-tensors; otherwise they are unpacked.
        copies: Whether tokenizer and generation settings are copied into the folder.
    """

    purpose: str
    prepare: Callable[[Source], Callable[[Path], None]]
    reader: str
    read: Callable[[Path], Reader]
    extra: tuple[str, str] | None = None
    tolerance: float = TOLERANCE
    copies: bool = True
    quantize: Callable[[Source, Path, str], str] | None = None
    keeps_formats: bool = False
    keeps_inner_sizes: bool = False


TARGETS: dict[str, Target] = {
    "checkpoint": Target(
        purpose="Transformers: the child's folder itself, e.g. one of several nested children",
        prepare=_prepare_copy,
        reader="layersmith",
        read=with_layersmith,
        keeps_inner_sizes=True,
    ),
    "padded": Target(
        purpose="every tool that loads the parent; filled up with zeros",
        prepare=padded.prepare,
        reader="stock Transformers without remote code",
        read=with_stock_transformers,
    ),
    "gguf": Target(
        purpose="llama.cpp and what is built on it: one file with the tokenizer",
        prepare=gguf.prepare,
        reader="a reader of GGUF files",
        read=gguf.read,
        extra=("gguf", "gguf"),
        copies=False,
        quantize=gguf.quantize,
    ),
    "vllm": Target(
        purpose="stock vLLM",
        prepare=served.prepare,
        reader="layersmith's reader of the layout",
        read=served.read,
        keeps_formats=True,
    ),
    "sglang": Target(
        purpose="stock SGLang; the DeciLM layout",
        prepare=partial(decilm.prepare, decilm.SGLANG),
        reader="layersmith's reader of the layout",
        read=with_layersmith,
    ),
    "tensorrt-llm": Target(
        purpose="stock TensorRT-LLM; the DeciLM layout",
        prepare=partial(decilm.prepare, decilm.TENSORRT_LLM),
        reader="layersmith's reader of the layout",
        read=with_layersmith,
    ),
    "puzzletron": Target(
        purpose="NVIDIA Model-Optimizer's puzzletron, its first schema",
        prepare=puzzletron.prepare,
        reader="layersmith's reader of the layout",
        read=with_layersmith,
    ),
    "anymodel": Target(
        purpose="AnyModel, in NVIDIA's vLLM",
        prepare=puzzletron.prepare_any_model,
        reader="layersmith's reader of the layout",
        read=with_layersmith,
    ),
    "onnx": Target(
        purpose="onnxruntime: one graph without KV cache",
        prepare=onnx_graph.prepare,
        reader="onnxruntime",
        read=onnx_graph.read,
        extra=("onnxruntime", "onnx"),
        keeps_inner_sizes=True,
    ),
}
