"""Remove a subblock from a layer. Each no-op is proved before it is offered.

The logits with the no-op must equal, bit for bit, the logits with the subblock's output set to zero ("silenced").
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from layersmith.model_descriptor.experiment import Outcome
from layersmith.model_descriptor.infer.specimen import (
    Specimen,
    cache_argument,
    experiment,
    first_tensor_of,
    with_first_tensor,
)
from layersmith.model_descriptor.infer.subblocks import LayerKind, Record, Subblock
from layersmith.model_descriptor.stock import stock_model
from layersmith.modeling_layersmith import heterogeneous_layers, make_replacement
from layersmith.upstream import output_size_attribute

Replaced = tuple[tuple[str, Record], ...]


def proved(specimen: Specimen, layer_names: Sequence[str], kind: LayerKind, notes: list[str]) -> LayerKind:
    """The kind of layer with only the no-ops that are proved.

    Args:
        specimen: The small model.
        layer_names: Layers of the kind in which a no-op has to hold. They differ in the layer that follows them, which
            may use the output of a subblock in another way.
        kind: The kind as the experiments on the first of these layers show it.
        notes: Gets a line for each no-op that does not hold.
    """
    attention, ffn = (
        subblock if subblock is None or not subblock.removable else _first_that_holds(specimen, layer_names, subblock)
        for subblock in (kind.attention, kind.ffn)
    )
    shared: Replaced = ()
    if attention is not None and ffn is not None and attention.removable and ffn.removable:
        together = Subblock(attention.modules + ffn.modules, attention.replaced + ffn.replaced + kind.shared)
        if kind.shared and _tried(specimen, layer_names, together)[1] is None:
            shared = kind.shared
    layer_class = type(specimen.model.get_submodule(layer_names[0])).__name__
    for name, subblock in (("attention", attention), ("ffn", ffn)):
        if subblock is not None and not subblock.removable:
            notes.append(f"No {name} no-op in {layer_class}: {subblock.reason}.")
    return LayerKind(attention, ffn, shared, kind.owners)


def _first_that_holds(specimen: Specimen, layer_names: Sequence[str], subblock: Subblock) -> Subblock:
    """The subblock with the proved no-op that removes most, or with the experiment that refuted the first no-op."""
    first_refuted = None
    for replaced in _candidates(subblock):
        proved_no_op, refuted = _tried(specimen, layer_names, Subblock(subblock.modules, replaced))
        if refuted is None:
            return Subblock(subblock.modules, proved_no_op)
        first_refuted = first_refuted or refuted
    return _last_part(specimen, layer_names, subblock) or Subblock(subblock.modules, refuted=first_refuted)


def _candidates(subblock: Subblock) -> Iterator[Replaced]:
    """No-ops to try: with all modules around the subblock, with those that return a tensor, and with none of them."""
    modules = [r for r in subblock.replaced if r[0] in subblock.modules]
    around = [r for r in subblock.replaced if r[0] not in subblock.modules]
    simple = [r for r in around if not r[1].get("returns")]
    # A layer may expect a tuple from the original class alone, and a tensor from any other module.
    bare = [(name, {k: v for k, v in record.items() if k not in ("returns", "names")}) for name, record in modules]
    for inner, outer in itertools.product((modules, bare), (around, simple, [])):
        yield (*inner, *outer)


def _last_part(specimen: Specimen, layer_names: Sequence[str], subblock: Subblock) -> Subblock | None:
    """A no-op that removes only the last part of a subblock, because other layers use what the rest computes.

    Other layers may use its keys and values, or the state of its router. The no-op replaces the last module inside the
    subblock without which the subblock returns zeros. Modules before the subblock stay, even if gradients show no use
    of them, since gradients do not pass through a selection of tokens.
    """
    if len(subblock.modules) != 1:
        return None
    prefix, outer = f"{layer_names[0]}.", f"{layer_names[0]}.{subblock.modules[0]}"
    inside = [
        name
        for name, module in specimen.model.get_submodule(outer).named_modules(prefix=outer)
        if name != outer and any(p.ndim >= 2 for p in module.parameters())
    ]
    ends = {call.name: call.end for call in specimen.trace(specimen.ids, keep=())}
    for name in sorted(inside, key=lambda name: -ends.get(name, 0)):
        calls = []
        with experiment(f"Does the model run with zeros from {name}?"), specimen.silenced({name: None}):
            calls = specimen.trace(specimen.ids, keep=[outer, name])
        begin = {call.name.removeprefix(prefix): call.begin for call in reversed(calls)}
        outputs = {call.name: call.output for call in calls if call.name in (outer, name)}
        given = first_tensor_of(outputs.get(outer))
        if given is None or bool(given.any()) or name not in outputs:
            continue
        record: Record = {
            "is": "zeros",
            "returns": len(outputs[name]) if isinstance(outputs[name], tuple | list) else 0,
        }
        if size := output_size_attribute(specimen.model.get_submodule(name)):
            record["size"] = size
        around = [r for r in subblock.replaced if r[0] not in subblock.modules and not r[1].get("returns")]
        around = [r for r in around if begin[r[0]] > begin[subblock.modules[0]]]
        for kept in (around, []) if around else ([],):
            replaced = ((name.removeprefix(prefix), record), *kept)
            proved_no_op, refuted = _tried(specimen, layer_names, Subblock(subblock.modules, replaced))
            if refuted is None:
                return Subblock(subblock.modules, proved_no_op, stays=True)
    return None


# ---------------------------------------------------------------------------------------------- one no-op


def _tried(specimen: Specimen, layer_names: Sequence[str], subblock: Subblock) -> tuple[Replaced, Outcome | None]:
    """Try a no-op in one layer after another, until an experiment refutes it.

    Returns:
        The replacements, with the attributes that the model reads from the original modules, and the experiment that
        refutes the no-op, or None.
    """
    asked: dict[str, set[str]] = {name: set() for name, _ in subblock.replaced}
    for layer_name in layer_names:
        trial = _Trial(specimen, layer_name, subblock)
        if (refuted := trial.refuted()) is not None:
            return (), refuted
        asked = {name: attributes | trial.asked[name] for name, attributes in asked.items()}
    return _with_attributes(subblock.replaced, asked), None


def _with_attributes(replaced: Replaced, asked: Mapping[str, set[str]]) -> Replaced:
    return tuple(
        (name, record | {"asked": sorted(asked[name])} if asked[name] else record) for name, record in replaced
    )


class _Trial:
    """One no-op, tried in one layer.

    Attributes:
        asked: For every replaced module the attributes that the model reads from it.
    """

    def __init__(self, specimen: Specimen, layer_name: str, subblock: Subblock):
        self.specimen, self.layer_name, self.subblock = specimen, layer_name, subblock
        self.asked: dict[str, set[str]] = {name: set() for name, _ in subblock.replaced}

    def refuted(self) -> Outcome | None:
        """The experiment that refutes the no-op; None if it is proved."""
        layer = self.specimen.model.get_submodule(self.layer_name)
        removed = f"without {' and '.join(self.subblock.modules)} of {self.layer_name}"
        question = f"Does the model run {removed}?"
        wanted = seen = cached = None
        with experiment(question) as attempt:
            wanted = self._silenced()
            cached = self._run_with_cache()
            with self._replaced(layer):
                seen = self.specimen.run()
                self._run_from_cache(cached)
                self._build(type(layer))
        if attempt.failed or wanted is None or seen is None:
            return Outcome(question, False, f"the model does not run with it ({attempt.reason})")
        if not torch.equal(wanted, seen):
            change = float((wanted - seen).abs().max() / wanted.abs().max())
            reason = f"its logits differ by {change:.0e} of the largest from those with the subblock's output silenced"
            return Outcome(f"Does silencing the output have the same effect as running {removed}?", False, reason)
        return self._refuted_afresh(removed, fills_cache=cached is not None)

    def _silenced(self) -> torch.Tensor:
        """The logits with the subblock's output silenced."""
        records, prefix = dict(self.subblock.replaced), f"{self.layer_name}."
        silenced = {prefix + name: records.get(name, {}).get("of") for name in self.subblock.modules}
        # A norm after the subblock is removed with it, so its output for zeros is silenced too.
        after = [prefix + name for name, record in self.subblock.replaced if record["is"] == "same"]
        with self.specimen.silenced(silenced), silent_stay_silent(self.specimen.model, after):
            return self.specimen.run()

    def _run_with_cache(self) -> Any:
        """The output of a run with a cache; None if the model does not run with one."""
        output = None
        with torch.no_grad(), experiment("Does the model run with a cache?"):
            output = self.specimen.model(input_ids=self.specimen.ids, use_cache=True)
        return output

    @contextmanager
    def _replaced(self, layer: nn.Module) -> Iterator[None]:
        """While open, the layer has the no-op, and attributes that the model reads from its modules are recorded."""
        originals = {name: layer.get_submodule(name) for name in self.asked}
        try:
            for name, record in self.subblock.replaced:
                self._put(layer, name, record)
            yield
        finally:
            for name, module in originals.items():
                layer.set_submodule(name, module)

    def _put(self, layer: nn.Module, name: str, record: Record) -> None:
        original = layer.get_submodule(name)
        layer.set_submodule(name, _Asked(original, _replacement(original, record), self.asked[name]))

    def _run_from_cache(self, cached: Any) -> None:
        """Run with a cache and then one more token, because the model may read other attributes then."""
        model, ids, name = self.specimen.model, self.specimen.ids, cache_argument(self.specimen.model)
        with torch.no_grad(), experiment("Does the model fill a cache and continue from it?"):
            model(input_ids=ids, use_cache=True)
            if isinstance(cached, Mapping) and name in cached:
                mask = torch.ones(1, ids.shape[1] + 1, dtype=torch.long)
                model(input_ids=ids[:, :1], use_cache=True, **{name: cached[name], "attention_mask": mask})

    def _build(self, layer_class: type[nn.Module]) -> None:
        """Build a model with the no-op, because building may read other attributes of the modules."""

        def finish(layer: nn.Module, index: int) -> None:
            for name, record in self.subblock.replaced:
                with suppress(AttributeError):  # another kind of layer
                    self._put(layer, name, record)

        with (
            experiment("Can the model be built with it?"),
            heterogeneous_layers([layer_class], lambda layer_config, index: layer_config, finish),
        ):
            stock_model(self.specimen.config)

    def _refuted_afresh(self, removed: str, fills_cache: bool) -> Outcome | None:
        """The experiment on a fresh model that refutes the no-op; None if none does.

        The first run of a model may read attributes that later runs do not, e.g. to scale the weights of all layers.

        Args:
            removed: The no-op in words.
            fills_cache: Whether the original model fills its cache.
        """
        ids = self.specimen.ids
        fresh = stock_model(self.specimen.config, "cpu", torch.float32).eval()
        final = copy.deepcopy(fresh)
        for name, record in self.subblock.replaced:
            self._put(fresh.get_submodule(self.layer_name), name, record)
        with torch.no_grad(), experiment("Does a fresh model run with it?"):
            fresh(input_ids=ids, use_cache=False)
        for name, record in _with_attributes(self.subblock.replaced, self.asked):
            put(final.get_submodule(self.layer_name), name, record)
        question = f"Does a fresh model run {removed}?"
        with torch.no_grad(), experiment(question) as attempt:
            final(input_ids=ids, use_cache=False)
        if attempt.failed:
            return Outcome(question, False, f"the model does not run with it ({attempt.reason})")
        question = f"Does a fresh model fill its cache {removed}?"
        with torch.no_grad(), experiment(question) as attempt:
            final(input_ids=ids, use_cache=True)
        # These errors show that a removed module is missing; a cache may refuse for other reasons.
        if fills_cache and isinstance(attempt.error, AttributeError | TypeError | KeyError):
            return Outcome(question, False, f"the model does not fill its cache with it ({attempt.reason})")
        return None


def _replacement(original: nn.Module, record: Record) -> nn.Module:
    size = record.get("size")
    return make_replacement(record | {"size": getattr(original, size)} if size else record)


@contextmanager
def silent_stay_silent(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """While open, these modules return zeros if all their inputs are zeros."""

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
    """A replacement that notes which attributes the model reads from the original module."""

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


def put(layer: nn.Module, name: str, record: Record) -> None:
    """Replace a module of a layer; the replacement has the attributes that the model reads from the original."""
    record = dict(record)
    original = layer.get_submodule(name)
    values = {attribute: getattr(original, attribute) for attribute in record.pop("asked", ())}
    plain = {attribute: value for attribute, value in values.items() if not isinstance(value, torch.Tensor)}
    empty = [attribute for attribute, value in values.items() if isinstance(value, torch.Tensor)]
    kept = ({"attributes": plain} if plain else {}) | ({"empty": empty} if empty else {})
    layer.set_submodule(name, _replacement(original, record | kept))
