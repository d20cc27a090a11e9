"""Scales of input channels that a norm holds: which norms can, and what they become."""

from typing import Any

import pytest
import torch

from layersmith.library.norm_scales import held_scales, norm_before, scales_help
from layersmith.quantization.formats import format_named
from layersmith.quantization.rounding import quantize
from tests.conformance.tiny import tiny_config
from tests.conftest import stock_model


@pytest.mark.parametrize(
    ("family", "attention", "ffn", "held"),
    [
        ("llama", ("q", "k", "v"), ("gate", "up"), True),
        ("phi3", ("qkv",), ("gate_up",), True),
        ("gemma", ("q", "k", "v"), ("gate", "up"), False),  # multiplies by one plus the weight
        ("cohere", ("q", "k", "v"), ("gate", "up"), False),  # attention and FFN read one norm
        ("olmo2", ("q", "k", "v"), ("gate", "up"), False),  # nothing is normed before
    ],
)
def test_norms_that_can_hold_scales(family: str, attention: tuple[str], ffn: tuple[str], held: bool) -> None:
    model = stock_model(tiny_config(family))
    layer = model.model.layers[0]
    calls: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda module, *call: calls.append(call), with_kwargs=True)
    model(input_ids=torch.arange(3, 11)[None], use_cache=False)
    handle.remove()
    args, kwargs = calls[0]

    def run() -> torch.Tensor:
        output = layer(*args, **kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]

    before = {name: weight.clone() for name, weight in layer.state_dict().items()}
    of_attention = [f"self_attn.{name}_proj.weight" for name in attention]
    of_ffn = [f"mlp.{name}_proj.weight" for name in ffn]
    assert norm_before(layer, of_attention, run) == ("input_layernorm.weight" if held else None)
    assert norm_before(layer, of_ffn, run) == ("post_attention_layernorm.weight" if held else None)
    if len(of_attention) > 1:  # the third reads it too
        assert norm_before(layer, of_attention[:2], run) is None
    assert norm_before(layer, ["self_attn.o_proj.weight"], run) is None
    assert all(torch.equal(weight, before[name]) for name, weight in layer.state_dict().items())


def test_a_norm_holds_its_scales_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    norm, squares = torch.randn(64, generator=generator), torch.rand(64, generator=generator) * 10
    norm[3] = squares[5] = 0.0
    divided, scales = held_scales(norm.bfloat16(), squares)
    torch.testing.assert_close(divided * scales, norm.bfloat16().float(), rtol=1e-6, atol=0)
    assert torch.equal(divided.bfloat16().float(), divided)
    assert (divided[3], scales[3]) == (0, 1)
    others = squares > 0
    wanted = squares[others] ** 0.125
    ratio = scales[others & (norm != 0)] / wanted[norm[others] != 0]
    assert ratio.max() / ratio.min() < 1.02  # bfloat16 has 8 bits


@pytest.mark.parametrize("name", ["q4_1", "int4-g32", "int8", "nvfp4"])
def test_scales_are_left_out_where_weights_are_on_the_levels_of_a_format(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, squares = torch.randn(300, 128, generator=generator), torch.rand(128, generator=generator) ** 8 * 10
    _, scales = held_scales(torch.ones(128), squares)
    format = format_named(name)
    assert scales_help(weight, scales, squares, format)
    stored = quantize(weight, format).values().bfloat16()
    assert not scales_help(stored, scales, squares, format)
    assert scales_help(stored, scales, squares, format_named("q5_0"))  # whose levels are others
