"""The number of KV heads: the attribute whose double, with keys and values of each there twice, changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from layersmith.errors import UnsupportedModel
from layersmith.model_descriptor.experiment import Effect, Shapes
from layersmith.model_descriptor.infer.attributes import AttributePath
from layersmith.model_descriptor.infer.cache_contents import keys_in_cache
from layersmith.model_descriptor.infer.specimen import Specimen, first_tensor_of, restored
from layersmith.model_descriptor.infer.subblocks import LayerKind

if TYPE_CHECKING:
    from layersmith.model_descriptor.infer.sizes import Trial

_MORE = "there are more of them than the config says, which says what other layers have"
NOT_UNDERSTOOD = "with every KV head there twice the model gives something else, so where they lie is not understood"
OF_QUERIES = "keys are made of the queries that read them too, so none can go without its queries"


def find_kv_heads(
    trial: Trial, kind: LayerKind, base: Shapes, effects: Mapping[AttributePath, Effect]
) -> tuple[AttributePath | None, str, list[AttributePath]]:
    """The attribute whose double, with each head's keys and values there twice, changes nothing.

    Returns:
        The attribute; or None, why the one that sets the heads of the keys in the cache, or that is called so as usual,
        is not it, where that was seen, and the attributes that set them.
    """
    reason, of_keys = "", []
    cached = _heads_of_keys(trial.specimen, trial.index)
    for path, effect in effects.items() if kind.attention is not None else ():
        value = trial.value(path)
        changes = {
            n: [d for d, (a, b) in enumerate(zip(base[n], new, strict=False)) if a != b]
            for n, new in effect.shapes.items()
        }
        if effect.came_or_went or effect.other != 2 * value or any(kind.owners.get(n) != "attention" for n in changes):
            continue
        if value == cached and _doubles_keys(trial, path, value):
            of_keys.append(path)
        # There may be keys for each query head in the cache, however many KV heads there are.
        is_usual = path[-1] == "num_key_value_heads" and cached is not None and cached % value == 0
        is_usual = is_usual or path in of_keys
        if both := [n for n, dims in changes.items() if len(dims) > 1]:
            reason = (
                f"{both[0]} changes on both sides with their number: each of them reads all" if is_usual else reason
            )
            continue
        rows = [n for n, dims in changes.items() if dims == [0]]
        # What a projection takes is of query heads.
        if any(n not in rows and (len(base[n]) != 2 or n.endswith(".weight")) for n in changes):
            continue
        if not any(len(base[n]) == 2 for n in rows) or any(
            base[n][d] % value or effect.shapes[n][d] <= base[n][d] for n, (d,) in changes.items()
        ):
            continue
        if not _carries(trial, kind, list(changes)):
            continue
        if any(all(_duplicates(own, path, seed) for seed in (0, 1)) for own in trial.ways()):
            return path, "", []
        if is_usual:
            more = any(_duplicates(own, path, 0, factor) for own in trial.ways() for factor in (2, 4))
            reason = _MORE if more else NOT_UNDERSTOOD
    return None, reason, of_keys


def keys_need_queries(
    trial: Trial, effects: Mapping[AttributePath, Effect], of_keys: Sequence[AttributePath], of_queries: AttributePath
) -> bool:
    """Whether keys in the cache change with weights that the number of query heads governs, and theirs does not.

    Args:
        trial: of the model.
        effects: what other values of attributes do to the layer.
        of_keys: the attributes that set the number of heads of the keys.
        of_queries: the number of its query heads.
    """
    others = {name for path in of_keys for name in effects[path].shapes}
    own = [name for name in effects[of_queries].shapes if name not in others]
    weights = [trial.specimen.model.get_parameter(trial.prefix + name) for name in own]
    try:
        before = keys_in_cache(trial.specimen, trial.index)
        with restored(weights):
            with torch.no_grad():
                for weight in weights:
                    weight.mul_(2)
            after = keys_in_cache(trial.specimen, trial.index)
    except Exception:  # a family's own code may keep no cache, or another kind
        return False
    return before is not None and after is not None and not torch.equal(before, after)


def _heads_of_keys(specimen: Specimen, index: int) -> int | None:
    """K of the keys ``[B, K, T, d]`` that a layer leaves in the cache; None if it leaves none."""
    try:
        keys = keys_in_cache(specimen, index)
    except Exception:  # a family's own code may keep no cache, or another kind
        return None
    return keys.shape[1] if keys is not None and keys.ndim == 4 else None


def _doubles_keys(trial: Trial, path: AttributePath, value: int) -> bool:
    """Whether twice as much of an attribute makes keys of twice as many heads."""
    try:
        return _heads_of_keys(trial.made(path, 2 * value), trial.index) == 2 * value
    except UnsupportedModel:
        return False


def _carries(trial: Trial, kind: LayerKind, names: Sequence[str]) -> bool:
    """Whether the attention gives the same for all tokens when these weights are zero, as without keys and values."""
    assert kind.attention is not None
    model = trial.specimen.model
    weights = [model.get_parameter(trial.prefix + name) for name in names]
    # A mixer beside it does not read them, and gives what it gives.
    holders = [m for m in kind.attention.modules if any(name.startswith(f"{m}.") for name in names)]
    watched = [trial.prefix + name for name in holders or kind.attention.modules]
    outputs = []
    with restored(weights):
        with torch.no_grad():
            for weight in weights:
                weight.zero_()
        for ids in (trial.specimen.ids, trial.specimen.other_ids):
            calls = [c for c in trial.specimen.trace(ids, keep=watched) if c.name in watched]
            outputs.append([first_tensor_of(c.output) for c in calls])
    return all(
        a is not None and b is not None and torch.allclose(a, b, atol=1e-5) for a, b in zip(*outputs, strict=True)
    )


def _duplicates(trial: Trial, path: AttributePath, seed: int, factor: int = 1) -> bool:
    """Whether a model with some of the heads gives what one with every one of them there several times gives.

    Where the specimen has as many heads as queries, the one with fewer is the one that has every head once; how often
    they can be there is a matter of the number of query heads.

    Args:
        trial: of the model.
        path: the attribute.
        seed: of the weights.
        factor: KV heads for each one that the attribute counts.
    """
    value = trial.value(path)
    for times in (2, 3, 5, 7):
        for few, many in ((value, times * value), (value // times, value)):
            if few < 1 or times * few != many:
                continue
            try:
                models = [trial.made(path, heads, seed) for heads in (few, many)]
            except UnsupportedModel:  # it cannot run so
                continue
            if any(_same_repeated(models[0], models[1], factor * few, times, by_head) for by_head in (False, True)):
                return True
    return False


def _same_repeated(fewer: Specimen, more: Specimen, heads: int, times: int, by_head: bool) -> bool:
    """Whether a model that is given every KV head of another several times gives the same; see :func:`_repeated`."""
    once, several = (dict(m.model.named_parameters()) for m in (fewer, more))
    try:
        with torch.no_grad():
            for name, weight in once.items():
                same = weight.shape == several[name].shape
                several[name].copy_(weight if same else _repeated(weight, heads, times, several[name], by_head))
    except (RuntimeError, KeyError, ValueError):  # it is not laid out so
        return False
    return torch.allclose(fewer.run(), more.run(), atol=1e-4, rtol=1e-4)


def _repeated(weight: torch.Tensor, heads: int, times: int, target: torch.Tensor, by_head: bool) -> torch.Tensor:
    """Entries of each head several times; where a weight holds queries before keys and values, those stay.

    Args:
        weight: of the model with fewer heads.
        heads: that it has.
        times: how often each is to be there.
        target: the weight of the model with more.
        by_head: whether the queries of a head, its keys and its values lie together, head after head.
    """
    (dim,) = (d for d, (a, b) in enumerate(zip(weight.shape, target.shape, strict=True)) if a != b)
    weight, added = weight.movedim(dim, 0), target.shape[dim] - weight.shape[dim]
    queries = weight.shape[0] - added // (times - 1)  # 0 where the weight is keys or values alone
    if by_head:
        of_head = weight.reshape(heads, -1, *weight.shape[1:])
        share = queries // heads
        own = of_head[:, :share].unflatten(1, (times, -1))
        shared = of_head[:, None, share:].expand(-1, times, *of_head[:, share:].shape[1:])
        return torch.cat([own, shared], 2).flatten(0, 2).movedim(0, dim)
    first, rest = weight[:queries], weight[queries:]
    parts = 1 if queries == 0 else 2
    grouped = rest.reshape(parts, heads, -1, *weight.shape[1:]).repeat_interleave(times, 1)
    return torch.cat([first, grouped.reshape(-1, *weight.shape[1:])]).movedim(0, dim)
