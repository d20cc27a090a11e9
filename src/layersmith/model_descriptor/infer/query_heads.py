"""The number of query heads: the attribute whose double, with every head there twice, changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layersmith.model_descriptor import conventions
from layersmith.model_descriptor.experiment import Effect, Experiment, Outcome
from layersmith.model_descriptor.infer.attributes import AttributePath
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.infer.trial import ANY_SIZES, Trial, Values

Pin = tuple[AttributePath, int]
_Change = tuple[torch.Size, torch.Size]

# How far the two of a head are from their mean, in standard deviations, to tell heads from the entries of a rank.
_APART = 4.0
_NOT_UNDERSTOOD = (
    "with every query head there twice the model gives something else, so where they lie is not understood"
)


@dataclass(frozen=True)
class QueryHeads:
    """The attributes that set the number of query heads, or why there are none.

    Attributes:
        paths: The attributes that have to change together; empty if there is no such number.
        pin: The attribute that sets the size of a head, and its value: it has to be set when their number changes.
        reason: Why there are none, where an experiment showed it.
        blocks: Blocks of the projection that heads end in, each of which reads its share of the heads.
        pairs: Whether two heads work together, one of each half of all, and end next to each other in a projection.
        outcomes: The experiment that refuted each attribute that looked like the number.
    """

    paths: tuple[AttributePath, ...] = ()
    pin: Pin | None = None
    reason: str = ""
    blocks: int = 1
    pairs: bool = False
    outcomes: tuple[Outcome, ...] = ()


@dataclass(frozen=True)
class _Guess:
    """Attributes that may be the number of query heads together, and what may set the size of a head."""

    trial: Trial
    paths: tuple[AttributePath, ...]
    pin: Pin | None = None

    def __str__(self) -> str:
        names = " and ".join(".".join(path) for path in self.paths)
        return f"{names} (with {'.'.join(self.pin[0])} = {self.pin[1]})" if self.pin else names

    @property
    def heads(self) -> int:
        return self.trial.value(self.paths[0])

    def values(self, heads: int) -> Values:
        """Values of the attributes for a number of heads."""
        return {**dict.fromkeys(self.paths, heads), **dict([self.pin] if self.pin else [])}

    @cached_property
    def effect(self) -> Effect | None:
        """What twice the heads do to the layer; None if the family refuses them."""
        twice = self.trial.shapes(self.values(2 * self.heads))
        return None if twice is None else Effect.between(self.trial.base, twice, 2 * self.heads)

    def pin_keeps_sizes(self) -> bool:
        """Whether the pin alone changes nothing, and something together with the number of heads."""
        if self.pin is None:
            return True
        alone, unpinned = self.trial.shapes(dict([self.pin])), _Guess(self.trial, self.paths).effect
        return alone == self.trial.base and unpinned is not None and unpinned != self.effect

    def doubles(self) -> bool:
        """Whether twice the heads make a side of some matrix twice as long and none shorter.

        Heads come out of one matrix and go into another. What reads them has at least two entries for each: with one
        it is a rank, whose entries may be there twice too.
        """
        effect = self.effect
        if effect is None or effect.came_or_went or not self.pin_keeps_sizes():
            return False
        sides: set[int] = set()
        lengths = []
        for name, before in effect.before.items():
            for dim in effect.dims(name):
                # The sides of a matrix, or of each in a stack of them.
                side = dim - (len(before) - 2) if len(before) in (2, 3) else -1
                sides.add(side)
                lengths.append((side, before[dim], effect.shapes[name][dim]))
        return (
            {0, 1} <= sides
            and any(side == 1 and a >= 2 * self.heads for side, a, _ in lengths)
            and any(b == 2 * a for _, a, b in lengths)
            and all(b > a for _, a, b in lengths)
        )

    @cached_property
    def ends_in_linear_map(self) -> bool:
        """Whether heads end in a linear map, which has no blocks."""
        effect, trial = self.effect, self.trial
        assert effect is not None
        taking = [n for n, new in effect.shapes.items() if len(new) == 2 and new[1] > effect.before[n][1]]
        modules = [trial.specimen.model.get_submodule((trial.prefix + n).rpartition(".")[0]) for n in taking[:1]]
        return any(type(module).forward in (nn.Linear.forward, Conv1D.forward) for module in modules)

    @cached_property
    def first_models(self) -> list[Specimen | None]:
        """Models of the first seed with all heads and with twice as many; None for one that does not run."""
        return self._models(0)

    def _models(self, seed: int) -> list[Specimen | None]:
        return [self.trial.specimen_with(self.values(times * self.heads), seed) for times in (1, 2)]

    def gives_the_same(self, blocks: int) -> bool:
        """Whether models of two seeds give the same with every query head there twice, each read at half."""
        return all(self._gives_the_same(seed, blocks) for seed in (0, 1))

    @cached_property
    def ends(self) -> int:
        """Heads that end next to each other, one of each of as many shares of all; 0 if no number of them is right.

        Two heads may work together, one of each half of all.
        """
        numbers = (1, 2) if self.heads % 2 == 0 and self.ends_in_linear_map else (1,)
        return next((number for number in numbers if self.gives_the_same(number)), 0)

    def why_not_the_same(self) -> str:
        refusal = self.trial.refusal(self.values(2 * self.heads))
        return f"with more of them in a layer the model does not run ({refusal})" if refusal else _NOT_UNDERSTOOD

    def runs_with_plain_attention(self) -> bool:
        return self.trial.specimen_with(self.values(2 * self.heads), plain_attention=True) is not None

    def is_rank(self, blocks: int) -> bool:
        """Whether the model gives the same even where the two of each head differ, which only a linear map allows."""
        return self._gives_the_same(0, blocks, apart=_APART)

    def _gives_the_same(self, seed: int, blocks: int, apart: float = 0.0) -> bool:
        """Whether a model with every query head twice, and what reads them at half, gives the same.

        Args:
            seed: Seed of the weights.
            blocks: Blocks of the projection that reads them: each reads its share of the heads by the same entries.
                Or shares of all heads, one head of each of which end next to each other.
            apart: How far the two of a head are from their mean.
        """
        once, twice = self._models(seed) if seed else self.first_models
        if once is None or twice is None:
            return False
        weights, doubled = (dict(m.model.named_parameters()) for m in (once, twice))
        if weights.keys() != doubled.keys():
            return False
        changed = [n for n in weights if weights[n].shape != doubled[n].shape]
        if not any(n.startswith(self.trial.prefix) for n in changed):
            return False
        for layouts in _layouts({(weights[n].shape, doubled[n].shape) for n in changed}):
            try:
                with torch.no_grad():
                    for name, weight in weights.items():
                        layout = layouts.get((weight.shape, doubled[name].shape))
                        fits = weight if layout is None else _every_head_twice(
                            weight, doubled[name].shape, self.heads, blocks, apart, layout
                        )  # fmt: skip
                        doubled[name].copy_(fits)
            except (RuntimeError, ValueError, IndexError):  # the weights are laid out in another way
                continue
            if _close(once.logits, twice.run(), exact=bool(apart)):
                return True
        return False


_DOUBLES = Experiment[_Guess, None](
    question="Does twice {} make a side of some matrix twice as long and none shorter?",
    expectation=lambda guess, _: guess.doubles(),
)
_SAME = Experiment[_Guess, None](
    question="Does the model give the same with every head of {} there twice, each read at half?",
    expectation=lambda guess, _: guess.ends > 0,
    conclusion=lambda guess: guess.why_not_the_same(),
)
_NO_RANK = Experiment[_Guess, None](
    question="Does the model give something else once the two of each head of {} differ?",
    expectation=lambda guess, _: not guess.is_rank(guess.ends),
    conclusion="it is the rank of a linear map",
)
_PLAIN_ATTENTION = Experiment[_Guess, None](
    question="Does the plain attention of Transformers run with twice {}?",
    expectation=lambda guess, _: guess.runs_with_plain_attention(),
)


def find_query_heads(trial: Trial, kv_heads: AttributePath | None) -> QueryHeads:
    """The number of query heads, searched in all layers at once, then in those of the kind alone.

    Args:
        trial: The kind of layer.
        kv_heads: The attribute that is the number of its KV heads.
    """
    results = []
    for way in trial.ways() if trial.kind.attention is not None else ():
        results.append(_find(way, kv_heads))
        if results[-1].paths:
            return results[-1]
    return results[0] if results else QueryHeads()


def _find(trial: Trial, kv_heads: AttributePath | None) -> QueryHeads:
    unset = [(name,) for name in trial.survey.missing if _sets_sizes(trial, (name,))]
    unset += [p for p, value in trial.numbers.items() if value == 0 and len(p) == 1 and p not in trial.idle]
    refuted: list[QueryHeads] = []
    for path, effect in trial.effects.items():
        value = trial.value(path)
        touched = [*effect.shapes, *effect.came_or_went]
        if path == kv_heads or value < 2 or value % (trial.value(kv_heads) if kv_heads else 1):
            continue
        if effect.other != 2 * value or any(trial.kind.owners.get(name) != "attention" for name in touched):
            continue
        heads = _heads_set_by(trial, path, kv_heads, unset)
        if heads.paths:
            return heads
        refuted.append(heads)
    return QueryHeads(
        reason=next((heads.reason for heads in refuted if heads.reason), ""),
        outcomes=tuple(outcome for heads in refuted for outcome in heads.outcomes),
    )


def _heads_set_by(
    trial: Trial, path: AttributePath, kv_heads: AttributePath | None, unset: Sequence[AttributePath]
) -> QueryHeads:
    """The heads that an attribute sets, alone, or together with another attribute or with the size of a head.

    Args:
        trial: The kind of layer.
        path: The attribute.
        kv_heads: The attribute that is the number of its KV heads.
        unset: Attributes without a value that may set the size of a head.
    """
    alone = _Guess(trial, (path,))
    partners, pins = _partners(trial, path, kv_heads), _pins(trial, path, unset)
    together = (_Guess(trial, (path, partner)) for partner in partners)
    pinned = (_Guess(trial, (path,), pin) for pin in pins)
    only_fused: QueryHeads | None = None
    for guess in itertools.chain([alone], together, pinned):
        if not (_DOUBLES.holds(guess) and _SAME.holds(guess)):
            continue
        if not (differs := _NO_RANK.run(guess)).held:
            return QueryHeads(outcomes=(differs,))
        heads = QueryHeads(guess.paths, guess.pin, pairs=guess.ends > 1)
        # The number of KV heads that a config says may be read only where attention is not fused.
        if not partners or _PLAIN_ATTENTION.run(guess).held:
            return heads
        only_fused = only_fused or heads
    return only_fused or _in_blocks(alone, pins)


def _partners(trial: Trial, path: AttributePath, kv_heads: AttributePath | None) -> list[AttributePath]:
    """Attributes that may have to be equal to the number of query heads."""
    value = trial.value(path)
    partners = [p for p, other in trial.numbers.items() if other == value and p not in (path, kv_heads)]
    # A number of KV heads that sets no size may still be read, e.g. for how many queries there are to each.
    idle = [p for p in trial.idle if kv_heads is None and p[-1] == conventions.KV_HEADS]
    return [*partners, *(p for p in idle if p not in partners)]


def _pins(trial: Trial, path: AttributePath, unset: Sequence[AttributePath]) -> list[Pin]:
    """What may set the size of a head, read off the weights: what a head takes in the last projection."""
    value = trial.value(path)
    sizes = sorted({n // value for shape in trial.base.values() for n in shape if n % value == 0 and n > value})
    set_to_size = [(p, v) for p, v in trial.numbers.items() if v in sizes and p != path and p not in trial.idle]
    return list(dict.fromkeys([*((p, size) for p in unset for size in sizes), *set_to_size]))


def _in_blocks(guess: _Guess, pins: Sequence[Pin]) -> QueryHeads:
    """Heads that end in a projection made of blocks, each of which reads other heads; or why these are no heads."""
    doubles = _DOUBLES.run(guess)
    if not doubles.held:
        reason = _why_not_doubled(guess, pins) if guess.paths[0][-1] == conventions.QUERY_HEADS else ""
        return QueryHeads(reason=reason, outcomes=(replace(doubles, reason=reason),) if reason else ())
    if not guess.ends_in_linear_map:
        numbers = (n for n in range(2, guess.heads + 1) if guess.heads % n == 0)
        blocks = next((number for number in numbers if guess.gives_the_same(number)), 1)
        if blocks > 1 and not guess.is_rank(blocks):
            return QueryHeads(guess.paths, blocks=blocks)
    same = _SAME.run(guess)
    return QueryHeads(reason=same.reason, outcomes=(same,))


def _why_not_doubled(alone: _Guess, pins: Sequence[Pin]) -> str:
    """Why the attribute with the usual name is not it, where layers with more heads of the same size do not run."""
    for guess in (alone, *(_Guess(alone.trial, alone.paths, pin) for pin in pins)):
        size_stays = guess.pin is None or alone.trial.shapes(dict([guess.pin])) == alone.trial.base
        effect = guess.effect
        if not size_stays or effect is None or effect.came_or_went:
            continue
        doubled = [n for n, before in effect.before.items() if effect.shapes[n] == (2 * before[0], *before[1:])]
        # Without such a weight, the heads are smaller instead.
        if doubled and (refusal := alone.trial.refusal(guess.values(2 * guess.heads))):
            return f"with more of them, each as it is, it does not run ({refusal})"
    return ""


def _sets_sizes(trial: Trial, path: AttributePath) -> bool:
    """Whether an attribute that a config lacks sets sizes of a layer once the config has it."""
    return any(trial.shapes({path: size}) != trial.base for size in ANY_SIZES)


def _close(first: torch.Tensor, second: torch.Tensor, exact: bool) -> bool:
    """Whether two outputs are the same, to rounding; heads that differ may matter little, so for a rank no more."""
    if exact:
        return float((first - second).abs().max()) < 1e-5 * float(first.abs().max())
    return torch.allclose(first, second, atol=1e-4, rtol=1e-4)


def _layouts(shapes: Collection[_Change]) -> Iterator[dict[_Change, str]]:
    """How the entries of heads may lie in weights of each shape: the same in all, or fused in some of them."""
    names = ("whole", "thirds", "halves", "first")
    yield from (dict.fromkeys(shapes, layout) for layout in names)
    makers = [change for change in shapes if not _is_last(*change)]  # what heads end in has no layout
    if len(makers) == 2:
        for one, other in itertools.permutations(names[:3], 2):
            yield {**dict.fromkeys(shapes, "whole"), makers[0]: one, makers[1]: other}


def _is_last(before: torch.Size, after: torch.Size) -> bool:
    """Whether the last dimension of a matrix, or of a stack of them, grew."""
    return len(before) > 1 and before[-1] != after[-1]


def _every_head_twice(
    weight: torch.Tensor, shape: torch.Size, heads: int, blocks: int, apart: float, layout: str
) -> torch.Tensor:
    """Entries of every head twice along the dimension that grew; at half where they are a projection's inputs."""
    (dim,) = (d for d, (a, b) in enumerate(zip(weight.shape, shape, strict=True)) if a != b)
    moved = weight.movedim(dim, 0)
    added = shape[dim] - weight.shape[dim]
    rest = moved[added:]  # what is not of query heads comes after them
    moved = moved[:added]
    parts = {"whole": 1, "thirds": 3, "halves": 2, "first": 1}[layout]
    if len(rest) and layout != "first":
        raise ValueError("entries of no query head")
    # A fused projection in parts has those parts; what heads end in has none.
    is_last = dim == weight.ndim - 1 and weight.ndim > 1
    if is_last:
        parts, heads = 1, heads // blocks
    grouped = moved.reshape(parts, heads, -1, *moved.shape[1:])
    if is_last:
        grouped = (grouped / 2).repeat_interleave(2, 1)
    else:
        change = apart * grouped.std() * torch.linspace(1, 99, grouped.numel()).view_as(grouped).sin() if apart else 0
        grouped = torch.stack([grouped + change, grouped - change], 2)
    return torch.cat([grouped.reshape(-1, *moved.shape[1:]), rest]).movedim(0, dim)
