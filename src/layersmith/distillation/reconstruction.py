"""Output reconstruction: the last projection of a pruned subblock, refitted in closed form.

Let a subblock end in y = W a, and what is left of it in V b, with V a slice of W. The projection whose output is
nearest the parent's in the mean square, V being preferred where the data do not tell, minimises

    E|W' b - W a|^2 + lambda |W' - V|^2,   so   W' = V + (E[W a b^T] - V E[b b^T]) (E[b b^T] + lambda)^-1.

Where units are silenced and nothing else changes, b is a part of a, and E[a a^T] tells it for all alternatives of a
subblock at once. Where b is something else it is watched while the alternative runs: KV heads that are averaged, query
heads that are given another KV head, a window, norms over what is left. Which of both it is, is tried.

Of experts that lie in one stack no module's input tells the channels, so there is nothing to watch; their alternatives
are trained only. Products are in float32, sums and solutions in float64.

Shapes: D outputs, F inputs of the parent's projection, K of the alternative's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layersmith.execution.exchange import first_tensor
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.modeling_layersmith import _first_tensor as first_argument

# Lambda as a fraction of the mean of E[b_k^2].
RIDGE = 1e-3
_ALIKE = {torch.float32: 1e-4, torch.float64: 1e-8}

Run = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def refit(weight: torch.Tensor, moment: torch.Tensor, cross: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """W' as in the module's docstring.

    Args:
        weight: V, ``[D, K]``.
        moment: E[b b^T], ``[K, K]``.
        cross: E[W a b^T], ``[D, K]``.
        ridge: lambda as a fraction of the mean of E[b_k^2].

    Returns:
        ``[D, K]`` float64.
    """
    own, moment = weight.double(), moment.double()
    strength = ridge * moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.linalg.cholesky(moment + strength * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))
    return own + torch.cholesky_solve((cross.double() - own @ moment).T, factor).T


@dataclass(frozen=True)
class Refit:
    """An alternative whose last projection is refitted.

    Attributes:
        alternative: which.
        module: the stage of the layer that it changes, with it in it.
        weight: name of the projection's weight in the layer.
        dim: the dimension of the weight that its input has.
        left: entries of a that b is, or None where b is something else.
    """

    alternative: Alternative
    module: nn.Module
    weight: str
    dim: int
    left: torch.Tensor | None

    @property
    def projection(self) -> str:
        return self.weight.removesuffix(".weight")


@contextmanager
def watched(module: nn.Module, name: str) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """While open, notes inputs and outputs of a submodule, ``[tokens, entries]`` each; outputs without the bias."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    own = module.get_submodule(name)

    def note(reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        y = first_tensor(output)
        bias = getattr(reader, "bias", None)
        y = y - bias if isinstance(bias, torch.Tensor) else y
        seen.append((first_argument(args, kwargs).flatten(0, -2), y.flatten(0, -2)))

    handle = own.register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def refits(
    library: Library,
    alternatives: Sequence[Alternative],
    stage: nn.Module,
    module_of: Callable[[Alternative], nn.Module],
    run: Run,
    probe: torch.Tensor,
) -> list[Refit]:
    """Those of a stage's alternatives that have a projection to refit, found by running each on a few tokens.

    Args:
        library: of the alternatives.
        alternatives: of one subblock of one layer.
        stage: the parent's stage.
        module_of: gives what stands in the stage's place.
        run: a module on hidden states that the stage is given.
        probe: such hidden states, of a few tokens.
    """
    found = []
    for a in alternatives:
        reader = library.reader(a)
        if reader is None:
            continue
        (weight, dim), module = reader, module_of(a)
        name = weight.removesuffix(".weight")
        with watched(stage, name) as of_parent:
            run(stage, probe)
        with watched(module, name) as own:
            run(module, probe)
        if len(of_parent) != 1 or len(own) != 1 or len(of_parent[0][0]) != len(own[0][0]):
            continue  # it is called several times, or on other tokens
        left = _left(library, a, of_parent[0][0], own[0][0])
        found.append(Refit(a, module, weight, dim, left))
    return found


def _left(library: Library, a: Alternative, of_parent: torch.Tensor, own: torch.Tensor) -> torch.Tensor | None:
    """Entries of the parent's projection's input that an alternative's has, if that is all there is to it."""
    gone = library.units_gone(a)
    if gone is None or len(gone) != 1:
        return None
    is_left = torch.ones(of_parent.shape[-1], dtype=torch.bool)
    is_left[next(iter(gone.values()))] = False
    left = is_left.nonzero()[:, 0].to(of_parent.device)
    if len(left) != own.shape[-1]:
        return None
    expected = of_parent[:, left]
    most = expected.float().abs().max().clamp_min(1e-12)
    is_alike = bool((expected - own).float().abs().max() <= _ALIKE.get(own.dtype, 3e-2) * most)
    return left if is_alike else None


class Moments:
    """Sums over tokens that refit a stage's alternatives."""

    def __init__(self, stage: nn.Module, refitted: Sequence[Refit], run: Run, count: Callable[[float], None]):
        self.stage, self.refitted, self.run, self._count = stage, refitted, run, count
        self._sums: dict[str, torch.Tensor] = {}
        self.tokens = 0

    @torch.no_grad()
    def add(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Add what the stage is given; what it gives, or None if it need not be run."""
        if not self.refitted:
            return None
        names = sorted({r.projection for r in self.refitted})
        seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        output = self._watch(self.stage, names, hidden, seen)
        for name in names:
            if any(r.left is not None and r.projection == name for r in self.refitted):
                ((a, _),) = seen[name]
                self._add(name, a, a)
        for r in self.refitted:
            if r.left is None:
                own: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
                self._watch(r.module, [r.projection], hidden, own)
                ((b, _),) = own[r.projection]
                ((_, y),) = seen[r.projection]
                self._add(f"{r.alternative.identity} moment", b, b)
                self._add(f"{r.alternative.identity} cross", y, b)
        self.tokens += hidden.shape[0] * hidden.shape[1]
        return output

    def _watch(
        self, module: nn.Module, names: Sequence[str], hidden: torch.Tensor, seen: dict[str, list[Any]]
    ) -> torch.Tensor:
        if not names:
            return self.run(module, hidden)
        with watched(module, names[0]) as seen[names[0]]:
            return self._watch(module, names[1:], hidden, seen)

    def _add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        product = (x.float().T @ y.float()).double()
        self._count(2.0 * x.shape[0] * x.shape[1] * y.shape[1])
        self._sums[name] = self._sums[name] + product if name in self._sums else product

    def refitted_weights(self, library: Library) -> dict[str, dict[str, torch.Tensor]]:
        """Identity of an alternative to its refitted weight by name, in the checkpoint's dtype."""
        result = {}
        for r in self.refitted:
            layer = library.parent.layer(r.alternative.layer)
            own = library.sliced(r.alternative).get(r.weight, layer.state_dict()[r.weight])
            own = own.detach().movedim(r.dim, 1).double()  # [D, K]
            if r.left is not None:
                moment = self._sums[r.projection]
                whole = layer.get_parameter(r.weight).detach().movedim(r.dim, 1).double()
                cross, moment = whole @ moment[:, r.left], moment[r.left][:, r.left]
            else:
                cross, moment = (self._sums[f"{r.alternative.identity} {what}"] for what in ("cross", "moment"))
            refitted = refit(own, moment / self.tokens, cross / self.tokens)
            outputs, size = own.shape
            self._count(size**3 / 3 + 4.0 * outputs * size**2)
            weight = refitted.movedim(1, r.dim).contiguous()
            result[r.alternative.identity] = {r.weight: weight.to(library.parent.dtype)}
        return result
