"""The number of KV heads: the attribute whose double, with keys and values of each there twice, changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

import torch

from layersmith.model_descriptor import conventions
from layersmith.model_descriptor.experiment import Experiment, Outcome, first_refutation
from layersmith.model_descriptor.infer.attributes import AttributePath
from layersmith.model_descriptor.infer.cache_contents import keys_in_cache
from layersmith.model_descriptor.infer.specimen import Specimen, first_tensor_of, restored
from layersmith.model_descriptor.infer.trial import Candidate, Trial

NOT_UNDERSTOOD = "with every KV head there twice the model gives something else, so where they lie is not understood"
OF_QUERIES = "keys are made of the queries that read them too, so none can go without its queries"
# Numbers of heads that are tried: where the first two that run give something else, so do the others.
_MOST_NUMBERS = 2
# KV heads for each one that an attribute counts. With more than one it counts those of other layers.
_FACTORS = (1, 2, 4)
_MORE = "there are more of them than the config says, which says what other layers have"


@dataclass(frozen=True)
class KVHeads:
    """The attribute that is the number of KV heads, or the reason why no attribute is.

    Attributes:
        path: The attribute; None if no attribute is that number.
        reason: Why the attribute that sets the heads of the keys in the cache, or has the usual name, is not it.
        of_keys: Attributes that set the number of heads of the keys in the cache, where ``path`` is None.
        outcomes: The experiment that decided on each attribute that looked like it.
    """

    path: AttributePath | None = None
    reason: str = ""
    of_keys: tuple[AttributePath, ...] = ()
    outcomes: tuple[Outcome, ...] = ()


@dataclass(frozen=True)
class _KVCandidate(Candidate):
    """An attribute that may be the number of KV heads; ``cached`` is the number of heads of the keys in the cache."""

    cached: int | None

    @cached_property
    def is_of_attention(self) -> bool:
        """Whether twice the value changes weights of the attention and no others."""
        owners, effect = self.trial.kind.owners, self.effect
        doubled = effect.other == 2 * self.value and not effect.came_or_went
        return doubled and all(owners.get(name) == "attention" for name in effect.shapes)

    @cached_property
    def sets_keys(self) -> bool:
        """Whether twice the value makes keys of twice as many heads."""
        if not self.is_of_attention or self.value != self.cached:
            return False
        twice = self.trial.specimen_with({self.path: 2 * self.value})
        return twice is not None and _heads_of_keys(twice, self.trial.index) == 2 * self.value

    @property
    def is_expected(self) -> bool:
        """Whether a reader would take it for the number of KV heads, so that a refusal needs a reason.

        There may be keys for each query head in the cache, however many KV heads there are.
        """
        usual = self.path[-1] == conventions.KV_HEADS and self.cached is not None and self.cached % self.value == 0
        return usual or self.sets_keys

    @property
    def on_both_sides(self) -> list[str]:
        return [name for name in self.effect.shapes if len(self.effect.dims(name)) > 1]

    def makes_heads(self) -> bool:
        """Whether matrices give more, in whole heads, and none takes more: what a projection takes is of queries."""
        effect = self.effect
        rows = [name for name in effect.shapes if effect.dims(name) == [0]]
        for name, before in effect.before.items():
            (dim,) = effect.dims(name)
            if name not in rows and (len(before) != 2 or name.endswith(".weight")):
                return False
            if before[dim] % self.value or effect.shapes[name][dim] <= before[dim]:
                return False
        return any(len(effect.before[name]) == 2 for name in rows)

    def carries_all_tokens(self) -> bool:
        """Whether the attention gives all tokens the same when these weights are zero, as without keys and values."""
        attention, specimen, prefix = self.trial.kind.attention, self.trial.specimen, self.trial.prefix
        assert attention is not None
        weights = [specimen.model.get_parameter(prefix + name) for name in self.effect.shapes]
        # A mixer next to the attention does not read them, and its output still depends on the tokens.
        holders = [m for m in attention.modules if any(name.startswith(f"{m}.") for name in self.effect.shapes)]
        watched = [prefix + name for name in holders or attention.modules]
        outputs = []
        with restored(weights):
            with torch.no_grad():
                for weight in weights:
                    weight.zero_()
            for ids in (specimen.ids, specimen.other_ids):
                calls = [call for call in specimen.trace(ids, keep=watched) if call.name in watched]
                outputs.append([first_tensor_of(call.output) for call in calls])
        return all(
            a is not None and b is not None and torch.allclose(a, b, atol=1e-5) for a, b in zip(*outputs, strict=True)
        )

    @cached_property
    def factors(self) -> dict[bool, int]:
        """What :func:`_factor` gave for each of the trial's ways that was tried."""
        return {}

    def is_same(self, way: Trial) -> bool:
        """Whether models of two seeds give the same with each head there several times."""
        self.factors[way.alone] = _factor(way, self.path, 0, _FACTORS if self.is_expected else _FACTORS[:1])
        return self.factors[way.alone] == 1 and _factor(way, self.path, 1) == 1

    def why_not_same(self) -> str:
        if not self.is_expected:
            return ""
        return _MORE if max(self.factors.values()) > 1 else NOT_UNDERSTOOD


_EXPERIMENTS = (
    Experiment[_KVCandidate, None](
        question="Does twice {} change weights of the attention alone?",
        expectation=lambda candidate, _: candidate.is_of_attention,
    ),
    Experiment[_KVCandidate, None](
        question="Does each weight that grows with {} grow along one side?",
        expectation=lambda candidate, _: not candidate.on_both_sides,
        conclusion=lambda candidate: (
            f"{candidate.on_both_sides[0]} changes on both sides with their number: each of them reads all"
        ),
    ),
    Experiment[_KVCandidate, None](
        question="Do projections give more whole heads with twice {}, and none takes more?",
        expectation=lambda candidate, _: candidate.makes_heads(),
    ),
    Experiment[_KVCandidate, None](
        question="Does the attention give all tokens the same without the weights that grow with {}?",
        expectation=lambda candidate, _: candidate.carries_all_tokens(),
    ),
    Experiment[_KVCandidate, Trial](
        question="Does the model give the same with each of {} KV heads there several times?",
        changes=lambda candidate: candidate.trial.ways(),
        expectation=lambda candidate, way: candidate.is_same(way),
        conclusion=lambda candidate: candidate.why_not_same(),
    ),
)


def find_kv_heads(trial: Trial) -> KVHeads:
    """The attribute whose double, with each head's keys and values there twice, changes nothing."""
    if trial.kind.attention is None:
        return KVHeads()
    cached = _heads_of_keys(trial.specimen, trial.index)
    outcomes: list[Outcome] = []
    of_keys: list[AttributePath] = []
    for path, effect in trial.effects.items():
        candidate = _KVCandidate(trial, path, effect, cached)
        if candidate.sets_keys:
            of_keys.append(path)
        outcome = first_refutation(_EXPERIMENTS, candidate)
        if outcome is None:
            return KVHeads(path)
        if outcome.reason and candidate.is_expected:
            outcomes.append(outcome)
    reason = outcomes[-1].reason if outcomes else ""
    return KVHeads(reason=reason, of_keys=tuple(of_keys), outcomes=tuple(outcomes))


def keys_need_queries(trial: Trial, of_keys: Sequence[AttributePath], of_queries: AttributePath) -> bool:
    """Whether keys in the cache change with weights that only the number of query heads governs.

    Args:
        trial: The kind of layer.
        of_keys: Attributes that set the number of heads of the keys.
        of_queries: The number of query heads.
    """
    others = {name for path in of_keys for name in trial.effects[path].shapes}
    names = [name for name in trial.effects[of_queries].shapes if name not in others]
    weights = [trial.specimen.model.get_parameter(trial.prefix + name) for name in names]
    before = keys_in_cache(trial.specimen, trial.index)
    with restored(weights):
        with torch.no_grad():
            for weight in weights:
                weight.mul_(2)
        after = keys_in_cache(trial.specimen, trial.index)
    return before is not None and after is not None and not torch.equal(before, after)


def _heads_of_keys(specimen: Specimen, index: int) -> int | None:
    """K of the keys ``[B, K, T, d]`` that a layer leaves in the cache; None if it leaves none."""
    keys = keys_in_cache(specimen, index)
    return keys.shape[1] if keys is not None and keys.ndim == 4 else None


def _factor(trial: Trial, path: AttributePath, seed: int, factors: Sequence[int] = (1,)) -> int:
    """How many KV heads there are for each one that an attribute counts: with these, a model with few heads gives what
    one with each of them there several times gives. 0 if none of the factors is right.

    Where the specimen has as many heads as queries, the model with fewer has every head once. How often they can be
    there depends on the number of query heads, so several numbers are tried.

    Args:
        trial: The kind of layer.
        path: The attribute.
        seed: Seed of the weights.
        factors: The factors to try.
    """
    value = trial.value(path)
    model_with = lru_cache(2)(lambda heads: trial.specimen_with({path: heads}, seed))
    tried = 0
    for times in (2, 3, 5, 7):
        for few in (value, value // times) if value % times == 0 else (value,):
            fewer = model_with(few)
            # This one is changed, so it is built anew.
            more = trial.specimen_with({path: times * few}, seed) if fewer is not None else None
            if fewer is None or more is None:
                continue
            for factor, by_head in product(factors, (False, True)):
                if _same_repeated(fewer, more, factor * few, times, by_head):
                    return factor
            tried += 1
            if tried == _MOST_NUMBERS:
                return 0
    return 0


def _same_repeated(fewer: Specimen, more: Specimen, heads: int, times: int, by_head: bool) -> bool:
    """Whether a model gives the same once it has every KV head of another several times; see :func:`_repeated`."""
    once, several = (dict(m.model.named_parameters()) for m in (fewer, more))
    try:
        with torch.no_grad():
            for name, weight in once.items():
                same = weight.shape == several[name].shape
                several[name].copy_(weight if same else _repeated(weight, heads, times, several[name], by_head))
    except (RuntimeError, KeyError, ValueError):  # the weights are laid out in another way
        return False
    return torch.allclose(fewer.logits, more.run(), atol=1e-4, rtol=1e-4)


def _repeated(weight: torch.Tensor, heads: int, times: int, target: torch.Tensor, by_head: bool) -> torch.Tensor:
    """Entries of each head several times; where a weight holds queries before keys and values, those stay.

    Args:
        weight: Weight of the model with fewer heads.
        heads: Number of its heads.
        times: How often each head is to be there.
        target: The same weight of the model with more heads.
        by_head: Whether the queries of a head, its keys and its values lie together, head after head.
    """
    (dim,) = (d for d, (a, b) in enumerate(zip(weight.shape, target.shape, strict=True)) if a != b)
    weight, added = weight.movedim(dim, 0), target.shape[dim] - weight.shape[dim]
    queries = weight.shape[0] - added // (times - 1)  # 0 where the weight is keys or values alone
    if by_head:
        of_head = weight.reshape(heads, -1, *weight.shape[1:])
        share = queries // heads
        of_queries = of_head[:, :share].unflatten(1, (times, -1))
        shared = of_head[:, None, share:].expand(-1, times, *of_head[:, share:].shape[1:])
        return torch.cat([of_queries, shared], 2).flatten(0, 2).movedim(0, dim)
    first, rest = weight[:queries], weight[queries:]
    parts = 1 if queries == 0 else 2
    grouped = rest.reshape(parts, heads, -1, *weight.shape[1:]).repeat_interleave(times, 1)
    return torch.cat([first, grouped.reshape(-1, *weight.shape[1:])]).movedim(0, dim)
