"""Which config attributes set the sizes of a Mamba or linear-attention mixer, found by what they do to its state.

Such a mixer keeps a state of fixed size in the cache: ``[B, H, P, N]``, or ``[B, H, N, P]``, or ``[B, P, N]`` where
there are no heads. What the mixer's last projection takes is H * P long. So an attribute whose double makes H and that
length twice as long is the number of heads; one that makes another dimension longer and not that length is the size of
the state. Heads of one group share what writes to the state and what reads it: N entries of each, for every group.

Shapes: H heads, P size of a head, N size of the state, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layersmith.block_config import MambaConfig
from layersmith.errors import first_line
from layersmith.model_descriptor.experiment import Effect, Shapes
from layersmith.model_descriptor.infer.attributes import AttributePath
from layersmith.model_descriptor.infer.cache_contents import filled_cache, keys_in_cache, recurrent_states
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.infer.subblocks import LayerKind

if TYPE_CHECKING:
    from layersmith.model_descriptor.infer.sizes import Trial


@dataclass(frozen=True)
class MixerSizes:
    """The attributes that set a mixer's sizes; None or empty where there is none that can differ alone.

    Attributes:
        num_heads, head_dim: H and P, and what has to go with each in proportion, e.g. the width of all heads.
        state_dim, num_groups: N and G.
        reader: the weight, in the layer, that reads the heads; its second dimension is H * P long.
        headless: whether the state has no dimension for heads: there is one.
        square: whether the state is as large as a head because both are one attribute.
        groups: G where no attribute says it: 1, 0 for one for each head, None if that is not known.
        is_alone: whether the layer keeps no keys and values beside the state.
        problem: why no attribute was found, if one that looks like it does not run.
    """

    num_heads: tuple[tuple[str, ...], ...] = ()
    state_dim: tuple[str, ...] | None = None
    head_dim: tuple[tuple[str, ...], ...] = ()
    num_groups: tuple[str, ...] | None = None
    reader: str = ""
    headless: bool = False
    square: bool = False
    groups: int | None = 1
    is_alone: bool = True
    problem: str = ""


def find_mixer(
    trial: Trial,
    kind: LayerKind,
    base: Shapes,
    effects: Mapping[AttributePath, Effect],
    without: Sequence[AttributePath],
) -> MixerSizes | None:
    """The attributes of a kind of layer's mixer; None if it has none with a state in the cache.

    Args:
        trial: makes layers with other values.
        kind: of layer.
        base: its shapes.
        effects: attributes that change shapes of the layer.
        without: attributes that alone change no shapes; one may be the size of a head where another is the width of
            all of them.
    """
    index = trial.index
    state = _state(trial.specimen, index) if kind.attention is not None else None
    if state is None or len(state) not in (3, 4):
        return None
    reader = _reader(trial, kind, base, state)
    if reader is None:
        return None
    length = base[reader][1]
    headless = len(state) == 3
    heads = 1 if headless else state[1]
    own = [
        path
        for path, effect in effects.items()
        if not effect.came_or_went and all(kind.owners.get(name) == "attention" for name in effect.shapes)
    ]

    problems: list[str] = []

    def tried(values: dict[AttributePath, Any], heads_alone: bool = False) -> tuple[list[int], int, Shapes] | None:
        """Dimensions of the state that are twice as long then, how long the reader is, and the shapes."""
        try:
            shapes = trial.shapes_with(values)
            if heads_alone and shapes[reader][1] != 2 * length:
                return None
            seen = tuple(_states(trial.made_with(values), index)[0].shape)
        except Exception as error:  # whatever a family's own code raises for sizes that do not go together
            if any(trial.value(path) in state[1:] for path in values):
                problems.append(first_line(error.__cause__ or error))
            return None
        if len(seen) != len(state) or any(b not in (a, 2 * a) for a, b in zip(state, seen, strict=True)):
            return None
        return [d for d, (a, b) in enumerate(zip(state, seen, strict=True)) if a != b], shapes[reader][1], shapes

    doubled = {path: tried({path: 2 * trial.value(path)}) for path in own}
    sizes: dict[str, Any] = {}
    written = 2 * heads  # entries that write to one of the state and read it, of all groups
    for path, found in doubled.items():
        value = trial.value(path)
        if found is None or len(found[0]) != 1 or value != state[found[0][0]]:
            continue
        (dim,), new_length, shapes = found
        if dim == 1 and not headless:
            if new_length == 2 * length:
                sizes.setdefault("num_heads", (path,))
        elif new_length == length:
            sizes.setdefault("state_dim", path)
            written = _rows(base, shapes) // value
        elif new_length == 2 * length and not headless:
            sizes.setdefault("head_dim", (path,))
    for name, size, dims in (("num_heads", heads, (1,)), ("head_dim", length // heads, (2, 3))):
        if headless or name in sizes:
            continue
        for pair in _pairs(trial, own if name == "num_heads" else [*own, *without], own, size):
            found = tried({path: 2 * trial.value(path) for path in pair}, heads_alone=True)
            alone = found is not None and len(found[0]) == 1 and found[0][0] in dims and found[1] == 2 * length
            if alone and _takes_shares(trial, pair, size):
                sizes[name] = pair
                break
    square = (
        "state_dim" not in sizes and not headless and any(f is not None and f[0] == [2, 3] for f in doubled.values())
    )
    groups = max(1, written // 2)
    if "state_dim" in sizes and not headless:
        entries = 2 * trial.value(sizes["state_dim"])
        for path in own:
            if (
                trial.value(path) == groups
                and (path,) != sizes.get("num_heads")
                and _is_groups(trial, path, index, base, state, entries)
            ):
                sizes["num_groups"] = path
                break
    known = {1: 1, heads: 0}.get(groups)
    keys = keys_in_cache(trial.specimen, index)
    alone = keys is None or not keys.numel()
    problem = f"with other sizes of its mixer it does not run ({problems[0]})" if problems and not sizes else ""
    return MixerSizes(
        **sizes, reader=reader, headless=headless, square=square, groups=known, is_alone=alone, problem=problem
    )


def _pairs(
    trial: Trial, firsts: Sequence[AttributePath], seconds: Sequence[AttributePath], size: int
) -> Iterator[tuple[AttributePath, AttributePath]]:
    for first, second in product(firsts, seconds):
        if first != second and trial.value(first) == size and trial.value(second):
            yield first, second


def _takes_shares(trial: Trial, pair: tuple[AttributePath, AttributePath], size: int) -> bool:
    """Whether the second can be in proportion to any value of the first, where that is no whole number."""
    new = size + size // 2
    try:
        trial.shapes_with({path: in_proportion(trial.value(path), new, size) for path in pair})
    except Exception:  # whatever a family's own code raises for a size that it cannot take
        return False
    return True


def _is_groups(
    trial: Trial, path: AttributePath, index: int, base: Shapes, state: tuple[int, ...], entries: int
) -> bool:
    """Whether another number adds or takes so many rows for each, runs, and leaves the state as it is."""
    value = trial.value(path)
    for other in (2 * value, value // 2):
        if other < 1:
            continue
        try:
            shapes = trial.shapes_with({path: other})
            if _rows(base, shapes) == entries * (other - value) and _state(trial.made(path, other), index) == state:
                return True
        except Exception:  # whatever a family's own code raises for sizes that do not go together
            continue
    return False


def _rows(base: Shapes, changed: Shapes) -> int:
    """Rows that all matrices together have more."""
    return sum(changed[name][0] - shape[0] for name, shape in base.items() if len(shape) == 2 and name in changed)


def _states(specimen: Specimen, index: int) -> list[torch.Tensor]:
    return recurrent_states(filled_cache(specimen), index)


def _state(specimen: Specimen, index: int) -> tuple[int, ...] | None:
    """The shape of the state that a layer leaves in the cache; None if it leaves none."""
    try:
        states = _states(specimen, index)
    except Exception:  # a family's own code may keep no cache, or another kind
        return None
    return tuple(states[0].shape) if len(states) == 1 else None


def _reader(trial: Trial, kind: LayerKind, base: Shapes, state: tuple[int, ...]) -> str | None:
    """The weight of the last linear map that runs in a module of the attention and takes all the heads."""
    assert kind.attention is not None
    lengths = {state[1]} if len(state) == 3 else {state[1] * state[2], state[1] * state[3]}
    specimen = trial.specimen
    linear = {name for name, module in specimen.model.named_modules() if isinstance(module, nn.Linear)}
    called = [call.name for call in specimen.trace(specimen.ids, keep=()) if call.name in linear]
    for module in kind.attention.modules:
        inside = [name for name in called if name.startswith(f"{trial.prefix}{module}.")]
        weight = f"{inside[-1]}.weight".removeprefix(trial.prefix) if inside else ""
        if weight in base and base[weight][1] in lengths:
            return weight
    return None


def mamba_config(
    sizes: MixerSizes, numbers: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> MambaConfig | None:
    """A mixer's sizes in a model itself; None where one of them is not known.

    Args:
        sizes: of its kind.
        numbers: ``num_heads``, ``state_dim`` and ``num_groups``, as far as attributes say them.
        shapes: of the layer.
    """
    if sizes.reader not in shapes or not (sizes.num_heads or sizes.state_dim):
        return None
    heads = 1 if sizes.headless else numbers.get("num_heads")
    if not heads or shapes[sizes.reader][1] % heads:
        return None
    head_dim = shapes[sizes.reader][1] // heads
    state = numbers.get("state_dim") or (head_dim if sizes.square else None)
    groups = numbers.get("num_groups") or (heads if sizes.groups == 0 else sizes.groups)
    return MambaConfig(state, heads, head_dim, groups) if state and groups else None


def mixer_values(
    sizes: MixerSizes | None, mamba: MambaConfig | None, value: Callable[[AttributePath], int]
) -> list[tuple[AttributePath, int | float]]:
    """What a mixer's sizes ask of the attributes; those that are as the config has them stay unsaid.

    Args:
        sizes: of its kind.
        mamba: what is asked for.
        value: gives what the model's config says of an attribute.
    """
    if sizes is None or mamba is None:
        return []
    shares: dict[AttributePath, Fraction] = {}
    for together, size in ((sizes.num_heads, mamba.num_heads), (sizes.head_dim, mamba.head_dim)):
        for path in together:
            shares[path] = shares.get(path, Fraction(1)) * Fraction(size, value(together[0]))
    values: list[tuple[AttributePath, int | float]] = [
        (path, in_proportion(value(path), share.numerator, share.denominator)) for path, share in shares.items()
    ]
    wanted = ((sizes.state_dim, mamba.state_dim), (sizes.num_groups, mamba.num_groups))
    values += [(path, size) for path, size in wanted if path is not None]
    return [(path, size) for path, size in values if size != value(path)]


def in_proportion(value: int, new: int, old: int) -> int | float:
    """``value * new / old``; if that is not whole, not the number below it, so that products are not less."""
    exact = Fraction(value * new, old)
    if exact.denominator == 1:
        return int(exact)
    near = float(exact)
    return near if Fraction(near) >= exact else math.nextafter(near, math.inf)
