"""Finds the axes of an attention's heads: which weights hold entries of query heads, and which of KV heads.

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
NO_READER = "the projection that reads its heads cannot be identified"


def attention_heads(model: ModelExperiments, i: int, reasons: dict[str, str]) -> HeadsAxis:
    """The query and KV heads of layer ``i``.

    Args:
        model: The experiments on the model's sizes.
        i: Index of the layer.
        reasons: Receives why the number of KV heads or of query heads cannot change.

    Raises:
        NoAxis: Neither number can change.
    """
    block, described = model.blocks[i], model.described
    if block.attention.no_op or block.attention.replace_with_linear:
        raise NoAxis("there is no attention to narrow")
    count = block.attention.num_key_value_heads
    if count is None and block.attention.mamba is not None:
        raise NoAxis(_STATE)
    num_heads = _num_heads(model, i)
    of_kv: list[Governed] = []
    if count is not None and count > 1:
        of_kv = model.governed(model.experiment("kv", other_kv_heads), i)
        why = "" if of_kv else "its number of KV heads changes no weight of the layer"
    elif count == 1:
        why = "it has one KV head already"
    else:
        why = _why_no_kv_heads(model, i, num_heads)
    of_queries, no_queries = _of_queries(model, i, num_heads)
    if why:
        reasons["kv_heads"] = why
    if no_queries:
        reasons["query_heads"] = no_queries
    if num_heads is None or not (of_kv or of_queries):
        raise NoAxis("; ".join(filter(None, (why, no_queries))))
    facts = described.layer_facts(i)
    count = facts.shared_kv_heads if count is None else count
    if not of_kv and count != 1 and facts.latent_cache is not None:
        count = None  # each query head computes keys and values from the cached entries, whatever the config says
    if facts.heads_end_in_blocks:
        if of_kv:
            raise NoAxis("its output projection is made of blocks, and it has several KV heads")
        count = 1  # the proof tries to remove equally many heads of each block
    elif not of_kv and count in (None, num_heads):
        return _ungrouped_heads(model, i, num_heads, of_queries)
    return _grouped_heads(model, i, count or 1, num_heads, of_kv, of_queries)


def _why_no_kv_heads(model: ModelExperiments, i: int, num_heads: int | None) -> str:
    """Why there cannot be fewer KV heads in a layer whose block config has no number of them."""
    facts = model.described.layer_facts(i)
    if facts.keeps_state:
        return _STATE
    if facts.caches_nothing:
        return "it does not compute keys and values"
    if facts.latent_cache is not None:
        return "its cache holds one latent vector per token, which all heads share"
    if facts.shared_kv_heads in (None, num_heads):
        return "each query head has separate keys and values"
    if facts.attention_stays:
        return "later layers use its keys and values"
    return facts.why_no_kv_heads or "the number of its KV heads cannot change alone"


def _num_heads(model: ModelExperiments, i: int) -> int | None:
    count = model.blocks[i].attention.num_attention_heads
    count = model.described.layer_facts(i).num_query_heads if count is None else count
    return whole_number(model.language, "num_attention_heads") if count is None else count


def _of_queries(model: ModelExperiments, i: int, num_heads: int | None) -> tuple[list[Governed], str]:
    """The dimensions that grow with the number of query heads at a fixed head size; else the reason for none."""
    if num_heads is None:
        return [], "its config has no number of query heads"

    def doubled(block: BlockConfig, j: int, larger: bool) -> Resized | None:
        count = _num_heads(model, j)
        if count is None or block.attention.no_op or block.attention.replace_with_linear:
            return None
        alternative = Alternative(j, "attention", "query_heads", size=2 * count)
        return Resized(alternative.block_config(block), 2 * count, count)

    made = model.experiment("queries", doubled)
    try:
        governed = model.governed(made, i) if made.sizes[i] is not None else []
    except NoAxis as reason:
        return [], str(reason)
    if governed:
        return governed, ""
    return [], model.described.layer_facts(i).why_no_query_heads or "the size of its heads follows from their number"


def _ungrouped_heads(model: ModelExperiments, i: int, num_heads: int, of_queries: list[Governed]) -> HeadsAxis:
    """The axis where every query head has separate keys and values."""
    weights = [WeightAxis(g.name, g.dim, tuple(_split_fused([Segment("queries", g.unit)], g.rest))) for g in of_queries]

    def axis_of(weights: list[WeightAxis], reader: str, head_dim: int) -> HeadsAxis:
        return HeadsAxis(
            size=num_heads,
            num_heads=num_heads,
            head_dim=head_dim,
            weights=tuple(weights),
            reader=reader,
            fewer_groups=num_heads > 1,
        )

    return _each_attention(model, i, weights, axis_of)


def _grouped_heads(
    model: ModelExperiments, i: int, count: int, num_heads: int, of_kv: list[Governed], of_queries: list[Governed]
) -> HeadsAxis:
    """The axis where several query heads share a KV head, and some number changes the weights of both."""
    if num_heads % count:
        raise NoAxis(f"its {num_heads} query heads do not split evenly over {count} KV heads")
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
            raise NoAxis(f"queries, keys and values of {name} cannot be separated")
        weights.append(WeightAxis(name, dim, tuple(_split_fused(parts, rest))))
    several = count > 1 and bool(of_kv)

    def axis_of(weights: list[WeightAxis], reader: str, head_dim: int) -> HeadsAxis:
        blocks = _blocks(model, i, weights, reader)
        if blocks > 1:
            weights = [_in_blocks(w, blocks) if w.name == reader else w for w in weights]
        axis = HeadsAxis(
            size=count,
            num_heads=num_heads,
            head_dim=head_dim * blocks,
            weights=tuple(weights),
            reader=reader,
            fewer_kv=several,
            fewer_queries=num_heads > max(count, blocks),
            fewer_groups=several,
            blocks=blocks,
        )
        return (in_pairs(axis) if model.described.layer_facts(i).heads_in_pairs else None) or axis

    return _each_attention(model, i, weights, axis_of)


def _in_blocks(w: WeightAxis, blocks: int) -> WeightAxis:
    return dataclasses.replace(w, segments=tuple(Segment(s.part, s.unit * blocks) for s in w.segments), blocks=blocks)


def in_pairs(axis: HeadsAxis) -> HeadsAxis | None:
    """The axis whose units are pairs of heads; None where heads cannot form pairs.

    Head ``h`` of the first half is paired with head ``h`` of the second half; the reader holds a pair contiguously.
    """
    odd = axis.size % 2 or axis.num_heads % 2 or any(len(w.segments) != 1 for w in axis.weights)
    if odd or axis.blocks > 1 or axis.other_attentions or axis.together > 1:
        return None

    def paired(w: WeightAxis) -> WeightAxis:
        (segment,) = w.segments
        pair = (Segment(segment.part, 2 * segment.unit),) if w.name == axis.reader else (segment, segment)
        return dataclasses.replace(w, segments=pair)

    several = axis.size > 2
    return dataclasses.replace(
        axis,
        size=axis.size // 2,
        num_heads=axis.num_heads // 2,
        weights=tuple(paired(w) for w in axis.weights),
        fewer_kv=axis.fewer_kv and several,
        fewer_groups=axis.fewer_groups and several,
        together=2,
    )


def _each_attention(
    model: ModelExperiments,
    i: int,
    weights: list[WeightAxis],
    axis_of: Callable[[list[WeightAxis], str, int], HeadsAxis],
) -> HeadsAxis:
    """The heads of every attention of a layer; the weights of an attention lie in the module that holds its reader."""
    readers = heads_readers(model, i, weights)
    if len(readers) < 2:
        return axis_of(weights, *heads_reader(model, i, weights))
    paths = [name.split(".") for name, _ in readers]
    # The shortest prefixes that differ between all readers are the modules of the attentions.
    length = 1 + next(at for at, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) == len(readers))
    modules = [f"{'.'.join(path[:length])}." for path in paths]
    if shared := [w.name for w in weights if not w.name.startswith(tuple(modules))]:
        raise NoAxis(f"it has several attentions, and all use {shared[0]}")
    first, *others = [
        axis_of([w for w in weights if w.name.startswith(module)], *reader)
        for module, reader in zip(modules, readers, strict=True)
    ]
    return dataclasses.replace(first, other_attentions=tuple(others))


def _blocks(model: ModelExperiments, i: int, weights: Sequence[WeightAxis], reader: str) -> int:
    """The number of blocks of a block-diagonal output projection; 1 for a dense one."""
    if not model.described.layer_facts(i).heads_end_in_blocks:
        return 1
    # The reader of B blocks counts 1/B of the entries that each head has where it is computed.
    unit = next(w for w in weights if w.name == reader).segments[0].unit
    computed = max(s.unit for w in weights if w.name != reader for s in w.segments if s.part == "queries")
    if computed % unit:
        raise NoAxis(f"the blocks of {reader} cannot be identified")
    return computed // unit


def _without_query_size(
    model: ModelExperiments, i: int, count: int, num_heads: int, of_kv: list[Governed]
) -> HeadsAxis:
    """The axis where the number of query heads cannot change alone.

    The experiments then show only the weights of KV heads. Other weights of the attention belong to the query heads if
    one of their dimensions is as long as all query heads together.
    """
    matrices = [g for g in of_kv if len(model.base[i][g.name]) == 2]
    if not matrices:
        raise NoAxis("no projection computes its keys and values")
    fused = [g for g in matrices if g.rest]
    head_dim = fused[0].rest // num_heads if fused else matrices[0].unit
    weights = [WeightAxis(g.name, g.dim, tuple(_split_fused([Segment("kv", g.unit)], 0))) for g in of_kv if not g.rest]
    for g in of_kv:
        if g.rest:
            if g.rest % num_heads:
                raise NoAxis(f"queries, keys and values of {g.name} cannot be separated")
            parts = [Segment("queries", g.rest // num_heads), Segment("kv", g.unit)]
            weights.append(WeightAxis(g.name, g.dim, tuple(_split_fused(parts, 0))))
    governed = {g.name for g in of_kv}
    length = num_heads * head_dim
    inside = tuple(f"{module}." for module in model.described.attention_modules(model.skeleton[i]))
    for name in sorted(model.attention_weights(i) - governed):
        shape = model.base[i][name]
        matrix = f"{name.rpartition('.')[0]}.weight"
        if shape == (length,) and name.startswith(inside) and len(model.base[i].get(matrix, shape)) == 1:
            weights.append(WeightAxis(name, 0, (Segment("queries", head_dim),)))  # a norm over all heads
            continue
        if length not in shape or len(shape) > 2 or matrix not in model.base[i]:
            continue
        input_dim = model.input_dim(i, matrix)
        if input_dim is None:
            continue
        # A projection whose input is as long as all heads is the output projection; the others compute queries.
        reads_heads = model.base[i][matrix][input_dim] == length
        is_reader = reads_heads and (bool(fused) or _comes_last(model, i, matrix))
        dim = 0 if len(shape) == 1 else input_dim if is_reader else 1 - input_dim
        if shape[dim] == length and not (len(shape) == 1 and is_reader):
            weights.append(WeightAxis(name, dim, (Segment("queries", head_dim),)))
    reader, head_dim = heads_reader(model, i, weights)
    return HeadsAxis(
        size=count, num_heads=num_heads, head_dim=head_dim, weights=tuple(weights), reader=reader, fewer_kv=True
    )


def _comes_last(model: ModelExperiments, i: int, matrix: str) -> bool:
    """Whether a projection is the last of its shape that the attention constructs."""
    attention, shapes = model.attention_weights(i), model.base[i]
    return [n for n in shapes if n in attention and shapes[n] == shapes[matrix]][-1] == matrix


def _split_fused(parts: Sequence[Segment], rest: int) -> list[Segment]:
    """The segments of a weight; where it holds queries too, keys and values become one segment each."""
    segments: list[Segment] = []
    for segment in parts:
        if segment.part == "kv" and len(parts) > 1 and segment.unit % 2 == 0:
            segments += [Segment("kv", segment.unit // 2)] * 2
        else:
            segments.append(segment)
    return [*segments, Segment(REST, rest)] if rest else segments


def takes(model: ModelExperiments, i: int, w: WeightAxis) -> bool:
    """Whether a weight is a projection's and the units lie along its input."""
    return w.name.endswith(".weight") and model.input_dim(i, w.name) == w.dim


def heads_readers(model: ModelExperiments, i: int, weights: Sequence[WeightAxis]) -> list[tuple[str, int]]:
    """Name and entries per head of the projections that read the heads; else of stacks of projections."""
    of_heads = [w for w in weights if len(w.segments) == 1 and w.segments[0].part == "queries"]
    readers = [w for w in of_heads if takes(model, i, w)]
    # The proof shows whether the last dimension of a stack is the input.
    stacks = [w for w in of_heads if len(model.base[i][w.name]) == 3 and w.dim == 2 and w.name.endswith(".weight")]
    return [(w.name, w.segments[0].unit) for w in readers or stacks]


def heads_reader(model: ModelExperiments, i: int, weights: Sequence[WeightAxis]) -> tuple[str, int]:
    """The one projection of :func:`heads_readers`.

    Raises:
        NoAxis: No projection reads the heads, or more than one does.
    """
    readers = heads_readers(model, i, weights)
    if len(readers) > 1:
        names = " and ".join(name for name, _ in readers)
        raise NoAxis(f"it has several attentions with the output projections {names}, and one number of heads for all")
    if not readers:
        raise NoAxis(NO_READER)
    return readers[0]
