"""Families with misleading names: the findings must equal those of the original family, apart from the names.

The names of modules and config attributes are replaced in the source of a family's modelling file, and the result is
imported as a separate module. Names are exchanged on purpose: the attention is called ``mlp``, the FFN ``attention``.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto import configuration_auto, modeling_auto

import layersmith
from layersmith import BlockConfig, FFNConfig
from layersmith.block_config import AttentionConfig
from layersmith.library.survey import survey
from layersmith.model_descriptor.stock import causal_lm_config, stock_class, stock_model
from layersmith.recipe import LibraryRecipe
from layersmith.stages.distill_finished import distill
from tests.conformance.tiny import tiny_config
from tests.conftest import TINY_RECIPE, randomize
from tests.library.axes.test_families import costs_of, parent_of_config

# Old module name to new, in the source and so in the weights' names.
MODULES = {
    "self_attn": "mlp",
    "mlp": "attention",
    "input_layernorm": "after_norm",
    "post_attention_layernorm": "input_layernorm",
    "embed_tokens": "table",
    "lm_head": "unembed",
    "q_proj": "down_proj",
    "o_proj": "q_proj",
    "down_proj": "o_proj",
    "gate_proj": "up_proj",
    "up_proj": "gate_proj",
    "experts": "router",
    "gate_up_proj": "rows",
    "qkv_proj": "everything",
}
ATTRIBUTES = {"num_key_value_heads": "groups", "intermediate_size": "breadth", "num_local_experts": "crowd"}

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES = {"llama": "Llama", "mixtral": "Mixtral", "phi3": "Phi3"}
TOKENS = torch.arange(24).view(2, 12) * 5 % 120 + 3


# Names by which Transformers itself finds the weights of experts.
KEPT = {"mixtral": {"gate_up_proj", "down_proj"}}


def modules_of(family: str) -> dict[str, str]:
    return {old: new for old, new in MODULES.items() if old not in KEPT.get(family, ())}


def renamed(name: str, family: str) -> str:
    names = modules_of(family)
    return ".".join(names.get(part, part) for part in name.split("."))


def altered_source(module: Any, names: dict[str, str]) -> str:
    """A module's source with words exchanged, all at once."""
    source = inspect.getsource(module)
    package = module.__name__.rpartition(".")[0]
    for dots, base in (("...", "transformers"), ("..", "transformers.models"), (".", package)):
        source = re.sub(rf"^from {re.escape(dots)}(?=\w)", f"from {base}.", source, flags=re.MULTILINE)
        source = re.sub(rf"^from {re.escape(dots)} import", f"from {base} import", source, flags=re.MULTILINE)
    words = re.compile(r"\b(" + "|".join(sorted(map(re.escape, names), key=len, reverse=True)) + r")\b")
    return words.sub(lambda match: names[match.group(0)], source)


def import_source(name: str, source: str, folder: Path) -> Any:
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Configs of a family and of the altered one."""
    family, class_name = request.param, FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(family)
    base = f"transformers.models.{family}"
    configuration = importlib.import_module(f"{base}.configuration_{family}")
    modeling = importlib.import_module(f"{base}.modeling_{family}")
    config_class = getattr(configuration, f"{class_name}Config")
    new_type = f"altered_{family}"
    source = altered_source(configuration, ATTRIBUTES)
    source = source.replace(f'model_type = "{family}"', f'model_type = "{new_type}"')
    source = re.sub(rf"\b{class_name}(?=[A-Z])", f"Odd{class_name}", source)
    source = re.sub(r"attribute_map = \{[^}]*\}", "attribute_map = {}", source)
    new_class = getattr(import_source(f"configuration_{new_type}", source, folder), f"Odd{class_name}Config")
    source = altered_source(modeling, modules_of(family) | ATTRIBUTES)
    source = source.replace(f"from {base}.configuration_{family} import", f"from configuration_{new_type} import")
    source = re.sub(rf"\b{class_name}(?=[A-Z])", f"Odd{class_name}", source)
    altered = import_source(f"modeling_{new_type}", source, folder)
    AutoConfig.register(new_type, new_class)
    model_class = getattr(altered, f"Odd{class_name}ForCausalLM")
    AutoModelForCausalLM.register(new_class, model_class)
    yield config_class(**SIZES), new_class(**{ATTRIBUTES.get(name, name): value for name, value in SIZES.items()})
    configuration_auto.CONFIG_MAPPING._extra_content.pop(new_type, None)
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(new_class, None)


def models_of(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """The family's model and the altered one with the same weights."""
    models = [randomize(stock_model(config, "cpu", torch.float32)).eval() for config in pair]
    weights = {renamed(name, pair[0].model_type): tensor for name, tensor in models[0].state_dict().items()}
    models[1].load_state_dict(weights, strict=True)
    return models[0], models[1]


def test_the_altered_model_computes_the_same(pair: tuple[Any, Any]) -> None:
    model, altered = models_of(pair)
    assert torch.equal(model(TOKENS).logits, altered(TOKENS).logits)


def test_groups_are_the_same_renamed(pair: tuple[Any, Any]) -> None:
    groups = []
    for model in models_of(pair):
        descriptor = layersmith.describe(model.config)
        groups.append(descriptor.get_weight_groups(model.state_dict(), 3))
        assert descriptor.attn_no_op_supported()
        assert descriptor.mlp_no_op_supported()
    assert {group: {renamed(n, pair[0].model_type) for n in names} for group, names in groups[0].items()} == {
        group: set(names) for group, names in groups[1].items()
    }


def test_sizes_are_the_same(pair: tuple[Any, Any]) -> None:
    original, altered = (layersmith.block_configs(config) for config in pair)
    assert original == altered
    assert original[0].attention.num_key_value_heads == 2


def test_children_are_the_same_renamed(pair: tuple[Any, Any]) -> None:
    """Of the same block configs, with the same weights: the same logits."""
    blocks = layersmith.block_configs(pair[0])
    ffn = blocks[0].ffn
    narrow = FFNConfig(intermediate_size=16)
    if ffn.moe is not None:
        import dataclasses

        narrow = FFNConfig(moe=dataclasses.replace(ffn.moe, num_local_experts=4, expert_intermediate_dim=16))
    changed = [
        BlockConfig(AttentionConfig(no_op=True), narrow),
        BlockConfig(AttentionConfig(num_key_value_heads=1), FFNConfig(no_op=True)),
        blocks[2],
    ]
    children = [randomize(layersmith.build(config, changed)).eval() for config in pair]
    weights = {renamed(name, pair[0].model_type): tensor for name, tensor in children[0].state_dict().items()}
    children[1].load_state_dict(weights, strict=True)
    assert torch.equal(children[0](TOKENS).logits, children[1](TOKENS).logits)
    assert torch.equal(children[0](TOKENS, use_cache=False).logits, children[0](TOKENS).logits)


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_the_whole_way(
    pair: tuple[Any, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast, text_folder: Path
) -> None:
    """Also where a model calls its embedding and its head by other names than Transformers looks for."""
    config = copy.deepcopy(pair[1])
    config.vocab_size = len(tokenizer)
    randomize(stock_model(config, "cpu", torch.float32)).save_pretrained(tmp_path / "parent")
    tokenizer.save_pretrained(tmp_path / "parent")
    layersmith.compress(
        tmp_path / "parent", tmp_path / "run", data=text_folder, budget=0.75, recipe=TINY_RECIPE, trust_remote_code=True
    )
    distill(tmp_path / "run", tokens=1000, trust_remote_code=True)
    assert (tmp_path / "run" / "distilled" / "config.json").is_file()


# Of each family, numbers in its config of which each gets the name of the next, and modules, whose names mislead too.
EXCHANGED: dict[str, tuple[list[str], dict[str, str]]] = {
    "falcon_h1": (["mamba_n_heads", "num_key_value_heads", "mamba_d_state", "intermediate_size"], {"mup_vector": "A"}),
    "jetmoe": (["num_key_value_heads", "intermediate_size", "kv_channels"], {"input_linear": "output_linear_"}),
    "minimax": (["num_attention_heads", "num_key_value_heads", "intermediate_size"], {"qkv_proj": "o_proj_"}),
    "zaya": (
        ["num_attention_heads", "num_key_value_heads", "router_hidden_size"],
        {"q_proj": "up_proj_", "temp": "q_proj_"},
    ),
}


@pytest.mark.parametrize("family", EXCHANGED)
def test_axes_are_the_same_where_numbers_have_each_others_names(family: str, tmp_path: Path) -> None:
    """What a config calls its number of heads is something else, e.g. a width."""
    config = causal_lm_config(tiny_config(family))
    attributes, modules = EXCHANGED[family]
    names = dict(zip(attributes, [*attributes[1:], attributes[0]], strict=True))
    new_type, stock = f"exchanged_{family}", stock_class(config)
    configuration, modeling = (importlib.import_module(c.__module__) for c in (type(config), stock))
    prefix = stock.__name__.removesuffix("ForCausalLM")
    odd = re.compile(rf"\b{prefix}(?=[A-Z])")
    source = altered_source(configuration, names).replace(f'model_type = "{family}"', f'model_type = "{new_type}"')
    made = import_source(f"configuration_{new_type}", odd.sub(f"Odd{prefix}", source), tmp_path)
    new_class = getattr(made, f"Odd{type(config).__name__}")
    source = altered_source(modeling, names | modules)
    source = source.replace(f"from {configuration.__name__} import", f"from configuration_{new_type} import")
    made = import_source(f"modeling_{new_type}", odd.sub(f"Odd{prefix}", source), tmp_path)
    model_class = getattr(made, f"Odd{stock.__name__}")
    renamed = {names.get(k, k): v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    AutoConfig.register(new_type, new_class)
    AutoModelForCausalLM.register(new_class, model_class)
    try:
        original, altered = (parent_of_config(c, c.model_type) for c in (config, new_class(**renamed)))
        assert original.blocks == altered.blocks
        surveys = [survey(parent, LibraryRecipe()) for parent in (original, altered)]
        offered = [{(a.layer, a.name) for a in one.alternatives} for one in surveys]
        assert offered[0] == offered[1]
        assert costs_of(original, surveys[0]) == costs_of(altered, surveys[1])
    finally:
        configuration_auto.CONFIG_MAPPING._extra_content.pop(new_type, None)
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(new_class, None)
