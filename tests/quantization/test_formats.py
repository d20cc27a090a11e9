"""What formats cost, and which shapes they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from layersmith.errors import UsageError
from layersmith.quantization.formats import FORMATS, KV_FORMATS, format_named, kv_format_named

# Bytes of a block in llama.cpp, of 32 or 256 weights.
GGML = {"q8_0": 34, "q5_0": 22, "q5_1": 24, "q4_0": 18, "q4_1": 20, "iq4_nl": 18, "q6_k": 210, "q5_k": 176, "q4_k": 144,
        "q3_k": 110, "q2_k": 84}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if row.storage == "gguf"])
def test_gguf_bytes_are_those_of_its_blocks(name: str) -> None:
    form = FORMATS[name]
    assert form.bytes_of((3, 5, 1024)) == 15 * 1024 // form.block * GGML[name]
    assert form.bits_a_weight == GGML[name] * 8 / form.block


def test_known_bits_a_weight() -> None:
    bits = {name: row.bits_a_weight for name, row in FORMATS.items()}
    assert bits["int4-g128"] == 4.125
    assert bits["nvfp4"] == 4.5
    assert bits["mxfp4"] == 4.25
    assert bits["fp8-channel"] == 8
    assert FORMATS["bf16"].bytes_of((7,)) == 14


def test_a_width_that_blocks_do_not_divide_is_refused() -> None:
    assert FORMATS["q4_k"].refusal((4, 576)) == "q4_k: its blocks of 256 do not divide 576 input channels"
    assert FORMATS["int4-g64"].refusal((4, 576)) is None
    with pytest.raises(UsageError, match="256 do not divide 576"):
        FORMATS["q4_k"].bytes_of((4, 576))
    with pytest.raises(UsageError, match="Did you mean 'q4_k'"):
        format_named("q4_K")


def test_k_quants_have_substitutes() -> None:
    assert FORMATS["q3_k"].fitting((4, 512)) is FORMATS["q3_k"]
    assert FORMATS["q3_k"].fitting((4, 576)) is FORMATS["iq4_nl"]
    assert FORMATS["q3_k"].fitting((4, 570)) is FORMATS["int4-g64"].fitting((4, 570)) is None
    for row in FORMATS.values():  # llama.cpp never takes one with fewer bits
        fitting = row.fitting((4, 576))
        assert fitting is None or fitting.bits_a_weight >= row.bits_a_weight


def test_kv_formats() -> None:
    assert {name: row.bytes_of(2 * 3 * 64, 64) for name, row in KV_FORMATS.items()} == {"fp8": 384, "int4": 6 * 36}
    with pytest.raises(UsageError, match="unknown format 'fp9' of the KV cache"):
        kv_format_named("fp9")


def test_the_documented_table_is_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    documented = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:3] == "| `"]
    groups = {"channel": "all", "tensor": "whole matrix"}
    weights = [
        [
            f"`{row.name}`",
            f"{row.bits_a_weight:.7g}",
            groups.get(str(row.group), str(row.group)),
            str(row.block),
            ", ".join(row.servers),
            ", ".join(row.embedding_servers),
        ]
        for row in FORMATS.values()
    ]
    weights[0][2] = ""  # bf16 has no scale
    assert [row for row in documented if len(row) == 6] == weights
    caches = [[f"`{row.name}`", str(row.bytes_of(64, 64)), row.like] for row in KV_FORMATS.values()]
    assert [[cell.replace("`", "") for cell in row[1:]] for row in documented if len(row) == 3] == [
        row[1:] for row in caches
    ]
    assert [row[0] for row in documented if len(row) == 3] == [row[0] for row in caches]
