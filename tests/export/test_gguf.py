"""Children as GGUF files: every tensor is there bit by bit, the file alone computes the child's logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

import layersmith
from layersmith import MoEConfig
from layersmith.export import gguf
from layersmith.export.gguf_reader import GGUFModel
from layersmith.export.source import CannotExport, open_source
from tests.conftest import FAMILIES, NO_ATTENTION, SIZES, block, child_model, stock_model
from tests.heterogeneous.test_convert import write_gguf

pytest.importorskip("gguf")

NO_FFN = {"no_op": True}
# No attention in the first layer, no FFN in the last, a layer without both, all KV heads different.
MIXED = [
    block(NO_ATTENTION, {"intermediate_size": 48}),
    block(NO_ATTENTION, NO_FFN),
    block({"num_key_value_heads": 1}, {"intermediate_size": 24}),
    block(NO_ATTENTION, {"intermediate_size": 32}),
    block({"num_key_value_heads": 2}, NO_FFN),
]
FIVE: dict[str, Any] = {"num_hidden_layers": 5}


def experts(count: int = 6, width: int = 24) -> dict[str, Any]:
    return {"moe": MoEConfig(num_local_experts=count, num_experts_per_tok=2, expert_intermediate_dim=width)}


def qwen3_moe(**more: Any) -> PretrainedConfig:
    of_experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return Qwen3MoeConfig(**SIZES | {"head_dim": 8} | of_experts | more)


def qwen3(**more: Any) -> PretrainedConfig:
    return FAMILIES["qwen3"](tie_word_embeddings=True, **more)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **more}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
# An architecture of llama.cpp, and a child that it is chosen for.
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("llama", lambda: stock_model(FAMILIES["llama"]())),
    "llama, mixed": ("deci", lambda: child_model(FAMILIES["llama"](**FIVE, **LLAMA3), MIXED)),
    "tied llama with biases, mixed": ("deci", lambda: child_model(FAMILIES["llama_tied"](**FIVE, **YARN), MIXED)),
    "query heads": (
        "deci",
        lambda: child_model(
            FAMILIES["llama"](**rope("linear", factor=2.0)),
            [block({"num_attention_heads": 4, "num_key_value_heads": 2}), *[block()] * 3],
        ),
    ),
    "linear maps": (
        "deci",
        lambda: child_model(
            FAMILIES["llama"](mlp_bias=True),
            [block({"replace_with_linear": True}), *[block()] * 2, block(None, {"replace_with_linear": True})],
        ),
    ),
    "mistral, mixed": ("deci", lambda: child_model(FAMILIES["mistral"](**FIVE, sliding_window=None), MIXED)),
    "qwen2": ("qwen2", lambda: stock_model(FAMILIES["qwen2"]())),
    "qwen2, mixed": ("deci", lambda: child_model(FAMILIES["qwen2"](**FIVE), MIXED)),
    "qwen3": ("qwen3", lambda: stock_model(FAMILIES["qwen3"]())),
    "qwen3, removed": ("qwen3", lambda: child_model(FAMILIES["qwen3"](), [block(NO_ATTENTION), *[block()] * 3])),
    "tied qwen3, mixed": ("openelm", lambda: child_model(qwen3(**FIVE), MIXED)),
    "qwen3_moe": (
        "qwen3moe",
        lambda: child_model(
            qwen3_moe(),
            [block(NO_ATTENTION, experts()), block(None, NO_FFN), block(NO_ATTENTION, NO_FFN), block(None, experts())],
        ),
    ),
    "mixtral": ("llama", lambda: stock_model(MixtralConfig(**SIZES | {"num_local_experts": 4}))),
}


@pytest.fixture
def write(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Write a model as a GGUF file."""

    def writes(model: Any, with_tokenizer: bool = True) -> Path:
        layersmith.save(model, tmp_path / "child", tokenizer=tokenizer if with_tokenizer else None)
        (tmp_path / "out").mkdir()
        with open_source(tmp_path / "child") as source:
            gguf.prepare(source)(tmp_path / "out")
        return tmp_path / "out" / gguf.FILE

    return writes


@pytest.mark.parametrize("case", CASES)
def test_the_file_computes_the_childs_logits(case: str, write: Callable[..., Path]) -> None:
    arch, make = CASES[case]
    model = make()
    read = GGUFModel(write(model))
    assert read.arch == arch
    tokens = torch.arange(3, 83)[None]
    with torch.no_grad():
        torch.testing.assert_close(read.logits(tokens), model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_matrices_keep_their_data_type(write: Callable[..., Path]) -> None:
    from gguf import GGUFReader

    tensors = GGUFReader(write(child_model(FAMILIES["llama"](**FIVE), MIXED).to(torch.bfloat16))).tensors
    assert {t.tensor_type.name for t in tensors if len(t.shape) > 1} == {"BF16"}
    assert {t.tensor_type.name for t in tensors if len(t.shape) == 1} == {"F32"}


def test_a_wrong_tensor_is_noticed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    layersmith.save(child_model(FAMILIES["llama"](**FIVE), MIXED), tmp_path / "child", tokenizer=tokenizer)
    with open_source(tmp_path / "child") as source:
        layout = gguf.gguf_layout(source)
        gguf.prepare(source)(tmp_path)
        gguf.check(source, layout, tmp_path / gguf.FILE)
        damaged = bytearray((tmp_path / gguf.FILE).read_bytes())
        damaged[-1] ^= 1
        (tmp_path / gguf.FILE).write_bytes(damaged)
        with pytest.raises(CannotExport, match="read back"):
            gguf.check(source, layout, tmp_path / gguf.FILE)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "linear FFN": (
        lambda: child_model(qwen3(), [*[block()] * 3, block(None, {"replace_with_linear": True})]),
        r'layer 3: its FFN is one linear map.*library.linear=\["attention"\]',
    ),
    "window": (
        lambda: stock_model(FAMILIES["mistral"]()),
        "layer 0 sees the last 12 tokens of up to 256.*max_position_embeddings",
    ),
    "untied": (lambda: child_model(FAMILIES["qwen3"](**FIVE), MIXED), "are not the embeddings.*padded"),
    "experts": (
        lambda: child_model(
            qwen3_moe(), [block(None, experts()), block(None, experts(4)), *[block(None, experts())] * 2]
        ),
        "layer 1 has 4 experts, 2 per token, and layer 0 6",
    ),
    "KV heads of a mixture": (
        lambda: child_model(qwen3_moe(), [block({"num_key_value_heads": n}, experts()) for n in (4, 4, 2, 4)]),
        "layer 2 has 2 KV heads where others have 4.*padded",
    ),
    "weights of experts": (lambda: stock_model(qwen3_moe(norm_topk_prob=False)), "norm_topk_prob is False"),
    "rope": (
        lambda: stock_model(FAMILIES["llama"](**rope("dynamic", factor=2.0))),
        "rotary embeddings of the kind dynamic",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused(case: str, write: Callable[..., Path]) -> None:
    make, words = REFUSED[case]
    with pytest.raises(CannotExport, match=words) as caught:
        write(make())
    assert "\n" not in str(caught.value)


def test_a_child_without_a_tokenizer_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(CannotExport, match="no tokenizer that loads"):
        write(stock_model(FAMILIES["llama"]()), with_tokenizer=False)


def test_a_child_of_a_gguf_parent_becomes_the_same_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from gguf import GGUFReader

    write_gguf(tmp_path / "parent.gguf", stock_model(FAMILIES["llama"](head_dim=4)), tokenizer)
    with open_source(tmp_path / "parent.gguf") as source:
        gguf.prepare(source)(tmp_path)
    before, after = GGUFReader(tmp_path / "parent.gguf"), GGUFReader(tmp_path / gguf.FILE)
    for key in ("model", "pre", "tokens", "merges", "eos_token_id"):
        values = [reader.get_field(f"tokenizer.ggml.{key}") for reader in (before, after)]
        assert values[0].contents() == values[1].contents(), key
    read = {tensor.name: gguf.as_torch(tensor) for tensor in after.tensors}
    for tensor in before.tensors:
        torch.testing.assert_close(read[tensor.name].float(), gguf.as_torch(tensor), rtol=1e-2, atol=0)
