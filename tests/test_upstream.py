"""Private names of other projects do what layersmith.upstream says."""

import torch

from layersmith import upstream


def test_generation_compiles_on_any_device() -> None:
    assert upstream.compile_on_any_device()._compile_all_devices


def test_many_compiled_models_are_kept() -> None:
    with upstream.many_compiled_models():
        assert torch._dynamo.config.recompile_limit == 4096
    assert torch._dynamo.config.recompile_limit < 4096
