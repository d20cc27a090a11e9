"""Which config attributes set the sizes of an FFN: its width, or the number, width and use of experts.

The number of experts comes and goes with whole matrices, a width changes one side of them. How many experts a token
uses changes no shape; it is counted in gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from layersmith.model_descriptor.experiment import Effect, Experiment, Outcome, first_refutation
from layersmith.model_descriptor.infer.attributes import AttributePath
from layersmith.model_descriptor.infer.experts import FFNExperts, before_digit, experts_used, lie_flat
from layersmith.model_descriptor.infer.sizes import Sizes
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.infer.trial import Candidate, Trial


def with_ffn_sizes(trial: Trial, sizes: Sizes) -> Sizes:
    """The sizes of a kind of layer with those of its FFN."""
    experts = find_experts(trial)
    width = _widest(experts, inside=experts.count is not None)
    sizes = replace(
        sizes, config_width=width.factor, width_at=width.at, outcomes=(*sizes.outcomes, *width.outcomes)
    )  # fmt: skip
    if experts.count is None:
        resized = unsaid_width(trial) if width.path is None else ()
        return replace(sizes, width=width.path, resized=resized, width_at=resized[0] if resized else width.at)
    shared = _widest(experts, inside=False)
    if shared.factor != width.factor:
        shared = Width()
    per_token = experts_per_token(experts)
    return replace(
        sizes,
        num_experts=experts.count,
        expert_width=width.path,
        shared_width=shared.path,
        shared_width_at=shared.at,
        experts_per_token=per_token,
        flat=experts.flat,
        experts_of_both=experts.of_both,
        ffn_experts=ffn_experts(experts, per_token),
    )


# ------------------------------------------------------------------------------------------- the number of experts


class _Count(Candidate):
    """An attribute that may be the number of experts, and what it does to the FFN."""

    def is_length_of_list(self) -> bool:
        names = self.effect.came_or_went
        return bool(names) and self.value > 1 and all(any(p.isdigit() for p in name.split(".")) for name in names)

    def is_height_of_stacks(self) -> bool:
        """Whether stacks of matrices grow by as many; one may have room for more, as for experts that do nothing."""
        more = self.effect.other - self.value
        stacks = [
            before
            for name, before in self.effect.before.items()
            if len(before) == 3 and self.effect.shapes[name] == (before[0] + more, *before[1:])
        ]
        return not self.effect.came_or_went and len(stacks) >= 2 and min(s[0] for s in stacks) == self.value

    @cached_property
    def flat(self) -> tuple[str, ...]:
        """Matrices in which experts lie one after another along the first dimension; empty if there are none."""
        effect, value = self.effect, self.value
        rows = {n: (old[0], effect.shapes[n][0]) for n, old in effect.before.items() if old[1:] == effect.shapes[n][1:]}
        if value < 2 or effect.came_or_went or rows.keys() != effect.shapes.keys():
            return ()
        if any(a % value or b * value != a * effect.other for a, b in rows.values()):
            return ()
        flat = tuple(n for n, (a, _) in rows.items() if a > value and len(effect.before[n]) == 2)
        # What chooses among the experts has one entry for each.
        if len(flat) < 2 or len(flat) == len(rows):
            return ()
        # A token may use all experts that a small specimen has, but not twice as many.
        twice = self.trial.specimen_with({self.path: 2 * value})
        return flat if twice is not None and lie_flat(twice, self.trial.prefix, flat, 2 * value) else ()


# One of them has to hold.
_COUNTS = (
    Experiment[_Count, None]("Do members of a list come and go with {}?", lambda count, _: count.is_length_of_list()),
    Experiment[_Count, None]("Do stacks hold as many matrices as {}?", lambda count, _: count.is_height_of_stacks()),
    Experiment[_Count, None](
        "Do matrices hold as many blocks of rows as {}, and each token uses some?", lambda count, _: bool(count.flat)
    ),
)


@dataclass(frozen=True)
class Experts:
    """The experts of one kind's FFN.

    Attributes:
        trial: The kind of layer.
        effects: Attribute to what another value does to the FFN.
        count: The attribute that is the number of experts; None if there are none.
        number: Number of experts.
        of_both: Whether that attribute is the number of the attention's experts too.
        flat: Weights in which experts lie one after another along the first dimension.
    """

    trial: Trial
    effects: dict[AttributePath, Effect]
    count: AttributePath | None = None
    number: int = 0
    of_both: bool = False
    flat: tuple[str, ...] = ()

    @cached_property
    def members(self) -> set[str]:
        """Parameters of the experts."""
        if self.count is None:
            return set()
        effect, base = self.effects[self.count], self.trial.base
        lists = {before_digit(name) for name in effect.came_or_went}
        listed = {n for n in base if before_digit(n) in lists} if lists else set()
        return listed | {n for n, shape in effect.before.items() if len(shape) == 3} | set(self.flat)

    @property
    def idle(self) -> int:
        """Places for experts that have weights in some stacks and none in others: such experts do nothing."""
        shapes = [self.trial.base[name] for name in self.members]
        return max((shape[0] - self.number for shape in shapes if len(shape) == 3), default=0)

    def unit(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape; that of a single expert where experts lie flat."""
        return (shape[0] // self.number, *shape[1:]) if name in self.flat else shape


def find_experts(trial: Trial) -> Experts:
    """The attribute that is the number of experts.

    Where no attribute is that of the FFN alone, the attention may have experts too, and one attribute be both numbers.
    """
    ffn = trial.kind.ffn
    inside = () if ffn is None else tuple(f"{n}." for n in (*ffn.modules, *(name for name, _ in ffn.replaced)))
    of_ffn = {
        path: effect
        for path, effect in trial.effects.items()
        if all(name.startswith(inside) for name in (*effect.shapes, *effect.came_or_went))
    }
    of_both = {path: effect.inside(inside) for path, effect in trial.effects.items() if path not in of_ffn}
    for effects in (of_ffn, of_both):
        candidates = [_Count(trial, path, effect) for path, effect in effects.items() if effect]
        counts = [count for count in candidates if any(experiment.holds(count) for experiment in _COUNTS)]
        if counts:
            largest = max(counts, key=lambda count: count.value)
            return Experts(
                trial=trial,
                effects=of_ffn | {count.path: count.effect for count in counts},
                count=largest.path,
                number=largest.value,
                of_both=effects is of_both,
                flat=largest.flat,
            )
    return Experts(trial, of_ffn)


# ------------------------------------------------------------------------------------------------------- widths


@dataclass(frozen=True)
class Width:
    """The attribute that is a width; None if no attribute is.

    Attributes:
        path: The attribute.
        factor: What the attribute calls a width of 1.
        at: A weight, and a dimension of it, that are as long as the width.
        outcomes: The experiments that refuted attributes which looked like a width, where no attribute is.
    """

    path: AttributePath | None = None
    factor: int = 1
    at: tuple[str, int] | None = None
    outcomes: tuple[Outcome, ...] = ()


@dataclass(frozen=True)
class _WidthCandidate(Candidate):
    """An attribute that may be the width of the matrices inside the experts, or outside."""

    experts: Experts
    inside: bool

    @cached_property
    def changes(self) -> dict[str, list[tuple[int, int]]]:
        """Weight to the lengths that differ, before and after."""
        unit, effect = self.experts.unit, self.effect
        governed = [n for n in effect.shapes if (n in self.experts.members) is self.inside]
        pairs = {n: zip(unit(n, effect.before[n]), unit(n, effect.shapes[n]), strict=True) for n in governed}
        return {name: [(a, b) for a, b in lengths if a != b] for name, lengths in pairs.items()}

    @property
    def matrices(self) -> list[str]:
        return [name for name in self.changes if len(self.effect.before[name]) >= 2]

    @property
    def lengths(self) -> tuple[int, int]:
        """The width before and after: the narrowest matrix counts each channel once, a fused one twice."""
        return min(self.changes[name][0] for name in self.matrices)

    @property
    def factor(self) -> int:
        return self.effect.other // self.lengths[1]

    @property
    def at(self) -> tuple[str, int]:
        name = next(name for name in self.matrices if self.changes[name][0] == self.lengths)
        return name, self.effect.dims(name)[0]

    @property
    def rank(self) -> tuple[bool, int, bool, AttributePath]:
        """Orders widths: the largest matrices count; stacks of experts of unknown number are not understood.

        What also sets matrices around the experts is the width of a latent that they read, not theirs.
        """
        alone = self.experts.members >= self.effect.shapes.keys()
        shapes = [self.effect.before[name] for name in self.matrices]
        elements = sum(torch.Size(shape).numel() for shape in shapes)
        return self.inside or all(len(shape) == 2 for shape in shapes), elements, alone, self.path

    def sets_one_side(self) -> bool:
        known = self.effect.came_or_went or self.path == self.experts.count
        return not known and len(self.matrices) >= 2 and all(len(change) == 1 for change in self.changes.values())

    def counts_channels(self) -> bool:
        """Whether the attribute is a multiple of the width, and all that it sets grows in proportion to the width."""
        before, after = self.lengths
        is_multiple = self.effect.other % after == 0 and self.value in (0, self.factor * before)
        return is_multiple and all(a * after == b * before for ((a, b),) in self.changes.values())

    def keeps_small_value(self) -> bool:
        """Whether a small value is taken as it is, not rounded up."""
        if not self.value:
            return True
        width = max(1, self.lengths[0] // 16)
        shapes = self.trial.shapes({self.path: width * self.factor})
        if shapes is None or not shapes.keys() >= set(self.matrices):
            return False
        units = [self.experts.unit(name, shapes[name]) for name in self.matrices]
        return all(width in shape or 2 * width in shape for shape in units)

    def others(self) -> Iterator[int]:
        """Other values to run with; some kernels ask for multiples."""
        value = self.value or self.effect.other
        values = (max(1, value // 2), *((value - 1) // m * m for m in (8, 4)), 2 * value)
        return iter(dict.fromkeys(v for v in values if v))


_WIDTHS = (
    Experiment[_WidthCandidate, None](
        "Does {} set one side of two or more matrices?", lambda width, _: width.sets_one_side()
    ),
    Experiment[_WidthCandidate, None](
        "Is {} the length of that side, or a multiple of it, in all weights?", lambda width, _: width.counts_channels()
    ),
    Experiment[_WidthCandidate, None](
        "Is a small value of {} kept as it is?",
        lambda width, _: width.keeps_small_value(),
        conclusion="a small width is rounded up",
    ),
)
# The hidden size would not run with another value in the layers alone.
_RUNS = Experiment[_WidthCandidate, int](
    question="Does the model run with another value of {} in its layers?",
    changes=lambda width: width.others(),
    expectation=lambda width, other: width.trial.specimen_with({width.path: other}) is not None,
    conclusion="the model does not run with another value",
)


def _widest(experts: Experts, inside: bool) -> Width:
    """The width of the largest matrices inside the experts, or outside."""
    candidates, outcomes = [], []
    for path, effect in experts.effects.items():
        candidate = _WidthCandidate(experts.trial, path, effect, experts, inside)
        refutation = first_refutation(_WIDTHS, candidate)
        if refutation is None:
            candidates.append(candidate)
        elif refutation.reason:
            outcomes.append(refutation)
    for candidate in sorted(candidates, key=lambda candidate: candidate.rank, reverse=True):
        if (runs := _RUNS.run(candidate)).held:
            return Width(candidate.path, candidate.factor, candidate.at)
        outcomes.append(runs)
    return Width(outcomes=tuple(outcomes))


def unsaid_width(trial: Trial) -> tuple[tuple[str, int], ...]:
    """The weights between the matrices of an FFN, where no attribute sets its width.

    Each of its matrices has the hidden size on one side and the width on the other.
    """
    shapes = {name: shape for name, shape in trial.base.items() if trial.kind.owners.get(name) == "ffn"}
    sides = [set(shape) for shape in shapes.values() if len(shape) == 2]
    hidden = trial.specimen.hidden_size
    widths = set.union(*sides) - {hidden} if len(sides) >= 2 else set()
    if len(widths) != 1 or not all(hidden in side and len(side) == 2 for side in sides):
        return ()
    (width,) = widths
    return tuple((name, shape.index(width)) for name, shape in shapes.items() if width in shape)


# ----------------------------------------------------------------------------------------- experts that a token uses


def experts_per_token(experts: Experts) -> AttributePath | None:
    """The attribute without a shape whose change changes the number of experts that one token uses."""
    trial, every = experts.trial, experts.number + experts.idle

    def used(specimen: Specimen | None) -> int | None:
        if specimen is None:
            return None
        return experts_used(specimen, trial.prefix, experts.members, experts.flat, experts.number)

    def used_with(path: AttributePath, value: int) -> int | None:
        return used(trial.specimen_with({path: value}))

    base = used(trial.specimen) or 0
    for path in trial.idle_everywhere:
        value = trial.value(path)
        if experts.idle:
            # Some experts of a token may do nothing; if a token is given all, it uses those that do something.
            is_all = base <= value <= every and used_with(path, every) == experts.number
            if is_all and (base < experts.number or (used_with(path, value - 1) or base) < base):
                return path
        elif value == base and any(
            used_with(path, other) == other for other in (value - 1, value + 1) if 1 <= other <= experts.number
        ):
            return path
    return None


def ffn_experts(experts: Experts, per_token: AttributePath | None) -> FFNExperts | None:
    """What depends on the number of experts of an FFN; None if that is unclear, or the attention has no experts."""
    trial, count, number = experts.trial, experts.count, experts.number
    ffn = trial.kind.ffn
    if not experts.of_both or count is None or ffn is None:
        return None
    effect = experts.effects[count].inside(tuple(f"{module}." for module in ffn.modules))
    weights = []
    for name, before in effect.before.items():
        dims = effect.dims(name)
        if len(dims) != 1 or (before[dims[0]], effect.shapes[name][dims[0]]) != (number, effect.other):
            return None
        weights.append((name, dims[0]))
    counts = _numbers_that_change(trial, ffn.modules, count, 2 * number)
    used = trial.value(per_token) if per_token is not None else 0
    uses = _numbers_that_change(trial, ffn.modules, per_token, used - 1) if per_token is not None and used > 1 else ()
    return None if counts is None or uses is None else FFNExperts(tuple(weights), counts, uses)


def _numbers_that_change(
    trial: Trial, modules: Collection[str], path: AttributePath, new: int
) -> tuple[tuple[str, str], ...] | None:
    """Plain numbers of modules that are as large as an attribute and change with it; None if one changes otherwise."""
    changed = trial.specimen_with({path: new})
    if changed is None:
        return None
    layer, other = (specimen.model.get_submodule(trial.layer_name) for specimen in (trial.specimen, changed))
    twins: dict[str, nn.Module] = dict(other.named_modules())
    numbers = []
    for name, module in layer.named_modules():
        if not f"{name}.".startswith(tuple(f"{m}." for m in modules)):
            continue
        twin = vars(twins[name]) if name in twins else {}
        for attribute, value in vars(module).items():
            if type(value) is int and twin.get(attribute) != value:
                if (value, twin.get(attribute)) != (trial.value(path), new):
                    return None
                numbers.append((name, attribute))
    return tuple(numbers)
