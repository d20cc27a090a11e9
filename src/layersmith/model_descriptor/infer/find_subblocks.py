"""Which modules of a decoder layer are its attention and which its FFN.

The module that lets one token depend on another is the attention, or the Mamba or linear-attention mixer in its place.
The largest module that treats every token alone is the FFN. Whatever else stops mattering for the logits when a
subblock gives zeros belongs to it: its norms before and after, its scales.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from layersmith.errors import UnsupportedModel
from layersmith.model_descriptor.experiment import Outcome
from layersmith.model_descriptor.infer.layer_experiments import ExaminedLayer
from layersmith.model_descriptor.infer.specimen import Call, Specimen
from layersmith.model_descriptor.infer.subblocks import LayerKind, Record, Subblock


def find_kind(specimen: Specimen, layer_name: str) -> LayerKind:
    """The subblocks of one decoder layer.

    Raises:
        UnsupportedModel: No module of the layer mixes tokens and none transforms each alone.
    """
    layer = ExaminedLayer(specimen, layer_name)
    mixing, pointwise = _candidates(layer)
    attention = _silenceable(layer, _first_in_chains(layer, mixing, pointwise), mixes=True)
    outside = [name for name in pointwise if not any(a.startswith(f"{name}.") for a in attention)]
    ffn = _ffn_modules(layer, _silenceable(layer, outside, mixes=False))
    if not attention and not ffn:
        raise UnsupportedModel(
            f"in {layer_name} no module mixes tokens and none transforms each alone, so its subblocks cannot be "
            "identified."
        )
    dead_attention = layer.dead(attention) if attention else set()
    dead_ffn = layer.dead(ffn) if ffn else set()
    dead_both = layer.dead(attention + ffn) if attention and ffn else set()
    shared = _dead_modules(layer, dead_both - dead_attention - dead_ffn, attention + ffn)
    return LayerKind(
        attention=_subblock(layer, attention, dead_attention, ffn) if attention else None,
        ffn=_subblock(layer, ffn, dead_ffn, attention) if ffn else None,
        shared=tuple((name, {"is": "same", **_form(layer.calls[name])}) for name in shared),
        owners=_owners(layer, attention, ffn, dead_attention, dead_ffn),
    )


# ---------------------------------------------------------------------------------------------- which modules


def _candidates(layer: ExaminedLayer) -> tuple[list[str], list[str]]:
    """Modules one level down with matrices: those that mix tokens, and those that do not."""
    mixes = {name: layer.mixes(name) for name in layer.children("")}
    candidates = [name for name in mixes if layer.matrices(name)]
    return [name for name in candidates if mixes[name]], [name for name in candidates if mixes[name] is False]


def _first_in_chains(layer: ExaminedLayer, mixing: list[str], pointwise: list[str]) -> list[str]:
    """Mixing modules without those that only work on the output of another module, e.g. a convolution."""
    downstream: set[str] = set()
    for name in [*mixing, *pointwise] if len(mixing) > 1 else ():
        downstream |= layer.given_only_zeros([name]) - {name}
    return [name for name in mixing if name not in downstream]


def _silenceable(layer: ExaminedLayer, names: Sequence[str], mixes: bool) -> list[str]:
    """Modules that can be silenced without losing the residual stream: these, or some inside them."""
    result = []
    for name in names:
        current = name
        while layer.hidden_outputs(current) > 1 or not layer.keeps_stream(current):
            inner = [c for c in layer.children(current) if layer.mixes(c) is mixes and layer.matrices(c)]
            if len(inner) != 1 or not layer.matrices(current).keys() <= layer.weights(inner[0]):
                # The module adds the residual itself.
                current = name
                argument = layer.residual_argument(name)
                if argument is None and (last := _last_before_residual(layer, name)) is not None:
                    current = last
                else:
                    layer.passes[name] = argument
                break
            current = inner[0]
        result.append(current)
    return result


def _last_before_residual(layer: ExaminedLayer, name: str) -> str | None:
    """A module inside ``name`` in which all of its matrices end, and that can give zeros."""
    matrices = layer.matrices(name).keys()
    for inner in reversed([n for n in layer.calls if n.startswith(f"{name}.") and layer.matrices(n)]):
        if layer.keeps_stream(inner) and matrices <= layer.dead([inner]) | layer.weights(inner):
            return inner
    return None


def _ffn_modules(layer: ExaminedLayer, names: list[str]) -> list[str]:
    """The module with the largest matrices, or the last of its chain, and those that share its norm or class."""
    if not names:
        return []
    dead = {name: layer.dead([name]) | layer.weights(name) for name in names}
    main = max(names, key=lambda name: sum(layer.matrices(name).values()))
    for name in names:  # in a chain, the last one silences all the others
        if layer.weights(main) <= dead[name] and layer.calls[name].begin > layer.calls[main].begin:
            main = name
    chosen = [main]
    for name in names:
        if layer.weights(name) <= dead[main] or layer.weights(main) <= dead[name]:
            continue
        share_norms = bool(layer.dead([main, name]) - dead[main] - dead[name])
        classes = {type(layer.layer.get_submodule(c)) for c in chosen}
        if share_norms or type(layer.layer.get_submodule(name)) in classes - {nn.Linear}:
            chosen.append(name)
    return chosen


# ---------------------------------------------------------------------------------------------- to whom weights belong


def _owners(
    layer: ExaminedLayer, attention: list[str], ffn: list[str], dead_attention: set[str], dead_ffn: set[str]
) -> dict[str, str]:
    owners: dict[str, str] = {}
    # Saved buffers belong to a subblock too, so the state_dict counts and not the parameters.
    for weight in layer.layer.state_dict():
        if any(weight.startswith(f"{name}.") for name in attention):
            owners[weight] = "attention"
        elif any(weight.startswith(f"{name}.") for name in ffn):
            owners[weight] = "ffn"
        elif weight in dead_attention:
            owners[weight] = "attention"
        elif weight in dead_ffn:
            owners[weight] = "ffn"
        else:
            owners[weight] = _owner_by_order(layer, weight, attention, ffn)
    return owners


def _owner_by_order(layer: ExaminedLayer, weight: str, attention: Sequence[str], ffn: Sequence[str]) -> str:
    """Weights that matter without either subblock go with the one before which, or else in or after which, they run."""
    if not ffn:
        return "attention"
    if not attention:
        return "ffn"
    first_ffn = min(layer.calls[name].begin for name in ffn)
    after_attention = max(layer.calls[name].end for name in attention)
    module = weight
    while module := module.rpartition(".")[0]:
        if module in layer.calls:
            begin = layer.calls[module].begin
            return "attention" if begin < first_ffn and begin < after_attention else "ffn"
    return "ffn"


# ---------------------------------------------------------------------------------------------- the no-op


def _subblock(layer: ExaminedLayer, names: list[str], dead: set[str], others: list[str]) -> Subblock:
    """A subblock with the no-op that the experiments suggest; ``removal.py`` proves or refutes it."""
    replaced: list[tuple[str, Record]] = []
    for name in names:
        form = _form(layer.calls[name])
        if name not in layer.passes:
            replaced.append((name, {"is": "zeros", **form}))
        elif (argument := layer.passes[name]) is not None:
            replaced.append((name, {"is": "argument", "of": argument, **form}))
        else:
            reason = f"without {name} the layer's input is lost, and no argument of it passes the input on"
            return Subblock(tuple(names), refuted=Outcome(f"Can the layer run without {name}?", False, reason))
    silent = layer.given_only_zeros(names)
    for name in _dead_modules(layer, dead, [*names, *others], silent):
        replaced.append((name, {"is": "same", **_form(layer.calls[name])}))
    return Subblock(tuple(names), tuple(replaced))


def _dead_modules(
    layer: ExaminedLayer, dead: set[str], around: Sequence[str], silent: Collection[str] = ()
) -> list[str]:
    """Outermost modules outside the subblocks whose every weight is dead, or that are silent."""
    outermost: list[str] = []
    for name in layer.calls:
        weights = layer.weights(name) if name else set()
        outside = not any(name == a or name.startswith(f"{a}.") or a.startswith(f"{name}.") for a in around)
        if not weights or not outside or any(name.startswith(f"{outer}.") for outer in outermost):
            continue
        if (weights <= dead | layer.always_dead and weights & dead) or name in silent:
            outermost.append(name)
    return outermost


def _form(call: Call) -> dict[str, Any]:
    """What a module returns: how many things, in a list or under which names, and which are arguments passed on."""
    output = call.output
    form: dict[str, Any] = {"returns": len(output) if isinstance(output, tuple | list) else 0}
    if names := getattr(output, "_fields", ()):
        form["names"] = list(names)
    if isinstance(output, list):
        form["list"] = True
    passes = []
    for place, part in enumerate(output if form["returns"] else ()):
        if place and isinstance(part, torch.Tensor):
            given = (k for k, v in call.tensors().items() if v.dtype == part.dtype and torch.equal(v, part))
            passes += [[place, key] for key in itertools.islice(given, 1)]
    return form | ({"passes": passes} if passes else {})
