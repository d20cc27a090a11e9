"""Which config attributes set the sizes of an FFN: its width, or the number, width and use of experts.

The number of experts comes and goes with whole matrices, a width changes one side of them. How many a token uses
changes no shape and is counted in gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from layersmith.errors import UnsupportedModel
from layersmith.model_descriptor.experiment import Effect, Shapes
from layersmith.model_descriptor.infer.attributes import AttributePath
from layersmith.model_descriptor.infer.experts import before_digit, experts_used, lie_flat
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.infer.subblocks import LayerKind

if TYPE_CHECKING:
    from layersmith.model_descriptor.infer.sizes import Trial


@dataclass(frozen=True)
class OwnExperts:
    """What an FFN's experts are set by in a layer whose attention has experts too, of one number: what is built of it.

    Attributes:
        weights: of the FFN, and the dimension of each that has an entry for every expert.
        counts: modules of the FFN, and the plain number of each that is that of the experts.
        uses: the same of the number of those that a token uses.
    """

    weights: tuple[tuple[str, int], ...] = ()
    counts: tuple[tuple[str, str], ...] = ()
    uses: tuple[tuple[str, str], ...] = ()


class FFNSizes:
    """What the attributes of one kind's FFN are: the number of experts, and widths in and beside them.

    Attributes:
        count: the attribute that is the number of experts; None if there are none.
        number: of experts.
        of_both: whether it is the number of the attention's experts too.
        flat: weights in which experts lie one after another along the first dimension.
        members: weights of experts.
    """

    def __init__(self, trial: Trial, kind: LayerKind, base: Shapes, effects: dict[AttributePath, Effect]):
        self.trial, self.base, self.kind = trial, base, kind
        ffn = kind.ffn
        inside = () if ffn is None else tuple(f"{n}." for n in (*ffn.modules, *(name for name, _ in ffn.replaced)))
        self.effects = {
            path: effect
            for path, effect in effects.items()
            if all(n.startswith(inside) for n in (*effect.shapes, *effect.came_or_went))
        }
        counts = [path for path in self.effects if self._is_count(path)]
        self.of_both = not counts and bool(inside)
        if self.of_both:  # the attention may have experts too, and one attribute say the number of either
            parts = {path: _inside(effect, inside) for path, effect in effects.items()}
            self.effects |= (own := {path: part for path, part in parts.items() if part and path not in self.effects})
            counts = [path for path in own if self._is_count(path)]
            self.effects = {path: e for path, e in self.effects.items() if path not in own or path in counts}
            self.of_both = bool(counts)
        self.count = max(counts, key=trial.value, default=None)
        self.number = 0 if self.count is None else trial.value(self.count)
        self.flat = () if self.count is None else self._flat(self.count)
        self.members = self._members()

    def _is_count(self, path: AttributePath) -> bool:
        """Whole matrices come and go: along the first dimension of a stack of them, or as members of a list.

        A stack may have room for more than the attribute counts, as for experts that do nothing.
        """
        effect, value = self.effects[path], self.trial.value(path)
        if effect.came_or_went:
            return value > 1 and all(any(part.isdigit() for part in n.split(".")) for n in effect.came_or_went)
        more = effect.other - value
        stacked = [
            self.base[n]
            for n, new in effect.shapes.items()
            if len(new) == 3 and new == (self.base[n][0] + more, *self.base[n][1:])
        ]
        own = len(stacked) >= 2 and min(shape[0] for shape in stacked) == value
        return own or bool(self._flat(path))

    @property
    def idle(self) -> int:
        """Places for experts that have weights in some stacks and none in others: they do nothing."""
        return max((self.base[n][0] - self.number for n in self.members if len(self.base[n]) == 3), default=0)

    def _flat(self, path: AttributePath) -> tuple[str, ...]:
        """Matrices with experts one after another along the first dimension, if the attribute is their number."""
        effect, value = self.effects[path], self.trial.value(path)
        rows = {n: (self.base[n][0], new[0]) for n, new in effect.shapes.items() if self.base[n][1:] == new[1:]}
        if value < 2 or effect.came_or_went or rows.keys() != effect.shapes.keys():
            return ()
        if any(a % value or b * value != a * effect.other for a, b in rows.values()):
            return ()
        flat = tuple(n for n, (a, _) in rows.items() if a > value and len(self.base[n]) == 2)
        # What chooses among them has one entry for each.
        if len(flat) < 2 or len(flat) == len(rows):
            return ()
        try:  # a token may use all that a small specimen has, but not twice as many
            twice = self.trial.made(path, 2 * value)
        except UnsupportedModel:
            return ()
        return flat if lie_flat(twice, self.trial.prefix, flat, 2 * value) else ()

    def _members(self) -> set[str]:
        """Parameters of the experts."""
        if self.count is None:
            return set()
        effect = self.effects[self.count]
        lists = {before_digit(name) for name in effect.came_or_went}
        listed = {n for n in self.base if before_digit(n) in lists} if lists else set()
        return listed | {n for n in effect.shapes if len(self.base[n]) == 3} | set(self.flat)

    def _units(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape, of a single expert where experts lie flat."""
        return (shape[0] // self.number, *shape[1:]) if name in self.flat else shape

    def widest(self, inside: bool) -> tuple[AttributePath | None, int, tuple[str, int] | None]:
        """The attribute that is the width of the largest matrices inside or beside the experts.

        Returns:
            The attribute, what it calls a width of 1, and a weight and dimension that are as long as the width.
        """
        found: list[tuple[bool, int, AttributePath, int, tuple[str, int]]] = []
        for path, effect in self.effects.items():
            governed = {n: new for n, new in effect.shapes.items() if (n in self.members) is inside}
            if effect.came_or_went or path == self.count or not governed:
                continue
            changes = {
                n: [(a, b) for a, b in zip(self._units(n, self.base[n]), self._units(n, new), strict=True) if a != b]
                for n, new in governed.items()
            }
            matrices = {n: change for n, change in changes.items() if len(self.base[n]) >= 2}
            if len(matrices) < 2 or any(len(change) != 1 for change in changes.values()):
                continue
            # The narrowest matrix counts each channel once; a fused gate and up projection counts it twice.
            before, after = min(change[0] for change in matrices.values())
            factor, rest = divmod(effect.other, after)
            if rest or (value := self.trial.value(path)) not in (0, factor * before):
                continue
            if any(a * after != b * before for ((a, b),) in changes.values()):
                continue
            small = max(1, before // 16) * factor
            if value and not self._is_width_at(path, small, small // factor, matrices):
                continue
            elements = sum(torch.Size(self.base[n]).numel() for n in matrices)
            name = next(n for n, c in matrices.items() if c[0] == (before, after))
            changed = self.effects[path].shapes[name]
            at = name, next(d for d, (a, b) in enumerate(zip(self.base[name], changed, strict=True)) if a != b)
            # Stacks of experts whose number is not known are not understood; what is beside them may be.
            found.append((inside or all(len(self.base[n]) == 2 for n in matrices), elements, path, factor, at))
        for _, _, path, factor, at in sorted(found, reverse=True):
            # Another one has to run: the hidden size would not, in the layers alone. Some kernels ask for multiples.
            value = self.trial.value(path) or self.effects[path].other
            others = (max(1, value // 2), *((value - 1) // m * m for m in (8, 4)), 2 * value)
            if any(self.trial.runs(path, other) for other in dict.fromkeys(others) if other):
                return path, factor, at
        return None, 1, None

    def _is_width_at(self, path: AttributePath, value: int, width: int, matrices: Collection[str]) -> bool:
        """Whether a small value is kept as it is, not rounded up."""
        try:
            shapes = self.trial.shapes(path, value)
        except Exception:  # whatever a family's own code raises for a size that it cannot take
            return False
        own = {name: self._units(name, shapes[name]) for name in matrices}
        return all(width in shape or 2 * width in shape for shape in own.values())


def own_experts(experts: FFNSizes, per_token: AttributePath | None) -> OwnExperts | None:
    """What there is for each expert of an FFN; None if it is not understood, or the attribute is the FFN's alone."""
    trial, count, number = experts.trial, experts.count, experts.number
    if not experts.of_both or count is None:
        return None

    def layer_with(path: AttributePath, value: int) -> nn.Module:
        return trial.made(path, value).model.get_submodule(trial.layer_name)

    def changed(other: nn.Module, value: int, new: int) -> Iterator[tuple[str, str]]:
        for name, module in layer.named_modules():
            if not f"{name}.".startswith(inside):
                continue
            twin = vars(other.get_submodule(name))
            for attribute, own in vars(module).items():
                if type(own) is int and twin[attribute] != own:
                    if (own, twin[attribute]) != (value, new):
                        raise UnsupportedModel(f"{name}.{attribute} changes in another way")
                    yield name, attribute

    layer = trial.specimen.model.get_submodule(trial.layer_name)
    inside = tuple(f"{name}." for name in (experts.kind.ffn.modules if experts.kind.ffn is not None else ()))
    weights: list[tuple[str, int]] = []
    uses: tuple[tuple[str, str], ...] = ()
    try:
        twice = layer_with(count, 2 * number)
        for name, weight in layer.named_parameters():
            shape = twice.get_parameter(name).shape
            dims = [d for d, (a, b) in enumerate(zip(weight.shape, shape, strict=True)) if a != b]
            if name.startswith(inside) and dims:
                (dim,) = dims
                if (weight.shape[dim], shape[dim]) != (number, 2 * number):
                    return None
                weights.append((name, dim))
        counts = tuple(changed(twice, number, 2 * number))
        if per_token is not None and (used := trial.value(per_token)) > 1:
            uses = tuple(changed(layer_with(per_token, used - 1), used, used - 1))
    except (UnsupportedModel, AttributeError, KeyError, ValueError):
        return None
    return OwnExperts(tuple(weights), counts, uses)


def unsaid_width(specimen: Specimen, kind: LayerKind, base: Shapes) -> tuple[tuple[str, int], ...]:
    """The weights between the matrices of an FFN, where no attribute sets its width.

    Each of its matrices has the size of the hidden states on one side and the width on the other.
    """
    own = {name: shape for name, shape in base.items() if kind.owners.get(name) == "ffn"}
    matrices = {name: shape for name, shape in own.items() if len(shape) == 2}
    sides = [set(shape) for shape in matrices.values()]
    hidden = specimen.hidden_size
    widths = set.union(*sides) - {hidden} if len(sides) >= 2 else set()
    if len(widths) != 1 or not all(hidden in side and len(side) == 2 for side in sides):
        return ()
    (width,) = widths
    return tuple((name, shape.index(width)) for name, shape in own.items() if width in shape)


def experts_per_token(trial: Trial, without: Sequence[AttributePath], experts: FFNSizes) -> AttributePath | None:
    """The attribute without a shape whose change changes the number of experts that one token uses."""

    def used(specimen: Specimen) -> int:
        return experts_used(specimen, trial.prefix, experts.members, experts.flat, experts.number)

    def used_with(path: AttributePath, other: int) -> int | None:
        try:
            return used(trial.made(path, other))
        except (UnsupportedModel, RuntimeError):
            return None

    base = used(trial.specimen)
    for path in without:
        value = trial.value(path)
        if experts.idle:
            # Some of those that a token is given may do nothing; if it is given all, those that do something are used.
            every = experts.number + experts.idle
            is_all = base <= value <= every and used_with(path, every) == experts.number
            if is_all and (base < experts.number or (used_with(path, value - 1) or base) < base):
                return path
        elif value == base and any(used_with(path, o) == o for o in (value - 1, value + 1) if 1 <= o <= experts.number):
            return path
    return None


def _inside(effect: Effect, names: tuple[str, ...]) -> Effect:
    """What it does to the weights whose names begin so."""
    shapes = {name: shape for name, shape in effect.shapes.items() if name.startswith(names)}
    came_or_went = frozenset(name for name in effect.came_or_went if name.startswith(names))
    return replace(effect, shapes=shapes, came_or_went=came_or_went)
