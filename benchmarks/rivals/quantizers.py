"""Quantizers of other packages: llama.cpp with an importance matrix, and checkpoints that a package wrote.

llama.cpp's mixtures of types are those that its ``llama_model_quantize`` makes by name, with its own substitutes for
matrices whose width is not a multiple of 256, and its type for the embeddings or another one. The importance matrix is
what its own tool gathers: the mean squares of the inputs of every linear map, here on the calibration rows of the run.
It needs the packages llama-cpp-python and gguf.
"""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from layersmith.distillation.quantize import layerwise_of
from layersmith.export.run import export
from layersmith.heterogeneous.checkpoint import load
from layersmith.heterogeneous.convert import ordinary_checkpoint
from layersmith.library.formats import InputMoments, matrices, quantized_embeddings
from layersmith.stages.data import DATA
from layersmith.stages.job import Job
from layersmith.stages.library import LIBRARY

# Mixture, and type of the embeddings where it is not the mixture's. From many bits to few: as substitutes are larger
# than what they stand for, a mixture of few bits can be larger than IQ4_NL, and worse.
_FEW_BITS = ("Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_S", "Q2_K", "IQ2_M", "IQ2_XXS", "IQ1_M", "IQ1_S")
_MIXTURES = (
    *((name, "") for name in ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS")),
    ("IQ4_NL", "Q5_0"),
    *((name, "IQ4_NL") for name in ("IQ4_NL", *_FEW_BITS)),
)
_DOES_NOT_WORK = 2**60


@dataclass(frozen=True)
class RoundedModel:
    """A model whose weights another package rounded.

    Attributes:
        model: In float32.
        size: Bytes of its weights with all scales.
        described: What was asked of the package.
    """

    model: PreTrainedModel
    size: int
    described: str

    def record(self) -> dict[str, Any]:
        """What the table says about it."""
        return {"bytes": self.size, "parameters": 1.0, "formats": {self.described: 1}}


def importance(job: Job) -> dict[str, torch.Tensor]:
    """llama.cpp's name of each linear map to the mean square ``[in]`` of its inputs on the calibration rows."""
    import gguf

    library, tokens = job.read(LIBRARY), job.read(DATA).calibration
    parent, layerwise = library.parent, layerwise_of(library.parent, library)
    batches, depth, result = [layerwise.start(rows) for rows in tokens.split(4)], len(layerwise.layers), {}
    hidden, names = [batch.embedded for batch in batches], gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, depth)
    for i, layer in enumerate(layerwise.layers):
        of_subblock = matrices(parent.model, parent.descriptor, layer, i, depth, library.axes[i])
        moments = InputMoments(layer, [name for members in of_subblock.values() for name in members])
        with moments.watching(), torch.no_grad():
            hidden = [layerwise.run(batch, i, h) for batch, h in zip(batches, hidden, strict=True)]
        for name in moments.linear:
            moment = moments.of(name)
            assert moment is not None
            whole = f"{parent.descriptor.layer_block_name(i)}.{name}".removesuffix(".weight")
            result[f"{names.get_name(whole)}.weight"] = moment.diagonal().float()
    return result


def llama_quantizer(squares: dict[str, torch.Tensor]) -> Callable[..., int]:
    """A function ``(file, out, mixture, embeddings, dry_run)`` that quantizes a GGUF file, or only counts its bytes."""
    import gguf
    import llama_cpp

    said: list[str] = []
    log = llama_cpp.llama_log_callback(lambda level, text, data: said.append(text.decode()))
    llama_cpp.llama_log_set(log, None)
    matrix = (llama_cpp.llama_model_imatrix_data * (len(squares) + 1))()  # the last is empty and ends it
    data = {name: (ctypes.c_float * len(values))(*values.tolist()) for name, values in squares.items()}
    for entry, (name, values) in zip(matrix, data.items(), strict=False):
        entry.name, entry.size, entry.data = name.encode(), len(values), values

    def quantized(file: Path, out: Path, mixture: str, embeddings: str, dry_run: bool) -> int:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mixture}")
        settings.imatrix, settings.nthread, settings.dry_run = matrix, 1, dry_run
        if embeddings:
            settings.token_embedding_type = settings.output_tensor_type = gguf.GGMLQuantizationType[embeddings].value
        said.clear()
        if llama_cpp.llama_model_quantize(str(file).encode(), str(out).encode(), settings):
            return _DOES_NOT_WORK
        mebibytes = float(re.findall(r"quant size *= *([0-9.]+) MiB", "".join(said))[-1])
        return int(mebibytes * 2**20)

    quantized.log = log  # type: ignore[attr-defined]  # must live as long as llama.cpp may call it
    return quantized


def by_llama_cpp(job: Job, most: float) -> RoundedModel | None:
    """The parent in the first of llama.cpp's mixtures with at most ``most`` bytes; None if none has."""
    quantized = llama_quantizer(importance(job))
    with tempfile.TemporaryDirectory() as folder:
        export(job.parent.path, Path(folder) / "parent", "gguf")
        (file,) = (Path(folder) / "parent").glob("*.gguf")
        out = Path(folder) / "out.gguf"
        best = next((mixture for mixture in _MIXTURES if quantized(file, out, *mixture, True) <= most), None)
        if best is None:
            return None
        size = quantized(file, out, *best, False)
        described = f"{best[0]}, embeddings {best[1] or 'as it does'}"
        return RoundedModel(load(ordinary_checkpoint(out, "float32")), size, described)


def of_folder(folder: str, bits: str, embeddings: str, head_moment: torch.Tensor | None) -> RoundedModel:
    """Weights that another package rounded to ``bits`` in linear maps; embeddings and head are rounded here."""
    model = load(folder, dtype=torch.float32)
    rounded = quantized_embeddings(model, embeddings, head_moment)
    values = {name: weight.values() for name, weight in rounded.items()}
    size = sum(weight.format.bytes_of(weight.levels.shape) for weight in rounded.values())
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.data = values[name]
        else:
            size += int(parameter.numel() * (float(bits) if name in linear else 16.0)) // 8
    return RoundedModel(model, size, f"{bits} bits, embeddings {embeddings}")
