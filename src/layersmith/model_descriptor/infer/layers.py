"""Find a model's layers, embedding, head and final norm by observing one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from layersmith.errors import UnsupportedModel
from layersmith.foreign import foreign_code
from layersmith.model_descriptor.infer.specimen import Call, Specimen, first_tensor_of
from layersmith.model_descriptor.stock import stock_model
from layersmith.modeling_layersmith import heterogeneous_layers


@dataclass(frozen=True)
class Structure:
    """Module names of a model.

    Attributes:
        layers: The list that holds the decoder layers.
        num_layers: The number of layers in it.
        embedding, head: The input embedding and the language-model head.
        final_norm: The norm before the head; empty if the model has none.
        after: Modules with weights that run after the last layer, final norm and head included.
        rotary: Modules outside the layers with buffers that a ``state_dict`` does not hold.
    """

    layers: str
    num_layers: int
    embedding: str
    head: str
    final_norm: str
    after: tuple[str, ...]
    rotary: tuple[str, ...]


def find_structure(specimen: Specimen) -> Structure:
    """Observe one run of a specimen.

    Raises:
        UnsupportedModel: A part cannot be identified.
    """
    model = specimen.model
    calls = specimen.trace(specimen.ids)
    layers, num_layers = _find_layers(model, calls)
    prefix = f"{layers}."
    last_end = max(call.end for call in calls if call.name.startswith(prefix))
    late = [call for call in calls if call.begin > last_end and not call.name.startswith(prefix)]
    holders = {name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    after = [call for call in late if call.name in holders]
    head = _find_head(specimen, after)
    norm = next((c.name for c in after if c.name != head and _is_norm(model.get_submodule(c.name), c)), "")
    if not norm:  # a norm without weights
        bare = [c for c in late if c.name and not list(model.get_submodule(c.name).children())]
        norm = next((c.name for c in bare if c.name != head and _changes(c)), "")
    saved = set(model.state_dict())
    outside = [(name, module) for name, module in model.named_modules() if not name.startswith(prefix)]
    return Structure(
        layers=layers,
        num_layers=num_layers,
        embedding=_find_embedding(specimen, calls, last_end),
        head=head,
        final_norm=norm,
        after=tuple(dict.fromkeys(call.name for call in after)),
        rotary=tuple(name for name, module in outside if _has_unsaved_buffers(name, module, saved)),
    )


def _find_embedding(specimen: Specimen, calls: Sequence[Call], last_end: int) -> str:
    """The input embedding: the one that the model names if it runs, else the first embedding that does."""
    name = _named(specimen.model, "get_input_embeddings")
    if name is not None and any(call.name == name for call in calls):
        return name
    for call in calls:
        if isinstance(specimen.model.get_submodule(call.name), nn.Embedding) and call.end < last_end:
            return call.name
    raise UnsupportedModel("no module takes the token ids, so the input embedding cannot be identified.")


def _find_head(specimen: Specimen, after: Sequence[Call]) -> str:
    """The head: the one that the model names if it runs, else the last module with an output for each token id."""
    name = _named(specimen.model, "get_output_embeddings")
    if name is not None and any(call.name == name for call in after):
        return name
    for call in reversed(after):
        output = first_tensor_of(call.output)
        if output is not None and output.shape[-1] == specimen.logits.shape[-1]:
            return call.name
    raise UnsupportedModel("no module after the layers gives the logits, so the head cannot be identified.")


def _find_layers(model: nn.Module, calls: list[Call]) -> tuple[str, int]:
    """The name and length of the outermost list whose modules each run once; of several the one with most weights."""
    counts: dict[str, int] = {}
    for call in calls:
        counts[call.name] = counts.get(call.name, 0) + 1
    lists: list[tuple[int, str, int]] = []
    looped = idle = ""
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(name.startswith(f"{outer}.") for _, outer, _ in lists):
            continue
        runs = [counts.get(f"{name}.{i}", 0) for i in range(len(module))]
        size = sum(p.numel() for p in module.parameters())
        if runs and all(n == 1 for n in runs) and size:
            lists.append((size, name, len(module)))
        elif runs and all(runs) and not looped:
            looped = name
        elif any(runs) and not all(runs) and len({type(layer) for layer in module}) > 1 and not idle:
            idle = f"{runs.count(0)} of the {len(runs)} layers in {name}"
    if not lists:
        if looped:
            raise UnsupportedModel(
                f"layers in {looped} run more than once in a forward pass; a layer that is replaced would change "
                "in all of them."
            )
        if idle:
            raise UnsupportedModel(f"on text alone {idle} do not run, so they cannot be examined.")
        raise UnsupportedModel("no list of modules runs in sequence, so its layers cannot be identified.")
    _, name, length = max(lists)
    return name, length


def _has_unsaved_buffers(name: str, module: nn.Module, saved: Collection[str]) -> bool:
    buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    return any(f"{name}.{buffer}".removeprefix(".") not in saved for buffer, _ in buffers)


def _named(model: nn.Module, method: str) -> str | None:
    """The name of the module that a method of the model returns."""
    try:
        module = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, other in model.named_modules() if other is module), None)


def _is_norm(module: nn.Module, call: Call) -> bool:
    """Whether a module keeps the shape and has no weight of more than one dimension."""
    output, given = first_tensor_of(call.output), first_tensor_of(list(call.tensors().values()))
    flat = all(p.ndim <= 1 for p in module.parameters())
    return flat and output is not None and given is not None and output.shape == given.shape


def _changes(call: Call) -> bool:
    output, given = first_tensor_of(call.output), first_tensor_of(list(call.tensors().values()))
    if output is None or given is None or output.shape != given.shape or output.ndim != 3:
        return False
    return not torch.equal(output, given)


def why_no_attention(specimen: Specimen, layers: str) -> str:
    """The reason why no layer has an attention."""
    first = f"{layers}.0"
    base, other = (
        next(call for call in specimen.trace(ids, keep=[first]) if call.name == first).tensors().values()
        for ids in (specimen.ids, specimen.other_ids)
    )
    taken = [pair for pair in zip(base, other, strict=False) if pair[0].is_floating_point() and pair[0].ndim >= 2]
    if taken and torch.equal(*taken[0]):
        return f"the layers in {layers} do not read the text itself: an encoder reads it, and they read its output."
    return f"in no layer in {layers} does one token of the text depend on another: its attention is somewhere else."


def check_configurable(config: PretrainedConfig, classes: Sequence[type[nn.Module]]) -> None:
    """Check that each layer is built from a config; otherwise layers cannot differ.

    Raises:
        UnsupportedModel: A layer is built without a config.
    """
    with (
        foreign_code("Is every layer built from a config?", refusal_is_answer=True) as attempt,
        heterogeneous_layers(classes, lambda layer_config, index: layer_config, lambda layer, index: None),
    ):
        stock_model(config)
    if attempt.error is not None:
        raise UnsupportedModel(
            f"{attempt.reason}: it is built from modules that several layers share."
        ) from attempt.error


def groups_outside(model: nn.Module, structure: Structure) -> dict[str, str]:
    """The group of every weight outside the layers: the head if it is used after the last layer, else the embedding."""
    inside = f"{structure.layers}."
    after = tuple(f"{name}." for name in structure.after)
    # Saved buffers need a group too, so this goes through the state_dict rather than the parameters.
    names = [name for name in model.state_dict() if not name.startswith(inside)]
    return {name: "lm_head" if name.startswith(after) else "embedding" for name in names}
