"""Target ``gguf``: one file for llama.cpp and what is built on it, tokenizer included.

The file is written tensor by tensor and read back with the ``gguf`` package: every tensor of the child must be there,
bit by bit, and no other but the zeros of :mod:`layersmith.export.gguf_layout`. Weights that the child has in a format
of llama.cpp are written in it (:mod:`layersmith.heterogeneous.quantized`). Where llama-cpp-python is installed, its
logits and token ids are compared as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from layersmith.export import llama_cpp
from layersmith.export.gguf_layout import Entry, Layout, gguf_layout
from layersmith.export.gguf_reader import GGUFModel
from layersmith.export.gguf_tokenizer import gguf_tokenizer
from layersmith.export.proof import sample_tokens
from layersmith.export.source import CannotExport, Source
from layersmith.foreign import foreign_code
from layersmith.quantization.formats import FORMATS

FILE = "model.gguf"
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
# GGUF's number for a file of which no name says what is in it.
_MIXED_TYPES = 1024
# GGUF's names of data types, and its number for a file whose matrices have one of them.
_TYPES = {torch.float32: ("F32", 0), torch.float16: ("F16", 1), torch.bfloat16: ("BF16", 32)}


def prepare(source: Source) -> Callable[[Path], None]:
    """Choose an architecture of llama.cpp, and lay out tensors and tokenizer.

    Returns:
        Writes ``model.gguf`` into a folder.

    Raises:
        CannotExport: llama.cpp has no program or no tokenizer for the child.
    """
    layout = gguf_layout(source)
    kinds, number = _kinds(source, layout)
    general = {"general.architecture": layout.arch.name, "general.type": "model", "general.name": source.folder.name}
    metadata = {**general, "general.file_type": number, **layout.metadata, **_tokenizer(source)}
    if any(kind not in _SIZES for kind in kinds.values()):
        metadata["general.quantization_version"] = 2
    return partial(_write, source, layout, metadata, kinds)


def _kinds(source: Source, layout: Layout) -> tuple[dict[str, str], int]:
    """GGUF's data type of every tensor of the file, and its number for the file.

    Raises:
        CannotExport: Weights of several formats are one tensor in the file.
    """
    blocks = source.gguf_blocks
    dense = [name for name, shape in source.shapes.items() if len(shape) > 1 and name not in blocks]
    name, number = _TYPES.get(source.tensor(dense[0]).dtype if dense else torch.bfloat16, _TYPES[torch.float32])
    kinds = {}
    for entry in layout.entries:
        formats = {blocks[of][0].name.upper() if of in blocks else name for of in entry.sources}
        if len(formats) > 1:
            raise CannotExport(
                f"--to gguf: {entry.sources[0]} has the format {blocks[entry.sources[0]][0]}, and others with which "
                f"llama.cpp's {layout.arch.name} keeps it in one tensor have not. Give them one format."
            )
        kinds[entry.name] = "F32" if len(entry.shape) == 1 else formats.pop() if formats else name
    return kinds, _MIXED_TYPES if blocks else number


def read(folder: Path) -> GGUFModel:
    """The reader for the proof."""
    return GGUFModel(folder / FILE)


def _tokenizer(source: Source) -> dict[str, Any]:
    with foreign_code("does the child's tokenizer load?", refusal_is_answer=True) as attempt:
        tokenizer = attempt.call(AutoTokenizer.from_pretrained, source.folder)
    if attempt.failed:
        raise CannotExport(
            f"--to gguf: {source.folder} has no tokenizer that loads ({attempt.reason}), and llama.cpp reads it from "
            "the file. Save the parent's tokenizer in the folder."
        ) from attempt.error
    eos = source.language.eos_token_id
    return gguf_tokenizer(tokenizer, source.language.vocab_size, eos if isinstance(eos, int) else None).metadata()


def _write(source: Source, layout: Layout, metadata: Mapping[str, Any], kinds: Mapping[str, str], folder: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(folder / FILE, layout.arch.name)
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer has added it
            _add(writer, key, value)
    for entry in layout.entries:
        kind, shape = kinds[entry.name], entry.shape
        size = shape[-1] * _SIZES[kind] if kind in _SIZES else FORMATS[kind.lower()].bytes_of((1, shape[-1]))
        # Of bytes the writer wants the shape in bytes.
        numpy_type: Any = torch.zeros(0, dtype=torch.uint8).numpy().dtype
        count = math.prod(shape[:-1]) * size
        writer.add_tensor_info(entry.name, (*shape[:-1], size), numpy_type, count, GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    torch_types = {name: dtype for dtype, (name, _) in _TYPES.items()}
    for entry in layout.entries:
        tensor = made(entry, source)
        if kinds[entry.name] in torch_types:
            tensor = tensor.to(torch_types[kinds[entry.name]]).contiguous().view(torch.uint8)
        writer.write_tensor_data(tensor.numpy())
    writer.close()
    check(source, layout, folder / FILE)
    if llama_cpp.is_installed():
        tokens = sample_tokens(source)
        kind = next((kind for kind in kinds.values() if kind not in _SIZES), kinds["token_embd.weight"])
        llama_cpp.compare(folder / FILE, list(tokens), list(GGUFModel(folder / FILE).logits(tokens)), kind)
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        llama_cpp.compare_tokens(folder / FILE, [tokenizer(text).input_ids for text in llama_cpp.TEXTS])


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def quantize(source: Source, folder: Path, name: str) -> str:
    """Replace the file by one that llama.cpp quantized, and compare the two on a few lines of text.

    Args:
        source: The child.
        folder: Holds ``model.gguf``, which is removed.
        name: llama.cpp's name of the format, such as ``Q4_K_M``.

    Returns:
        What it changed, in words.
    """
    file, out = folder / FILE, folder / f"model-{name}.gguf"
    llama_cpp.quantize(file, out, name)
    ids = AutoTokenizer.from_pretrained(source.folder)("\n".join(llama_cpp.TEXTS)).input_ids
    before, after = (GGUFModel(path).logits(torch.tensor([ids]))[0].log_softmax(-1) for path in (file, out))
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    same = int((before.argmax(-1) == after.argmax(-1)).sum())
    sizes = [path.stat().st_size for path in (file, out)]
    file.unlink()
    return (
        f"Quantized to {name}: {sizes[1] / sizes[0]:.0%} of the size; on {len(ids)} tokens of text the first choice is "
        f"the same for {same}, and the KL divergence is {kl:.4f}."
    )


# ---------------------------------------------------------------------------------------------- tensors


def made(entry: Entry, source: Source) -> torch.Tensor:
    """A tensor of the file, from the child's; bytes ``[rows, bytes of a row]`` where it has a format of llama.cpp."""
    if entry.fill == "identity" and not entry.sources:
        return torch.eye(*entry.shape)
    if not entry.sources:
        fill = entry.fill if isinstance(entry.fill, tuple) else (entry.fill,)
        return torch.tensor(fill).expand(entry.shape)
    parts = [_stored(source, name) for name in entry.sources]
    for i, heads in enumerate(entry.rotated):
        parts[i] = turned(parts[i], heads)
    if len(parts) == 1 and len(entry.shape) < 3:
        return parts[0]
    return torch.stack(parts) if len(entry.shape) == 3 else torch.cat(parts)


def _stored(source: Source, name: str) -> torch.Tensor:
    return source.gguf_blocks[name][1] if name in source.gguf_blocks else source.tensor(name)


def turned(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys, so that the two channels that turn together are neighbours.

    Args:
        tensor: Weight ``[heads * size, hidden]`` or bias ``[heads * size]``.
        heads: Number of heads.
    """
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def turned_back(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of :func:`turned`."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def check(source: Source, layout: Layout, file: Path) -> None:
    """Read a file back: every tensor of the child is in it bit by bit, and no other but constants.

    Raises:
        CannotExport: It is not; a bug, or a damaged disk.
    """
    from gguf import GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    left = dict.fromkeys(source.places)
    wrong = sorted(tensors.keys() ^ {entry.name for entry in layout.entries})
    for entry in () if wrong else layout.entries:
        stored = as_torch(tensors[entry.name])
        if not entry.sources:
            same = torch.equal(stored.float(), made(entry, source).float())
        else:
            parts = list(stored) if len(entry.shape) == 3 else list(_rows(stored, entry, source))
            same = all(
                torch.equal(
                    turned_back(part, entry.rotated[i]) if entry.rotated else part, _stored(source, name).to(part)
                )
                for i, (name, part) in enumerate(zip(entry.sources, parts, strict=True))
            )
        wrong += [] if same else [entry.name]
        for name in entry.sources:
            del left[name]
    if wrong or left:
        raise CannotExport(f"--to gguf: read back, the file is not the child: {[*wrong, *left][0]}.")


def _rows(stored: torch.Tensor, entry: Entry, source: Source) -> tuple[torch.Tensor, ...]:
    return stored.split([source.shapes[name][0] for name in entry.sources])


def as_torch(tensor: Any) -> torch.Tensor:
    """A tensor of a ``GGUFReader`` with rows first; its bytes if it is quantized."""
    types = {name: dtype for dtype, (name, _) in _TYPES.items()}
    if tensor.tensor_type.name not in types:
        return torch.from_numpy(tensor.data.copy())
    shape = [int(n) for n in reversed(tensor.shape)]
    return torch.from_numpy(tensor.data.copy()).view(torch.uint8).view(types[tensor.tensor_type.name]).reshape(shape)
