"""The table of number formats for weights, and the one for the KV cache.

A weight matrix ``[out, in]`` is divided into groups of input channels. In most formats a weight is ``scale * level``,
where ``level`` is one of a few numbers and the scale belongs to the group; in some a zero point or a minimum is added.
k-quants of llama.cpp quantize the scales themselves, in blocks of 256 input channels.

Formats of the storage ``compressed-tensors`` are read by Transformers and vLLM, those of ``gguf`` by llama.cpp. They
are weight-only: activations are not rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from layersmith.errors import UsageError, did_you_mean

Levels = Literal["bf16", "signed", "unsigned", "e4m3", "e2m1", "iq4_nl"]
Storage = Literal["plain", "compressed-tensors", "gguf"]


@dataclass(frozen=True)
class Format:
    """A number format of weights.

    Attributes:
        name: Name in recipes, on the command line, and in files.
        bits: Bits of an element.
        levels: The numbers that an element can be, before scaling: integers with or without a sign, floats with 4 bits
            of exponent and 3 of mantissa, with 2 and 1, or the 16 values of llama.cpp's IQ4_NL.
        group: Input channels that share a scale; ``channel``: all of an output channel; ``tensor``: all.
        scale_bits: Bits of a group's scale.
        zero_bits: Bits of a group's zero point or minimum.
        block: Number of which the input channels must be a multiple.
        block_bits: Bits of what the groups of a block share.
        storage: The file format that has it.
        servers: Programs that run it for the linear layers.
        embedding_servers: Programs that run it for the embeddings and the output layer.
    """

    name: str
    bits: int
    levels: Levels
    group: int | Literal["channel", "tensor"]
    scale_bits: int
    zero_bits: int
    block: int
    block_bits: int
    storage: Storage
    servers: tuple[str, ...]
    embedding_servers: tuple[str, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def bits_a_weight(self) -> float:
        """Bits of a weight with the scales of its group and block; scales of whole channels or tensors not counted."""
        group = self.group if isinstance(self.group, int) else math.inf
        return self.bits + (self.scale_bits + self.zero_bits) / group + self.block_bits / self.block

    @property
    def is_asymmetric(self) -> bool:
        """Whether groups have a zero point or a minimum."""
        return self.zero_bits > 0

    def groups(self, width: int) -> int:
        """Groups of an output channel of ``width`` input channels."""
        return width // self.group if isinstance(self.group, int) else 1

    def refusal(self, shape: Sequence[int]) -> str | None:
        """Why a weight of a shape ``[..., out, in]`` cannot have this format; None if it can."""
        if len(shape) < 2:
            return f"{self.name}: only matrices are quantized" if self.storage != "plain" else None
        if shape[-1] % self.block:
            return f"{self.name}: its blocks of {self.block} do not divide {shape[-1]} input channels"
        return None

    def fitting(self, shape: Sequence[int]) -> Format | None:
        """The format of a weight of a shape: this one, or the one that llama.cpp takes where its blocks do not fit."""
        if self.refusal(shape) is None:
            return self
        substitute = FORMATS.get(_SUBSTITUTES.get(self.name, ""))
        return None if substitute is None else substitute.fitting(shape)

    def bytes_of(self, shape: Sequence[int]) -> int:
        """Bytes of a stored weight with all its scales.

        Args:
            shape: ``[..., out, in]``. The last two dimensions are matrices that are stored one by one.

        Raises:
            UsageError: The shape cannot have this format, see :meth:`refusal`.
        """
        if reason := self.refusal(shape):
            raise UsageError(f"{reason}.")
        count = math.prod(shape)
        if self.storage == "plain":
            return count * self.bits // 8
        matrices, (rows, width) = math.prod(shape[:-2]), shape[-2:]
        if self.storage == "gguf":
            return round(count * self.bits_a_weight) // 8
        groups = self.groups(width) * (1 if self.group == "tensor" else rows)
        codes = rows * width * self.bits // 8
        zeros = shared = 0
        if self.levels == "signed":  # in words of 32 bits, of the weight by row, of zero points by group; and the shape
            codes = rows * 4 * math.ceil(width * self.bits / 32)
            zeros = self.groups(width) * 4 * math.ceil(rows * self.zero_bits / 32)
            shared = 16
        elif self.scale_bits == 8 and self.levels == "e2m1" and self.group == 16:
            shared = 4  # the scale of the scales
        return matrices * (codes + groups * self.scale_bits // 8 + zeros + shared)


_TENSORS, _LLAMA = ("transformers", "vllm"), ("llama.cpp",)
_ALL = (*_TENSORS, *_LLAMA)
# Integers of 3 bits are packed in words by compressed-tensors from 0.20 on; vLLM has no kernel for them.
_TRANSFORMERS = ("transformers",)
# Transformers 5.23 with compressed-tensors 0.20.1 does not load packed zero points: it expects them unpacked.
_VLLM = ("vllm",)


def _table(*rows: Format) -> dict[str, Format]:
    return {row.name: row for row in rows}


# fmt: off
FORMATS: dict[str, Format] = _table(
    #      name            bits levels     group     scale zero block shared storage        servers  of embeddings
    Format("bf16",           16, "bf16",     "tensor",   0,  0,    1,  0, "plain",              _ALL, _ALL),
    Format("int8",            8, "signed",   "channel", 16,  0,    1,  0, "compressed-tensors", _TENSORS, ()),
    Format("int4-g32",        4, "signed",   32,        16,  0,   32,  0, "compressed-tensors", _TENSORS, ()),
    Format("int4-g64",        4, "signed",   64,        16,  0,   64,  0, "compressed-tensors", _TENSORS, ()),
    Format("int4-g128",       4, "signed",   128,       16,  0,  128,  0, "compressed-tensors", _TENSORS, ()),
    Format("int4-g32-asym",   4, "signed",   32,        16,  4,   32,  0, "compressed-tensors", _VLLM, ()),
    Format("int4-g64-asym",   4, "signed",   64,        16,  4,   64,  0, "compressed-tensors", _VLLM, ()),
    Format("int4-g128-asym",  4, "signed",   128,       16,  4,  128,  0, "compressed-tensors", _VLLM, ()),
    Format("int3-g32",        3, "signed",   32,        16,  0,   32,  0, "compressed-tensors", _TRANSFORMERS, ()),
    Format("int3-g64",        3, "signed",   64,        16,  0,   64,  0, "compressed-tensors", _TRANSFORMERS, ()),
    Format("int3-g128",       3, "signed",   128,       16,  0,  128,  0, "compressed-tensors", _TRANSFORMERS, ()),
    Format("fp8-tensor",      8, "e4m3",     "tensor",  16,  0,    1,  0, "compressed-tensors", _TENSORS, ()),
    Format("fp8-channel",     8, "e4m3",     "channel", 16,  0,    1,  0, "compressed-tensors", _TENSORS, ()),
    Format("nvfp4",           4, "e2m1",     16,         8,  0,   16,  0, "compressed-tensors", _TENSORS, ()),
    Format("mxfp4",           4, "e2m1",     32,         8,  0,   32,  0, "compressed-tensors", _TENSORS, ()),
    Format("q8_0",            8, "signed",   32,        16,  0,   32,  0, "gguf",               _LLAMA, _LLAMA),
    Format("q6_k",            6, "signed",   16,         8,  0,  256, 16, "gguf",               _LLAMA, _LLAMA),
    Format("q5_k",            5, "unsigned", 32,         6,  6,  256, 32, "gguf",               _LLAMA, _LLAMA),
    Format("q5_1",            5, "unsigned", 32,        16, 16,   32,  0, "gguf",               _LLAMA, _LLAMA),
    Format("q5_0",            5, "signed",   32,        16,  0,   32,  0, "gguf",               _LLAMA, _LLAMA),
    Format("q4_k",            4, "unsigned", 32,         6,  6,  256, 32, "gguf",               _LLAMA, _LLAMA),
    Format("q4_1",            4, "unsigned", 32,        16, 16,   32,  0, "gguf",               _LLAMA, _LLAMA),
    Format("q4_0",            4, "signed",   32,        16,  0,   32,  0, "gguf",               _LLAMA, _LLAMA),
    Format("iq4_nl",          4, "iq4_nl",   32,        16,  0,   32,  0, "gguf",               _LLAMA, _LLAMA),
    Format("q3_k",            3, "signed",   16,         6,  0,  256, 16, "gguf",               _LLAMA, _LLAMA),
    Format("q2_k",            2, "unsigned", 16,         4,  4,  256, 32, "gguf",               _LLAMA, _LLAMA),
)
# fmt: on
# What llama.cpp's quantizer takes for matrices whose width is not a multiple of 256.
_SUBSTITUTES = {"q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0", "q3_k": "iq4_nl", "q2_k": "iq4_nl"}


def format_named(name: str) -> Format:
    """A format of the table.

    Raises:
        UsageError: The name is unknown.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}. {did_you_mean(name, FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True)
class KVFormat:
    """A number format of the KV cache, for keys after rotation and for values.

    Attributes:
        name: Name in recipes and on the command line.
        bits: Bits of an element.
        head_bits: Bits of what the elements of one head and token share: scale and offset.
        like: What it rounds like.
    """

    name: str
    bits: int
    head_bits: int
    like: str

    def bytes_of(self, numbers: int, head_dim: int) -> int:
        """Bytes of the ``numbers`` that a layer keeps of a token, in heads of ``head_dim``."""
        return (numbers * self.bits + numbers // head_dim * self.head_bits) // 8


# Rounded by ``modeling_layersmith.rounded_cache``.
KV_FORMATS: dict[str, KVFormat] = {
    row.name: row
    for row in (
        KVFormat("fp8", 8, 0, "vLLM with --kv-cache-dtype fp8: E4M3 without a scale"),
        KVFormat("int4", 4, 32, "QuantizedCache of Transformers: unsigned, with scale and offset"),
    )
}


def kv_format_named(name: str) -> KVFormat:
    """A format of the table for the KV cache.

    Raises:
        UsageError: The name is unknown.
    """
    if name not in KV_FORMATS:
        raise UsageError(f"unknown format {name!r} of the KV cache. {did_you_mean(name, KV_FORMATS)}")
    return KV_FORMATS[name]
