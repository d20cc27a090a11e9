"""A family whose classes are not in Transformers: registered with it, described by its author."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

import layersmith
from layersmith.model_descriptor.factory import ModelDescriptorFactory
from tests.conftest import NO_ATTENTION, SIZES, block, randomize
from tests.model_descriptor.hand_written import LlamaModelDescriptor


class OwnConfig(LlamaConfig):
    model_type = "a_family_of_its_own"


class OwnLayer(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(hidden_states, *args, **kwargs) * 1.01


class OwnModel(LlamaModel):
    config_class = OwnConfig

    def __init__(self, config: OwnConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([OwnLayer(config, i) for i in range(config.num_hidden_layers)])
        self.post_init()


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config: OwnConfig):
        super().__init__(config)
        self.model = OwnModel(config)
        self.post_init()


class OwnDescriptor(LlamaModelDescriptor):
    @staticmethod
    def decoder_layer_cls() -> type[nn.Module]:
        return OwnLayer


@pytest.fixture
def registered() -> None:
    AutoConfig.register(OwnConfig.model_type, OwnConfig, exist_ok=True)
    AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM, exist_ok=True)
    ModelDescriptorFactory.register_decorator(OwnConfig.model_type)(OwnDescriptor)


@pytest.mark.usefixtures("registered")
def test_build_save_and_load(tmp_path: Path) -> None:
    blocks = [block(NO_ATTENTION), block({"num_key_value_heads": 2}, {"intermediate_size": 32}), block(), block()]
    model: Any = randomize(layersmith.build(OwnConfig(**SIZES), blocks)).eval()
    assert isinstance(model.model.layers[1], OwnLayer)
    assert model.model.layers[1].mlp.up_proj.weight.shape[0] == 32
    ids = torch.arange(20)[None]
    layersmith.save(model, tmp_path / "child")
    assert torch.equal(layersmith.load(tmp_path / "child").eval()(ids).logits, model(ids).logits)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "child").eval()
    assert torch.equal(auto(ids).logits, model(ids).logits)
