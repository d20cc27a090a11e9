"""A child's folder loads in three ways with equal logits, and never with invented weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import layersmith
from layersmith.errors import InputError
from layersmith.heterogeneous.checkpoint import read_subblocks, write_subblocks
from layersmith.library.alternative import Alternative
from layersmith.modeling_layersmith import HOW_TO_LOAD
from tests.conformance.tiny import tiny_config
from tests.conftest import FAMILIES, NO_ATTENTION, block, child_model, stock_model

IDS = torch.arange(20)[None] * 7 % 512
BLOCKS = [
    block(NO_ATTENTION, {"intermediate_size": 16}),
    block({"num_key_value_heads": 2}),
    block({"replace_with_linear": True}, {"no_op": True}),
    block({"num_key_value_heads": 1}, {"replace_with_linear": True}),
]
# Children in which only one thing differs, so that nothing else can make stock code stop.
SINGLE = {
    "attention no-op": [block(NO_ATTENTION), *[block()] * 3],
    "FFN no-op": [block(), block(None, {"no_op": True}), block(), block()],
    "attention linear": [block(), block({"replace_with_linear": True}), block(), block()],
    "FFN linear": [*[block()] * 3, block(None, {"replace_with_linear": True})],
    "KV heads": [block({"num_key_value_heads": 2}), *[block()] * 3],
    "width": [*[block()] * 3, block(None, {"intermediate_size": 32})],
}


@pytest.fixture
def child(family: str, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    model = child_model(FAMILIES[family](), BLOCKS)
    layersmith.save(model, tmp_path / "child")
    return tmp_path / "child", model(IDS).logits


def test_loads_here(child: tuple[Path, torch.Tensor], family: str) -> None:
    folder, logits = child
    assert torch.equal(layersmith.load(folder).eval()(IDS).logits, logits)
    auto = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(auto(IDS).logits, logits)
    assert layersmith.block_configs(auto.config) == BLOCKS
    assert AutoModel.from_pretrained(folder).eval()(IDS).last_hidden_state.shape == (1, 20, 32)
    assert json.loads((folder / "config.json").read_text())["model_type"] == FAMILIES[family]().model_type


@pytest.mark.parametrize("family", ["llama_tied", "qwen2_windows", "qwen3"])
def test_loads_in_stock_transformers(child: tuple[Path, torch.Tensor], run_python: Callable, tmp_path: Path) -> None:
    folder, logits = child
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.arange(20)[None] * 7 % 512
generated = model.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
torch.save((model(ids).logits, generated), sys.argv[2])
model.save_pretrained(sys.argv[3])
again = AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True).eval()
assert torch.equal(again(ids).logits, model(ids).logits)
"""
    done = run_python(script, str(folder), str(tmp_path / "out"), str(tmp_path / "again"), without_layersmith=True)
    assert done.returncode == 0, done.stderr
    stock_logits, generated = torch.load(tmp_path / "out")
    assert torch.equal(stock_logits, logits)
    model = layersmith.load(tmp_path / "again").eval()
    same = model.generate(IDS, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(IDS))
    assert torch.equal(same, generated)


@pytest.mark.parametrize("what", SINGLE)
def test_stock_code_without_remote_code_refuses(what: str, run_python: Callable, tmp_path: Path) -> None:
    layersmith.save(child_model(FAMILIES["llama"](), SINGLE[what]), tmp_path / "child")
    script = """
import sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM
for cls in (AutoModelForCausalLM, LlamaForCausalLM):
    for more in ({}, {"attn_implementation": "eager"}):
        try:
            cls.from_pretrained(sys.argv[1], **more)
        except Exception as error:
            print("refused", error)
"""
    done = run_python(script, str(tmp_path / "child"), without_layersmith=True)
    assert done.stdout.count("refused") == 4, done.stdout + done.stderr
    assert done.stdout.count(HOW_TO_LOAD) == 2


def test_round_trip_through_save_pretrained(tmp_path: Path) -> None:
    model = child_model(FAMILIES["qwen3"](), BLOCKS)
    model.save_pretrained(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    again.save_pretrained(tmp_path / "two")
    for name in ("config.json", "model.safetensors", "modeling_layersmith.py"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_ordinary_models_load_and_save_as_ever(tmp_path: Path) -> None:
    model = stock_model(FAMILIES["qwen2"]())
    layersmith.save(model, tmp_path / "stock")
    assert type(layersmith.load(tmp_path / "stock")) is type(model)
    assert torch.equal(layersmith.load(tmp_path / "stock").eval()(IDS).logits, model(IDS).logits)
    assert not (tmp_path / "stock" / "modeling_layersmith.py").exists()


def test_a_checkpoint_without_a_plan_is_built_by_the_descriptor(tmp_path: Path) -> None:
    model = child_model(FAMILIES["llama"](), BLOCKS)
    layersmith.save(model, tmp_path / "child")
    path = tmp_path / "child" / "config.json"
    data = json.loads(path.read_text())
    for name in ("layersmith", "auto_map", "per_layer_config"):
        del data[name]
    path.write_text(json.dumps(data))
    assert torch.equal(layersmith.load(tmp_path / "child").eval()(IDS).logits, model(IDS).logits)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "child").eval()
    assert torch.equal(auto(IDS).logits, model(IDS).logits)
    auto.save_pretrained(tmp_path / "again")  # and now it has one
    assert json.loads((tmp_path / "again" / "config.json").read_text())["layersmith"] == model.config.layersmith


@pytest.mark.parametrize("heterogeneous", [True, False])
@pytest.mark.parametrize(
    "harm", ["missing weight", "extra weight", "truncated", "missing file", "other shape", "empty"]
)
def test_damage_is_refused(harm: str, heterogeneous: bool, tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    model = child_model(config, BLOCKS) if heterogeneous else stock_model(config)
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="20KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    if harm in ("missing weight", "extra weight"):
        tensors = load_file(files[1])
        if harm == "missing weight":
            del tensors[next(iter(tensors))]
        else:
            tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2)
        save_file(tensors, files[1], {"format": "pt"})
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        if harm == "extra weight":
            index["weight_map"]["model.layers.0.mlp.extra.weight"] = files[1].name
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif harm == "truncated":
        files[1].write_bytes(files[1].read_bytes()[:-10])
    elif harm == "empty":
        files[1].write_bytes(b"")
    elif harm == "missing file":
        files[1].unlink()
    else:
        data = json.loads((folder / "config.json").read_text())
        data["vocab_size"] = 100
        (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(InputError) as refused:
        layersmith.load(folder)
    assert "\n" not in str(refused.value)


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / "precious").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        layersmith.save(child_model(FAMILIES["llama"](), BLOCKS), tmp_path / "child")
    assert [p.name for p in (tmp_path / "child").iterdir()] == ["precious"]


def test_a_model_whose_config_does_not_say_how_it_differs_is_not_saved(tmp_path: Path) -> None:
    model = stock_model(FAMILIES["llama"]())
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(InputError, match=r"layersmith\.build"):
        layersmith.save(model, tmp_path / "child")
    assert not (tmp_path / "child").exists()


def test_subblock_files(family: str, tmp_path: Path) -> None:
    model = child_model(FAMILIES[family](), BLOCKS)
    descriptor = layersmith.describe(model)
    layersmith.save(model, tmp_path / "child")
    (tmp_path / "child" / "model.safetensors").unlink()
    write_subblocks(model.state_dict(), descriptor, 4, tmp_path / "child")
    files = {path.stem for path in (tmp_path / "child" / "subblocks_safetensors").iterdir()}
    # The attention of layer 0 and the FFN of layer 2 are not there, and neither are their norms.
    assert files == {"embedding", "lm_head", "block_0_ffn", "block_1_attention", "block_1_ffn"} | {
        "block_2_attention", "block_3_attention", "block_3_ffn",
    }  # fmt: skip
    tensors = read_subblocks(tmp_path / "child")
    for name, tensor in tensors.items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert set(read_subblocks(tmp_path / "child", ["block_2_attention"])) == {
        "model.layers.2.input_layernorm.weight",
        "model.layers.2.self_attn.linear.weight",
    }
    loaded = layersmith.load(tmp_path / "child").eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(InputError, match="no weight group 'block_9_ffn'"):
        read_subblocks(tmp_path / "child", ["block_9_ffn"])


def test_loading_by_class_is_right_and_refused_without_layersmith(tmp_path: Path, run_python: Callable) -> None:
    model = child_model(FAMILIES["llama"](), BLOCKS)
    layersmith.save(model, tmp_path / "child")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "child").eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    stock = "import sys\nfrom transformers import LlamaForCausalLM\nLlamaForCausalLM.from_pretrained(sys.argv[1])"
    done = run_python(stock, str(tmp_path / "child"))
    assert done.returncode != 0
    assert HOW_TO_LOAD in done.stderr


def test_import_is_cheap(run_python: Callable) -> None:
    done = run_python("import layersmith, sys; print('torch' in sys.modules, 'transformers' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_auto_classes_know_children_whichever_is_imported_first(run_python: Callable, tmp_path: Path) -> None:
    layersmith.save(child_model(FAMILIES["llama"](), BLOCKS), tmp_path / "child")
    load = "AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    for imports in ("import layersmith\nfrom transformers import *", "from transformers import *\nimport layersmith"):
        done = run_python(f"{imports}\nimport sys\n{load}\nprint('loaded')", str(tmp_path / "child"))
        assert "loaded" in done.stdout, done.stderr
    shutil.rmtree(tmp_path / "child")


@pytest.mark.skipif(
    transformers.__version__.startswith("5.15."), reason="5.15 does not look at the sizes of nested configs"
)
def test_stock_code_stops_at_a_size_in_a_nested_config_that_changes_no_shape(
    tmp_path: Path, run_python: Callable
) -> None:
    config = tiny_config("dbrx")
    blocks = layersmith.block_configs(config)
    blocks[1] = Alternative(1, "ffn", "experts_per_token", size=1).block_config(blocks[1])
    child = child_model(config, blocks)
    layersmith.save(child, tmp_path / "child")
    stock = "import sys\nfrom transformers import DbrxForCausalLM\nDbrxForCausalLM.from_pretrained(sys.argv[1], "
    done = run_python(stock + "attn_implementation='eager')", str(tmp_path / "child"))
    assert done.returncode != 0
    assert "d_model" in done.stderr
    again = layersmith.load(tmp_path / "child").eval()
    assert torch.equal(again(IDS % 90, use_cache=False).logits, child(IDS % 90, use_cache=False).logits)
