"""What files hold is what was rounded: read back by the packages whose formats they are."""

from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor

from layersmith.quantization.formats import FORMATS
from layersmith.quantization.packing import compressed_tensors, gguf_blocks, quantization_config
from layersmith.quantization.rounding import Quantized, quantize

GGUF = [name for name, row in FORMATS.items() if row.storage == "gguf"]
COMPRESSED = [name for name, row in FORMATS.items() if row.storage == "compressed-tensors"]


def weight(rows: int = 40, width: int = 768) -> Tensor:
    """Weights of very different sizes, groups of zeros, and groups of one sign."""
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator) ** 3
    out[3, :256] = 0
    out[4] = out[4].abs()
    out[5] = -out[5].abs()
    out[6, ::16] *= 20
    return out


@pytest.mark.parametrize("name", GGUF)
def test_the_gguf_package_reads_the_same_weights(name: str) -> None:
    rounded = quantize(weight(), FORMATS[name])
    blocks = gguf_blocks(rounded)
    assert blocks.numel() == FORMATS[name].bytes_of((40, 768))
    values = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert torch.equal(torch.from_numpy(values), rounded.values())


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_reads_the_same_weights(name: str) -> None:
    rounded = quantize(weight(), FORMATS[name])
    stored = compressed_tensors(rounded)
    assert sum(t.numel() * t.element_size() for t in stored.values()) == FORMATS[name].bytes_of((40, 768))
    assert torch.equal(decompressed(stored, rounded), rounded.values())


def decompressed(stored: dict[str, Tensor], rounded: Quantized) -> Tensor:
    """What compressed-tensors makes of tensors, in a model in float32."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    group = quantization_config({"a": rounded.format}, [])["config_groups"]["group_0"]
    scheme = schemes.QuantizationScheme.model_validate(group)
    loaded = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in stored.items()}
    compressor = compressors.BaseCompressor.get_value_from_registry(group["format"])
    return compressor.decompress(loaded, scheme)["weight"]
