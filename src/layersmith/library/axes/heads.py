"""Finds the axes of an attention's heads: which weights have entries of query heads, and which of KV heads.

Shapes: H query heads, K key-value heads, d head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from layersmith.block_config import BlockConfig
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import REST, HeadsAxis, NoAxis, Segment, WeightAxis
from layersmith.library.axes.experiments import Governed, ModelExperiments, Resized, other_kv_heads
from layersmith.model_descriptor.stock import whole_number

_STATE = "it has a mixer that keeps a state instead of keys and values"


def attention_heads(model: ModelExperiments, i: int, reasons: dict[str, str]) -> HeadsAxis:
    """Query and key-value heads; weights that hold both say so."""
    block = model.blocks[i]
    if block.attention.no_op or block.attention.replace_with_linear:
        raise NoAxis("there is no attention to narrow")
    count = block.attention.num_key_value_heads
    if count is None and block.attention.mamba is not None:
        raise NoAxis(_STATE)
    num_heads = _num_heads(model, i)
    of_kv: list[Governed] = []
    why = "each query head has keys and values of its own"
    described = model.described
    if described is not None and described.keeps_state(i):
        why = _STATE
    elif count is None and described is not None and described.caches_nothing(i):
        why = "it keeps no keys and values of its own"
    elif count is None and described is not None and described.latent_cache(i) is not None:
        why = "its cache holds for every token what all heads share"
    elif count is None and _shared_kv_heads(model, i) not in (None, num_heads):
        if described is not None and described.attention_stays(i):
            why = "later layers use its keys and values"
        else:
            seen = described.why_no_kv_heads(i) if described is not None else ""
            why = seen or "the number of its KV heads cannot differ alone"
    if count is not None and count > 1:
        of_kv = model.governed(model.experiment("kv", other_kv_heads), i)
        why = "" if of_kv else "its number of KV heads changes no weight of the layer"
    elif count == 1:
        why = "it has one KV head already"
    of_queries, no_queries = _of_queries(model, i, num_heads)
    if why:
        reasons["kv_heads"] = why
    if no_queries:
        reasons["query_heads"] = no_queries
    if num_heads is None or not (of_kv or of_queries):
        raise NoAxis("; ".join(filter(None, (why, no_queries))))
    count = _shared_kv_heads(model, i) if count is None else count
    if not of_kv and count != 1 and model.described is not None and model.described.latent_cache(i) is not None:
        count = None  # each query head makes keys and values of what is cached, whatever the config says
    if model.described is not None and model.described.heads_end_in_blocks(i):
        if of_kv:
            raise NoAxis("the projection that its heads end in is made of blocks, and it has several KV heads")
        count = 1  # it is tried whether equally many heads of each block can go
    elif not of_kv and count in (None, num_heads):
        return _alike_heads(model, i, num_heads, of_queries)
    return _grouped_heads(model, i, count or 1, num_heads, of_kv, of_queries)


def _shared_kv_heads(model: ModelExperiments, i: int) -> int | None:
    return None if model.described is None else model.described.shared_kv_heads(i)


def _num_heads(model: ModelExperiments, i: int) -> int | None:
    own = model.blocks[i].attention.num_attention_heads
    if own is None and model.described is not None:
        own = model.described.num_query_heads(i)
    return whole_number(model.language, "num_attention_heads") if own is None else own


def _of_queries(model: ModelExperiments, i: int, num_heads: int | None) -> tuple[list[Governed], str]:
    """What changes with the number of query heads, the size of a head unchanged; or why that is not known."""
    if num_heads is None:
        return [], "its config has no number of query heads"

    def more(block: BlockConfig, j: int, larger: bool) -> Resized | None:
        own = _num_heads(model, j)
        if own is None or block.attention.no_op or block.attention.replace_with_linear:
            return None
        return Resized(Alternative(j, "attention", "query_heads", size=2 * own).block_config(block), 2 * own, own)

    made = model.experiment("queries", more)
    try:
        governed = model.governed(made, i) if made.sizes[i] is not None else []
    except NoAxis as reason:
        return [], str(reason)
    seen = model.described.why_no_query_heads(i) if model.described is not None else ""
    return governed, "" if governed else seen or "the size of its heads follows from their number"


def _alike_heads(model: ModelExperiments, i: int, num_heads: int, of_queries: list[Governed]) -> HeadsAxis:
    """Every query head has keys and values of its own."""
    weights = [WeightAxis(g.name, g.dim, tuple(_split_fused([Segment("queries", g.unit)], g.rest))) for g in of_queries]

    def one(own: list[WeightAxis], reader: str, head_dim: int) -> HeadsAxis:
        return HeadsAxis(num_heads, num_heads, head_dim, tuple(own), reader, fewer_groups=num_heads > 1)

    return _each_attention(model, i, weights, one)


def _grouped_heads(
    model: ModelExperiments, i: int, count: int, num_heads: int, of_kv: list[Governed], of_queries: list[Governed]
) -> HeadsAxis:
    if num_heads % count:
        raise NoAxis(f"its {num_heads} query heads are not the same number for each of {count} KV heads")
    queries = {(g.name, g.dim): g for g in of_queries}
    kv = {(g.name, g.dim): g for g in of_kv}
    if not queries:
        return _without_query_size(model, i, count, num_heads, of_kv)
    weights = []
    for name, dim in dict.fromkeys([*queries, *kv]):
        length = model.base[i][name][dim]
        q, k = queries.get((name, dim)), kv.get((name, dim))
        parts = [Segment(part, g.unit) for part, g in (("queries", q), ("kv", k)) if g is not None]
        rest = length - sum(s.unit * (num_heads if s.part == "queries" else count) for s in parts)
        if rest < 0:
            raise NoAxis(f"queries, keys and values of {name} cannot be told apart")
        weights.append(WeightAxis(name, dim, tuple(_split_fused(parts, rest))))
    more_than_one = count > 1 and bool(of_kv)

    def one(own: list[WeightAxis], reader: str, head_dim: int) -> HeadsAxis:
        blocks = _blocks(model, i, own, reader)
        if blocks > 1:
            own = [dataclasses.replace(w, blocks=blocks) if w.name == reader else w for w in own]
            own = [
                dataclasses.replace(w, segments=tuple(Segment(s.part, s.unit * w.blocks) for s in w.segments))
                for w in own
            ]
            head_dim *= blocks
        found = HeadsAxis(
            count, num_heads, head_dim, tuple(own), reader, fewer_kv=more_than_one,
            fewer_queries=num_heads > max(count, blocks), fewer_groups=more_than_one, blocks=blocks,
        )  # fmt: skip
        pairs = in_pairs(found) if model.described is not None and model.described.heads_in_pairs(i) else None
        return found if pairs is None else pairs

    return _each_attention(model, i, weights, one)


def in_pairs(axis: HeadsAxis) -> HeadsAxis | None:
    """The axis of pairs: a head and the one as far in the other half of all, next to each other where they end.

    None where heads cannot be so.
    """
    odd = axis.size % 2 or axis.num_heads % 2 or any(len(w.segments) != 1 for w in axis.weights)
    if odd or axis.blocks > 1 or axis.beside or axis.together > 1:
        return None

    def paired(w: WeightAxis) -> WeightAxis:
        (own,) = w.segments
        pair = (Segment(own.part, 2 * own.unit),) if w.name == axis.reader else (own, own)
        return dataclasses.replace(w, segments=pair)

    weights = tuple(paired(w) for w in axis.weights)
    several = axis.size > 2
    return dataclasses.replace(
        axis,
        size=axis.size // 2,
        num_heads=axis.num_heads // 2,
        weights=weights,
        fewer_kv=axis.fewer_kv and several,
        fewer_groups=axis.fewer_groups and several,
        together=2,
    )


def _each_attention(
    model: ModelExperiments, i: int, weights: list[WeightAxis], one: Callable[[list[WeightAxis], str, int], HeadsAxis]
) -> HeadsAxis:
    """The heads of every attention of a layer: each has what lies in the same module as what its heads end in."""
    readers = heads_readers(model, i, weights)
    if len(readers) < 2:
        return one(weights, *heads_reader(model, i, weights))
    parts = [name.split(".") for name, _ in readers]
    length = 1 + next(at for at, own in enumerate(zip(*parts, strict=False)) if len(set(own)) == len(readers))
    modules = [f"{'.'.join(part[:length])}." for part in parts]
    of_each = [[w for w in weights if w.name.startswith(module)] for module in modules]
    if shared := [w.name for w in weights if not w.name.startswith(tuple(modules))]:
        raise NoAxis(f"it has several attentions, whose heads are all made by {shared[0]}")
    first, *beside = [one(own, *reader) for own, reader in zip(of_each, readers, strict=True)]
    return dataclasses.replace(first, beside=tuple(beside))


def _blocks(model: ModelExperiments, i: int, weights: Sequence[WeightAxis], reader: str) -> int:
    """How many shares of the heads the projection that they end in reads by the same entries."""
    if model.described is None or not model.described.heads_end_in_blocks(i):
        return 1
    # A head has as many entries where it is made, and in the projection a share of them for each.
    unit = next(w for w in weights if w.name == reader).segments[0].unit
    made = max(s.unit for w in weights if w.name != reader for s in w.segments if s.part == "queries")
    if made % unit:
        raise NoAxis(f"the blocks of {reader} cannot be told")
    return made // unit


def _without_query_size(
    model: ModelExperiments, i: int, count: int, num_heads: int, of_kv: list[Governed]
) -> HeadsAxis:
    """Where the number of query heads cannot differ alone: they are what as long as all of them remains."""
    matrices = [g for g in of_kv if len(model.base[i][g.name]) == 2]
    if not matrices:
        raise NoAxis("no projection gives its keys and values")
    fused = [g for g in matrices if g.rest]
    head_dim = fused[0].rest // num_heads if fused else matrices[0].unit
    weights = [WeightAxis(g.name, g.dim, tuple(_split_fused([Segment("kv", g.unit)], 0))) for g in of_kv if not g.rest]
    for g in of_kv:
        if g.rest:
            if g.rest % num_heads:
                raise NoAxis(f"queries, keys and values of {g.name} cannot be told apart")
            parts = [Segment("queries", g.rest // num_heads), Segment("kv", g.unit)]
            weights.append(WeightAxis(g.name, g.dim, tuple(_split_fused(parts, 0))))
    governed = {g.name for g in of_kv}
    length = num_heads * head_dim
    modules = () if model.described is None else model.described.attention_modules(model.skeleton[i])
    inside = tuple(f"{module}." for module in modules)
    for name in sorted(model.attention_weights(i) - governed):
        shape = model.base[i][name]
        matrix = f"{name.rpartition('.')[0]}.weight"
        if shape == (length,) and name.startswith(inside) and len(model.base[i].get(matrix, shape)) == 1:
            weights.append(WeightAxis(name, 0, (Segment("queries", head_dim),)))  # a norm over all of them
            continue
        if length not in shape or len(shape) > 2 or matrix not in model.base[i]:
            continue
        own_input = model.input_dim(i, matrix)
        # A projection that takes as much as all heads give is the output's; the others give queries.
        takes = own_input is not None and model.base[i][matrix][own_input] == length
        is_reader = takes and ((not fused and _comes_last(model, i, matrix)) or bool(fused))
        if len(shape) == 2 and own_input is not None:
            dim = own_input if is_reader else 1 - own_input
            if shape[dim] == length:
                weights.append(WeightAxis(name, dim, (Segment("queries", head_dim),)))
        elif len(shape) == 1 and own_input is not None and not is_reader:
            weights.append(WeightAxis(name, 0, (Segment("queries", head_dim),)))
    reader, head_dim = heads_reader(model, i, weights)
    return HeadsAxis(count, num_heads, head_dim, tuple(weights), reader, fewer_kv=True)


def _comes_last(model: ModelExperiments, i: int, matrix: str) -> bool:
    """Whether a square projection is the last of its attention in the order of construction."""
    own = model.attention_weights(i)
    square = [n for n in model.base[i] if n in own and model.base[i][n] == model.base[i][matrix]]
    return square[-1] == matrix


def _split_fused(parts: Sequence[Segment], rest: int) -> list[Segment]:
    """Queries, then keys, then values, where a weight holds them all."""
    found: list[Segment] = []
    for segment in parts:
        if segment.part == "kv" and len(parts) > 1:
            found += [Segment("kv", segment.unit // 2)] * 2 if segment.unit % 2 == 0 else [segment]
        else:
            found.append(segment)
    return [*found, Segment(REST, rest)] if rest else found


def takes(model: ModelExperiments, i: int, w: WeightAxis) -> bool:
    """Whether the units of a weight are the input of a projection."""
    return w.name.endswith(".weight") and model.input_dim(i, w.name) == w.dim


def heads_readers(model: ModelExperiments, i: int, weights: Sequence[WeightAxis]) -> list[tuple[str, int]]:
    """Name and entries per head of the projections whose input the heads are; else of stacks of projections."""
    of_heads = [w for w in weights if len(w.segments) == 1 and w.segments[0].part == "queries"]
    readers = [w for w in of_heads if takes(model, i, w)]
    # Of a stack, the proof shows whether its last dimension is the input.
    stacks = [w for w in of_heads if len(model.base[i][w.name]) == 3 and w.dim == 2 and w.name.endswith(".weight")]
    return [(w.name, w.segments[0].unit) for w in readers or stacks]


def heads_reader(model: ModelExperiments, i: int, weights: Sequence[WeightAxis]) -> tuple[str, int]:
    """The only such projection.

    Raises:
        NoAxis: there is none, or more than one.
    """
    readers = heads_readers(model, i, weights)
    if len(readers) > 1:
        names = " and ".join(name for name, _ in readers)
        raise NoAxis(f"it has several attentions, whose heads end in {names}, and one number of heads for all")
    if not readers:
        raise NoAxis("the projection that its heads end in cannot be told")
    return readers[0]
