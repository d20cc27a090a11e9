"""The graph gives the child's logits in onnxruntime, at other sizes than it was traced with."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

import layersmith
from layersmith.errors import InputError
from tests.export.children import MIXED, PRUNED_EXPERTS, write_child


@pytest.mark.skipif(find_spec("onnxruntime") is None or find_spec("onnxscript") is None, reason="needs the extra onnx")
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_onnxruntime_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    exported = layersmith.export(
        write_child(tmp_path / "child", family, PRUNED_EXPERTS if "moe" in family else MIXED), tmp_path / "out", "onnx"
    )
    assert exported.proof.difference < 1e-4
    assert (tmp_path / "out" / "model.onnx").is_file()


@pytest.mark.skipif(find_spec("onnxruntime") is not None, reason="the extra onnx is installed")
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"layersmith\[onnx\]"):
        layersmith.export(tmp_path, tmp_path / "out", "onnx")
