"""Parents in other formats: GGUF files and quantized checkpoints become ordinary checkpoints with the same function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

import layersmith
from layersmith.errors import InputError, UnsupportedModel
from layersmith.heterogeneous.convert import ordinary_checkpoint, quantization_of
from tests.conftest import FAMILIES, TINY_RECIPE, stock_model

BLOCK = 16


def write_quantized(folder: Path, settings: dict[str, Any], convert: Callable[..., dict[str, torch.Tensor]]) -> Any:
    """A checkpoint whose projections are stored as ``convert`` returns them; returns the model before that."""
    model = stock_model(FAMILIES["llama"]()).to(torch.bfloat16)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensors |= convert(name, tensor) if "_proj" in name else {name: tensor.contiguous()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model


def fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Eight-bit floats with one scale for each block of 16 x 16."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    stored = (blocks / scale).reshape(rows, columns).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale_inv": scale.view(rows // BLOCK, columns // BLOCK)}


def test_fp8_weights_are_multiplied_by_their_scales(tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    before = write_quantized(tmp_path / "parent", settings, fp8)
    assert quantization_of(tmp_path / "parent") == "fp8"
    model = layersmith.load(tmp_path / "parent")
    assert not hasattr(model.config, "quantization_config")
    for name, weight in before.state_dict().items():
        loaded = model.state_dict()[name]
        assert loaded.dtype == torch.bfloat16
        expected = weight
        if "_proj" in name:
            stored = fp8(name, weight)
            scale = stored[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            expected = (stored[name].float() * scale).to(torch.bfloat16)
        torch.testing.assert_close(loaded, expected, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, UnsupportedModel, "cannot dequantize its gptq"),
        ({"quant_method": "of next year"}, UnsupportedModel, "does not know the weights' format"),
    ],
)
def test_other_formats_are_refused_in_one_sentence(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    write_quantized(tmp_path / "parent", settings, lambda name, weight: {name: weight.contiguous()})
    with pytest.raises(error, match=words) as caught:
        layersmith.load(tmp_path / "parent")
    assert "\n" not in str(caught.value)


def test_an_ordinary_checkpoint_is_converted_only_on_request(make_parent: Callable[..., Path]) -> None:
    parent = make_parent("llama")
    assert ordinary_checkpoint(parent) == ordinary_checkpoint(parent, "float32") == str(parent)
    converted = ordinary_checkpoint(parent, "bfloat16")
    before, after = (layersmith.load(path).state_dict() for path in (parent, converted))
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.to(torch.bfloat16))


@pytest.mark.parametrize("fault", ["flipped", "deleted"])
def test_a_damaged_conversion_is_made_again(make_parent: Callable[..., Path], fault: str) -> None:
    parent = make_parent("llama")
    weights = Path(ordinary_checkpoint(parent, "bfloat16")) / "model.safetensors"
    before = weights.read_bytes()
    if fault == "flipped":
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    else:
        weights.unlink()
    assert Path(ordinary_checkpoint(parent, "bfloat16")) == weights.parent
    assert weights.read_bytes() == before


# ---------------------------------------------------------------------------------------------- GGUF


def write_gguf(file: Path, model: Any, tokenizer: Any, pre: str = "gpt-2") -> None:
    """A Llama model with its byte-level BPE tokenizer as a GGUF file in float32."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(state["vocab"], key=state["vocab"].get))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(state["vocab"]))
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        weight = tensor.float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp pairs neighbouring channels in its rotations
            heads = weight.shape[0] // config.head_dim
            halves = weight.view(heads, 2, config.head_dim // 2, -1)
            weight = halves.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_parent(tmp_path: Path, tokenizer: Any) -> tuple[Path, Any]:
    model = stock_model(FAMILIES["llama"](head_dim=4))
    write_gguf(tmp_path / "parent.gguf", model, tokenizer)
    return tmp_path / "parent.gguf", model


def test_a_gguf_file_loads_as_the_model_it_holds(gguf_parent: tuple[Path, Any]) -> None:
    file, model = gguf_parent
    loaded = layersmith.load(ordinary_checkpoint(file, "float32"))
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert layersmith.load(file).dtype == torch.bfloat16


def test_its_tokenizer_splits_text_as_the_file_names_it(tmp_path: Path, tokenizer: Any) -> None:
    ids = {}
    for pre in ("gpt-2", "smollm"):
        write_gguf(tmp_path / f"{pre}.gguf", stock_model(FAMILIES["llama"](head_dim=4)), tokenizer, pre)
        read = AutoTokenizer.from_pretrained(ordinary_checkpoint(tmp_path / f"{pre}.gguf"))
        ids[pre] = read.convert_ids_to_tokens(read("x = (\n    12").input_ids)
    assert ids["gpt-2"][-4:] == ["ĠĠĠ", "Ġ", "1", "2"]
    assert ids["smollm"][-3:] == ["ĠĠĠĠ", "1", "2"]  # each digit by itself, and so all spaces together


def test_a_gguf_parent_is_compressed(gguf_parent: tuple[Path, Any], text_folder: Path, tmp_path: Path) -> None:
    file, _ = gguf_parent
    result = layersmith.compress(file, tmp_path / "run", data=text_folder, budget=0.8, recipe=TINY_RECIPE)
    child = layersmith.load(result.child)
    assert child.dtype == torch.bfloat16
    assert (result.child / "tokenizer.json").is_file()
    again = layersmith.compress(file, tmp_path / "run", data=text_folder, budget=0.8, recipe=TINY_RECIPE)
    assert again.child == result.child


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "parent.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(InputError, match="not a GGUF file that Transformers can read"):
        layersmith.load(tmp_path / "parent.gguf")
