"""Proof, on the parent's weights, that removing units of an axis does what the axis says: the third step.

A channel is dead if the output projection has zero weights for it. Removing a dead channel must not change the output
of the layer. The proof therefore zeroes these weights for some channels in a copy of a layer, slices the same channels
away in another copy, and compares the outputs. Heads are proved in the same way. Experts are dead if the router never
chooses them. Where shapes leave the order of units open, every order is tried. The library does not offer an axis that
fails, and keeps the reason.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from layersmith.execution.exchange import LAYER_TYPE, share_buffers
from layersmith.foreign import foreign_code
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import (
    REST,
    Bundle,
    ExpertsAxis,
    HeadsAxis,
    LayerAxes,
    Layout,
    Segment,
    WeightAxis,
    WidthAxis,
    combined_layouts,
    largest_part,
)
from layersmith.library.axes.heads import in_pairs
from layersmith.library.axes.layers import input_dim, layer_shapes
from layersmith.library.axes.prove_inner import prove_inner
from layersmith.library.axes.prove_mixers import prove_head_size, prove_mixer, prove_state
from layersmith.library.axes.trial import (
    Fails,
    Kill,
    Slice,
    Trial,
    alike,
    copy_units,
    dead_or_copies,
    first_success,
    first_that_holds,
    made_dead,
    others,
    twice,
    ways_that_hold,
)
from layersmith.library.slicing import (
    keep_experts,
    keep_groups,
    keep_kv_heads,
    keep_query_heads,
    members_of,
    narrow,
    query_heads_of,
)

_NEVER = -1e4  # a router score low enough that an expert is never chosen


def prove(trial: Trial, axes: Sequence[LayerAxes]) -> list[LayerAxes]:
    """The axes that hold; one layer of every distinct shape is tried.

    Args:
        trial: Runs layers of the parent; a few dozen tokens are enough.
        axes: Axes that were inferred on the meta device.
    """
    verdicts: dict[tuple[object, ...], LayerAxes] = {}
    proved = []
    for i, layer_axes in enumerate(axes):
        key = alike(trial, i, layer_axes)
        if key not in verdicts:
            verdicts[key] = _prove_layer(trial, i, layer_axes)
        proved.append(verdicts[key])
    return proved


def _prove_layer(trial: Trial, i: int, axes: LayerAxes) -> LayerAxes:
    reasons = dict(axes.reasons)

    def tried(name: str, axis: Any, attempt: Callable[[Trial, int, Any], Any]) -> Any:
        if axis is None:
            return None
        try:
            return attempt(trial, i, axis)
        except Fails as reason:
            reasons[name] = str(reason)
            return None

    inner = [tried(f"inner.{axis.name}", axis, prove_inner) for axis in axes.inner]
    return LayerAxes(
        ffn=tried("ffn", axes.ffn, partial(_prove_width, shared=False)),
        kv=tried("attention", axes.kv, partial(_prove_heads, reasons=reasons)),
        experts=tried("experts", axes.experts, _prove_experts),
        shared=tried("shared", axes.shared, partial(_prove_width, shared=True)),
        reasons=reasons,
        window=tried("window", axes.window or None, _prove_window) or "",
        of_experts=axes.of_experts,
        mixer=tried("mixer", axes.mixer, prove_mixer),
        state=tried("state", axes.state, prove_state),
        mixer_size=tried("mixer_size", axes.mixer_size, prove_head_size),
        inner=tuple(axis for axis in inner if axis is not None),
    )


# ---------------------------------------------------------------------------------------------- widths


def _prove_width(trial: Trial, i: int, axis: WidthAxis, shared: bool) -> WidthAxis:
    axis = dataclasses.replace(axis, bundles=tuple(_with_reader(trial, i, b) for b in _partitioned(trial, i, axis)))
    # Some kernels require multiples of 8 or 4, so such sizes are tried too.
    sizes = [largest_part(axis.size), *((axis.size - 1) // m * m for m in (8, 4))]
    return first_success(
        partial(_prove_width_at, trial, i, axis, shared, size) for size in dict.fromkeys(sizes) if size
    )


def _prove_width_at(trial: Trial, i: int, axis: WidthAxis, shared: bool, size: int) -> WidthAxis:
    block = trial.parent.blocks[i]
    kind = "shared_width" if shared else "ffn_width" if block.ffn.moe is None else "expert_width"
    narrower = Alternative(i, "ffn", kind, size=size).block_config(block)

    def difference(guess: WidthAxis, copies: bool) -> float:
        # Every expert keeps different channels, which tests that channels are not confused between experts.
        kept = [_some_channels(b, b.size * size // axis.size) for b in guess.bundles]

        def kill(layer: nn.Module) -> None:
            state = layer.state_dict()
            for bundle, bundle_kept in zip(guess.bundles, kept, strict=True):
                for w in bundle.weights:
                    places = w.positions("channels", {"channels": bundle.size})
                    for m, (weight, dim) in enumerate(members_of(state, bundle, w)):
                        left = bundle_kept[m] if bundle.members else bundle_kept
                        gone = others(bundle.size, left)
                        if w.name == bundle.reader:
                            weight.index_fill_(dim, places[gone].flatten().to(weight.device), 0)
                        elif copies:
                            copy_units(weight, dim, places, left, gone)

        return trial.difference(i, narrower, kill, lambda tensors: narrow(tensors, guess, kept))

    return dead_or_copies(trial, lambda: _width_guesses(axis), difference, "dead channels")


def _some_channels(bundle: Bundle, count: int) -> torch.Tensor:
    members = max(1, bundle.members)
    every = torch.arange(bundle.size)
    rows = torch.stack(
        [((every[:: bundle.size // count][:count] + m) % bundle.size).sort().values for m in range(members)]
    )
    return rows if bundle.members else rows[0]


def _partitioned(trial: Trial, i: int, axis: WidthAxis) -> list[Bundle]:
    """Bundles with one reader each: parallel FFNs that do not share channels become separate bundles."""
    bundles = []
    for bundle in axis.bundles:
        if bundle.reader or bundle.members:
            bundles.append(bundle)
            continue
        parts: dict[str, list[WeightAxis]] = {}
        for w in bundle.weights:
            module = w.name.rpartition(".")[0]
            parts.setdefault(module.rpartition(".")[0], []).append(w)
        split = [_with_reader(trial, i, dataclasses.replace(bundle, weights=tuple(part))) for part in parts.values()]
        bundles += split if len(split) > 1 and all(part.reader for part in split) else [bundle]
    return bundles


def _with_reader(trial: Trial, i: int, bundle: Bundle) -> Bundle:
    """The bundle with its reader, the weight whose rows each compute one output.

    Zeroing the reader's first row changes only the first output; zeroing a row of another weight changes all outputs.
    """
    if bundle.reader:
        return bundle
    layer = trial.parent.layer(i)
    shapes = layer_shapes(layer)
    matrices = [w for w in bundle.weights if not bundle.members and len(shapes[w.name]) == 2]
    read_into = [w.name for w in matrices if w.name.endswith(".weight") and input_dim(layer, w.name) == w.dim]
    if len(read_into) == 1:
        return dataclasses.replace(bundle, reader=read_into[0])
    base = trial.output(i, layer)
    for w in bundle.weights:
        if (
            len(shapes[w.name.format(0)]) != bundle.matrix_dims
            or [s.part for s in w.segments] != ["channels"]
            or w.segments[0].unit != 1
        ):
            continue
        changed = copy.deepcopy(layer)
        with torch.no_grad():
            for weight, dim in members_of(changed.state_dict(), bundle, w):
                weight.select(1 - dim, 0).zero_()
        change = (trial.output(i, changed) - base).float().abs().flatten(0, -2).amax(0)
        touched = int((change > 1e-6 * change.max()).sum()) if float(change.max()) > 0 else 0
        if 0 < touched <= max(1, len(change) // 8) and bool(change[0] > 0):
            return dataclasses.replace(bundle, reader=w.name)
    if bundle.members or len(bundle.weights) > 1:
        # A module after the subblock, e.g. a norm, mixes the outputs; the shapes must decide.
        return _reader_by_shape(trial, i, bundle)
    return bundle


def _reader_by_shape(trial: Trial, i: int, bundle: Bundle) -> Bundle:
    """The bundle whose reader is the only matrix with one entry per channel, as with a fused gate and up projection."""
    shapes = layer_shapes(trial.parent.layers[i])
    narrowest = [
        w
        for w in bundle.weights
        if len(shapes[w.name.format(0)]) == bundle.matrix_dims and sum(s.unit for s in w.segments) == 1
    ]
    if len(narrowest) == 1:
        return dataclasses.replace(bundle, reader=narrowest[0].name)
    raise Fails("the weights that read its channels cannot be identified")


def _width_guesses(axis: WidthAxis) -> Iterator[WidthAxis]:
    for weights in _guesses([w for b in axis.bundles for w in b.weights]):
        rest = iter(weights)
        yield dataclasses.replace(
            axis,
            bundles=tuple(dataclasses.replace(b, weights=tuple(next(rest) for _ in b.weights)) for b in axis.bundles),
        )


def _guesses(weights: Sequence[WeightAxis]) -> Iterator[tuple[WeightAxis, ...]]:
    """Every possible order of the units; weights with the same signature have the same order."""
    return combined_layouts(weights, _signature, lambda w: _orders(*_signature(w)))


_Signature = tuple[tuple[tuple[str, int], ...], int]


def _signature(w: WeightAxis) -> _Signature:
    """The number of entries per unit of every part, and the number of entries of no unit."""
    units: dict[str, int] = {}
    for segment in w.segments:
        if segment.part != REST:
            units[segment.part] = units.get(segment.part, 0) + segment.unit
    return tuple(units.items()), sum(s.unit for s in w.segments if s.part == REST)


def _orders(units: tuple[tuple[str, int], ...], rest: int) -> list[Layout]:
    layouts: list[Layout]
    if len(units) == 1:
        ((part, unit),) = units
        whole = (Segment(part, unit),)
        pieces = [(Segment(part, unit // n),) * n for n in (2, 3, 4) if unit % n == 0 and unit > 1]
        single = [(Segment(part),) * unit] if 4 < unit <= 8 else []
        orders = [*pieces, whole, *single] if part == "channels" else [whole, *pieces]
        layouts = [(segments, False) for segments in dict.fromkeys(orders)]
    else:
        sizes = dict(units)
        queries, kv = Segment("queries", sizes["queries"]), sizes["kv"]
        split = (Segment("kv", kv // 2),) * 2 if kv % 2 == 0 else (Segment("kv", kv),)
        layouts = [
            ((queries, *split), False),
            ((queries, Segment("kv", kv)), True),
            ((queries, Segment("kv", kv)), False),
            ((*split, queries), False),
            ((Segment("kv", kv), queries), True),
        ]
    if not rest:
        return layouts
    return [
        (order, grouped)
        for segments, grouped in layouts
        for order in ((*segments, Segment(REST, rest)), (Segment(REST, rest), *segments))
    ]


# ---------------------------------------------------------------------------------------------- heads


def _prove_heads(trial: Trial, i: int, axis: HeadsAxis, reasons: dict[str, str]) -> HeadsAxis:
    """The axis with the layout of its heads and the ways to reduce them that hold."""

    def refused(way: str, reason: str) -> None:
        reasons["kv_heads" if way == "fewer_kv" else "query_heads"] = reason

    def difference(way: str, guess: HeadsAxis, copies: bool) -> float:
        return twice(trial, partial(_heads_difference, trial, i, way), guess, copies=copies)

    ways = ("fewer_kv", "fewer_groups", "fewer_queries")
    return ways_that_hold(trial, axis, ways, _heads_guesses(axis), difference, refused)


def _heads_guesses(axis: HeadsAxis) -> Iterator[HeadsAxis]:
    if axis.together > 1:
        yield axis
        yield dataclasses.replace(axis, weights=tuple(_in_halves(w) for w in axis.weights))
        return
    counts = [axis.size]
    if not (axis.fewer_kv or axis.fewer_groups or axis.other_attentions or axis.blocks > 1):
        # A config may name fewer KV heads than the layer has, e.g. half as many as its sliding-window layers.
        counts += [n for n in range(2 * axis.size, axis.num_heads, axis.size) if axis.num_heads % n == 0]
    for count in counts:
        yield from _layouts(dataclasses.replace(axis, size=count))
    if (pairs := in_pairs(axis)) is not None:
        yield from _heads_guesses(pairs)


def _in_halves(w: WeightAxis) -> WeightAxis:
    """The layout that has the first heads of all pairs before the second heads."""
    unit = sum(s.unit for s in w.segments) // 2
    return dataclasses.replace(w, segments=(Segment(w.segments[0].part, unit),) * 2)


def _layouts(axis: HeadsAxis) -> Iterator[HeadsAxis]:
    for weights in _guesses([w for attention in axis.attentions for w in attention.weights]):
        rest = iter(weights)
        first, *attentions = [
            dataclasses.replace(attention, weights=tuple(itertools.islice(rest, len(attention.weights))))
            for attention in axis.attentions
        ]
        yield dataclasses.replace(first, other_attentions=tuple(attentions))


def _heads_difference(trial: Trial, i: int, way: str, axis: HeadsAxis, copies: bool, others_stay: bool) -> float:
    """The change of the output when half the heads are dead and then removed.

    Args:
        trial: Runs layers of the parent.
        i: Index of the layer.
        way: The heads to remove: a flag of :class:`HeadsAxis`.
        axis: A guess of the layout.
        copies: Whether the removed heads are first made copies of those that stay.
        others_stay: Whether evenly spaced heads stay instead of the last ones. A wrong layout may pass one of both.
    """
    kills, cuts = [], []
    for a, attention in enumerate(axis.attentions):
        # The attentions keep different heads, which tests that heads are not confused between them.
        fewer, kill, cut = _without_some(i, way, attention, copies, others_stay if a == 0 else not others_stay)
        kills.append(kill)
        cuts.append(cut)

    def kill_all(layer: nn.Module) -> None:
        for kill in kills:
            kill(layer)

    def cut_all(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: weight for cut in cuts for name, weight in cut(tensors).items()}

    return trial.difference(i, fewer.block_config(trial.parent.blocks[i]), kill_all, cut_all)


def _without_some(
    i: int, way: str, axis: HeadsAxis, copies: bool, others_stay: bool
) -> tuple[Alternative, Kill, Slice]:
    """One attention with half its heads: the alternative, a function that makes the others dead, and their slice."""
    group = axis.num_heads // axis.size
    copied: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def some(size: int, count: int) -> torch.Tensor:
        # Never the first ones: this tests the order of heads.
        return torch.arange(0, size, size // count)[:count] if others_stay else torch.arange(size - count, size)

    if way == "fewer_queries":
        share = axis.num_heads // axis.shares
        first = torch.arange(axis.shares)[:, None] * share
        in_share = some(share, largest_part(share))
        queries = (first + in_share).flatten()
        # A removed head is a copy of one of the same share.
        source = (first + in_share[torch.arange(share - len(in_share)) % len(in_share)]).flatten()
        fewer = Alternative(i, "attention", "query_heads", size=len(queries) * axis.together)
        cut: Slice = lambda tensors: keep_query_heads(tensors, axis, queries)  # noqa: E731
    else:
        count = largest_part(axis.size)
        heads = some(axis.size, count)
        queries = query_heads_of(axis, heads)
        gone_heads = others(axis.size, heads)
        copied["kv"] = heads[torch.arange(len(gone_heads)) % count], gone_heads
        source = query_heads_of(axis, copied["kv"][0])
        if way == "fewer_kv":
            fewer = Alternative(i, "attention", "kv_heads", size=count * axis.together)
            cut = lambda tensors: keep_kv_heads(tensors, axis, heads)  # noqa: E731
        else:
            left, of_queries = count * axis.together, count * group * axis.together
            fewer = Alternative(i, "attention", "head_groups", size=left, query_heads=of_queries)
            cut = lambda tensors: keep_groups(tensors, axis, heads)  # noqa: E731
    gone = others(axis.num_heads, queries)
    if way != "fewer_kv":  # with fewer KV heads all query heads stay, with their weights
        copied["queries"] = source, gone
    kill = made_dead(axis, "queries", gone, copied if copies else {})
    return fewer, kill, cut


def _prove_window(trial: Trial, i: int, layer_type: str) -> str:
    """The type, if the layer runs with that type's mask.

    The output is not compared: even a window over all tokens may change it, e.g. by the type's rotary embedding.
    """
    windowed = Alternative(i, "attention", "window", layer_type)
    layer = trial.built(i, windowed.block_config(trial.parent.blocks[i]))
    original = trial.parent.layer(i)
    layer.load_state_dict(original.state_dict(), strict=True, assign=True)
    share_buffers(original, layer)
    setattr(layer, LAYER_TYPE, layer_type)
    with foreign_code("does the layer run with a window?", refusal_is_answer=True) as attempt:
        output = trial.run(i, layer.eval())
    if attempt.failed:
        raise Fails(f"it does not run with a window ({attempt.reason})")
    if not bool(output.isfinite().all()):
        raise Fails("with a window its output is not finite")
    return layer_type


# ---------------------------------------------------------------------------------------------- experts


def _prove_experts(trial: Trial, i: int, axis: ExpertsAxis) -> ExpertsAxis:
    block = trial.parent.blocks[i]
    if axis.per_token >= axis.size:
        raise Fails("a token uses all experts")
    if not axis.router:
        raise Fails("no weight chooses among its experts")
    inputs = [_input_of(trial, i, name) for name in axis.router]
    modules = {w.name.rpartition(".")[0] for w in axis.weights if len(layer_shapes(trial.parent.layers[i])[w.name]) > 2}
    of_experts = {w.name for w in axis.weights if w.name.rpartition(".")[0] in modules}

    def difference(guess: ExpertsAxis) -> float:
        kept = _some_experts(guess)
        gone = others(guess.size, kept)

        def kill(layer: nn.Module) -> None:
            state = layer.state_dict()
            for w in guess.weights:
                entries = w.positions("experts", {"experts": guess.size})[gone].flatten().to(state[w.name].device)
                if w.name in guess.router:
                    x = inputs[guess.router.index(w.name)]
                    # A row that gives every token a score far below all others.
                    row = torch.linalg.lstsq(x.double(), torch.full((len(x), 1), _NEVER).double()).solution[:, 0]
                    rows = row.to(state[w.name].dtype).expand(len(entries), -1)
                    state[w.name].movedim(w.dim, 0)[entries] = rows
                elif state[w.name].numel() == state[w.name].shape[w.dim] and w.name not in of_experts:
                    state[w.name].view(-1)[entries] = _NEVER  # the router's bias of the expert

        fewer = Alternative(i, "ffn", "experts", size=len(kept)).block_config(block)
        return trial.difference(i, fewer, kill, lambda tensors: keep_experts(tensors, guess, kept))

    try:
        return first_that_holds(trial, _experts_guesses(axis), difference, "experts that are never chosen")
    except Fails:
        if table := _table_of_experts(trial, i, axis):
            raise Fails(f"no score chooses among its experts: {table} assigns them to tokens") from None
        raise


def _table_of_experts(trial: Trial, i: int, axis: ExpertsAxis) -> str:
    """The name of an integer tensor that assigns experts to tokens: other expert numbers change the output."""
    layer = copy.deepcopy(trial.parent.layer(i))
    trial.parent.let_go()
    expected = trial.output(i, layer)
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point() or not tensor.numel() or int(tensor.min()) < 0 or int(tensor.max()) >= axis.size:
            continue
        numbers = tensor.clone()
        tensor.copy_((numbers + 1) % axis.size)
        change = (trial.output(i, layer) - expected).abs().max()
        tensor.copy_(numbers)
        if float(change) > trial.tolerance * float((expected - trial.before(i)).abs().max()):
            return name
    return ""


def _experts_guesses(axis: ExpertsAxis) -> Iterator[ExpertsAxis]:
    """One group, then every number of groups whose halves hold two experts and, together, enough for a token."""
    least = max(axis.per_token, 1)
    for groups in range(1, axis.size // 2 + 1):
        if axis.size % groups or (groups > 1 and axis.size // groups < 4):
            continue
        if len(_some_experts(dataclasses.replace(axis, groups=groups))) < least:
            continue
        for weights in _guesses(axis.weights):
            yield dataclasses.replace(axis, groups=groups, weights=weights)


def _some_experts(axis: ExpertsAxis) -> torch.Tensor:
    """Half the experts, or as many as a token needs: the last ones of each group, equally many of each."""
    in_group = axis.size // axis.groups
    left = max(in_group // 2, -(-axis.per_token // axis.groups))
    return (torch.arange(axis.groups)[:, None] * in_group + torch.arange(in_group - left, in_group)).flatten()


def _input_of(trial: Trial, i: int, weight: str) -> torch.Tensor:
    """``[tokens, D]``: the input of a router's module, or of the innermost module around it that is called."""
    shape = layer_shapes(trial.parent.layers[i])[weight]
    module = weight.rpartition(".")[0]
    while module:
        for tensor in trial.inputs(i, module):
            if tensor.shape[-1] in shape:
                return tensor.flatten(0, -2).float()
        module = module.rpartition(".")[0]
    raise Fails("the input of its router cannot be identified")
