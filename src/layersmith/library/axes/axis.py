"""The axes of a subblock: a size, the weights that it governs, and the position of each unit in them.

A unit is kept or removed as a whole: a channel of an FFN, a head, an expert. Along one dimension of a weight the units
lie in segments. The rows of a fused gate and up projection are one segment of gates and one of ups. Those of a fused
QKV projection are queries, keys and values, one after another or group by group.

Shapes: D hidden, F intermediate channels, H query heads, K key-value heads, E experts, d head size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

REST = "rest"
# What a size inside a subblock can be of: queries, keys and values alike, some of them, or none of several heads.
INNER_ROLES = ("head size", "key head size", "value head size", "rank", "latent width")


class NoAxis(Exception):
    """A layer does not have an axis; the message says why."""


def numbered(name: str, attention: int) -> str:
    """The name of an entry of one attention of a layer; the first attention's has no number."""
    return f"{name}.{attention}" if attention else name


def largest_part(size: int) -> int:
    """The largest proper divisor of a size: its divisors also divided the size.

    Raises:
        ValueError: The size is below 2.
    """
    if size < 2:
        raise ValueError(f"{size} has no proper divisor")
    return next(size // divisor for divisor in range(2, size + 1) if size % divisor == 0)


@dataclass(frozen=True)
class Segment:
    """Consecutive entries of a dimension that belong to the units of one part, unit after unit.

    Attributes:
        part: ``"channels"``, ``"kv"``, ``"queries"``, ``"experts"``, ``"state"``, ``"entries"``, or ``"rest"`` for
            entries that belong to no unit.
        unit: Number of entries per unit; for the rest, the number of all its entries.
    """

    part: str
    unit: int = 1


@dataclass(frozen=True)
class WeightAxis:
    """One dimension of one weight of a layer that an axis governs.

    Attributes:
        name: Name of the parameter in the layer, with ``{}`` for the number of a list's member.
        dim: The dimension.
        segments: The segments along it, in order.
        grouped: Whether the segments are repeated for every KV head, each time with that head's share of the units.
        blocks: Number of blocks of a block-diagonal matrix, stored as ``[blocks * R, n]``. With more than one, the
            segments describe the second dimension of :meth:`spread`.
    """

    name: str
    dim: int
    segments: tuple[Segment, ...]
    grouped: bool = False
    blocks: int = 1

    def spread(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with all units along one dimension: ``[R, blocks * n]`` of ``[blocks * R, n]``."""
        if self.blocks == 1:
            return weight
        return weight.unflatten(0, (self.blocks, -1)).transpose(0, 1).flatten(1)

    def folded(self, spread: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`spread`."""
        if self.blocks == 1:
            return spread
        return spread.unflatten(1, (self.blocks, -1)).transpose(0, 1).flatten(0, 1).contiguous()

    def taken(self, weight: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """The weight with only some entries of the dimension that the segments describe."""
        return self.folded(self.spread(weight).index_select(self.dim, entries.to(weight.device)))

    def silence(self, weight: torch.Tensor, entries: torch.Tensor) -> None:
        """Set entries of the dimension that the segments describe to zero, in place."""
        weight.copy_(self.folded(self.spread(weight).index_fill(self.dim, entries.to(weight.device), 0)))

    def positions(self, part: str, sizes: Mapping[str, int]) -> torch.Tensor:
        """``[units, entries]``: the positions of a part's units in a dimension with ``sizes[part]`` units per part."""
        repeats = sizes["kv"] if self.grouped else 1
        counts = [1 if s.part == REST else sizes[s.part] // repeats for s in self.segments]
        lengths = [s.unit * n for s, n in zip(self.segments, counts, strict=True)]
        period = sum(lengths)
        places, start = [], 0
        for segment, count, length in zip(self.segments, counts, lengths, strict=True):
            if segment.part == part:
                first = start + torch.arange(length).view(count, segment.unit)
                places.append((torch.arange(repeats)[:, None, None] * period + first).flatten(0, 1))
            start += length
        return torch.cat(places, 1)

    def gathered(self, kept: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> torch.Tensor:
        """The entries of the dimension that make up the smaller one, in its order.

        Args:
            kept: The units that stay, in their new order, by part; parts that are not named keep all.
            sizes: The number of units before, by part.
        """
        parts = list(dict.fromkeys(s.part for s in self.segments))
        new_sizes = {p: len(kept[p]) if p in kept else sizes.get(p, 1) for p in {*parts, *sizes}}
        old = {p: self.positions(p, {**sizes, REST: 1}) for p in parts}
        new = {p: self.positions(p, {**new_sizes, REST: 1}) for p in parts}
        result = torch.empty(sum(p.numel() for p in new.values()), dtype=torch.long)
        for p in parts:
            result[new[p]] = old[p][kept[p]] if p in kept else old[p]
        return result


Layout = tuple[tuple[Segment, ...], bool]  # the segments of a weight, and whether they are repeated for every KV head


def combined_layouts(
    weights: Sequence[WeightAxis], key: Callable[[WeightAxis], Any], layouts: Callable[[WeightAxis], Sequence[Layout]]
) -> Iterator[tuple[WeightAxis, ...]]:
    """The weights with every combination of possible layouts; weights with the same key have the same layout."""
    options = {key(w): layouts(w) for w in weights}
    for combination in itertools.product(*options.values()):
        layout = dict(zip(options, combination, strict=True))
        yield tuple(dataclasses.replace(w, segments=layout[key(w)][0], grouped=layout[key(w)][1]) for w in weights)


class _WithReader:
    """An axis with named weights, one of which, the reader, maps the units to the subblock's output."""

    weights: tuple[WeightAxis, ...]
    reader: str

    def weight(self, name: str) -> WeightAxis:
        return next(w for w in self.weights if w.name == name)

    @property
    def reader_dim(self) -> int:
        """The dimension of the reader along which the units lie."""
        return self.weight(self.reader).dim

    @property
    def output(self) -> str:
        """Name in the layer of the module whose input holds the units."""
        return self.reader.removesuffix(".weight")


@dataclass(frozen=True)
class Bundle(_WithReader):
    """Weights that share their channels: an FFN, a shared expert, or all routed experts.

    Attributes:
        size: F, per member.
        weights: The weights that have channels.
        reader: The weight that maps the channels to the subblock's output; empty until it is proved.
        members: Number of experts, each with separate channels; 0 for a plain FFN.
        stacked: Whether the members lie along the first dimension of each weight, not in a list of modules.
        flat: Whether that first dimension is ``members * channels``; ``dim`` then counts it as two dimensions.
    """

    size: int
    weights: tuple[WeightAxis, ...]
    reader: str = ""
    members: int = 0
    stacked: bool = False
    flat: bool = False

    @property
    def matrix_dims(self) -> int:
        """Number of dimensions of a weight that holds one matrix, or one per member."""
        return 3 if self.stacked and not self.flat else 2


@dataclass(frozen=True)
class WidthAxis:
    """The width of an FFN or of experts, as the block config counts it.

    Attributes:
        size: F.
        bundles: Weights that are narrowed in the same proportion; each bundle keeps different channels.
    """

    def __str__(self) -> str:
        return f"width {self.size}"

    size: int
    bundles: tuple[Bundle, ...]

    @property
    def weights(self) -> tuple[WeightAxis, ...]:
        return tuple(w for bundle in self.bundles for w in bundle.weights)

    @property
    def output(self) -> str:
        """Name in the layer of the module whose input holds the channels of the first bundle."""
        return self.bundles[0].output


@dataclass(frozen=True)
class HeadsAxis(_WithReader):
    """The heads of an attention or of a mixer; a mixer's groups count as KV heads and its heads as query heads.

    Where heads work in pairs, as in differential attention, a pair counts as one head here.

    Attributes:
        size: K.
        num_heads: H; the query heads of one KV head are consecutive.
        head_dim: d, of a KV head in the cache.
        weights: The weights that hold heads, each once.
        reader: The weight that maps the heads to the subblock's output.
        fewer_kv: Whether there can be fewer KV heads for the same query heads.
        fewer_queries: Whether there can be fewer query heads for the same KV heads.
        fewer_groups: Whether KV heads can be removed with their query heads.
        other_attentions: The heads of the layer's other attentions. All attentions keep equally many heads, but each
            its most important ones.
        blocks: Number of blocks of a block-diagonal reader. Each block reads ``H / blocks`` consecutive heads, and
            equally many heads of each block stay.
        together: Number of heads, as a config counts them, that count as one here. The heads of a pair lie in
            different halves.
    """

    size: int
    num_heads: int
    head_dim: int
    weights: tuple[WeightAxis, ...]
    reader: str = ""
    fewer_kv: bool = False
    fewer_queries: bool = False
    fewer_groups: bool = False
    other_attentions: tuple[HeadsAxis, ...] = ()
    blocks: int = 1
    together: int = 1

    def __str__(self) -> str:
        ways = {"KV": self.fewer_kv, "query": self.fewer_queries, "KV with query": self.fewer_groups}
        fewer = ", ".join(way for way, holds in ways.items() if holds)
        return f"{self.num_heads} heads, {self.size} KV; fewer {fewer or 'none'}"

    @property
    def attentions(self) -> tuple[HeadsAxis, ...]:
        """The heads of every attention of the layer, this one first."""
        return (self, *self.other_attentions)

    @property
    def shares(self) -> int:
        """Number of groups of consecutive query heads; equally many heads of each group stay."""
        return max(self.size, self.blocks)

    @property
    def sizes(self) -> dict[str, int]:
        return {"kv": self.size, "queries": self.num_heads}


@dataclass(frozen=True)
class StateAxis:
    """The size of the state that a Mamba or linear-attention mixer keeps for every entry of a head.

    Attributes:
        size: N.
        weights: The weights that have entries per number of the state, in every group of heads. Where the entries lie
            along the first dimension, the weight writes to the state or reads it.
    """

    size: int
    weights: tuple[WeightAxis, ...]

    @property
    def makers(self) -> tuple[WeightAxis, ...]:
        """The weights that write to the state or read it; only those with nothing else in them, if there are such."""
        makers = tuple(w for w in self.weights if w.dim == 0)
        return tuple(w for w in makers if len(w.segments) == 1) or makers

    def __str__(self) -> str:
        return f"state {self.size}"


@dataclass(frozen=True)
class HeadSizeAxis(_WithReader):
    """The size of the heads of a Mamba or linear-attention mixer.

    Attributes:
        size: P.
        num_heads: H; the entries of a head are consecutive.
        groups: G, of consecutive heads.
        weights: The weights that have ``"channels"``, P for every head, or ``"entries"``, P that all heads share.
        reader: The weight that maps the heads to the subblock's output.
    """

    size: int
    num_heads: int
    groups: int
    weights: tuple[WeightAxis, ...]
    reader: str = ""

    @property
    def sizes(self) -> dict[str, int]:
        return {"channels": self.num_heads * self.size, "entries": self.size, "kv": self.groups}

    def __str__(self) -> str:
        return f"{self.num_heads} mixer heads of {self.size}"

    @property
    def alike(self) -> bool:
        """Whether all heads must keep the same entries."""
        return any(s.part == "entries" for w in self.weights for s in w.segments)


@dataclass(frozen=True)
class InnerAxis:
    """A size inside a subblock: of heads of queries and keys or of values, a rank, or a latent width.

    Attributes:
        name: The config's attribute that sets it.
        subblock: ``"attention"`` or ``"ffn"``.
        size: P.
        weights: The weights that have ``"channels"``, one of every unit for each of their heads.
        readers: Those of them whose input the units are.
        places: Arguments that all layers share, with the units along their last dimension, by the name of the weight
            that holds the entries that the layer takes.
        step: Numbers of the size that are one unit: 2 where a rotary embedding turns two entries together.
        groups: C, of heads that keep different units.
        norms: Weights of norms that divide by the root mean square of all units.
        offset: What these norms add to their weights.
        role: What has the size, one of ``INNER_ROLES``.
    """

    name: str
    subblock: str
    size: int
    weights: tuple[WeightAxis, ...]
    readers: tuple[str, ...] = ()
    places: tuple[WeightAxis, ...] = ()
    step: int = 1
    groups: int = 1
    norms: tuple[str, ...] = ()
    offset: float = 0.0
    role: str = ""

    def weight(self, name: str) -> WeightAxis:
        return next(w for w in self.weights if w.name == name)

    @property
    def units(self) -> int:
        """Number of units in each group."""
        return self.size // self.step

    @property
    def sizes(self) -> dict[str, int]:
        return {"channels": self.groups * self.units, "kv": self.groups}

    @property
    def makers(self) -> tuple[WeightAxis, ...]:
        """The weights that compute the units; only those with nothing else in them, if there are such."""
        made = tuple(w for w in self.weights if w.dim == 0) or self.weights
        return tuple(w for w in made if all(s.part != REST for s in w.segments)) or made

    def __str__(self) -> str:
        return f"{self.name} {self.size}"


@dataclass(frozen=True)
class ExpertsAxis:
    """The routed experts of an FFN.

    Attributes:
        size: E.
        weights: Stacks of experts, and the weights of the router.
        lists: Names of module lists with one member per expert.
        router: Names of those ``weights`` that choose experts.
        per_token: Number of experts that a token uses, the least number of experts that can stay.
        groups: Number of the router's groups of consecutive experts; each keeps equally many.
        fewer_per_token: Whether a token can use fewer experts.
    """

    size: int
    weights: tuple[WeightAxis, ...]
    lists: tuple[str, ...]
    router: tuple[str, ...]
    per_token: int
    groups: int = 1
    fewer_per_token: bool = False

    def __str__(self) -> str:
        return f"{self.size} experts, {self.per_token} per token"


@dataclass(frozen=True)
class LayerAxes:
    """The axes of one layer; None where it lacks one.

    Attributes:
        ffn: The width of the FFN, or of the routed experts.
        kv: The heads of the attention.
        experts: The routed experts.
        shared: The width of shared experts, where it is a separate size.
        reasons: Why an axis is missing: a sentence by ``"ffn"``, ``"attention"``, ``"experts"``, ``"shared"``,
            ``"window"``, ``"mixer"``, ``"mixer_size"``, ``"state"``, or ``"inner."`` and the attribute that sets a size
            inside a subblock.
        window: The layer type with sliding-window attention that the layer can take; empty if it can take none.
        of_experts: Names of the stacks and of the lists of experts.
        mixer: The heads of the Mamba or linear-attention mixer.
        state: The size of that mixer's state.
        mixer_size: The size of that mixer's heads.
        inner: Other sizes inside its subblocks.
    """

    ffn: WidthAxis | None
    kv: HeadsAxis | None
    experts: ExpertsAxis | None = None
    shared: WidthAxis | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    window: str = ""
    of_experts: tuple[str, ...] = ()
    mixer: HeadsAxis | None = None
    state: StateAxis | None = None
    mixer_size: HeadSizeAxis | None = None
    inner: tuple[InnerAxis, ...] = ()

    def is_of_experts(self, name: str) -> bool:
        """Whether a weight belongs to the routed experts."""
        return any(name == experts or name.startswith(f"{experts}.") for experts in self.of_experts)

    def __str__(self) -> str:
        axes = (self.kv, self.mixer, self.mixer_size, self.state, self.ffn, self.experts, self.shared, *self.inner)
        return "; ".join(str(axis) for axis in axes if axis is not None) or "no axes"
