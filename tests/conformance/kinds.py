"""What kind of model a family is, seen in how the model behaves and not in its name.

A *causal* model gives the same logits for a token whatever comes after it. What it remembers of earlier tokens is seen
in the cache that it returns: memory that grows with the number of tokens is an attention's, memory of one size is that
of a state-space, linear-attention or convolution mixer.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

DECODER = "decoder"
HYBRID = "hybrid"
PURE_SSM = "pure SSM"
ENCODER = "encoder"
ENCODER_DECODER = "encoder-decoder"

MEANINGS = {
    DECODER: "causal, or returns keys and values to continue from. Every layer that remembers earlier tokens does so "
    "in memory that grows with their number. A short convolution within an attention does not count",
    HYBRID: "like a decoder, but some layers remember earlier tokens in memory of fixed size: a state-space or "
    "linear-attention state, or a convolution in the attention's place. Others, or the same ones, also use memory that "
    "grows. A model that returns no memory is a hybrid if its config names a `linear_attention` layer",
    PURE_SSM: "causal; earlier tokens are remembered in memory of fixed size only",
    ENCODER: "the logits of a token depend on later tokens, and no keys and values are returned to continue from",
    ENCODER_DECODER: "its config has `is_encoder_decoder` or `encoder_layers`; its causal model is the decoder alone",
}


def kind_of(config: PretrainedConfig, model: nn.Module | None) -> str:
    """The kind of a family.

    Args:
        config: of the family, as its class makes it.
        model: of it; None if it does not run, and then the kind is known only of an encoder-decoder.
    """
    text = config.get_text_config(decoder=True)
    if any(c.is_encoder_decoder or hasattr(c, "encoder_layers") for c in (config, text)):
        return ENCODER_DECODER
    if model is None:
        return ""
    if not _is_causal(model) and not _cache_of(model, 6):
        return ENCODER
    memory = _memory(model)
    if memory is None:
        return HYBRID if "linear_attention" in (getattr(text, "layer_types", None) or ()) else DECODER
    grows, has_state = memory
    if grows and has_state:
        return HYBRID
    return PURE_SSM if has_state else DECODER


def is_language_model_only(model: nn.Module) -> bool:
    """Whether text alone uses every part of a model; a vision tower or a cross-attention is a part that it does not."""
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in model.named_modules()
    ]
    ids = torch.randint(
        3, 90, (4, 100), generator=torch.Generator().manual_seed(0)
    )  # so many that every expert gets some
    used: set[str] = set()
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        with suppress(AssertionError):  # reformer does not train on a text of this length
            logits.square().sum().backward()
            # Weights may be used without a call of their module.
            used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)

    def runs(name: str) -> bool:
        return any(module_name == name or module_name.startswith(f"{name}.") for module_name in called | used)

    idle = [n for n, m in model.named_modules() if n and any(p.ndim >= 2 for p in m.parameters()) and not runs(n)]
    return all(any(runs(twin) for twin in _twins(model, name)) for name in idle if name.rpartition(".")[0] not in idle)


def _twins(model: nn.Module, name: str) -> list[str]:
    """Modules of the same class in the same list, e.g. the other experts."""
    outer, _, last = name.rpartition(".")
    around = model.get_submodule(outer)
    if not isinstance(around, nn.ModuleList):
        return []
    cls = type(around.get_submodule(last))
    return [f"{outer}.{n}" for n, module in around.named_children() if type(module) is cls]


def _is_causal(model: nn.Module) -> bool:
    ids = torch.arange(3, 14)[None]
    other = ids.clone()
    other[:, -1] = 20
    with torch.no_grad():
        first, second = (model(input_ids=x, use_cache=False).logits[:, :-1] for x in (ids, other))
    return bool((first - second).abs().max() <= 1e-5 * first.abs().max())


def _memory(model: nn.Module) -> tuple[bool, bool] | None:
    """Whether what a model remembers has parts that grow with the tokens, and layers with a state of one size."""
    short, long = (_layers_of_cache(model, length) for length in (6, 12))
    if not any(_shapes(layer) for layer in short):
        return None
    grows = state = False
    for before, after in zip(short, long, strict=True):
        changed = [a != b for a, b in zip(_shapes(before), _shapes(after), strict=False)]
        grows |= any(changed)
        state |= bool(changed) and not any(changed)
        # A matrix beside keys and values is a state; a few last values, as a short convolution keeps them, are not.
        recurrent = _shapes(getattr(before, "recurrent_states", None))
        state |= any(len(shape) > 2 for shape in recurrent)
    return grows, state


def _layers_of_cache(model: nn.Module, length: int) -> list[Any]:
    cache = _cache_of(model, length)
    layers = getattr(cache, "layers", None)
    if layers is None:
        return [cache]
    others = [value for name, value in vars(cache).items() if name != "layers" and _shapes(value)]
    return [*layers, *(part for value in others for part in (value if isinstance(value, list) else [value]))]


def _cache_of(model: nn.Module, length: int) -> Any:
    with torch.no_grad():
        output = model(input_ids=torch.arange(3, 3 + length)[None], use_cache=True)
    return next((v for k, v in output.items() if k in ("past_key_values", "cache", "cache_params", "state")), None)


def _shapes(value: Any) -> list[torch.Size]:
    """Shapes of the tensors in something; counters and flags are not counted."""
    if isinstance(value, torch.Tensor):
        return [value.shape] if value.ndim >= 2 and value.numel() else []
    if isinstance(value, PretrainedConfig | nn.Module | str):
        return []
    if isinstance(value, list | tuple):
        return [shape for part in value for shape in _shapes(part)]
    if isinstance(value, dict):
        return [shape for part in value.values() for shape in _shapes(part)]
    return _shapes(vars(value)) if hasattr(value, "__dict__") else []
