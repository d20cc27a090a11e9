"""Taking a subblock out of a layer: every no-op is tried before it is offered.

A model with the no-op must give, to the bit, what it gives with the subblock's output silenced.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from layersmith.errors import first_line
from layersmith.model_descriptor.infer.specimen import Specimen, cache_argument, first_tensor_of, with_first_tensor
from layersmith.model_descriptor.infer.subblocks import LayerKind, Record, Subblock
from layersmith.model_descriptor.stock import stock_model
from layersmith.modeling_layersmith import make_replacement, own_layers
from layersmith.upstream import output_size_attribute


def proved(specimen: Specimen, layer_names: Sequence[str], kind: LayerKind, notes: list[str]) -> LayerKind:
    """The kind with the no-ops that hold; where taking away what is around a subblock does not, that stays.

    Args:
        specimen: the model.
        layer_names: layers of the kind, in each of which they have to hold: what a subblock gives may be used by the
            layer after it, or not, as that one is.
        kind: as it was found in the first of them.
        notes: gets a line for each no-op that does not hold.
    """
    layer_name = layer_names[0]
    tried = {}
    for name in ("attention", "ffn"):
        subblock: Subblock | None = getattr(kind, name)
        if subblock is None or not subblock.removable:
            tried[name] = subblock
            continue
        around = [r for r in subblock.replaced if r[0] not in subblock.modules]
        simple = [r for r in around if not r[1].get("returns")]
        reason = ""
        own = [r for r in subblock.replaced if r[0] in subblock.modules]
        # A layer may expect a tuple of its own class of module only, and a tensor of any other.
        bare = [(module, {k: v for k, v in record.items() if k not in ("returns", "names")}) for module, record in own]
        for modules, kept in itertools.product((own, bare), (around, simple, [])):
            replaced = tuple(modules + kept)
            candidate = Subblock(subblock.modules, replaced)
            asked, problem = _try_in_all(specimen, layer_names, candidate)
            reason = reason or problem
            if not problem:
                tried[name] = Subblock(subblock.modules, _with_attributes(replaced, asked))
                break
        else:
            tried[name] = _last_part(specimen, layer_names, subblock) or Subblock(subblock.modules, (), reason)
    both = [s for s in tried.values() if s is not None and s.removable]
    shared = kind.shared if len(both) == 2 else ()
    if len(both) == 2:
        together = Subblock(both[0].modules + both[1].modules, both[0].replaced + both[1].replaced + shared)
        _, problem = _try_in_all(specimen, layer_names, together)
        if problem and shared:
            shared = ()
    for name, subblock in tried.items():
        if subblock is not None and not subblock.removable:
            notes.append(
                f"No {name} no-op in {type(specimen.model.get_submodule(layer_name)).__name__}: {subblock.reason}."
            )
    return LayerKind(tried["attention"], tried["ffn"], shared, kind.owners)


def _try_in_all(specimen: Specimen, layer_names: Sequence[str], subblock: Subblock) -> tuple[dict[str, set[str]], str]:
    """:func:`_try_no_op` in one layer after another, until it does not hold."""
    asked: dict[str, set[str]] = {name: set() for name, _ in subblock.replaced}
    for layer_name in layer_names:
        own, problem = _try_no_op(specimen, layer_name, subblock)
        asked = {name: asked[name] | own[name] for name in asked}
        if problem:
            return asked, problem
    return asked, ""


def _last_part(specimen: Specimen, layer_names: Sequence[str], subblock: Subblock) -> Subblock | None:
    """A no-op that leaves what other layers use, e.g. keys and values or a router's state, and takes what is after it.

    It is the last module inside the subblock without which the subblock gives zeros. What runs before the subblock
    makes what they use, so it stays, though gradients may not say so: they do not pass through a choice of tokens.
    """
    if len(subblock.modules) != 1:
        return None
    layer_name = layer_names[0]
    outer = f"{layer_name}.{subblock.modules[0]}"
    inside = [
        name
        for name, module in specimen.model.get_submodule(outer).named_modules(prefix=outer)
        if name != outer and any(p.ndim >= 2 for p in module.parameters())
    ]
    ends = {call.name: call.end for call in specimen.trace(specimen.ids, keep=())}
    for name in sorted(inside, key=lambda name: -ends.get(name, 0)):
        try:
            with specimen.silenced({name: None}):
                calls = specimen.trace(specimen.ids, keep=[outer, name])
        except Exception:  # a family's own code may not bear zeros here
            continue
        begin = {call.name.removeprefix(f"{layer_name}."): call.begin for call in reversed(calls)}
        outputs = {call.name: call.output for call in calls if call.name in (outer, name)}
        given = first_tensor_of(outputs.get(outer))
        if given is None or bool(given.any()) or name not in outputs:
            continue
        record = {"is": "zeros", "returns": len(outputs[name]) if isinstance(outputs[name], tuple | list) else 0}
        if size := output_size_attribute(specimen.model.get_submodule(name)):
            record["size"] = size
        around = [r for r in subblock.replaced if r[0] not in subblock.modules and not r[1].get("returns")]
        around = [r for r in around if begin[r[0]] > begin[subblock.modules[0]]]
        for kept in (around, []) if around else ([],):
            replaced = ((name.removeprefix(f"{layer_name}."), record), *kept)
            asked, problem = _try_in_all(specimen, layer_names, Subblock(subblock.modules, replaced))
            if not problem:
                replaced = _with_attributes(replaced, asked)
                return Subblock(subblock.modules, replaced, stays=True)
    return None


def _replacement(original: nn.Module, record: Record) -> nn.Module:
    size = record.get("size")
    return make_replacement(record | {"size": getattr(original, size)} if size else record)


def _put_asked(layer: nn.Module, name: str, record: Record, asked: dict[str, set[str]]) -> None:
    """Put what stands for a module in its place, and note there what the model asks of it."""
    original = layer.get_submodule(name)
    layer.set_submodule(name, _Asked(original, _replacement(original, record), asked[name]))


def _try_no_op(specimen: Specimen, layer_name: str, subblock: Subblock) -> tuple[dict[str, set[str]], str]:
    """Run with modules replaced and with their outputs silenced; both must agree to the bit.

    Returns:
        What the model asked of the replaced modules beside calling them, and what went wrong, if anything.
    """
    model = specimen.model
    layer = model.get_submodule(layer_name)
    originals = {name: layer.get_submodule(name) for name, _ in subblock.replaced}
    asked: dict[str, set[str]] = {name: set() for name in originals}
    records = dict(subblock.replaced)
    silenced = {f"{layer_name}.{name}": records.get(name, {}).get("of") for name in subblock.modules}
    after = [f"{layer_name}.{name}" for name, record in subblock.replaced if record["is"] == "same"]
    try:
        # A norm after the subblock goes with it: what it makes of zeros is silenced too.
        with specimen.silenced(silenced), silent_stay_silent(model, after):
            wanted = specimen.run()
        filled, caches, name_of_cache = None, False, cache_argument(model)
        with suppress(Exception), torch.no_grad():
            cached = model(input_ids=specimen.ids, use_cache=True)
            caches = True
            filled = cached[name_of_cache]
        try:
            for name, record in subblock.replaced:
                _put_asked(layer, name, record, asked)
            seen = specimen.run()
            with suppress(Exception), torch.no_grad():  # more may be asked where there is a cache
                model(input_ids=specimen.ids, use_cache=True)
                if filled is not None:
                    mask = torch.ones(1, specimen.ids.shape[1] + 1, dtype=torch.long)
                    told = {name_of_cache: filled, "attention_mask": mask}
                    model(input_ids=specimen.ids[:, :1], use_cache=True, **told)
            _build_asking(specimen, type(layer), subblock, asked)
        finally:
            for name, module in originals.items():
                layer.set_submodule(name, module)
    except Exception as error:  # whatever a family's own code raises
        return asked, f"the model does not run with it ({first_line(error)})"
    if torch.equal(wanted, seen):
        return asked, _afresh(specimen, layer_name, subblock, asked, caches)
    change = float((wanted - seen).abs().max() / wanted.abs().max())
    return (
        asked,
        f"the model gives something else than with the subblock's output silenced (by {change:.0e} of its logits)",
    )


def _build_asking(
    specimen: Specimen, layer_class: type[nn.Module], subblock: Subblock, asked: dict[str, set[str]]
) -> None:
    """Note what a model asks of a subblock's modules while it is built."""

    def finish(layer: nn.Module, index: int) -> None:
        for name, record in subblock.replaced:
            with suppress(AttributeError):  # another kind of layer
                _put_asked(layer, name, record, asked)

    with suppress(Exception), own_layers([layer_class], lambda own, index: own, finish):
        stock_model(specimen.config)


def _afresh(specimen: Specimen, layer_name: str, subblock: Subblock, asked: dict[str, set[str]], caches: bool) -> str:
    """What goes wrong in the first run of a model with the no-op, or when it fills a cache, if anything.

    The first run may ask for what no later one does, e.g. to scale the weights of all layers.
    """
    fresh = stock_model(specimen.config, "cpu", torch.float32).eval()
    real = copy.deepcopy(fresh)
    layer = fresh.get_submodule(layer_name)
    for name, record in subblock.replaced:
        _put_asked(layer, name, record, asked)
    with suppress(Exception), torch.no_grad():
        fresh(input_ids=specimen.ids, use_cache=False)
    for name, record in _with_attributes(subblock.replaced, asked):
        put(real.get_submodule(layer_name), name, record)
    with torch.no_grad():
        try:
            real(input_ids=specimen.ids, use_cache=False)
        except Exception as error:  # whatever a family's own code raises
            return f"the model does not run with it ({first_line(error)})"
        try:
            real(input_ids=specimen.ids, use_cache=True)
        except (AttributeError, TypeError, KeyError) as error:  # it misses something; a cache may say no for others
            if caches:
                return f"the model does not fill its cache with it ({first_line(error)})"
        except Exception:
            pass
    return ""


@contextmanager
def silent_stay_silent(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """While open, these modules give zeros for zeros."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.is_floating_point()]
        if given and not any(bool(v.any()) for v in given):
            return with_first_tensor(output, torch.zeros_like)
        return None

    handles = [model.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Asked(nn.Module):
    """Stands in with a replacement, and notes which attributes of the original are read."""

    def __init__(self, original: nn.Module, replacement: nn.Module, asked: set[str]):
        super().__init__()
        object.__setattr__(self, "_original", original)
        object.__setattr__(self, "_asked", asked)
        self.replacement = replacement

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(object.__getattribute__(self, "_original"), name)
            if isinstance(value, str | int | float | bool | type(None) | torch.Tensor):
                object.__getattribute__(self, "_asked").add(name)
            return value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.replacement(*args, **kwargs)


def _with_attributes(
    replaced: Sequence[tuple[str, Record]], asked: dict[str, set[str]]
) -> tuple[tuple[str, Record], ...]:
    return tuple(
        (name, record | {"asked": sorted(asked[name])} if asked[name] else record) for name, record in replaced
    )


def put(layer: nn.Module, name: str, record: Record) -> None:
    """Put a replacement into a layer; it answers for what the model asks of the module that was there."""
    record = dict(record)
    original = layer.get_submodule(name)
    values = {attribute: getattr(original, attribute) for attribute in record.pop("asked", ())}
    plain = {attribute: value for attribute, value in values.items() if not isinstance(value, torch.Tensor)}
    empty = [attribute for attribute, value in values.items() if isinstance(value, torch.Tensor)]
    more = ({"attributes": plain} if plain else {}) | ({"empty": empty} if empty else {})
    layer.set_submodule(name, _replacement(original, record | more))
