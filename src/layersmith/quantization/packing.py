"""Rounded weights as files hold them: the tensors of ``compressed-tensors``, and the blocks of GGUF.

Layouts: compressed-tensors 0.20 (``pack-quantized``, ``naive-quantized``, ``nvfp4-pack-quantized``,
``mxfp4-pack-quantized``), and ``ggml-common.h`` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layersmith.quantization.formats import FORMATS, Format
from layersmith.quantization.rounding import E2M1, IQ4_NL, Grid, Quantized, integer_range

# Codes of the levels of E2M1: three bits of the magnitude, and the sign.
_E2M1_CODES = {level: E2M1.index(abs(level)) - E2M1.index(0.0) + 8 * (level < 0) for level in E2M1}


# ------------------------------------------------------------------------------------------- compressed-tensors


def compressed_tensors(quantized: Quantized) -> dict[str, Tensor]:
    """The tensors that take the place of a module's ``weight``, by the rest of their names.

    Integers are packed as ``weight_packed`` in words of 32 bits, FP4 in bytes; FP8 stays ``weight``. Scales of integers
    and of FP8 are in bfloat16.
    """
    form, grid, levels = quantized.format, quantized.grid, quantized.levels.float()
    if form.levels == "e4m3":
        scale = grid.scale.bfloat16()
        return {
            "weight": levels.to(torch.float8_e4m3fn),
            "weight_scale": scale.reshape(1) if form.group == "tensor" else scale,
        }
    if form.levels == "e2m1":
        packed = {"weight_packed": _bytes_of_fours(_index(levels, _E2M1_CODES))}
        if "global_scale" not in grid.stored:
            return packed | {"weight_scale": (grid.scale.log2().round() + 127).to(torch.uint8)}
        scale = (grid.scale * grid.stored["global_scale"]).to(torch.float8_e4m3fn)
        return packed | {"weight_scale": scale, "weight_global_scale": grid.stored["global_scale"]}
    lowest = integer_range(form)[0]
    out = {
        "weight_packed": _words(levels - lowest, form.bits),
        "weight_scale": grid.scale.bfloat16(),
        "weight_shape": torch.tensor(levels.shape),
    }
    if form.is_asymmetric:
        out["weight_zero_point"] = _words(grid.stored["zeros"].T, form.bits).T.contiguous()
    return out


def quantization_config(formats: Mapping[str, Format], others: list[str]) -> dict[str, Any]:
    """The entry of ``config.json`` that says which modules have which format.

    Args:
        formats: The format of each quantized module by its name, such as ``model.layers.0.mlp.up_proj``.
        others: Names of the linear and embedding modules that are not quantized.
    """
    names: dict[Format, list[str]] = {}
    for name, form in formats.items():
        names.setdefault(form, []).append(name)
    groups = {
        f"group_{number}": {"targets": targets, "weights": _arguments(form), "format": _LAYOUTS[_kind(form)]}
        for number, (form, targets) in enumerate(names.items())
    }
    layouts = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": others,
    }


def format_of(group: Mapping[str, Any]) -> Format | None:
    """The format of a group of :func:`quantization_config`; None if layersmith has no such format."""
    known = (form for form in FORMATS.values() if form.storage == "compressed-tensors")
    return next((form for form in known if group.get("weights") == _arguments(form)), None)


def grid_of(form: Format, stored: Mapping[str, Tensor]) -> Grid:
    """The values that the weights of a matrix can have, from its tensors as :func:`compressed_tensors` returns them."""
    scale, kept = stored["weight_scale"].float(), {}
    if form.name == "mxfp4":
        scale = torch.exp2(scale - 127)
    elif form.name == "nvfp4":
        kept["global_scale"] = stored["weight_global_scale"]
        scale = scale / kept["global_scale"]
    if form.group == "tensor":
        scale = scale.reshape(1, 1)
    if not form.is_asymmetric:
        return Grid(form, scale, None, kept)
    zeros = _codes(stored["weight_zero_point"].T, form.zero_bits, len(scale)).T
    return Grid(form, scale, -zeros * scale, {"zeros": zeros})


# Names of layouts in compressed-tensors.
_LAYOUTS = {
    "int": "pack-quantized",
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}


def _kind(form: Format) -> str:
    return {"signed": "int", "e4m3": "fp8"}.get(form.levels, form.name)


def _arguments(form: Format) -> dict[str, Any]:
    """``QuantizationArgs`` of compressed-tensors."""
    grouped = isinstance(form.group, int)
    strategy = ("tensor_group" if form.name == "nvfp4" else "group") if grouped else form.group
    scale_dtype = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8"}.get(form.name)
    return {
        "num_bits": form.bits,
        "type": "int" if form.levels == "signed" else "float",
        "strategy": strategy,
        "group_size": form.group if grouped else None,
        "symmetric": not form.is_asymmetric,
        "dynamic": False,
        **({"scale_dtype": scale_dtype, "zp_dtype": scale_dtype} if scale_dtype else {}),
    }


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[rows, n]`` of ``bits`` bits, one after another in words of 32 bits, ``[rows, ceil(n * bits / 32)]``."""
    ones = (codes.to(torch.uint8)[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    packed = np.packbits(ones.flatten(1).numpy(), axis=1, bitorder="little")
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(packed.view(np.dtype("<i4")))


def _codes(words: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` codes of each row that :func:`_words` packed, in float32."""
    ones = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    return torch.from_numpy(ones.reshape(-1, count, bits) @ (1 << np.arange(bits))).float()


def _bytes_of_fours(codes: Tensor) -> Tensor:
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _index(levels: Tensor, codes: Mapping[float, int]) -> Tensor:
    """Codes of levels in uint8."""
    known = torch.tensor(sorted(codes))
    table = torch.tensor([codes[float(level)] for level in known], dtype=torch.uint8)
    return table[torch.searchsorted(known, levels)]


# ------------------------------------------------------------------------------------------- GGUF


def gguf_blocks(quantized: Quantized) -> Tensor:
    """A matrix as a GGUF file holds it: bytes ``[rows, bytes of a row]``."""
    return torch.cat(_GGUF[quantized.format.name](_Block(quantized)), -1).flatten(1)


class _Block:
    """The blocks of a matrix: each property is bytes or codes in uint8, ``[rows, blocks, n]``."""

    def __init__(self, quantized: Quantized) -> None:
        form, grid, levels = quantized.format, quantized.grid, quantized.levels.float()
        shape = (len(levels), levels.shape[1] // form.block, -1)
        if form.levels == "iq4_nl":
            codes = _index(levels, {float(level): code for code, level in enumerate(IQ4_NL)})
        elif form.name == "q8_0":
            codes = levels.to(torch.int8).view(torch.uint8)
        else:
            codes = (levels - integer_range(form)[0]).to(torch.uint8)
        scale, offset = grid.scale, grid.offset
        if form.block_bits:
            scale, offset = grid.stored["block_scale"], grid.stored.get("block_offset")
        self.codes = codes.reshape(shape)
        self.d = _half(scale)
        self.m = torch.empty(0) if offset is None else _half(offset)
        self._stored, self._shape = grid.stored, shape

    def low(self, bits: int, run: int) -> Tensor:
        """The lowest bits of all levels; those of ``run`` levels are in the same place of neighbouring bytes."""
        return _packed(self.codes & (1 << bits) - 1, bits, run)

    def high(self, bits: int, above: int, run: int) -> Tensor:
        """The bits above the lowest ``above``."""
        return _packed(self.codes >> above, bits, run)

    def scales(self) -> Tensor:
        """Codes of the groups' scales, as they are."""
        return self._stored["scale_codes"].reshape(self._shape).to(torch.int8).view(torch.uint8)

    def offsets(self) -> Tensor:
        """Codes of the groups' offsets."""
        return self._stored["offset_codes"].reshape(self._shape).to(torch.uint8)

    def scales_and_offsets(self) -> Tensor:
        """8 scales and 8 offsets of 6 bits in 12 bytes."""
        scales, offsets = self.scales(), self.offsets()
        first = [codes[..., :4] | codes[..., 4:] >> 4 << 6 for codes in (scales, offsets)]
        return torch.cat([*first, scales[..., 4:] & 15 | (offsets[..., 4:] & 15) << 4], -1)

    def signed_scales(self) -> Tensor:
        """16 scales of 6 bits in 12 bytes."""
        codes = self.scales() + 32
        return torch.cat([_packed(codes & 15, 4, 8), _packed(codes >> 4, 2, 4)], -1)


_GGUF: dict[str, Callable[[_Block], tuple[Tensor, ...]]] = {
    "q8_0": lambda b: (b.d, b.codes),
    "q6_k": lambda b: (b.low(4, 64), b.high(2, 4, 32), b.scales(), b.d),
    "q5_k": lambda b: (b.d, b.m, b.scales_and_offsets(), b.high(1, 4, 32), b.low(4, 32)),
    "q5_1": lambda b: (b.d, b.m, b.high(1, 4, 1), b.low(4, 16)),
    "q5_0": lambda b: (b.d, b.high(1, 4, 1), b.low(4, 16)),
    "q4_k": lambda b: (b.d, b.m, b.scales_and_offsets(), b.low(4, 32)),
    "q4_1": lambda b: (b.d, b.m, b.low(4, 16)),
    "q4_0": lambda b: (b.d, b.low(4, 16)),
    "iq4_nl": lambda b: (b.d, b.low(4, 16)),
    "q3_k": lambda b: (b.high(1, 2, 32), b.low(2, 32), b.signed_scales(), b.d),
    "q2_k": lambda b: (b.scales() | b.offsets() << 4, b.low(2, 32), b.d, b.m),
}


def _packed(codes: Tensor, bits: int, run: int) -> Tensor:
    """Codes of ``bits`` bits in bytes: of each ``run * 8 / bits`` codes, the first ``run`` are the lowest bits."""
    parts = codes.unflatten(-1, (-1, 8 // bits, run))
    return sum((parts[..., i, :] << bits * i for i in range(8 // bits)), torch.zeros_like(parts[..., 0, :])).flatten(-2)


def _half(values: Tensor) -> Tensor:
    """Two bytes of float16 for each value ``[rows, blocks]``."""
    return values.half()[..., None].contiguous().view(torch.uint8)
