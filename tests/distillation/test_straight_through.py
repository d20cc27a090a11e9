"""Weights that are rounded in every forward pass, and learn as if they were not."""

import pytest
import torch

from layersmith.distillation.straight_through import rounded_again, rounded_in_forward
from layersmith.quantization.formats import FORMATS
from layersmith.quantization.rounding import quantize
from tests.conformance.tiny import tiny_config
from tests.conftest import stock_model

IDS = torch.arange(3, 27)[None]


@pytest.mark.parametrize("name", ["int4-g32", "q4_k", "q4_1", "fp8-tensor"])
def test_a_step_of_training_moves_weights_on_their_grid(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 32, bias=False), torch.nn.Linear(32, 4))
    x, y = torch.randn(64, 256), torch.randn(64, 4)
    before = quantize(model[0].weight.detach(), FORMATS[name])
    with torch.no_grad():
        model[0].weight.copy_(before.values())

    def loss() -> torch.Tensor:
        return (model(x) - y).square().mean()

    plain = torch.autograd.grad(loss(), list(model.parameters()))
    with rounded_in_forward(model, {"0.weight": before}, torch.device("cpu")):
        rounded = torch.autograd.grad(loss(), list(model.parameters()))
        assert all(torch.equal(g, h) for g, h in zip(rounded, plain, strict=False) if g.shape == h.shape)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        for _ in range(20):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    after = rounded_again(model, {"0.weight": before})["0.weight"]
    assert torch.equal(after.values(), model[0].weight)
    assert not torch.equal(after.levels, before.levels)
    assert type(model[0]) is torch.nn.Linear


def test_tied_weights_stay_tied() -> None:
    config = tiny_config("qwen2")
    config.tie_word_embeddings = True
    model = stock_model(config)
    weight = model.get_input_embeddings().weight
    rounded = {"model.embed_tokens.weight": quantize(weight.detach(), FORMATS["q8_0"])}
    with rounded_in_forward(model, rounded, torch.device("cpu")):
        made = model(input_ids=IDS).logits
        assert sum(p is weight for p in model.parameters()) == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(weight, rounded["model.embed_tokens.weight"].values())
    torch.testing.assert_close(model(input_ids=IDS).logits, made)
