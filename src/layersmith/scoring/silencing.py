"""A first look at alternatives: the size of each change, and which alternatives only silence units.

The score of an alternative that only silences units of a reader's input, or also refits the reader's weight, follows
from gradients at the reader, without a run of the alternative (:mod:`layersmith.scoring.second_order`). Whether an
alternative is of this sort is tested by experiment: its output must equal that of the parent's subblock with silenced
units.

Shapes: B rows, T tokens, D hidden, K kept entries of a reader's input.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layersmith.execution.hidden_states import States
from layersmith.execution.layerwise import Batch, LayerwiseParent, key_of
from layersmith.library.alternative import Alternative
from layersmith.run import ranks
from layersmith.scoring.forward import read
from layersmith.scoring.work import Work

# Tokens on which sizes of changes are measured: more make the first run longer, fewer make the sizes noisier.
_PROBE_TOKENS = 32
# Relative tolerance at which silencing units counts as equal to running the alternative, by precision.
_ALIKE, _ALIKE_IN_HALF = 1e-3, 5e-2

# Name of a module of a layer to the entries of its input that an alternative sets to zero.
Silencing = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Survey:
    """Properties of alternatives, measured on a few tokens.

    Attributes:
        size: Identity of an alternative to the norm of its change relative to the hidden states after its subblock, as
            root mean square over tokens.
        silencing: Identity of an alternative that only silences units to these units.
        refitted: The same for alternatives that also have the weight of their only reader refitted.
    """

    size: dict[str, float] = field(default_factory=dict)
    silencing: dict[str, Silencing] = field(default_factory=dict)
    refitted: dict[str, Silencing] = field(default_factory=dict)

    def of(self, a: Alternative) -> Silencing:
        """The units that an alternative silences; empty if it has to be run."""
        return self.silencing.get(a.identity) or self.refitted.get(a.identity) or {}


class ParentLayer:
    """The subblocks of a layer, which run on one batch with or without an alternative."""

    def __init__(self, layerwise: LayerwiseParent, i: int, batch: Batch, hidden: torch.Tensor, work: Work):
        self.layerwise, self.i, self.batch, self.work = layerwise, i, batch, work
        self.stages = layerwise.split(i, batch, hidden)

    def module(self, subblock: str) -> nn.Module:
        """The parent's module for a subblock."""
        module: nn.Module = self.layerwise.layers[self.i]
        return module if self.stages.layout == "whole" else getattr(self.stages, subblock)

    def run(self, subblock: str, hidden: torch.Tensor) -> torch.Tensor:
        return self.layerwise.run(self.batch, self.i, hidden, self.module(subblock))

    def changed(self, alternative: Alternative, hidden: torch.Tensor) -> torch.Tensor:
        with self.work.doing("build", 1.0):
            module = self.layerwise.module_of(alternative, self.stages)
        return self.layerwise.run(self.batch, self.i, hidden, module)


@torch.no_grad()
def look(
    layerwise: LayerwiseParent, alternatives: Sequence[Alternative], rows: torch.Tensor, work: Work | None = None
) -> Survey:
    """Measure the size of every change, and which alternatives only silence units, on the first tokens of a row.

    All processes of a launcher call this, look at some layers each, and return what all have seen.

    Args:
        layerwise: The parent, run layer by layer.
        alternatives: The alternatives, without the parent's subblocks.
        rows: Token ids ``[B, T]``.
        work: Counts and times the work.
    """
    if not ranks.are_several():
        return _look(layerwise, alternatives, rows, States(), work or Work(), range(len(layerwise.layers)))

    def look_here() -> Survey:
        with layerwise.division.shared(States()) as states:
            return _look(layerwise, alternatives, rows, states, work or Work(), layerwise.division.mine)

    of_all = Survey()
    for survey in ranks.from_each(look_here):
        of_all.size.update(survey.size)
        of_all.silencing.update(survey.silencing)
        of_all.refitted.update(survey.refitted)
    return of_all


def _look(
    layerwise: LayerwiseParent,
    alternatives: Sequence[Alternative],
    rows: torch.Tensor,
    states: States,
    work: Work,
    layers: Sequence[int],
) -> Survey:
    """:func:`look` at some layers, whose inputs are ``("input", i)``."""
    batch = layerwise.start(rows[:1, :_PROBE_TOKENS])
    survey = Survey()
    tried: dict[Hashable, bool] = {}
    if 0 in layers:
        states.put(("input", 0), batch.embedded)
    for i in layers:
        read(layerwise, i, work)
        of_layer, hidden = [a for a in alternatives if a.layer == i], states.pop(("input", i))
        with work.doing("look", len(of_layer)):
            states.put(("input", i + 1), layerwise.run(batch, i, hidden))
            layer = ParentLayer(layerwise, i, batch, hidden, work)
            middle = layer.run("attention", hidden) if layer.stages.layout == "sequence" else hidden
            for subblock, given in (("attention", hidden), ("ffn", middle)):
                of_subblock = [a for a in of_layer if a.subblock == subblock]
                if of_subblock:
                    _look_at(layer, of_subblock, given, survey, tried)
            del layer  # frees its weights
    return survey


def _look_at(
    layer: ParentLayer,
    alternatives: Sequence[Alternative],
    given: torch.Tensor,
    survey: Survey,
    tried: dict[Hashable, bool],
) -> None:
    """Add the alternatives of one subblock to the survey."""
    subblock = alternatives[0].subblock
    before = layer.run(subblock, given)
    silent = _silencing(layer, alternatives, given, before, tried)
    for a in alternatives:
        if a.identity in silent:
            refitted, silencing = silent[a.identity]
            (survey.refitted if refitted else survey.silencing)[a.identity] = silencing
            after = _silenced(layer, a, given, silencing, refitted)
        else:
            after = layer.changed(a, given)
        survey.size[a.identity] = _relative(after - before, before)


def _relative(change: torch.Tensor, reference: torch.Tensor) -> float:
    ratio = change.float().norm(dim=-1) / reference.float().norm(dim=-1).clamp_min(1e-12)
    return float(ratio.square().mean().sqrt())


def _silencing(
    layer: ParentLayer,
    alternatives: Sequence[Alternative],
    given: torch.Tensor,
    before: torch.Tensor,
    tried: dict[Hashable, bool],
) -> dict[str, tuple[bool, Silencing]]:
    """Those alternatives of a subblock that only silence units, and whether their reader was refitted.

    The smallest alternative of each kind is tested in one layer of every distinct shape; ``tried`` keeps the results.
    """
    if layer.stages.layout == "whole":
        return {}
    layerwise, library = layer.layerwise, layer.layerwise.builder
    kinds: dict[tuple[str, str, bool], list[Alternative]] = {}
    for a in alternatives:
        kinds.setdefault((a.kind, a.method, library.refitted(a) is not None), []).append(a)
    result: dict[str, tuple[bool, Silencing]] = {}
    for kind, members in kinds.items():
        refitted = kind[2]
        entries = {a.identity: library.refitted(a) if refitted else library.silenced(a) for a in members}
        known = {identity: e for identity, e in entries.items() if e is not None}
        if len(known) < len(members):
            continue
        smallest = min(members, key=lambda a: a.size)
        key = (kind, smallest.size, key_of(layerwise.layers[layer.i], given))
        if key not in tried:
            expected = layer.changed(smallest, given)
            silencing = known[smallest.identity]
            with watched(layer.module(smallest.subblock), list(silencing)) as (inputs, _):
                made = _silenced(layer, smallest, given, silencing, refitted)
            tolerance = _ALIKE if given.dtype == torch.float32 else _ALIKE_IN_HALF
            most = (expected - before).float().abs().max()
            is_alike = bool((made - expected).float().abs().max() <= tolerance * most)
            # Inputs of a reader that gets only some tokens, or some twice, cannot be assigned to tokens.
            tried[key] = is_alike and all(x[..., 0].numel() == given[..., 0].numel() for x in inputs.values())
        if tried[key]:
            result.update({identity: (refitted, e) for identity, e in known.items()})
    return result


def _silenced(
    layer: ParentLayer, a: Alternative, given: torch.Tensor, silencing: Silencing, refitted: bool
) -> torch.Tensor:
    """The output of a subblock with silenced units, and with a refitted reader if ``refitted``."""

    def silence(name: str, x: torch.Tensor) -> torch.Tensor:
        return x.index_fill(-1, silencing[name].to(x.device), 0)

    def refit(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        left, weight = refitted_reader(layer.layerwise, a, silencing[name], x)
        return x[..., left] @ weight.T + bias_of(layer.module(a.subblock).get_submodule(name))

    with _changed(layer.module(a.subblock), list(silencing), silence, refit if refitted else None):
        return layer.run(a.subblock, given)


def bias_of(reader: nn.Module) -> torch.Tensor | float:
    bias = getattr(reader, "bias", None)
    return bias if isinstance(bias, torch.Tensor) else 0.0


def refitted_reader(
    layerwise: LayerwiseParent, a: Alternative, gone: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries ``[K]`` of the parent's input that a refitted reader keeps, and its weight ``[D, K]``."""
    reader = layerwise.builder.reader(a)
    assert reader is not None
    is_left = torch.ones(x.shape[-1], dtype=torch.bool)
    is_left[gone.cpu()] = False
    weight = layerwise.builder.kept.of(a.identity)[reader[0]].to(x.device, x.dtype)
    return is_left.nonzero()[:, 0].to(x.device), weight.movedim(reader[1], 1)


@contextmanager
def watched(
    module: nn.Module, names: Sequence[str]
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Record the inputs and outputs of some modules of a subblock while the context is open."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def note(name: str, given: torch.Tensor) -> torch.Tensor:
        inputs[name] = given
        return given

    def note_output(name: str, given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        outputs[name] = output
        return output

    with _changed(module, names, note, note_output):
        yield inputs, outputs


@contextmanager
def _changed(
    module: nn.Module,
    names: Sequence[str],
    change_input: Callable[[str, torch.Tensor], torch.Tensor],
    change_output: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor] | None,
) -> Iterator[None]:
    """Replace the inputs, and perhaps the outputs, of some modules of a subblock while the context is open."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda reader, args: (change_input(name, args[0]), *args[1:])

    def output_hook(name: str, change: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
        return lambda reader, args, output: change(name, args[0], output)

    handles = [module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    if change_output is not None:
        handles += [module.get_submodule(n).register_forward_hook(output_hook(n, change_output)) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
