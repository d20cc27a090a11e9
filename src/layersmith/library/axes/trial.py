"""The second step after find: runs changed layers in place of the parent's, and tries guesses of layouts on them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from layersmith.block_config import BlockConfig
from layersmith.errors import first_line
from layersmith.execution.exchange import forward_with, hands_over, layer_outputs, output_of, share_buffers, tolerance
from layersmith.execution.parent import Parent
from layersmith.library.axes.axis import HeadsAxis, HeadSizeAxis, LayerAxes
from layersmith.library.axes.layers import meta_layers

_MOST_GUESSES = 48  # layouts of a layer's weights to try; there are seldom more than six
_SMALL = 1e-4  # epsilons of norms are below it; other numbers of modules are seldom

Slice = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
Kill = Callable[[nn.Module], None]


class Fails(Exception):
    """An axis does not hold; the message says why."""


class Trial:
    """Runs layers of a parent, and other layers in their place, on a few tokens."""

    def __init__(self, parent: Parent, tokens: torch.Tensor):
        self.parent, self.tokens = parent, tokens.to(parent.runtime.device)
        hands_over(parent)  # tried now, not while hooks observe a layer
        _, _, self.outputs = layer_outputs(parent, self.tokens)
        self.tolerance = tolerance(parent.runtime.dtype)
        self._before: dict[int, torch.Tensor] = {}
        self._skeletons: dict[str, nn.Module] = {}

    def output(self, i: int, layer: nn.Module) -> torch.Tensor:
        """The output of a layer in the place of layer ``i``."""
        return output_of(layer, lambda: forward_with(self.parent, self.tokens, self.outputs, i, layer))

    def run(self, i: int, layer: nn.Module) -> torch.Tensor:
        """The logits with a layer in the place of layer ``i``; its output where no other layer takes more from it."""
        if hands_over(self.parent):
            return self.output(i, layer)
        return forward_with(self.parent, self.tokens, self.outputs, i, layer)[0]

    def difference(self, i: int, block: BlockConfig, kill: Kill, cut: Slice, prepare: Kill | None = None) -> float:
        """The largest difference between layer ``i`` with dead units and with them removed, relative to its update.

        Args:
            i: Index of the layer.
            block: The block config with units removed.
            kill: Makes units of a layer dead.
            cut: Slices the layer's tensors.
            prepare: Changes both layers before they run.
        """
        original = self.parent.layer(i)
        with_dead = copy.deepcopy(original)
        self.parent.let_go()
        with torch.no_grad():
            kill(with_dead)
        narrower = self.built(i, block)
        tensors = dict(with_dead.state_dict())
        tensors |= cut(tensors)
        narrower.load_state_dict({name: tensors[name] for name in narrower.state_dict()}, strict=True, assign=True)
        share_buffers(original, narrower)
        if prepare is not None:
            for layer in (with_dead, narrower):
                prepare(layer)
        seen = [self.output(i, with_dead), self.output(i, narrower.eval())]
        del with_dead, narrower, tensors
        update = (seen[0] - self.before(i)).float().abs().max().clamp_min(1e-12)
        self.parent.let_go()
        return float((seen[0] - seen[1]).float().abs().max() / update)

    def built(self, i: int, block: BlockConfig) -> nn.Module:
        """Layer ``i`` with another block config, on the meta device; the same for every guess."""
        key = f"{i} {block.to_json()}"
        if key not in self._skeletons:
            blocks = [block if other == self.parent.blocks[i] else other for other in self.parent.blocks]
            self._skeletons[key] = meta_layers(self.parent.descriptor, self.parent.config, blocks)[i]
        return copy.deepcopy(self._skeletons[key])

    def before(self, i: int) -> torch.Tensor:
        """The hidden states that are the input of layer ``i``."""
        if i not in self._before:
            self._before[i] = next(t for t in self.inputs(i, "") if t.ndim >= 2)
        return self._before[i]

    def inputs(self, i: int, module: str) -> list[torch.Tensor]:
        """The floating-point tensors that a module of layer ``i`` is called with."""
        layer, seen = self.parent.layer(i), list[torch.Tensor]()

        def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            seen.extend(t for t in tensors if t.is_floating_point())

        handle = layer.get_submodule(module).register_forward_pre_hook(watch, with_kwargs=True)
        try:
            self.output(i, layer)
        finally:
            handle.remove()
        return seen


def alike(trial: Trial, i: int, axes: LayerAxes) -> tuple[object, ...]:
    """A key that is equal for layers with the same answers to all trials."""
    parent = trial.parent
    layer = parent.layers[i]
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in layer.state_dict().items())
    types = getattr(parent.language_config, "layer_types", None)
    # With a window, layers that pass on more than hidden states may differ although their shapes are equal.
    alone = -1 if hands_over(parent) or not axes.window else i
    return type(layer), shapes, repr(axes), repr(parent.blocks[i]), types[i] if types else "", alone


G = TypeVar("G")


def first_that_holds(trial: Trial, guesses: Iterator[G], difference: Callable[[G], float], what: str) -> G:
    """The first guess with which removing dead units changes the output by less than the tolerance.

    Raises:
        Fails: No guess holds.
    """
    least, problem = float("inf"), ""
    for guess in itertools.islice(guesses, _MOST_GUESSES):
        try:
            change = difference(guess)
        except (RuntimeError, ValueError, KeyError, IndexError, AssertionError) as error:
            problem = first_line(error)  # weights do not fit, or the family's code refuses these sizes
            continue
        if change < trial.tolerance:
            return guess
        least = min(least, change)
    if least == float("inf"):
        raise Fails(f"removing {what} fails ({problem})")
    raise Fails(f"removing {what} changes the layer's output by {least:.1e}, so the slice is not understood")


def twice(trial: Trial, difference: Callable[..., float], guess: Any, **how: Any) -> float:
    """The larger difference of two trials that keep different units: units that stay may be dead in the parent."""
    first = difference(guess, others_stay=False, **how)
    return first if first >= trial.tolerance else max(first, difference(guess, others_stay=True, **how))


def dead_or_copies(trial: Trial, guesses: Callable[[], Iterator[G]], difference: Callable[..., float], what: str) -> G:
    """The first guess with which dead units can be removed.

    If no guess holds, the units to remove are first made copies of those that stay. A norm over all units, or another
    statistic of them, is then the same before and after.
    """
    return first_success(
        partial(first_that_holds, trial, guesses(), partial(difference, copies=copies), what)
        for copies in (False, True)
    )


def first_success(attempts: Iterable[Callable[[], G]]) -> G:
    """The result of the first attempt that does not fail.

    Raises:
        Fails: All attempts fail; the reason is that of the first.
    """
    problem: Fails | None = None
    for attempt in attempts:
        try:
            return attempt()
        except Fails as reason:
            problem = problem or reason
    raise problem or Fails("nothing was tried")


def ways_that_hold(
    trial: Trial,
    axis: HeadsAxis,
    ways: Sequence[str],
    guesses: Iterable[HeadsAxis],
    difference: Callable[..., float],
    refused: Callable[[str, str], None] = lambda way, reason: None,
) -> HeadsAxis:
    """The axis with the layout of its heads, and with the ways to reduce them that hold.

    Args:
        trial: Runs layers of the parent.
        axis: The axis before the proof.
        ways: Names of the flags of :class:`HeadsAxis`, in the order in which they are tried.
        guesses: Axes with the possible layouts; the first that holds for one way is used for the next.
        difference: Gives the change of the output for a way and a guess, with or without copies of units that stay.
        refused: Receives a way that does not hold, and the reason.
    """
    held: list[str] = []
    problem: Fails | None = None
    options = list(itertools.islice(guesses, _MOST_GUESSES))
    for way in ways:
        if not getattr(axis, way):
            continue
        try:
            options = [dead_or_copies(trial, partial(iter, options), partial(difference, way), "dead heads")]
            held.append(way)
        except Fails as reason:
            problem = problem or reason
            refused(way, str(reason))
    if not held:
        raise problem or Fails("it has one head")
    holds: dict[str, Any] = {way: way in held for way in ways}
    return dataclasses.replace(options[0], **holds)


def others(size: int, kept: torch.Tensor) -> torch.Tensor:
    """The units that do not stay, in order."""
    gone = torch.ones(size, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero().flatten()


def without_small_numbers(layer: nn.Module) -> None:
    """Set the epsilons of a layer's norms to zero: the small floats among the attributes of its modules."""
    for module in layer.modules():
        for name, value in list(vars(module).items()):
            if type(value) is float and 0 < value < _SMALL:
                setattr(module, name, 0.0)


def copy_units(weight: torch.Tensor, dim: int, places: torch.Tensor, kept: torch.Tensor, gone: torch.Tensor) -> None:
    """Make the removed units copies of those that stay, in turn."""
    source = kept[torch.arange(len(gone)) % len(kept)]
    moved = weight.movedim(dim, 0)
    moved[places[gone].to(weight.device)] = moved[places[source].to(weight.device)]


def made_dead(
    axis: HeadsAxis | HeadSizeAxis,
    part: str,
    gone: torch.Tensor,
    copied: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> Kill:
    """A function that makes units of a layer's heads dead: the reader ignores them.

    Args:
        axis: The axis of the heads.
        part: The part of the reader that the units belong to.
        gone: The units.
        copied: By part, the units to copy in all weights but the reader, and the units that become copies.
    """

    def kill(layer: nn.Module) -> None:
        state = layer.state_dict()
        for w in axis.weights:
            for copied_part, (source, copies) in copied.items():
                if w.name != axis.reader and any(s.part == copied_part for s in w.segments):
                    copy_units(state[w.name], w.dim, w.positions(copied_part, axis.sizes), source, copies)
        reader = axis.weight(axis.reader)
        reader.silence(state[reader.name], reader.positions(part, axis.sizes)[gone].flatten())

    return kill
