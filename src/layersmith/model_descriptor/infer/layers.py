"""Where a model's layers, embedding, head and final norm are, seen in one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from layersmith.errors import UnsupportedModel
from layersmith.model_descriptor.infer.specimen import Call, Specimen, first_tensor_of
from layersmith.model_descriptor.stock import stock_model
from layersmith.modeling_layersmith import own_layers


@dataclass(frozen=True)
class Structure:
    """Module names of a model.

    Attributes:
        layers: of the list that holds the decoder layers.
        num_layers: how many are in it.
        embedding, head: of the input embedding and the language-model head.
        final_norm: of the norm before the head; empty if there is none.
        after: the modules with weights that run after the last layer, final norm and head included.
        rotary: modules outside the layers that hold buffers which a ``state_dict`` does not.
    """

    layers: str
    num_layers: int
    embedding: str
    head: str
    final_norm: str
    after: tuple[str, ...]
    rotary: tuple[str, ...]


def find_structure(specimen: Specimen) -> Structure:
    """Look at one run of a specimen.

    Raises:
        UnsupportedModel: what is wanted is not there, with what was found instead.
    """
    model = specimen.model
    calls = specimen.trace(specimen.ids)
    layers, num_layers = _find_layers(model, calls)
    prefix = f"{layers}."
    inside = [call for call in calls if call.name.startswith(prefix)]
    last_end = max(call.end for call in inside)
    names = {id(module): name for name, module in model.named_modules()}
    holders = {name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}

    embedding = _own(model, names, "get_input_embeddings")
    if embedding is None or not any(call.name == embedding for call in calls):
        embedding = next(
            (c.name for c in calls if isinstance(model.get_submodule(c.name), nn.Embedding) and c.end < last_end), None
        )
    if embedding is None:
        raise UnsupportedModel("no module takes the token ids, so the input embedding cannot be told.")
    after = [c for c in calls if c.begin > last_end and c.name in holders and not c.name.startswith(prefix)]
    head = _own(model, names, "get_output_embeddings")
    if head is None or not any(c.name == head for c in after):
        vocab = specimen.logits.shape[-1]
        outputs = [(c.name, first_tensor_of(c.output)) for c in after]
        head = next((name for name, out in reversed(outputs) if out is not None and out.shape[-1] == vocab), None)
    if head is None:
        raise UnsupportedModel("no module after the layers gives the logits, so the head cannot be told.")
    norm = next((c.name for c in after if c.name != head and _is_norm(model.get_submodule(c.name), c)), "")
    if not norm:  # a norm without weights
        bare = [c for c in calls if c.begin > last_end and c.name and not list(model.get_submodule(c.name).children())]
        norm = next((c.name for c in bare if c.name != head and not c.name.startswith(prefix) and _changes(c)), "")
    saved = set(model.state_dict())
    rotary = tuple(
        name
        for name, module in model.named_modules()
        if not name.startswith(prefix) and _has_unsaved_buffers(name, module, saved)
    )
    return Structure(layers, num_layers, embedding, head, norm, tuple(dict.fromkeys(c.name for c in after)), rotary)


def _find_layers(model: nn.Module, calls: list[Call]) -> tuple[str, int]:
    """The outermost list of modules, all of which run once, one after another, that holds the most weights."""
    counts: dict[str, int] = {}
    for call in calls:
        counts[call.name] = counts.get(call.name, 0) + 1
    found: list[tuple[int, str, int]] = []
    looped = idle = ""
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(name.startswith(f"{outer}.") for _, outer, _ in found):
            continue
        runs = [counts.get(f"{name}.{i}", 0) for i in range(len(module))]
        size = sum(p.numel() for p in module.parameters())
        if runs and all(n == 1 for n in runs) and size:
            found.append((size, name, len(module)))
        elif runs and all(runs) and not looped:
            looped = name
        elif any(runs) and not all(runs) and len({type(layer) for layer in module}) > 1 and not idle:
            idle = f"{runs.count(0)} of the {len(runs)} layers in {name}"
    if not found:
        if looped:
            raise UnsupportedModel(
                f"layers in {looped} run more than once in a forward pass; one that is replaced would change all its "
                "passes."
            )
        if idle:
            raise UnsupportedModel(f"on text alone {idle} do not run, and what does not run cannot be seen.")
        raise UnsupportedModel("no list of modules runs one after another, so its layers cannot be told.")
    _, name, length = max(found)
    return name, length


def _has_unsaved_buffers(name: str, module: nn.Module, saved: Collection[str]) -> bool:
    buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    return any(f"{name}.{buffer}".removeprefix(".") not in saved for buffer, _ in buffers)


def _own(model: nn.Module, names: dict[int, str], method: str) -> str | None:
    try:
        module = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    return names.get(id(module))


def _is_norm(module: nn.Module, call: Call) -> bool:
    """Keeps the shape, and has no weight of more than one dimension."""
    output, given = first_tensor_of(call.output), first_tensor_of(list(call.tensors().values()))
    flat = all(p.ndim <= 1 for p in module.parameters())
    return flat and output is not None and given is not None and output.shape == given.shape


def _changes(call: Call) -> bool:
    output, given = first_tensor_of(call.output), first_tensor_of(list(call.tensors().values()))
    if output is None or given is None or output.shape != given.shape or output.ndim != 3:
        return False
    return not torch.equal(output, given)


def without_attention(specimen: Specimen, layers: str) -> str:
    """Why no attention was found."""
    first = f"{layers}.0"
    own, other = (
        next(call for call in specimen.trace(ids, keep=[first]) if call.name == first).tensors().values()
        for ids in (specimen.ids, specimen.other_ids)
    )
    taken = [pair for pair in zip(own, other, strict=False) if pair[0].is_floating_point() and pair[0].ndim >= 2]
    if taken and torch.equal(*taken[0]):
        return (
            f"the layers in {layers} are not given the text: it goes to an encoder, and they see what that makes of it."
        )
    return f"no layer in {layers} is seen to let one token of the text see another: its attention is somewhere else."


def check_configurable(config: PretrainedConfig, classes: Sequence[type[nn.Module]]) -> None:
    """Each layer must be made from a config, or layers cannot differ."""
    try:
        with own_layers(classes, lambda own, index: own, lambda layer, index: None):
            stock_model(config)
    except TypeError as error:
        raise UnsupportedModel(f"{error}: it is put together from modules that several layers share.") from error


def groups_outside(model: nn.Module, structure: Structure) -> dict[str, str]:
    """What runs after the last layer goes with the head; everything else outside the layers with the embedding."""
    inside = f"{structure.layers}."
    after = tuple(f"{name}." for name in structure.after)
    # Buffers that are saved belong somewhere too, so the state_dict counts, not the parameters.
    names = [name for name in model.state_dict() if not name.startswith(inside)]
    return {name: "lm_head" if name.startswith(after) else "embedding" for name in names}
