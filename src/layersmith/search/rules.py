"""Rules for solutions besides the budget, as groups, candidates and limits of the integer program.

Kept layers, tensor parallelism and groups of identical layers restrict the candidates. Limits on numbers of no-ops and
on weighted sums of costs become additional costs with limits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from layersmith.block_config import AttentionConfig, BlockConfig
from layersmith.costs.budget import COST_OF, is_time
from layersmith.costs.table import CostTable
from layersmith.errors import Infeasible, UsageError, did_you_mean
from layersmith.library.alternative import Alternative
from layersmith.recipe import CombinedLimit, SearchRecipe
from layersmith.units import parse_amount

Place = tuple[int, str]
Costs = dict[str, float]

# Prefix of the names of costs that rules add.
RULE = "rule:"
_NO_OPS = {"attention": RULE + "no-op attentions", "ffn": RULE + "no-op FFNs"}


def allowed(
    alternatives: Sequence[Alternative], rules: SearchRecipe, blocks: Sequence[BlockConfig] | None
) -> dict[Place, list[Alternative]]:
    """The alternatives of every subblock that kept layers, kept attentions and tensor parallelism allow.

    Raises:
        UsageError: A rule names a layer that does not exist.
        Infeasible: A subblock has no allowed alternative.
    """
    by_place: dict[Place, list[Alternative]] = {}
    for alternative in alternatives:
        by_place.setdefault((alternative.layer, alternative.subblock), []).append(alternative)
    num_layers = max(layer for layer, _ in by_place) + 1
    _check_layers("keep_layers", rules.keep_layers, num_layers)
    _check_layers("keep_attentions", rules.keep_attentions, num_layers)
    kept: dict[Place, list[Alternative]] = {}
    for place, members in sorted(by_place.items()):
        kept[place] = [
            a
            for a in members
            if (a.is_parent or not _is_kept(a, rules)) and _divisible(a, rules.tensor_parallel, blocks)
        ]
        if not kept[place]:
            raise Infeasible(
                f"Infeasible: search.tensor_parallel {rules.tensor_parallel}. Layer {place[0]} has no {place[1]} "
                "alternative whose heads and widths are multiples of it. Choose a smaller value, or list other sizes "
                "in the recipe's library section."
            )
    return kept


def _is_kept(alternative: Alternative, rules: SearchRecipe) -> bool:
    """Whether a rule forbids this alternative of the parent's subblock."""
    replaces_attention = alternative.subblock == "attention" and alternative.kind in ("no_op", "linear")
    is_needed = replaces_attention and alternative.layer in rules.keep_attentions
    return is_needed or alternative.layer in rules.keep_layers


def _check_layers(name: str, layers: Sequence[int], num_layers: int) -> None:
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise UsageError(f"recipe search.{name}: layer {layer} does not exist; the model has {num_layers} layers.")


def _divisible(alternative: Alternative, by: int, blocks: Sequence[BlockConfig] | None) -> bool:
    """Whether all heads and widths can be split evenly over ``by`` ranks; fewer KV heads than ranks are repeated."""
    if by == 1 or blocks is None:
        return True
    config = alternative.subblock_config(blocks[alternative.layer])
    if config.no_op or config.replace_with_linear:
        return True
    if isinstance(config, AttentionConfig):
        kv = config.num_key_value_heads
        if kv is not None and kv % by and by % kv:
            return False
        counts = [config.num_attention_heads, config.mamba.num_heads if config.mamba is not None else None]
    else:
        moe = config.moe
        counts = [config.intermediate_size if moe is None else None]
        if moe is not None:
            counts += [moe.expert_intermediate_dim, moe.shared_expert_intermediate_dim]
    return all(count is None or count % by == 0 for count in counts)


def identical_groups(
    by_place: Mapping[Place, Sequence[Alternative]], rules: SearchRecipe, blocks: Sequence[BlockConfig] | None
) -> list[list[Place]]:
    """Groups of places whose subblocks must be identical; most have a single place.

    Raises:
        UsageError: A layer does not exist, or is in two groups.
    """
    num_layers = max(layer for layer, _ in by_place) + 1
    if rules.uniform_groups is None or rules.uniform_groups == 1:
        return [[place] for place in sorted(by_place)]
    if isinstance(rules.uniform_groups, int):
        size = rules.uniform_groups or num_layers
        sets = [tuple(range(start, min(start + size, num_layers))) for start in range(0, num_layers, size)]
    else:
        sets = list(rules.uniform_groups)
        named = [layer for layers in sets for layer in layers]
        _check_layers("uniform_groups", named, num_layers)
        if len(set(named)) < len(named):
            raise UsageError("recipe search.uniform_groups: a layer is named twice.")
        sets += [(layer,) for layer in range(num_layers) if layer not in named]
    groups = []
    for layers in sorted(sets):
        for subblock in ("attention", "ffn"):
            kinds: dict[object, list[Place]] = {}
            for layer in layers:
                if (layer, subblock) in by_place:
                    config = repr(blocks[layer].subblock(subblock)) if blocks is not None else None
                    is_kept = layer in rules.keep_layers
                    kinds.setdefault((config, is_kept), []).append((layer, subblock))
            groups += list(kinds.values())
    return sorted(groups)


def extra_costs(rules: SearchRecipe, costs: CostTable) -> dict[str, CombinedLimit]:
    """Name of each additional cost to its limit on a weighted sum of costs."""
    return {
        RULE + " + ".join(f"{weight:g} {name}" for name, weight in limit.costs.items()): limit for limit in rules.limits
    }


def costs_of(alternative: Alternative, rules: SearchRecipe, costs: CostTable) -> Costs:
    """All costs of an alternative, with those of rules."""
    totals: Costs = {name: costs.by_key[alternative.key][name] for name in costs.parent}
    for name, limit in extra_costs(rules, costs).items():
        totals[name] = weighted(limit, totals)
    if (name := _NO_OPS[alternative.subblock]) in limits_of(rules, costs):
        totals |= {name: int(alternative.is_no_op)}
    for name in _NO_OPS.values():
        if name in limits_of(rules, costs):
            totals.setdefault(name, 0)
    return totals


def limits_of(rules: SearchRecipe, costs: CostTable) -> Costs:
    """Name of each cost of a rule to its limit.

    Raises:
        UsageError: A cost is unknown, or an amount makes no sense.
    """
    limits: Costs = {}
    for subblock, most in (("attention", rules.max_removed_attentions), ("ffn", rules.max_removed_ffns)):
        if most is not None:
            limits[_NO_OPS[subblock]] = most
    for name, limit in extra_costs(rules, costs).items():
        limits[name] = _amount(limit, weighted(limit, costs.parent))
    return limits


def without_times(rules: SearchRecipe) -> SearchRecipe:
    """The rules without limits on sums with times."""
    return dataclasses.replace(rules, limits=tuple(x for x in rules.limits if not timed(x)))


def timed(limit: CombinedLimit) -> bool:
    """Whether a sum includes times."""
    return any(is_time(COST_OF.get(name, name)) for name in limit.costs)


def fixed_of(rules: SearchRecipe, costs: CostTable) -> Costs:
    """Costs outside the layers, with those of rules."""
    return {**costs.fixed, **{name: weighted(limit, costs.fixed) for name, limit in extra_costs(rules, costs).items()}}


def weighted(limit: CombinedLimit, costs: Mapping[str, float]) -> float:
    """The weighted sum of costs; whole numbers if the costs are, since decimal weights are scaled up."""
    scale = _scale(limit)
    total: Fraction | float = 0
    for name, weight in limit.costs.items():
        value = costs[_cost_name(name, costs)]
        factor = Fraction(str(weight)) * scale
        total += int(factor) * value
    return total if isinstance(total, int) else float(total)


def _scale(limit: CombinedLimit) -> int:
    """The factor that makes all weights whole numbers."""
    return math.lcm(*(Fraction(str(weight)).denominator for weight in limit.costs.values()))


def _cost_name(name: str, known: Mapping[str, float]) -> str:
    cost = COST_OF.get(name, name)
    if cost not in known:
        raise UsageError(f"recipe search.limits: unknown cost {name!r}. {did_you_mean(name, [*COST_OF, *known])}")
    return cost


def _amount(limit: CombinedLimit, whole: float) -> float:
    """The limit in the scaled unit of its sum; ``whole`` is the parent's sum."""
    if not limit.costs:
        raise UsageError("recipe search.limits: costs must name at least one cost.")
    try:
        number = Decimal(str(limit.at_most))
    except InvalidOperation:
        number = parse_amount(str(limit.at_most), "recipe search.limits.at_most")
    if number < 0:
        raise UsageError(f"recipe search.limits: at_most cannot be negative, but it is {limit.at_most}.")
    has_unit = isinstance(limit.at_most, str) and limit.at_most.strip()[-1:].isalpha()
    amount = Fraction(number) * (Fraction(whole) if 0 < number <= 1 and not has_unit else _scale(limit))
    return float(amount) if timed(limit) else math.floor(amount)
