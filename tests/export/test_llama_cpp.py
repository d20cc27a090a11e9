"""llama.cpp on exported files, where llama-cpp-python is installed; ``make serve-test`` has an environment with it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import layersmith
from layersmith.errors import InputError, UsageError
from layersmith.export import llama_cpp
from layersmith.export.gguf_reader import GGUFModel
from layersmith.export.run import export
from layersmith.export.source import CannotExport
from tests.conftest import FAMILIES, NO_ATTENTION, block, child_model

needs_llama_cpp = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


@pytest.fixture
def child(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    blocks = [block(NO_ATTENTION, {"intermediate_size": 64}), block({"num_key_value_heads": 2}), block(), block()]
    layersmith.save(child_model(FAMILIES["llama"](), blocks), tmp_path / "child", tokenizer=tokenizer)
    return tmp_path / "child"


@needs_llama_cpp
def test_it_computes_the_childs_logits_and_token_ids(child: Path, tmp_path: Path) -> None:
    export(child, tmp_path / "out", "gguf")  # compares
    file, tokens = tmp_path / "out" / "model.gguf", torch.arange(3, 43)
    logits = GGUFModel(file).logits(tokens[None])[0]
    assert llama_cpp.compare(file, [tokens], [logits], "F32") < 1e-5
    with pytest.raises(CannotExport, match="logits differ"):
        llama_cpp.compare(file, [tokens], [logits * 1.01], "F32")
    with pytest.raises(CannotExport, match="other ids"):
        llama_cpp.compare_tokens(file, [[0]] * len(llama_cpp.TEXTS))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CannotExport, match="does not read the file"):
        llama_cpp.compare_tokens(file, [[0]] * len(llama_cpp.TEXTS))


@needs_llama_cpp
def test_it_quantizes(child: Path, tmp_path: Path) -> None:
    made = export(child, tmp_path / "out", "gguf", quantize="Q8_0")
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == ["model-Q8_0.gguf"]
    assert "Quantized to Q8_0" in str(made)
    with pytest.raises(UsageError, match="does not do it"):
        export(child, tmp_path / "other", "gguf", quantize="Q9_K")
    assert not (tmp_path / "other").exists()


def test_only_gguf_is_quantized(child: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only --to gguf"):
        export(child, tmp_path / "out", "padded", quantize="Q8_0")
    if not llama_cpp.is_installed():
        with pytest.raises(InputError, match="needs the package llama-cpp-python"):
            export(child, tmp_path / "out", "gguf", quantize="Q8_0")
        assert not (tmp_path / "out").exists()
