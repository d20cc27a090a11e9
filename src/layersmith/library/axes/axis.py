"""What an axis of a subblock is: a size, the weights that it governs, and where each unit lies in them.

A unit is what is kept or removed as a whole: a channel of an FFN, a head, an expert. Along one dimension of a weight
the units lie in segments: the rows of a fused gate and up projection are one segment of gates and one of ups, and
those of a fused query, key and value projection are queries, keys and values, one after another or group by group.

Shapes: D hidden, F intermediate channels, H query heads, K key-value heads, E experts, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

REST = "rest"


class NoAxis(Exception):
    """There is no such axis; the message says why."""


def numbered(name: str, attention: int) -> str:
    """The name of what is of one of several attentions of a layer; that of the first is as if there were one."""
    return f"{name}.{attention}" if attention else name


def largest_part(size: int) -> int:
    """The largest proper divisor, so that whatever must divide a size still does; a ``ValueError`` if there is none."""
    if size < 2:
        raise ValueError(f"{size} cannot be less")
    return next(size // divisor for divisor in range(2, size + 1) if size % divisor == 0)


@dataclass(frozen=True)
class Segment:
    """Neighbouring entries of a dimension that belong to the units of one part, unit after unit.

    Attributes:
        part: ``"channels"``, ``"kv"``, ``"queries"``, ``"experts"``, ``"state"``, ``"entries"``, or ``"rest"`` for
            entries of no unit.
        unit: entries a unit; for the rest, all of them.
    """

    part: str
    unit: int = 1


@dataclass(frozen=True)
class WeightAxis:
    """One dimension of one weight of a layer that an axis governs.

    Attributes:
        name: of the parameter, in the layer; ``{}`` stands for the number of a member of a list.
        dim: the dimension.
        segments: what lies along it, in order.
        grouped: whether the segments are repeated for every KV head, each time with its share of the units.
        blocks: of a matrix that reads as many shares of the units by the same entries, each by its share of rows: what
            the segments describe lies along the second dimension of :meth:`spread`.
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
        """The weight of what :meth:`spread` made of it."""
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
        """``[units, entries]``: where the units of a part lie, if there are ``sizes[part]`` of each part."""
        repeats = sizes["kv"] if self.grouped else 1
        counts = [1 if s.part == REST else sizes[s.part] // repeats for s in self.segments]
        lengths = [s.unit * n for s, n in zip(self.segments, counts, strict=True)]
        period = sum(lengths)
        found, start = [], 0
        for segment, count, length in zip(self.segments, counts, lengths, strict=True):
            if segment.part == part:
                own = start + torch.arange(length).view(count, segment.unit)
                found.append((torch.arange(repeats)[:, None, None] * period + own).flatten(0, 1))
            start += length
        return torch.cat(found, 1)

    def gathered(self, kept: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> torch.Tensor:
        """Which entries of the dimension make up the smaller one, in its order.

        Args:
            kept: part to the units that it has then, in their order; of parts that are not named all stay.
            sizes: units of each part as they are now.
        """
        parts = list(dict.fromkeys(s.part for s in self.segments))
        new_sizes = {p: len(kept[p]) if p in kept else sizes.get(p, 1) for p in {*parts, *sizes}}
        rest = {REST: 1}
        old = {p: self.positions(p, {**sizes, **rest}) for p in parts}
        new = {p: self.positions(p, {**new_sizes, **rest}) for p in parts}
        result = torch.empty(sum(p.numel() for p in new.values()), dtype=torch.long)
        for p in parts:
            result[new[p]] = old[p][kept[p]] if p in kept else old[p]
        return result


class _WithReader:
    """What has weights by name, one of which reads all the units into the subblock's output."""

    weights: tuple[WeightAxis, ...]
    reader: str

    def weight(self, name: str) -> WeightAxis:
        return next(w for w in self.weights if w.name == name)

    @property
    def reader_dim(self) -> int:
        """The dimension of the reader that counts units."""
        return self.weight(self.reader).dim

    @property
    def output(self) -> str:
        """Name, in the layer, of the module whose input holds the units."""
        return self.reader.removesuffix(".weight")


@dataclass(frozen=True)
class Bundle(_WithReader):
    """Weights that share their channels: an FFN, all routed experts with channels of their own each, a shared expert.

    Attributes:
        size: channels.
        weights: what is sliced.
        reader: the weight that reads the channels into the subblock's output; empty until it is proved.
        members: experts in it; 0 where there is only one FFN.
        stacked: whether the members lie along the first dimension of each weight, not in a list of modules.
        flat: whether they lie there with their channels, one after another; ``dim`` is then that of a weight in which
            members have a dimension of their own before it.
    """

    size: int
    weights: tuple[WeightAxis, ...]
    reader: str = ""
    members: int = 0
    stacked: bool = False
    flat: bool = False

    @property
    def matrix_dims(self) -> int:
        """Dimensions of a weight that holds a matrix, or one for each member."""
        return 3 if self.stacked and not self.flat else 2


@dataclass(frozen=True)
class WidthAxis:
    """The width of an FFN or of experts, as the block config counts it.

    Attributes:
        size: F.
        bundles: what is narrowed together; each keeps channels of its own, in the same proportion.
    """

    size: int
    bundles: tuple[Bundle, ...]

    @property
    def weights(self) -> tuple[WeightAxis, ...]:
        return tuple(w for bundle in self.bundles for w in bundle.weights)

    @property
    def output(self) -> str:
        """Name, in the layer, of the module whose input holds the channels of the first bundle."""
        return self.bundles[0].output


@dataclass(frozen=True)
class HeadsAxis(_WithReader):
    """The heads of an attention, or of a mixer whose groups of heads are then the KV heads, and its heads the queries.

    Where heads work together in pairs, as in differential attention, a pair counts as one head here.

    Attributes:
        size: K.
        num_heads: H; query heads of one KV head are neighbours.
        head_dim: d, of a KV head in the cache.
        weights: what holds heads, each weight once.
        reader: the weight that reads the heads into the subblock's output.
        fewer_kv: whether there can be fewer KV heads for the same query heads.
        fewer_queries: whether there can be fewer query heads for the same KV heads.
        fewer_groups: whether KV heads can go with their query heads.
        beside: the heads of the layer's other attentions, where it has several; of each as many stay as here, but not
            the same ones.
        blocks: of the reader, which then reads neighbouring heads by the same entries, ``H / blocks`` of them by each
            of as many shares of its outputs. Equally many heads of each block stay.
        together: heads, as a config counts them, that are one here: one of each of as many equal shares of all.
    """

    size: int
    num_heads: int
    head_dim: int
    weights: tuple[WeightAxis, ...]
    reader: str = ""
    fewer_kv: bool = False
    fewer_queries: bool = False
    fewer_groups: bool = False
    beside: tuple[HeadsAxis, ...] = ()
    blocks: int = 1
    together: int = 1

    @property
    def attentions(self) -> tuple[HeadsAxis, ...]:
        """The heads of every attention of the layer, this one first."""
        return (self, *self.beside)

    @property
    def shares(self) -> int:
        """Of how many groups of neighbouring query heads equally many stay."""
        return max(self.size, self.blocks)

    @property
    def sizes(self) -> dict[str, int]:
        return {"kv": self.size, "queries": self.num_heads}


@dataclass(frozen=True)
class StateAxis:
    """The size of the state that a Mamba or linear-attention mixer keeps for every entry of a head.

    Attributes:
        size: N.
        weights: what has entries for each of the state, in every group of heads; those along the first dimension of a
            weight write to the state and read it.
    """

    size: int
    weights: tuple[WeightAxis, ...]

    @property
    def makers(self) -> tuple[WeightAxis, ...]:
        """The weights that write to the state and read it: where there are such for it alone, e.g. norms, those."""
        found = tuple(w for w in self.weights if w.dim == 0)
        return tuple(w for w in found if len(w.segments) == 1) or found


@dataclass(frozen=True)
class HeadSizeAxis(_WithReader):
    """The size of the heads of a Mamba or linear-attention mixer.

    Attributes:
        size: P.
        num_heads: H; the entries of a head are neighbours.
        groups: G, of neighbouring heads.
        weights: what has ``"channels"``, P for every head, or ``"entries"``, P that all heads share.
        reader: the weight that reads the heads into the subblock's output.
    """

    size: int
    num_heads: int
    groups: int
    weights: tuple[WeightAxis, ...]
    reader: str = ""

    @property
    def sizes(self) -> dict[str, int]:
        return {"channels": self.num_heads * self.size, "entries": self.size, "kv": self.groups}

    @property
    def alike(self) -> bool:
        """Whether all heads have to keep the same entries."""
        return any(s.part == "entries" for w in self.weights for s in w.segments)


@dataclass(frozen=True)
class ExpertsAxis:
    """The routed experts of an FFN.

    Attributes:
        size: E.
        weights: stacks of experts, and what the router has for each.
        lists: names of lists of modules that have one for each expert.
        router: the weights of ``weights`` that choose experts.
        per_token: experts that a token uses; there cannot be fewer experts.
        groups: the router's groups of neighbouring experts; each keeps equally many.
        fewer_per_token: whether a token can use fewer experts.
    """

    size: int
    weights: tuple[WeightAxis, ...]
    lists: tuple[str, ...]
    router: tuple[str, ...]
    per_token: int
    groups: int = 1
    fewer_per_token: bool = False


@dataclass(frozen=True)
class LayerAxes:
    """The axes of one layer.

    Attributes:
        ffn: the width of its FFN, or of its routed experts.
        kv: its heads.
        experts: its routed experts.
        shared: the width of shared experts, where it is a size of its own.
        reasons: why there is none: ``"ffn"``, ``"attention"``, ``"experts"``, ``"shared"``, ``"window"``,
            ``"mixer"``, ``"mixer_size"`` or ``"state"`` to a sentence.
        window: the type that its attention could have to see a window only; empty if there is none.
        of_experts: weights that are stacks of experts, and lists of them.
        mixer: the heads of its Mamba or linear-attention mixer.
        state: the size of that mixer's state.
        mixer_size: the size of that mixer's heads.
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

    def is_of_experts(self, name: str) -> bool:
        """Whether a weight belongs to the routed experts, of which a token uses some."""
        return any(name == own or name.startswith(f"{own}.") for own in self.of_experts)
