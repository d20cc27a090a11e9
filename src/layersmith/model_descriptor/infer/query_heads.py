"""The number of query heads: the attribute whose double, with every head there twice, changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layersmith.errors import UnsupportedModel, first_line
from layersmith.model_descriptor.experiment import Effect, Shapes
from layersmith.model_descriptor.infer.attributes import AttributePath
from layersmith.model_descriptor.infer.subblocks import LayerKind

if TYPE_CHECKING:
    from layersmith.model_descriptor.infer.sizes import Trial


_Change = tuple[torch.Size, torch.Size]

_APART = 4.0
_NOT_UNDERSTOOD = (
    "with every query head there twice the model gives something else, so where they lie is not understood"
)


@dataclass(frozen=True)
class QueryHeads:
    """What was found.

    Attributes:
        paths: the attributes; none where there is no such number.
        pin: what sets the size of a head and has to be said when their number changes.
        reason: why there are none, where that was seen.
        blocks: of the projection that they end in, each of which reads its share of the heads by the same entries.
        pairs: whether two work together, one of either half of all, and end next to each other in a projection.
    """

    paths: tuple[AttributePath, ...] = ()
    pin: tuple[AttributePath, int] | None = None
    reason: str = ""
    blocks: int = 1
    pairs: bool = False


def find_query_heads(
    trial: Trial,
    kind: LayerKind,
    base: Shapes,
    effects: Mapping[AttributePath, Effect],
    named: Sequence[tuple[AttributePath, int]],
    idle: Collection[AttributePath],
    kv_heads: AttributePath | None,
) -> QueryHeads:
    """The number of query heads, found in all layers at once, or in those of the kind where that shows nothing."""
    found: list[QueryHeads] = []
    for way in trial.ways():
        found.append(_found(way, kind, base, effects, named, idle, kv_heads))
        if found[-1].paths:
            return found[-1]
    return found[0]


def _found(
    trial: Trial,
    kind: LayerKind,
    base: Shapes,
    effects: Mapping[AttributePath, Effect],
    named: Sequence[tuple[AttributePath, int]],
    idle: Collection[AttributePath],
    kv_heads: AttributePath | None,
) -> QueryHeads:
    """The attributes whose double, with each query head there twice and read at half, changes nothing.

    Where the size of a head follows from their number, it has to be said as well; where each query head has keys of
    its own, their number goes along.

    Args:
        trial: of the model.
        kind: of layer.
        base: shapes of such a layer.
        effects: what other values of attributes do to it.
        named: all attributes that are numbers.
        idle: those of them that do nothing to it.
        kv_heads: the attribute that is the number of KV heads.
    """
    if kind.attention is None:
        return QueryHeads()
    reasons: list[str] = []
    unset = [(name,) for name in trial.missing if _sets_sizes(trial, (name,), base)]
    unset += [p for p, v in named if v == 0 and len(p) == 1 and p not in idle]
    per_kv = trial.value(kv_heads) if kv_heads else 1
    for path, effect in effects.items():
        value, rank = trial.value(path), False
        found: QueryHeads | None = None
        touched = [*effect.shapes, *effect.came_or_went]
        if path == kv_heads or value < 2 or value % per_kv or effect.other != 2 * value:
            continue
        if any(kind.owners.get(name) != "attention" for name in touched):
            continue
        equal = [p for p, v in named if v == value and p not in (path, kv_heads)]
        # A number of KV heads that sets no size may still be read, e.g. for how many queries there are to each.
        equal += [p for p in idle if kv_heads is None and p[-1] == "num_key_value_heads" and p not in equal]
        # The size of a head, read off the weights: what a head of the last projection takes.
        sizes = sorted({n // value for shape in base.values() for n in shape if n % value == 0 and n > value})
        pins: list[tuple[AttributePath, int] | None] = [None, *((p, size) for p in unset for size in sizes)]
        pins += [(p, v) for p, v in named if v in sizes and p != path and p not in idle]
        for pin in dict.fromkeys(pins):
            for together in ((path,), *((path, other) for other in equal if pin is None)):
                if (pin is not None and pin[0] in together) or not _doubles(trial, together, pin, value, base):
                    continue
                # Two heads may work together, one of either half of all, and end next to each other in a projection.
                ways = [1, 2] if value % 2 == 0 and _is_plain(trial, together, pin, value, base) else [1]
                ends = next(
                    (n for n in ways if all(_doubled_queries(trial, together, pin, value, s, n) for s in (0, 1))), 0
                )
                if ends:
                    if _doubled_queries(trial, together, pin, value, 0, ends, apart=_APART):
                        rank = True
                        break
                    # The number of KV heads that a config says may be read where attention is not fused only.
                    if not equal or trial.runs_unfused(
                        {**dict.fromkeys(together, 2 * value), **dict([pin] if pin else [])}
                    ):
                        return QueryHeads(together, pin, pairs=ends > 1)
                    found = found or QueryHeads(together, pin, pairs=ends > 1)
            if rank:
                break
        if found is not None and not rank:
            return found
        if not rank and _doubles(trial, (path,), None, value, base):
            blocks = _in_blocks(trial, path, value, base)
            if blocks > 1 and not _doubled_queries(trial, (path,), None, value, 0, blocks, apart=_APART):
                return QueryHeads((path,), blocks=blocks)
            reasons += [_why_not(trial, path, value)]
        elif not rank and path[-1] == "num_attention_heads":
            reasons += _does_not_run(trial, path, value, pins, base)
    return QueryHeads(reason=next(iter(reasons), ""))


def _why_not(trial: Trial, path: AttributePath, heads: int) -> str:
    """Why their number cannot differ, where their double gives something else, or does not run."""
    try:
        trial.made(path, 2 * heads)
    except UnsupportedModel as error:
        return f"with more of them in a layer the model does not run ({first_line(error.__cause__ or error)})"
    return _NOT_UNDERSTOOD


def _does_not_run(
    trial: Trial, path: AttributePath, heads: int, pins: Sequence[tuple[AttributePath, int] | None], base: Shapes
) -> list[str]:
    """Why what is called so as usual is not it, where layers with more heads of the same size do not run."""
    for pin in dict.fromkeys(pins):
        own = {pin[0]: pin[1]} if pin else {}
        try:
            if own and trial.shapes_with(own) != base:
                continue
            more = _changes(base, trial.shapes_with({path: 2 * heads, **own}))
            if not any(new == (2 * shape[0], *shape[1:]) for shape, new in more.values()):
                continue  # they are smaller then
            trial.made_with({path: 2 * heads, **own})
        except UnsupportedModel as error:
            return [f"with more of them, each as it is, it does not run ({first_line(error.__cause__ or error)})"]
        except Exception:  # whatever a family's own code raises for a size that it cannot take
            continue
    return []


def _sets_sizes(trial: Trial, path: AttributePath, base: Shapes) -> bool:
    """Whether an attribute that a config does not have sets sizes of a layer, once it has it."""
    from layersmith.model_descriptor.infer.sizes import ANY_SIZES

    try:
        return any(trial.shapes_with({path: size}) != base for size in ANY_SIZES)
    except Exception:  # whatever a family's own code raises for a size that it cannot take
        return True


def _in_blocks(trial: Trial, path: AttributePath, heads: int, base: Shapes) -> int:
    """The blocks of a projection of several that heads end in, each of which reads other heads; 1 if there are none."""
    if _is_plain(trial, (path,), None, heads, base):
        return 1
    for blocks in (n for n in range(2, heads + 1) if heads % n == 0):
        if all(_doubled_queries(trial, (path,), None, heads, seed, blocks) for seed in (0, 1)):
            return blocks
    return 1


def _is_plain(
    trial: Trial, paths: Sequence[AttributePath], pin: tuple[AttributePath, int] | None, heads: int, base: Shapes
) -> bool:
    """Whether heads end in a linear map as such, which has no blocks."""
    more = trial.shapes_with({**dict.fromkeys(paths, 2 * heads), **dict([pin] if pin else [])})
    changes = _changes(base, more).items()
    names = [name for name, (shape, new) in changes if len(shape) == 2 and new[1] > shape[1]]
    modules = [trial.specimen.model.get_submodule((trial.prefix + name).rpartition(".")[0]) for name in names[:1]]
    return any(type(module).forward in (nn.Linear.forward, Conv1D.forward) for module in modules)


def _changes(base: Shapes, other: Shapes) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    return {name: (shape, other[name]) for name, shape in base.items() if shape != other[name]}


def _doubles(
    trial: Trial, paths: Sequence[AttributePath], pin: tuple[AttributePath, int] | None, heads: int, base: Shapes
) -> bool:
    """Whether twice the heads make a side of some matrix twice as long and none shorter, and a pin alone nothing.

    What reads them has at least two entries for each: with one it is a rank, of which entries may be there twice too.
    """
    own = {pin[0]: pin[1]} if pin else {}
    try:
        if pin is not None and trial.shapes_with(own) != base:
            return False
        more = trial.shapes_with({**dict.fromkeys(paths, 2 * heads), **own})
        if pin is not None and more == trial.shapes_with(dict.fromkeys(paths, 2 * heads)):
            return False
    except Exception:  # whatever a family's own code raises for a size that it cannot take
        return False
    if more.keys() != base.keys():
        return False
    # The sides of a matrix, or of each in a stack of them.
    changes = [
        (dim - (len(shape) - 2) if len(shape) in (2, 3) else -1, a, b)
        for name, shape in base.items()
        for dim, (a, b) in enumerate(zip(shape, more[name], strict=False))
        if a != b
    ]
    # Heads come out of one matrix and go into another.
    sides = {dim for dim, _, _ in changes}
    if not {0, 1} <= sides or not any(dim == 1 and a >= 2 * heads for dim, a, _ in changes):
        return False
    return any(b == 2 * a for _, a, b in changes) and all(b > a for _, a, b in changes)


def _doubled_queries(
    trial: Trial,
    paths: Sequence[AttributePath],
    pin: tuple[AttributePath, int] | None,
    heads: int,
    seed: int,
    blocks: int = 1,
    apart: float = 0.0,
) -> bool:
    """Whether a model with every query head twice, and what reads them at half, gives the same.

    Args:
        trial: of the model.
        paths: of their number.
        pin: of their size.
        heads: how many there are.
        seed: of the weights.
        blocks: of the projection that reads them, each of which reads its share of the heads by the same entries; or
            shares of all heads, one head of each of which are next to each other where they end.
        apart: how far what gives the one and the other of two heads is from their mean; it changes all but a linear
            map's rank.
    """
    own = {pin[0]: pin[1]} if pin else {}
    try:
        once = trial.made_with({**dict.fromkeys(paths, heads), **own}, seed)
        twice = trial.made_with({**dict.fromkeys(paths, 2 * heads), **own}, seed)
    except UnsupportedModel:
        return False
    weights, doubled = (dict(m.model.named_parameters()) for m in (once, twice))
    if weights.keys() != doubled.keys():
        return False
    changed = [n for n in weights if weights[n].shape != doubled[n].shape]
    if not any(n.startswith(trial.prefix) for n in changed):
        return False
    wanted = once.run()
    for layouts in _layouts({(weights[n].shape, doubled[n].shape) for n in changed}):
        try:
            with torch.no_grad():
                for name, weight in weights.items():
                    target = doubled[name]
                    same = weight.shape == target.shape
                    layout = "" if same else layouts[weight.shape, target.shape]
                    target.copy_(
                        weight if same else _every_head_twice(weight, target.shape, heads, blocks, apart, layout)
                    )
        except (RuntimeError, ValueError, IndexError):  # it is not laid out so
            continue
        seen = twice.run()
        # Heads that are apart may matter little, so for a rank nothing but rounding counts as the same.
        if apart and float((wanted - seen).abs().max()) < 1e-5 * float(wanted.abs().max()):
            return True
        if not apart and torch.allclose(wanted, seen, atol=1e-4, rtol=1e-4):
            return True
    return False


def _layouts(shapes: Collection[_Change]) -> Iterator[dict[_Change, str]]:
    """How the entries of heads may lie in weights of each shape: all alike, or fused ones beside others."""
    names = ("whole", "thirds", "halves", "first")
    yield from (dict.fromkeys(shapes, layout) for layout in names)
    makers = [own for own in shapes if not _is_last(*own)]  # what heads end in has none
    if len(makers) == 2:
        for one, other in itertools.permutations(names[:3], 2):
            yield {**dict.fromkeys(shapes, "whole"), makers[0]: one, makers[1]: other}


def _is_last(before: torch.Size, after: torch.Size) -> bool:
    """Whether it is the last dimension of a matrix, or of a stack of them, that grew."""
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
    if dim == weight.ndim - 1 and weight.ndim > 1:
        parts, heads = 1, heads // blocks
    grouped = moved.reshape(parts, heads, -1, *moved.shape[1:])
    if dim == weight.ndim - 1 and weight.ndim > 1:
        grouped = (grouped / 2).repeat_interleave(2, 1)
    else:
        change = apart * grouped.std() * torch.linspace(1, 99, grouped.numel()).view_as(grouped).sin() if apart else 0
        grouped = torch.stack([grouped + change, grouped - change], 2)
    return torch.cat([grouped.reshape(-1, *moved.shape[1:]), rest]).movedim(0, dim)
