"""Write rounded weights into a checkpoint's folder: as ``compressed-tensors``, or as the blocks of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from layersmith.errors import UsageError, some_of
from layersmith.heterogeneous.weight_files import INDEX, read_tensor, stored_shapes, weight_files, weight_map
from layersmith.quantization.formats import Format, format_named
from layersmith.quantization.packing import compressed_tensors, format_of, gguf_blocks, grid_of, quantization_config
from layersmith.quantization.rounding import Grid, Quantized
from layersmith.run.artifacts import read_json, read_tensors, write_json, write_tensors
from layersmith.untrusted import read_safetensors_header

# Blocks for the GGUF file that a child is exported to, below the folder of the child. Its weights have the same values.
GGUF_BLOCKS = "gguf/blocks.safetensors"


def write_quantized(folder: Path, formats: Mapping[str, Format], rounded: Callable[[str], Quantized]) -> None:
    """Give weights of a checkpoint's folder their formats.

    Formats of ``compressed-tensors`` replace the weights, and config.json says so: Transformers, vLLM and layersmith
    load the folder. Formats of GGUF are kept beside the weights, which get the rounded values in float32, until
    ``layersmith export --to gguf`` writes them.

    Args:
        folder: A checkpoint that ``save_pretrained`` has just written.
        formats: The format of each weight by its name in the files, such as ``model.layers.0.mlp.up_proj.weight``;
            ``bf16`` and weights that are not named stay as they are.
        rounded: Returns the rounded weight of a name.

    Raises:
        UsageError: Some formats are of GGUF and some of compressed-tensors, or a weight is not in the files.
    """
    formats = {name: form for name, form in formats.items() if form.storage != "plain"}
    if not formats:
        return
    files = weight_files(folder)
    shapes = stored_shapes(files)
    if missing := sorted(formats.keys() - shapes.keys()):
        raise UsageError(f"{folder}: no weights {some_of(missing)} to quantize.")
    if len(storages := {form.storage for form in formats.values()}) > 1:
        both = [next(form.name for form in formats.values() if form.storage == storage) for storage in sorted(storages)]
        raise UsageError(f"no program reads both {both[0]} and {both[1]}; choose formats of one server.")
    places: dict[str, str] = {}
    blocks: dict[str, Tensor] = {}
    for file in files:
        tensors: dict[str, Tensor] = {}
        for name, tensor in read_tensors(file).items():
            if name not in formats:
                tensors[name] = tensor
                continue
            quantized, module = rounded(name), name.removesuffix("weight")
            if quantized.format.storage == "gguf":
                blocks[name], tensors[name] = gguf_blocks(quantized), quantized.values()
            else:
                tensors |= {module + rest: stored for rest, stored in compressed_tensors(quantized).items()}
        write_tensors(file, tensors, {"format": "pt"})
        places |= dict.fromkeys(tensors, file.relative_to(folder).as_posix())
    if blocks:
        (folder / GGUF_BLOCKS).parent.mkdir(exist_ok=True)
        write_tensors(folder / GGUF_BLOCKS, blocks, {name: form.name for name, form in formats.items()})
        return
    if (index := folder / INDEX).is_file():
        write_json(index, read_json(index) | {"weight_map": places})
    _write_config(folder, formats, shapes)


def _write_config(folder: Path, formats: Mapping[str, Format], shapes: Mapping[str, tuple[int, ...]]) -> None:
    dense = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2 and name not in formats]
    if "lm_head.weight" not in shapes:  # tied to the embeddings; vLLM asks for its format
        dense.append("lm_head")
    by_module = {name.removesuffix(".weight"): form for name, form in formats.items()}
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"quantization_config": quantization_config(by_module, sorted(dense))})


def read_gguf_blocks(folder: Path) -> dict[str, tuple[Format, Tensor]]:
    """The format and the blocks ``[rows, bytes of a row]`` of each weight that has a format of GGUF."""
    file = folder / GGUF_BLOCKS
    if not file.is_file():
        return {}
    names = read_safetensors_header(file)[0]["__metadata__"]
    return {name: (format_named(names[name]), blocks) for name, blocks in read_tensors(file).items()}


def read_grids(folder: Path) -> dict[str, Grid]:
    """The values that each weight can have which :func:`write_quantized` wrote as compressed-tensors."""
    settings = read_json(folder / "config.json", dict[str, Any]).get("quantization_config") or {}
    if not names_modules(settings):
        return {}
    places, grids = weight_map(folder), {}
    for group in settings["config_groups"].values():
        if (form := format_of(group)) is None:
            continue
        for module in group["targets"]:
            parts = ("weight_scale", "weight_global_scale", "weight_zero_point")
            stored = {part: read_tensor(places, f"{module}.{part}") for part in parts if f"{module}.{part}" in places}
            grids[f"{module}.weight"] = grid_of(form, stored)
    return grids


def names_modules(settings: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` of compressed-tensors lists every quantized module, as layersmith writes it.

    Transformers 5.23 dequantizes all modules of a checkpoint as those of its first group.
    """
    groups = settings.get("config_groups")
    targets = [target for group in groups.values() for target in group["targets"]] if isinstance(groups, dict) else []
    return bool(targets) and all("." in target and not target.startswith("re:") for target in targets)


def dense_tensors(folder: Path, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a folder that :func:`write_quantized` wrote, with weights as compressed-tensors unpacks them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    tensors = {name: tensor for file in weight_files(folder) for name, tensor in read_tensors(file).items()}
    for group in settings["config_groups"].values():
        scheme = QuantizationScheme.model_validate(group)
        compressor = BaseCompressor.get_value_from_registry(group["format"])
        for module in group["targets"]:
            parts = {name.removeprefix(f"{module}."): name for name in tensors if name.startswith(f"{module}.weight")}
            dense = compressor.decompress({rest: tensors.pop(name) for rest, name in parts.items()}, scheme)
            tensors[f"{module}.weight"] = dense["weight"]
    return tensors
