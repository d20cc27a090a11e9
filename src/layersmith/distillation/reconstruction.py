"""Output reconstruction: the last projection of a pruned subblock, refitted by ridge regression.

Let a subblock end in y = W a, and the pruned subblock in V b, where V is a slice of W. The refitted projection W' comes
close to the parent's output, and stays at V where the data do not determine it: it minimises

    E|W' b - W a|^2 + lambda |W' - V|^2,   so   W' = V + (E[W a b^T] - V E[b b^T]) (E[b b^T] + lambda)^-1.

If pruning only removes units, b is a part of a, and E[a a^T] serves all alternatives of a subblock at once. Otherwise b
is recorded while the alternative runs: averaged KV heads, query heads with another KV head, a window, norms over the
remaining units. A short run finds out which of the two it is.

Experts stacked in one tensor expose no input per channel, so they are trained instead of refitted. Products are in
float32, sums and solutions in float64.

Shapes: D outputs, F inputs of the parent's projection, K of the alternative's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layersmith.execution.exchange import first_tensor, tolerance
from layersmith.execution.parent import as_stored
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.modeling_layersmith import first_tensor as first_argument

# Lambda as a fraction of the mean of E[b_k^2]: larger stays nearer V, smaller follows noise of few tokens.
RIDGE = 1e-3

Run = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def refit(weight: torch.Tensor, moment: torch.Tensor, cross: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """W' as in the module's docstring.

    Args:
        weight: V, ``[D, K]``.
        moment: E[b b^T], ``[K, K]``.
        cross: E[W a b^T], ``[D, K]``.
        ridge: Lambda as a fraction of the mean of E[b_k^2].

    Returns:
        ``[D, K]`` float64.
    """
    current, moment = weight.double(), moment.double()
    return current + correction(moment, cross.double() - current @ moment, ridge)


def correction(moment: torch.Tensor, missing: torch.Tensor, ridge: float) -> torch.Tensor:
    """The D that minimises E|D b - y|^2 + lambda |D|^2.

    Args:
        moment: E[b b^T], or its sum over tokens, ``[K, K]`` float64.
        missing: E[y b^T], or its sum, ``[D, K]`` float64.
        ridge: Lambda as a fraction of the mean of E[b_k^2].

    Returns:
        ``[D, K]`` float64.
    """
    strength = ridge * moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    ridged = moment.clone()
    ridged.diagonal().add_(strength)
    factor = torch.linalg.cholesky(ridged)
    del ridged  # of a wide FFN each of these matrices takes gigabytes
    return torch.cholesky_solve(missing.T, factor).T


@dataclass(frozen=True)
class Refit:
    """An alternative whose last projection is refitted.

    Attributes:
        alternative: The alternative.
        module: The part of the layer that it changes, with the alternative in it.
        weight: Name of the projection's weight in the layer.
        dim: Dimension of the weight along its input.
        left: Indices of the entries of a that make up b; None if b is something else.
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
    """While open, records a submodule's inputs and its outputs without bias, ``[tokens, entries]`` each."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    submodule = module.get_submodule(name)

    def record(reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        y = first_tensor(output)
        bias = getattr(reader, "bias", None)
        y = y - bias if isinstance(bias, torch.Tensor) else y
        seen.append((first_argument(args, kwargs).flatten(0, -2), y.flatten(0, -2)))

    handle = submodule.register_forward_hook(record, with_kwargs=True)
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
    """The alternatives of a subblock that have a projection to refit, by running each on a few tokens.

    Args:
        library: Library of the alternatives.
        alternatives: Alternatives of one subblock of one layer.
        stage: The parent's part of the layer.
        module_of: Returns the module that replaces the part.
        run: Runs a module on hidden states.
        probe: Input of the part for a few tokens.
    """
    result = []
    for a in alternatives:
        reader = library.reader(a)
        if reader is None:
            continue
        (weight, dim), module = reader, module_of(a)
        name = weight.removesuffix(".weight")
        with watched(stage, name) as of_parent:
            run(stage, probe)
        with watched(module, name) as of_alternative:
            run(module, probe)
        if len(of_parent) != 1 or len(of_alternative) != 1 or len(of_parent[0][0]) != len(of_alternative[0][0]):
            continue  # the projection is called several times, or on other tokens
        left = _left(library, a, of_parent[0][0], of_alternative[0][0])
        result.append(Refit(alternative=a, module=module, weight=weight, dim=dim, left=left))
    return result


def _left(library: Library, a: Alternative, of_parent: torch.Tensor, trained: torch.Tensor) -> torch.Tensor | None:
    """Indices of the entries that remain of the projection's input, if the alternative changes nothing else."""
    gone = library.units_gone(a)
    if gone is None or len(gone) != 1:
        return None
    is_left = torch.ones(of_parent.shape[-1], dtype=torch.bool)
    is_left[next(iter(gone.values()))] = False
    left = is_left.nonzero()[:, 0].to(of_parent.device)
    if len(left) != trained.shape[-1]:
        return None
    expected = of_parent[:, left]
    most = expected.float().abs().max().clamp_min(1e-12)
    is_alike = bool((expected - trained).float().abs().max() <= tolerance(trained.dtype) * most)
    return left if is_alike else None


class Moments:
    """Sums over tokens from which the alternatives of a subblock are refitted."""

    def __init__(self, stage: nn.Module, refitted: Sequence[Refit], run: Run, count: Callable[[float], None]):
        self.stage, self.refitted, self.run, self._count = stage, refitted, run, count
        self._sums: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Add inputs of the parent's part; returns its output, or None if there is nothing to refit."""
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
                of_alternative: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
                self._watch(r.module, [r.projection], hidden, of_alternative)
                ((b, _),) = of_alternative[r.projection]
                ((_, y),) = seen[r.projection]
                self._add(f"{r.alternative.identity} moment", b, b)
                self._add(f"{r.alternative.identity} cross", y, b)
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
        if not torch.isfinite(product).all():  # squares of large activations overflow float32
            product = x.double().T @ y.double()
        self._count(2.0 * x.shape[0] * x.shape[1] * y.shape[1])
        if name in self._sums:
            self._sums[name] += product
        else:
            self._sums[name] = product

    def refitted_weights(self, library: Library) -> dict[str, dict[str, torch.Tensor]]:
        """Identity of each alternative to its refitted weight by name, in the checkpoint's dtype."""
        result = {}
        for r in self.refitted:
            layer = library.parent.layer(r.alternative.layer)
            weight = library.sliced(r.alternative).get(r.weight, layer.state_dict()[r.weight])
            weight = weight.detach().movedim(r.dim, 1).double()  # V, [D, K]
            outputs, size = weight.shape
            self._count(size**3 / 3 + 2.0 * outputs * size**2)
            if r.left is not None:
                moments = self._sums[r.projection]
                whole = layer.get_parameter(r.weight).detach().movedim(r.dim, 1)
                gone = torch.ones(whole.shape[1], dtype=torch.bool, device=whole.device).index_fill(0, r.left, False)
                # W E[a b^T] less V E[b b^T] is what the removed entries of a contributed.
                missing = whole[:, gone].double() @ moments[gone][:, r.left]
                moment = moments[r.left[:, None], r.left]
                self._count(2.0 * outputs * (whole.shape[1] - size) * size)
            else:
                cross, moment = (self._sums[f"{r.alternative.identity} {what}"] for what in ("cross", "moment"))
                missing = cross - weight @ moment
                self._count(2.0 * outputs * size**2)
            refitted = weight + correction(moment, missing, RIDGE)
            result[r.alternative.identity] = {
                r.weight: as_stored(refitted.movedim(1, r.dim).contiguous(), library.parent.dtype)
            }
        return result
