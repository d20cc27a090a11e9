"""Second-order scores: all alternatives of all layers from one forward and a few backward passes of the parent.

At the parent the divergence KL(p || q) is zero and flat, so to second order it is half of the quadratic form of the
Fisher information. Let delta_t be what an alternative changes in the hidden states after its stage at token t, J_st the
Jacobian of the logits at position s with respect to those hidden states, and F_s = diag(p_s) - p_s p_s^T the Fisher
information of the parent's distribution at s. Then

    KL = 1/2 sum_s (sum_t J_st delta_t)^T F_s (sum_t J_st delta_t) + O(delta^3).

With signs xi_s in {-1, 1}^V, independent, v_s = sqrt(p_s) xi_s - p_s (sqrt(p_s) . xi_s) has E[v_s v_s^T] = F_s, so one
backward pass of sum_s v_s . z_s gives g_t = sum_s J_st^T v_s with

    KL ~ 1/2 E[(sum_t g_t . delta_t)^2] ~ 1/2 sum_t E[(g_t . delta_t)^2].

The second step leaves out how changes at different tokens work together; their sum has a far larger variance than the
terms that are kept. The same g serves all alternatives; it does not depend on them.

What only silences units at the input a of the projection W that reads them (narrower FFNs, fewer heads) needs no run
of its own: with u the gradient at its output and h = W^T u that at its input, g . delta = - sum over silenced i of
h_i a_i. Where the projection was refitted to what is left of its input, b, to W', it is g . delta = u . (W' b - W a).

Signs instead of labels drawn from p, which have the same second moment, vary less; docs/measurements/scoring.md
compares them.

Shapes: B rows, T tokens, D hidden, V vocabulary, F units of a reader's input, n alternatives.
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
from layersmith.scoring.exact import spans
from layersmith.scoring.forward import plan_start, read, start_all
from layersmith.scoring.work import Plan, Work, share_of_layer

# Tokens on which sizes of changes are measured: more cost a longer first run, fewer give noisier sizes.
_PROBE_TOKENS = 32
# Relative tolerance at which silencing units counts as equal to running the alternative, by precision.
_ALIKE, _ALIKE_IN_HALF = 1e-3, 5e-2
# Weights of the remaining time, in forward passes that take as long; they don't influence scores. Of a head: what a
# softmax takes of a head that is measured. Of a layer: norms and activations, which weigh more in a backward pass; and
# the readers of refitted alternatives. benchmarks/time_left.py shows how near the remaining time comes.
_SOFTMAX, _BACKWARD, _REFITTED = 0.6, 1.5, 0.2


# What an alternative takes away: module of a layer to the entries of its input that become zero.
Silencing = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Survey:
    """What is known of alternatives from a few tokens.

    Attributes:
        size: identity of an alternative to the root mean square over tokens of how large its change is beside the
            hidden states after its stage.
        silencing: of those alternatives that do nothing more.
        refitted: the same of those of which the weight of the one reader was refitted besides.
    """

    size: dict[str, float] = field(default_factory=dict)
    silencing: dict[str, Silencing] = field(default_factory=dict)
    refitted: dict[str, Silencing] = field(default_factory=dict)

    def of(self, a: Alternative) -> Silencing:
        """What an alternative silences; nothing where it has to be run."""
        return self.silencing.get(a.identity) or self.refitted.get(a.identity) or {}


class _Layer:
    """A layer's alternatives, on one batch: by stage."""

    def __init__(self, staged: LayerwiseParent, i: int, batch: Batch, hidden: torch.Tensor, work: Work):
        self.staged, self.i, self.batch, self.work = staged, i, batch, work
        self.stages = staged.split(i, batch, hidden)

    def module(self, subblock: str) -> nn.Module:
        """What runs without alternatives."""
        module: nn.Module = self.staged.layers[self.i]
        return module if self.stages.layout == "whole" else getattr(self.stages, subblock)

    def run(self, subblock: str, hidden: torch.Tensor) -> torch.Tensor:
        return self.staged.run(self.batch, self.i, hidden, self.module(subblock))

    def changed(self, alternative: Alternative, hidden: torch.Tensor) -> torch.Tensor:
        with self.work.doing("build", 1.0):
            module = self.staged.module_of(alternative, self.stages)
        return self.staged.run(self.batch, self.i, hidden, module)


@torch.no_grad()
def look(
    staged: LayerwiseParent, alternatives: Sequence[Alternative], rows: torch.Tensor, work: Work | None = None
) -> Survey:
    """How large every change is, and which alternatives only silence units, tried on the start of a row.

    Args:
        staged: the parent.
        alternatives: without the parent's own.
        rows: ``[B, T]``.
        work: told of what is done.
    """
    work = work or Work()
    batch = staged.start(rows[:1, :_PROBE_TOKENS])
    hidden, found = batch.embedded, Survey()
    tried: dict[Hashable, bool] = {}
    for i in range(len(staged.layers)):
        read(staged, i, work)
        of_layer = [a for a in alternatives if a.layer == i]
        with work.doing("look", len(of_layer)):
            layer = _Layer(staged, i, batch, hidden, work)
            whole = staged.run(batch, i, hidden)
            middle = layer.run("attention", hidden) if layer.stages.layout == "sequence" else hidden
            for subblock, given in (("attention", hidden), ("ffn", middle)):
                own = [a for a in of_layer if a.subblock == subblock]
                if own:
                    _look_at(staged, layer, own, given, found, tried)
            hidden = whole
            del layer  # it holds on to weights
    return found


def _look_at(
    staged: LayerwiseParent,
    layer: _Layer,
    own: Sequence[Alternative],
    given: torch.Tensor,
    found: Survey,
    tried: dict[Hashable, bool],
) -> None:
    """Add what is to be known of the alternatives of one subblock."""
    subblock = own[0].subblock
    before = layer.run(subblock, given)
    silent = _silencing(staged, layer, own, given, before, tried)
    for a in own:
        if a.identity in silent:
            refitted, silencing = silent[a.identity]
            (found.refitted if refitted else found.silencing)[a.identity] = silencing
            after = _silenced(layer, a, given, silencing, refitted)
        else:
            after = layer.changed(a, given)
        found.size[a.identity] = _relative(after - before, before)


def _relative(change: torch.Tensor, beside: torch.Tensor) -> float:
    ratio = change.float().norm(dim=-1) / beside.float().norm(dim=-1).clamp_min(1e-12)
    return float(ratio.square().mean().sqrt())


def _silencing(
    staged: LayerwiseParent,
    layer: _Layer,
    own: Sequence[Alternative],
    given: torch.Tensor,
    before: torch.Tensor,
    tried: dict[Hashable, bool],
) -> dict[str, tuple[bool, Silencing]]:
    """Of a stage's alternatives those that only silence units, and whether the reader of these was refitted.

    The smallest of each kind is tried, in one layer of every distinct shape; ``tried`` remembers.
    """
    if layer.stages.layout == "whole":
        return {}
    library = staged.builder
    kinds: dict[tuple[str, str, bool], list[Alternative]] = {}
    for a in own:
        kinds.setdefault((a.kind, a.method, library.refitted(a) is not None), []).append(a)
    result: dict[str, tuple[bool, Silencing]] = {}
    for kind, members in kinds.items():
        refitted = kind[2]
        entries = {a.identity: library.refitted(a) if refitted else library.silenced(a) for a in members}
        own_result = {identity: e for identity, e in entries.items() if e is not None}
        if len(own_result) < len(members):
            continue
        smallest = min(members, key=lambda a: a.size)
        key = (kind, smallest.size, key_of(staged.layers[layer.i], given))
        if key not in tried:
            expected = layer.changed(smallest, given)
            silencing = own_result[smallest.identity]
            with _watched(layer.module(smallest.subblock), list(silencing)) as (inputs, _):
                made = _silenced(layer, smallest, given, silencing, refitted)
            tolerance = _ALIKE if given.dtype == torch.float32 else _ALIKE_IN_HALF
            most = (expected - before).float().abs().max()
            is_alike = bool((made - expected).float().abs().max() <= tolerance * most)
            # A reader that is given some tokens only, or some twice, does not tell which is which.
            tried[key] = is_alike and all(x[..., 0].numel() == given[..., 0].numel() for x in inputs.values())
        if tried[key]:
            result.update({identity: (refitted, e) for identity, e in own_result.items()})
    return result


def _silenced(layer: _Layer, a: Alternative, given: torch.Tensor, silencing: Silencing, refitted: bool) -> torch.Tensor:
    """What a stage gives with units of it silenced, and what reads them refitted."""

    def silence(name: str, x: torch.Tensor) -> torch.Tensor:
        return x.index_fill(-1, silencing[name].to(x.device), 0)

    def refit(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        left, weight = _refitted(layer.staged, a, silencing[name], x)
        return x[..., left] @ weight.T + _bias(layer.module(a.subblock).get_submodule(name))

    with _changed(layer.module(a.subblock), list(silencing), silence, refit if refitted else None):
        return layer.run(a.subblock, given)


def _bias(reader: nn.Module) -> torch.Tensor | float:
    bias = getattr(reader, "bias", None)
    return bias if isinstance(bias, torch.Tensor) else 0.0


def _refitted(
    staged: LayerwiseParent, a: Alternative, gone: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries ``[K]`` of its parent's input that a refitted reader has, and its weight ``[D, K]``."""
    reader = staged.builder.reader(a)
    assert reader is not None
    is_left = torch.ones(x.shape[-1], dtype=torch.bool)
    is_left[gone.cpu()] = False
    weight = staged.builder.kept.of(a.identity)[reader[0]].to(x.device, x.dtype)
    return is_left.nonzero()[:, 0].to(x.device), weight.movedim(reader[1], 1)


@contextmanager
def _watched(
    module: nn.Module, names: Sequence[str]
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """While open, notes what modules of a stage are given and what they give."""
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
    """While open, modules of a stage are given, and give, what is made of their names, inputs and outputs."""

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


# ---------------------------------------------------------------------------------------------- the sweep


@dataclass
class _Sums:
    """Sums over the tokens of each row of a batch, ``[B]`` by identity of an alternative."""

    squares: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, own: Sequence[Alternative], products: Sequence[torch.Tensor]) -> None:
        """Add the squares over tokens of ``[B, T]`` products g . delta."""
        for a, product in zip(own, products, strict=True):
            total = product.square().sum(-1).double().cpu()
            self.squares[a.identity] = self.squares[a.identity] + total if a.identity in self.squares else total


def estimate(
    staged: LayerwiseParent,
    alternatives: Sequence[Alternative],
    found: Survey,
    batches: Sequence[torch.Tensor],
    seeds: Sequence[Sequence[Sequence[int]]],
    states: States,
    work: Work | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Second-order estimates of KL in nats a token, on every row.

    A layer is done with all batches before the next begins.

    Args:
        staged: the parent.
        alternatives: without the parent's own.
        found: what :func:`look` found of them.
        batches: rows of token ids, ``[B, T]`` each.
        seeds: for each batch and each backward pass one seed a row.
        states: where hidden states wait.
        work: told of what is done.

    Returns:
        For each batch identity of an alternative to ``[B]`` float64.
    """
    work = work or Work()
    numbers = range(len(batches))
    depth = len(staged.layers)
    started = start_all(staged, batches, states, work)
    for n, (rows, own_seeds) in enumerate(zip(batches, seeds, strict=True)):
        with work.doing("head back", _amount_of_head(staged, len(own_seeds), rows.shape)):
            for k, g in enumerate(_of_the_head(staged, rows, states.pop(("parent", depth, n)), own_seeds)):
                states.put(("gradient", k, n), g)
    by_place: dict[tuple[int, str], list[Alternative]] = {}
    for a in alternatives:
        by_place.setdefault((a.layer, a.subblock), []).append(a)
    sums = [_Sums() for _ in numbers]
    for i in reversed(range(depth)):
        own = {subblock: by_place.get((i, subblock), []) for subblock in ("attention", "ffn")}
        read(staged, i, work)
        for n in numbers:
            amount = _amount_back(staged, found, i, [*own["attention"], *own["ffn"]], len(seeds[n]), batches[n].shape)
            with work.doing("back", amount):
                hidden = states.pop(("parent", i, n))
                layer = _Layer(staged, i, started[n], hidden, work)
                cotangents = [states.pop(("gradient", k, n)) for k in range(len(seeds[n]))]
                for k, g in enumerate(_through(layer, own, found, hidden, cotangents, sums[n])):
                    states.put(("gradient", k, n), g)
                del layer, hidden, cotangents, g  # they hold on to weights
    for n in numbers:
        for k in range(len(seeds[n])):
            states.pop(("gradient", k, n))
    scales = [0.5 / (len(own) * rows.shape[1]) for own, rows in zip(seeds, batches, strict=True)]
    return [{a: total * scale for a, total in own.squares.items()} for own, scale in zip(sums, scales, strict=True)]


def plan_estimate(
    staged: LayerwiseParent,
    alternatives: Sequence[Alternative],
    found: Survey,
    shapes: Sequence[torch.Size],
    samples: int,
    plan: Plan,
) -> None:
    """Tell what :func:`estimate` will do on batches of shapes ``[B, T]``."""
    depth = len(staged.layers)
    plan_start(staged, shapes, plan)
    if staged.streamed:
        plan("reading", depth)
    by_layer = [[a for a in alternatives if a.layer == i] for i in range(depth)]
    for shape in shapes:
        plan("build", sum(not found.of(a) for a in alternatives))
        plan("head back", _amount_of_head(staged, samples, shape))
        plan("back", sum(_amount_back(staged, found, i, own, samples, shape) for i, own in enumerate(by_layer)))


def _amount_of_head(staged: LayerwiseParent, samples: int, shape: torch.Size) -> float:
    """As many operations of a head that is measured as take the same time: its metrics take more than a softmax."""
    return (_SOFTMAX + samples) * staged.head_operations(*shape)


def _amount_back(
    staged: LayerwiseParent, found: Survey, i: int, own: Sequence[Alternative], samples: int, shape: torch.Size
) -> float:
    """About what a layer takes in :func:`estimate`, in operations of a forward pass.

    Norms and activations weigh more in a backward pass than in a forward one, beside as many matrix products.
    """
    run = sum(share_of_layer(a) for a in own if not found.of(a))
    read = _REFITTED * sum(share_of_layer(a) for a in own if a.identity in found.refitted)
    return (1 + _BACKWARD * samples + run + read) * staged.operations(i, i + 1, *shape)


def _through(
    layer: _Layer,
    own: dict[str, list[Alternative]],
    found: Survey,
    hidden: torch.Tensor,
    cotangents: list[torch.Tensor],
    sums: _Sums,
) -> list[torch.Tensor]:
    """Score a layer's alternatives, and take the cotangents from its output to its input."""
    layout = layer.stages.layout
    if layout == "whole":
        return _Pass(layer, "attention", own["attention"] + own["ffn"], found, hidden).back(cotangents, sums)
    attention = _Pass(layer, "attention", own["attention"], found, hidden)
    if layout == "parallel":
        of_both = [p.back(cotangents, sums) for p in (_Pass(layer, "ffn", own["ffn"], found, hidden), attention)]
        return [a + b - g for a, b, g in zip(*of_both, cotangents, strict=True)]
    cotangents = _Pass(layer, "ffn", own["ffn"], found, attention.output.detach()).back(cotangents, sums)
    return attention.back(cotangents, sums)


class _Pass:
    """One stage of the parent, run so that gradients can be taken."""

    def __init__(
        self, layer: _Layer, subblock: str, own: Sequence[Alternative], found: Survey, given: torch.Tensor
    ) -> None:
        self.layer, self.subblock, self.own, self.found = layer, subblock, own, found
        readers = sorted({name for a in own for name in found.of(a)})
        self.given = given.detach().requires_grad_()
        with torch.enable_grad(), _watched(layer.module(subblock), readers) as (self.inputs, self.outputs):
            self.output = layer.run(subblock, self.given)

    def back(self, cotangents: list[torch.Tensor], sums: _Sums) -> list[torch.Tensor]:
        """Add what each alternative gives to its sum; returns the cotangents at what the stage was given."""
        silent = [a for a in self.own if a.identity in self.found.silencing]
        refitted = [a for a in self.own if a.identity in self.found.refitted]
        inputs = self.inputs if silent else {}
        outputs = {name: self.outputs[name] for a in refitted for name in self.found.of(a)}
        wanted = [self.given, *inputs.values(), *outputs.values()]
        last = len(cotangents) - 1
        grads = [self._gradients(wanted, g, keep=k < last) for k, g in enumerate(cotangents)]
        with torch.no_grad():
            if silent:
                at_inputs = [dict(zip(inputs, own[1:], strict=False)) for own in grads]
                self._add_silent(silent, at_inputs, sums)
            if refitted:
                at_outputs = [dict(zip(outputs, own[1 + len(inputs) :], strict=True)) for own in grads]
                self._add_refitted(refitted, at_outputs, sums)
            for a in self.own:
                if not self.found.of(a):
                    with self.layer.staged.arithmetic.needs():
                        change = (self.layer.changed(a, self.given.detach()) - self.output).float()
                    for g in cotangents:
                        sums.add([a], [torch.linalg.vecdot(g.float(), change)])
        return [own_grads[0] for own_grads in grads]

    def _add_silent(self, silent: Sequence[Alternative], grads: list[dict[str, torch.Tensor]], sums: _Sums) -> None:
        masks = _masks(silent, self.found, {name: x.shape[-1] for name, x in self.inputs.items()})
        for own in grads:
            products = [(self.inputs[name] * at).float() @ masks[name].to(at.device) for name, at in own.items()]
            # Some modules are given the tokens of all rows in one dimension.
            total = torch.stack(products).sum(0).view(*self.given.shape[:2], -1)
            sums.add(silent, total.unbind(-1))

    def _add_refitted(self, refitted: Sequence[Alternative], grads: list[dict[str, torch.Tensor]], sums: _Sums) -> None:
        staged, module = self.layer.staged, self.layer.module(self.subblock)
        for a in refitted:
            ((name, gone),) = self.found.of(a).items()
            x, y = self.inputs[name], self.outputs[name]
            left, weight = _refitted(staged, a, gone, x)
            change = x[..., left] @ weight.T - (y - _bias(module.get_submodule(name)))
            with staged.arithmetic.needs():
                staged.arithmetic.add(2.0 * x[..., 0].numel() * weight.numel())
            for own in grads:
                product = torch.linalg.vecdot(own[name].float(), change.float())
                sums.add([a], [product.view(self.given.shape[:2])])

    def _gradients(self, wanted: list[torch.Tensor], g: torch.Tensor, keep: bool) -> tuple[torch.Tensor, ...]:
        module, arithmetic = self.layer.module(self.subblock), self.layer.staged.arithmetic
        with arithmetic.needs():
            arithmetic.count_backward(key_of(module, g))
        return torch.autograd.grad(self.output, wanted, g, retain_graph=keep)


def _masks(silent: Sequence[Alternative], found: Survey, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """For each reader ``[F, n]``: 1 where an alternative silences an entry."""
    masks = {name: torch.zeros(size, len(silent)) for name, size in sizes.items()}
    for column, a in enumerate(silent):
        for name, entries in found.silencing[a.identity].items():
            masks[name][entries, column] = 1
    return masks


# ---------------------------------------------------------------------------------------------- the head


def _of_the_head(
    staged: LayerwiseParent, rows: torch.Tensor, hidden: torch.Tensor, seeds: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Cotangents ``[B, T, D]`` at what the last layer gives, one for each backward pass."""
    generators = [[torch.Generator().manual_seed(seed) for seed in own] for own in seeds]
    result = [torch.empty_like(hidden) for _ in seeds]
    for start, end in spans(rows, staged.vocab_size):
        part = hidden[:, start:end].detach().requires_grad_()
        with torch.enable_grad(), staged.arithmetic.needs():
            logits, _ = staged.head(rows[:, start:end], part)
        p = logits.detach().float().softmax(-1)
        for k, own in enumerate(generators):
            v = drawn(p, own).to(logits.dtype)
            keep = k + 1 < len(generators)
            (result[k][:, start:end],) = torch.autograd.grad(logits, part, v, retain_graph=keep)
            with staged.arithmetic.needs():
                staged.arithmetic.count_backward(("head", part.shape))
    return result


def drawn(p: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """v of the module's docstring for distributions ``[B, T, V]``, each row by a generator of its own."""
    signed = _signs(generators, p.shape[1], p.shape[-1], p.device) * p.sqrt()
    return torch.addcmul(signed, p, signed.sum(-1, keepdim=True), value=-1, out=signed)


_SIGN_BITS = 16
_sign_table: dict[torch.device, torch.Tensor] = {}


def _signs(generators: Sequence[torch.Generator], tokens: int, size: int, device: torch.device) -> torch.Tensor:
    """``[B, tokens, size]`` of -1 and 1, each row from a generator of its own.

    Sixteen at once are looked up by random bits: several times faster than to draw them one by one.
    """
    if device not in _sign_table:
        bits = (torch.arange(2**_SIGN_BITS)[:, None] >> torch.arange(_SIGN_BITS)) & 1
        _sign_table[device] = (2.0 * bits - 1).to(device)
    words = -(-size // 64)
    drawn = [torch.empty(tokens, words, dtype=torch.int64).random_(-(2**63), None, generator=g) for g in generators]
    halves = torch.stack(drawn).view(torch.int16).to(device, torch.int32) + 2 ** (_SIGN_BITS - 1)
    return torch.nn.functional.embedding(halves, _sign_table[device]).flatten(-2)[..., :size]
