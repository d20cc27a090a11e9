"""Proof that a slice means what its axis says, on the parent's weights: the third step after find and try.

If the output projection reads nothing from a channel, the channel is dead, and removing it must not change the output
of the layer. So some channels in a copy of a layer are made dead: the weights that read them are set to zero. The same
channels are sliced away, and both layers must agree. Heads are proved in the same way, and experts that the router is
made never to choose. Where shapes leave the order of units open, every order is tried. An axis that fails is not
offered, and its reason is kept.
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
    Segment,
    WeightAxis,
    WidthAxis,
    largest_part,
)
from layersmith.library.axes.heads import in_pairs
from layersmith.library.axes.layers import input_dim, layer_shapes
from layersmith.library.axes.prove_mixers import prove_head_size, prove_mixer, prove_state
from layersmith.library.axes.trial import (
    Fails,
    Kill,
    Slice,
    Trial,
    alike,
    copy_units,
    dead_or_copies,
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
    """The axes that hold, by experiment on one layer of every distinct shape.

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
    )


# ---------------------------------------------------------------------------------------------- widths


def _prove_width(trial: Trial, i: int, axis: WidthAxis, shared: bool) -> WidthAxis:
    axis = dataclasses.replace(axis, bundles=tuple(_with_reader(trial, i, b) for b in _partitioned(trial, i, axis)))
    # Where the part does not run, since some kernels ask for multiples, another size is tried.
    sizes = [largest_part(axis.size), *((axis.size - 1) // m * m for m in (8, 4))]
    problem: Fails | None = None
    for size in dict.fromkeys(size for size in sizes if size):
        try:
            return _prove_width_at(trial, i, axis, shared, size)
        except Fails as reason:
            problem = problem or reason
    assert problem is not None
    raise problem


def _prove_width_at(trial: Trial, i: int, axis: WidthAxis, shared: bool, size: int) -> WidthAxis:
    block = trial.parent.blocks[i]
    kind = "shared_width" if shared else "ffn_width" if block.ffn.moe is None else "expert_width"
    narrower = Alternative(i, "ffn", kind, size=size).block_config(block)

    def difference(guess: WidthAxis, copies: bool) -> float:
        # Every expert keeps others, so that it is put to the test that channels are not mixed up between them.
        kept = [_some_channels(b, b.size * size // axis.size) for b in guess.bundles]

        def kill(layer: nn.Module) -> None:
            state = layer.state_dict()
            for bundle, own in zip(guess.bundles, kept, strict=True):
                for w in bundle.weights:
                    places = w.positions("channels", {"channels": bundle.size})
                    for m, (weight, dim) in enumerate(members_of(state, bundle, w)):
                        left = own[m] if bundle.members else own
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
        found = [_with_reader(trial, i, dataclasses.replace(bundle, weights=tuple(own))) for own in parts.values()]
        bundles += found if len(found) > 1 and all(own.reader for own in found) else [bundle]
    return bundles


def _with_reader(trial: Trial, i: int, bundle: Bundle) -> Bundle:
    """The bundle with its reader: the weight of which a row is what one output is made of.

    Zeroing the first row across the channels changes the first output alone; a row of any other weight changes all.
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
        # After the subblock something mixes the outputs, e.g. a norm; then shapes have to tell.
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
    raise Fails("the weights that its channels end in cannot be told")


def _width_guesses(axis: WidthAxis) -> Iterator[WidthAxis]:
    for weights in _guesses([w for b in axis.bundles for w in b.weights]):
        rest = iter(weights)
        yield dataclasses.replace(
            axis,
            bundles=tuple(dataclasses.replace(b, weights=tuple(next(rest) for _ in b.weights)) for b in axis.bundles),
        )


def _guesses(weights: Sequence[WeightAxis]) -> Iterator[list[WeightAxis]]:
    """Every order in which units may lie; weights of which the same is known are laid out the same."""
    known = [_signature(w) for w in weights]
    options = {signature: _orders(*signature) for signature in dict.fromkeys(known)}
    for chosen in itertools.product(*options.values()):
        order = dict(zip(options, chosen, strict=True))
        yield [
            dataclasses.replace(w, segments=order[s][0], grouped=order[s][1])
            for w, s in zip(weights, known, strict=True)
        ]


_Signature = tuple[tuple[tuple[str, int], ...], int]


def _signature(w: WeightAxis) -> _Signature:
    """Entries a unit of every part, and those of no unit."""
    units: dict[str, int] = {}
    for segment in w.segments:
        if segment.part != REST:
            units[segment.part] = units.get(segment.part, 0) + segment.unit
    return tuple(units.items()), sum(s.unit for s in w.segments if s.part == REST)


def _orders(units: tuple[tuple[str, int], ...], rest: int) -> list[tuple[tuple[Segment, ...], bool]]:
    found: list[tuple[tuple[Segment, ...], bool]] = []
    if len(units) == 1:
        ((part, unit),) = units
        whole = (Segment(part, unit),)
        pieces = [(Segment(part, unit // n),) * n for n in (2, 3, 4) if unit % n == 0 and unit > 1]
        single = [(Segment(part),) * unit] if 4 < unit <= 8 else []
        orders = [*pieces, whole, *single] if part == "channels" else [whole, *pieces]
        found = [(segments, False) for segments in dict.fromkeys(orders)]
    else:
        sizes = dict(units)
        queries, kv = Segment("queries", sizes["queries"]), sizes["kv"]
        split = (Segment("kv", kv // 2),) * 2 if kv % 2 == 0 else (Segment("kv", kv),)
        found = [
            ((queries, *split), False),
            ((queries, Segment("kv", kv)), True),
            ((queries, Segment("kv", kv)), False),
            ((*split, queries), False),
            ((Segment("kv", kv), queries), True),
        ]
    if not rest:
        return found
    return [
        (order, grouped)
        for segments, grouped in found
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
        # What a config calls their number may be less than there are, e.g. half of them in layers with a window.
        counts += [n for n in range(2 * axis.size, axis.num_heads, axis.size) if axis.num_heads % n == 0]
    for count in counts:
        yield from _layouts(dataclasses.replace(axis, size=count))
    if (pairs := in_pairs(axis)) is not None:
        yield from _heads_guesses(pairs)


def _in_halves(w: WeightAxis) -> WeightAxis:
    """Laid out so that the two heads of a pair are as far from each other as may be."""
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
    """What removing half the heads changes when nothing reads them.

    Args:
        trial: of the parent.
        i: the layer.
        way: which heads go.
        axis: a guess.
        copies: whether the heads that go are first made copies of those that stay.
        others_stay: whether it is not the last ones that stay, but some in between: parts of heads that lie at the
            same distance from each other may look like heads to one of both.
    """
    kills, cuts = [], []
    for a, own in enumerate(axis.attentions):
        # Each attention keeps others, so that it is put to the test that heads are not mixed up between them.
        fewer, kill, cut = _without_some(i, way, own, copies, others_stay if a == 0 else not others_stay)
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
    """Half the heads of one attention gone: the alternative, what makes them dead, and what cuts them out."""
    group = axis.num_heads // axis.size
    copied: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def some(size: int, count: int) -> torch.Tensor:
        # Not the first ones, so that the order of heads is put to the test.
        return torch.arange(0, size, size // count)[:count] if others_stay else torch.arange(size - count, size)

    if way == "fewer_queries":
        share = axis.num_heads // axis.shares
        first = torch.arange(axis.shares)[:, None] * share
        own = some(share, largest_part(share))
        queries = (first + own).flatten()
        # A head that goes is a copy of one of its own share.
        source = (first + own[torch.arange(share - len(own)) % len(own)]).flatten()
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
    if way != "fewer_kv":  # there, query heads that lose their KV head but stay keep their own weights
        copied["queries"] = source, gone
    kill = made_dead(axis, "queries", gone, copied if copies else {})
    return fewer, kill, cut


def _prove_window(trial: Trial, i: int, layer_type: str) -> str:
    """The layer runs with the mask of the other type, and as long as the window holds all tokens it is no mask at all.

    What it gives may still differ then, e.g. by rotary positions of its own for each type.
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
        raise Fails("with a window it gives numbers that are not finite")
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
                    # A row with which every token's product is far below all others.
                    row = torch.linalg.lstsq(x.double(), torch.full((len(x), 1), _NEVER).double()).solution[:, 0]
                    rows = row.to(state[w.name].dtype).expand(len(entries), -1)
                    state[w.name].movedim(w.dim, 0)[entries] = rows
                elif state[w.name].numel() == state[w.name].shape[w.dim] and w.name not in of_experts:
                    state[w.name].view(-1)[entries] = _NEVER  # what the router adds to an expert's score

        fewer = Alternative(i, "ffn", "experts", size=len(kept)).block_config(block)
        return trial.difference(i, fewer, kill, lambda tensors: keep_experts(tensors, guess, kept))

    try:
        return first_that_holds(trial, _experts_guesses(axis), difference, "experts that are never chosen")
    except Fails:
        if table := _table_of_experts(trial, i, axis):
            raise Fails(f"no score chooses among its experts: {table} says which ones a token has") from None
        raise


def _table_of_experts(trial: Trial, i: int, axis: ExpertsAxis) -> str:
    """A tensor of whole numbers, each that of an expert, with others in which the layer gives something else."""
    layer = copy.deepcopy(trial.parent.layer(i))
    trial.parent.let_go()
    wanted = trial.output(i, layer)
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point() or not tensor.numel() or int(tensor.min()) < 0 or int(tensor.max()) >= axis.size:
            continue
        own = tensor.clone()
        tensor.copy_((own + 1) % axis.size)
        seen = trial.output(i, layer)
        tensor.copy_(own)
        if float((seen - wanted).abs().max()) > trial.tolerance * float((wanted - trial.before(i)).abs().max()):
            return name
    return ""


def _experts_guesses(axis: ExpertsAxis) -> Iterator[ExpertsAxis]:
    """No groups, then groups of which the half still holds two, and as many as a token uses."""
    least = max(axis.per_token, 1)
    for groups in range(1, axis.size // 2 + 1):
        if axis.size % groups or (groups > 1 and axis.size // groups < 4):
            continue
        if len(_some_experts(dataclasses.replace(axis, groups=groups))) < least:
            continue
        for weights in _guesses(axis.weights):
            yield dataclasses.replace(axis, groups=groups, weights=tuple(weights))


def _some_experts(axis: ExpertsAxis) -> torch.Tensor:
    """Half the experts, or as many as a token needs; equally many of each group, not the first ones."""
    in_group = axis.size // axis.groups
    left = max(in_group // 2, -(-axis.per_token // axis.groups))
    return (torch.arange(axis.groups)[:, None] * in_group + torch.arange(in_group - left, in_group)).flatten()


def _input_of(trial: Trial, i: int, weight: str) -> torch.Tensor:
    """``[tokens, D]``: what goes into the module of a router's weight, or into that around it if it is not called."""
    layer = trial.parent.layer(i)
    width = list(layer_shapes(layer)[weight])
    module = weight.rpartition(".")[0]
    while module:
        seen: list[torch.Tensor] = []

        def watch(module: nn.Module, args: Any, kwargs: Any, seen: list[torch.Tensor] = seen) -> None:
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            seen.extend(t for t in tensors if t.is_floating_point() and t.shape[-1] in width)

        handle = layer.get_submodule(module).register_forward_pre_hook(watch, with_kwargs=True)
        try:
            trial.output(i, layer)
        finally:
            handle.remove()
        if seen:
            return seen[0].flatten(0, -2).float()
        module = module.rpartition(".")[0]
    raise Fails("what its router reads cannot be told")
