"""What layersmith relies on in other projects beyond their public interfaces: a new version that breaks it says which.

One test for each function of ``layersmith.upstream``, and one for each touch point of ``modeling_layersmith`` and
``heterogeneous/auto.py``, which may not import it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto import auto_factory
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
)
from transformers.pytorch_utils import Conv1D

from layersmith import modeling_layersmith, upstream
from tests.conftest import FAMILIES

TOKENS = torch.arange(5)[None]


def llama(**more: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(FAMILIES["llama"](**more)).eval()


# ---------------------------------------------------------------------------------------------- Transformers: models


def test_model_from_config() -> None:
    model = upstream.model_from_config(LlamaForCausalLM, FAMILIES["llama"](), dtype=torch.bfloat16)
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16


def mixture() -> Qwen3MoeForCausalLM:
    """A model whose experts are one tensor in memory and many in its files."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(hidden_size=16, num_hidden_layers=1, num_experts=2, vocab_size=32, num_attention_heads=2,
                       num_key_value_heads=1, intermediate_size=8, moe_intermediate_size=8, head_dim=8,
                       num_experts_per_tok=1)
    ).eval()  # fmt: skip


def test_rows_on_disk(tmp_path: Path) -> None:
    model, name = mixture(), "model.layers.0.mlp.experts.gate_up_proj"
    model.save_pretrained(tmp_path)
    rows, stack = upstream.rows_on_disk(model, name, (2, 16, 16)), model.get_parameter(name).flatten(0, 1)
    assert len(rows) == 4
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        for written, numbers in rows.items():
            assert torch.equal(file.get_tensor(written), stack[numbers])


def test_experts_one_at_a_time() -> None:
    model = mixture()
    experts = model.model.layers[0].mlp.experts
    assert [upstream.is_stack_of_experts(m) for m in (experts, model.lm_head, model.model)] == [True, False, False]
    before, name = model(TOKENS).logits, experts.config._experts_implementation
    with upstream.one_expert_at_a_time([experts]):
        torch.testing.assert_close(model(TOKENS).logits, before)
        assert experts.config._experts_implementation == "eager"
    assert experts.config._experts_implementation == name


def test_shapes_on_disk(tmp_path: Path) -> None:
    model = mixture()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert upstream.shapes_on_disk(model.to("meta")) == written


def test_output_size_attribute() -> None:
    for module in (nn.Linear(3, 5), Conv1D(5, 3)):
        assert getattr(module, upstream.output_size_attribute(module)) == 5
    assert upstream.output_size_attribute(nn.LayerNorm(3)) == ""


def test_generation_compiles_on_any_device() -> None:
    assert upstream.compile_on_any_device()._compile_all_devices


# ---------------------------------------------------------------------------------------------- Transformers: configs


def test_per_layer_entries() -> None:
    config = FAMILIES["llama"]()
    assert not upstream.is_heterogeneous(config)
    assert upstream.per_layer_entries(config) == {}
    upstream.set_per_layer_entries(config, {1: {"intermediate_size": 8}})
    assert upstream.is_heterogeneous(config)
    assert upstream.per_layer_entries(config) == {1: {"intermediate_size": 8}}
    upstream.set_per_layer_entries(config, {})
    assert not upstream.is_heterogeneous(config)
    assert config.intermediate_size == 64


def test_plain_attention_is_asked_for_in_a_copy() -> None:
    config = LlamaConfig(attn_implementation="sdpa")
    assert upstream.with_plain_attention(config)._attn_implementation == "eager"
    assert config._attn_implementation == "sdpa"


# ---------------------------------------------------------------------------------------------- Transformers: caches


def test_keys_and_values_in_a_cache() -> None:
    cache = llama()(input_ids=TOKENS, use_cache=True).past_key_values
    slots = upstream.cache_slots(cache)
    assert len(slots) == 4
    for slot in slots:
        keys, values = upstream.keys_and_values(slot)
        assert keys is not None
        assert values is not None
        assert keys.shape == values.shape == (1, 4, 5, 16)
        assert not upstream.convolution_states(slot)
    assert upstream.cache_slots(None) == []
    assert upstream.keys_and_values(None) == (None, None)


def test_states_in_a_cache() -> None:
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2, expand=2)
    output = MambaForCausalLM(config).eval()(input_ids=TOKENS, use_cache=True)
    cache = next(value for value in output.values() if upstream.cache_slots(value))
    for slot in upstream.cache_slots(cache):
        (convolution,), (state,) = upstream.convolution_states(slot), upstream.recurrent_states(slot)
        assert convolution.shape == (1, 32, config.conv_kernel)
        assert state.shape[0] == 1
        assert state.numel() == 32 * 4
        assert upstream.keys_and_values(slot) == (None, None)


# ---------------------------------------------------------------------------------------------- PyTorch


def test_many_compiled_models_are_kept() -> None:
    with upstream.many_compiled_models():
        assert torch._dynamo.config.recompile_limit == 4096
    assert torch._dynamo.config.recompile_limit < 4096


# ---------------------------------------------------------------------------------------------- accelerate


# ---------------------------------------------------------------------------------------------- others


# ---------------------------------------------------------------------------------------------- modeling_layersmith


def test_a_model_starts_its_weights_module_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = PreTrainedModel._initialize_weights

    def watched(self: PreTrainedModel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        seen.append(type(module).__name__)
        original(self, module, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_initialize_weights", watched)
    llama()
    assert "Linear" in seen
    assert "LlamaDecoderLayer" in seen


def test_a_model_calls_post_init_when_it_has_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = []
    original = PreTrainedModel.post_init

    def watched(self: PreTrainedModel) -> None:
        layers.append(sum(type(module).__name__ == "LlamaDecoderLayer" for module in self.modules()))
        original(self)

    monkeypatch.setattr(PreTrainedModel, "post_init", watched)
    llama()
    assert layers == [4, 4]  # LlamaModel, LlamaForCausalLM


def test_init_weights_fills_a_module() -> None:
    model = llama()
    part = model.model.layers[0].mlp.up_proj
    nn.init.constant_(part.weight, torch.nan)
    with torch.no_grad():
        model._init_weights(part)
    assert part.weight.isfinite().all()


def test_models_have_the_methods_that_a_child_extends() -> None:
    implementations = ("set_attn_implementation", "set_experts_implementation")
    for name in ("from_pretrained", "save_pretrained", *implementations, "initialize_weights", "_from_config"):
        assert callable(getattr(PreTrainedModel, name)), name
    assert callable(PreTrainedModel.register_for_auto_class)


def test_loading_tells_which_weights_do_not_fit(tmp_path: Any) -> None:
    llama().save_pretrained(tmp_path)
    _, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {"missing_keys", "mismatched_keys", "unexpected_keys"} <= info.keys()


def test_generation_asks_for_the_shape_of_a_static_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(LlamaForCausalLM, "_get_static_cache_init_shape", lambda self: asked.append(self))
    how = {"cache_implementation": "static", "prefill_chunk_size": 2, "disable_compile": True}
    output = llama().generate(TOKENS, max_new_tokens=2, **how)
    assert output.shape[1] > TOKENS.shape[1]
    assert asked  # None: each layer's first keys say its shape


def test_the_attention_implementation_is_kept_in_the_config() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation_internal == "eager"
    assert model.model.layers[0].self_attn.config._attn_implementation_internal == "eager"


def test_auto_mappings_give_names_and_classes() -> None:
    for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        assert all(isinstance(name, str) for name in mapping._model_mapping)
    assert MODEL_FOR_CAUSAL_LM_MAPPING[LlamaConfig] is LlamaForCausalLM


def test_a_config_knows_where_it_came_from(tmp_path: Any) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path)._name_or_path == str(tmp_path)


def test_classes_are_read_out_of_a_checkpoint() -> None:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    assert list(inspect.signature(get_class_from_dynamic_module).parameters)[:2] == [
        "class_reference",
        "pretrained_model_name_or_path",
    ]


def test_attributes_that_differ_by_layer_cannot_be_read_from_the_config() -> None:
    config = FAMILIES["llama"](per_layer_config={0: {"intermediate_size": 8}})
    assert config.per_layer_attributes == {"intermediate_size"}
    assert config.per_layer_config[0].intermediate_size == 8
    assert config.per_layer_config[1].intermediate_size == 64
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = config.intermediate_size


def test_a_cache_slot_is_picked_by_the_layer_index_of_an_attention() -> None:
    model = llama()
    layer = model.model.layers[1]
    modeling_layersmith.set_cache_slot(layer, 7)
    assert layer.self_attn.layer_idx == 7


def test_the_length_so_far_is_that_of_slot_0() -> None:
    cache = DynamicCache(config=FAMILIES["llama"]())
    cache.update(torch.zeros(1, 4, 3, 16), torch.zeros(1, 4, 3, 16), 1)
    assert cache.get_seq_length() == 0
    cache.update(torch.zeros(1, 4, 3, 16), torch.zeros(1, 4, 3, 16), 0)
    assert cache.get_seq_length() == 3


def test_buffers_of_a_module_are_replaced_in_place() -> None:
    rotary = llama().model.rotary_emb
    assert isinstance(rotary._buffers["inv_freq"], torch.Tensor)
    assert "inv_freq" not in rotary.state_dict()


# ---------------------------------------------------------------------------------------------- heterogeneous/auto.py


def test_auto_classes_pick_a_model_class_by_the_config() -> None:
    pick = inspect.unwrap(auto_factory._get_model_class)
    assert pick(FAMILIES["llama"](), MODEL_FOR_CAUSAL_LM_MAPPING) is LlamaForCausalLM
    assert issubclass(LlamaForCausalLM.config_class, PretrainedConfig)


def test_attention_on_a_cpu_is_counted() -> None:
    q = torch.randn(1, 2, 5, 8)
    with FlopCounterMode(display=False, custom_mapping=upstream.attention_counters()) as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * 2 * (2 * 5 * 5 * 8)


def test_weights_on_the_disk_are_taken_from_accelerate(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "disk", "model.layers": "disk", "model.rotary_emb": "disk", "lm_head": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**device_map, "model.norm": "cpu"}, offload_folder=str(tmp_path / "offload")
    )
    places = upstream.take_disk_offload(model)
    name = "model.layers.0.mlp.up_proj.weight"
    file, inside = places[name]
    with safe_open(file, framework="pt") as tensors:
        assert tensors.get_slice(inside).get_shape() == [32, 16]
    assert not any("forward" in vars(module) for module in model.modules())


# ---------------------------------------------------------------------------------------------- Trainer


class _OneWeight(torch.nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.first = torch.nn.Parameter(torch.tensor([value]))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.first * x).sum()}


def test_a_trainers_checkpoints_are_written_and_read_by_other_functions(tmp_path: Path) -> None:
    said: list[tuple[str, str]] = []
    rows = [{"x": torch.ones(1)}] * 4
    for resumed in (None, str(tmp_path / "checkpoint-2")):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="steps", save_steps=2, max_steps=2,
            per_device_train_batch_size=2, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=_OneWeight(3.0), args=arguments, train_dataset=rows)
        upstream.checkpoint_by(
            trainer,
            lambda folder: said.append(("save", folder.name)),
            lambda folder: said.append(("load", folder.name)),
        )
        trainer.train(resume_from_checkpoint=resumed)
        assert trainer.lr_scheduler is not None
        assert trainer.lr_scheduler.last_epoch == 2
    assert said == [("save", "checkpoint-2"), ("load", "checkpoint-2")]
    written = {file.name for file in (tmp_path / "checkpoint-2").iterdir()}
    assert written == {"scheduler.pt", "rng_state.pth", "trainer_state.json"}


def test_a_prepared_model_is_wrapped_in_autocast_alone(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=True)
    model = torch.nn.Linear(2, 2)
    seen: list[torch.dtype] = []
    product = model.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        made = product(x)
        seen.append(made.dtype)
        return made

    model.forward = forward  # type: ignore[method-assign]
    trainer = Trainer(model=model, args=arguments)
    upstream.prepared(trainer, model)
    assert trainer.accelerator.prepare(model) is model
    assert model(torch.ones(1, 2)).dtype == torch.float32
    assert seen == [torch.bfloat16]


def test_weights_that_a_model_shares_are_known_by_name() -> None:
    assert upstream.tied_in(llama(tie_word_embeddings=True)) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert upstream.tied_in(llama()) == {}


def test_one_gpu_of_several_is_used(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    arguments._n_gpu = 4
    upstream.use_one_gpu(arguments)
    assert arguments.n_gpu == 1


def test_loggers_are_known_by_name() -> None:
    assert {"tensorboard", "wandb", "mlflow"} <= upstream.known_loggers()


def test_an_exchanged_forward_is_restored() -> None:
    model = torch.nn.Linear(2, 2)
    model.forward = lambda x: x  # type: ignore[method-assign]
    prepared = Accelerator(cpu=True).prepare(model)
    assert prepared is model
    upstream.restore_forward(model)
    assert "forward" not in vars(model)
    assert "_original_forward" not in vars(model)
    assert not torch.equal(model(torch.ones(2)), torch.ones(2))


DIMENSIONS = """
import os, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
from layersmith import upstream

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
plans = {name: style for name, style in ALL_PARALLEL_STYLES.items() if "ep_" not in name and name != "grouped_gemm"}
assert {"colwise", "rowwise", "packed_colwise", "embedding_rowwise"} < set(plans)
for name, style in plans.items():
    for dimensions in (2,) if "embedding" in name else (1, 2, 3):
        module, local = nn.Module(), "bias" if dimensions == 1 else "weight"
        module.register_parameter(local, nn.Parameter(torch.empty((4,) * dimensions, device="meta")))
        style.shard_param(module, local, mesh)
        placements = getattr(getattr(module, local), "placements", ())
        divided = [(p.dim % dimensions, getattr(p, "split_factor", 1)) for p in placements if hasattr(p, "dim")]
        dimension, pieces = upstream.divided_dimension(name, dimensions)
        print(name, dimensions, divided, dimension, pieces)
        assert [dimension] == [expected for expected, _ in divided] or (dimension is None and not divided)
        assert all(pieces >= of for _, of in divided)
os._exit(0)
"""


@pytest.mark.skipif(not upstream.divides_models(), reason="needs Transformers 5.23")
def test_the_dimension_that_a_style_divides_is_known(run_python: Callable[..., Any]) -> None:
    done = run_python(DIMENSIONS)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not upstream.divides_models(), reason="needs Transformers 5.23")
def test_a_plan_names_every_module_and_parameter() -> None:
    with torch.device("meta"):
        model = upstream.model_from_config(LlamaForCausalLM, FAMILIES["llama"]())
    plan = upstream.tensor_parallel_plan(model)
    assert plan["model.layers.2.self_attn.o_proj.weight"] == plan["model.layers.2.self_attn.o_proj"] == "rowwise"
    assert plan["lm_head"] == "colwise_gather_output"
    assert not any("*" in name for name in plan)
    assert upstream.keeps_output_divided(plan["model.layers.2.self_attn.q_proj"])
    assert not upstream.keeps_output_divided(plan["lm_head"])
