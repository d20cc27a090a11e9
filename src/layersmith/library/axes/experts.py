"""Finds the routed experts of a layer: the stacks or lists of their weights, and the router's weights.

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import ExpertsAxis, NoAxis
from layersmith.library.axes.experiments import ModelExperiments, other_experts
from layersmith.model_descriptor.experiment import Effect


@dataclass(frozen=True)
class Members:
    """Where the experts of a layer are.

    Attributes:
        count: E.
        stacks: Weights that are stacks of experts.
        lists: Names of lists of modules with one per expert.
        flat: Stacks whose first dimension is ``experts * rows``.
    """

    count: int
    stacks: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    flat: tuple[str, ...] = ()

    def number_of(self, name: str) -> int | None:
        """The expert of a list that a weight belongs to; None if it belongs to none."""
        for prefix in self.lists:
            if name.startswith(f"{prefix}."):
                number = name.removeprefix(f"{prefix}.").split(".")[0]
                return int(number) if number.isdigit() else None
        return None

    def template(self, name: str) -> str:
        """The name with ``{}`` for the number of the expert."""
        prefix = next(p for p in self.lists if name.startswith(f"{p}."))
        _, _, inside = name.removeprefix(f"{prefix}.").partition(".")
        return f"{prefix}.{{}}.{inside}"


def find_experts(model: ModelExperiments, i: int) -> ExpertsAxis:
    """The routed experts of layer ``i``.

    Raises:
        NoAxis: The number of experts cannot change.
    """
    moe = model.blocks[i].ffn.moe
    if moe is None or model.blocks[i].ffn.no_op or model.blocks[i].ffn.replace_with_linear:
        raise NoAxis("there are no experts")
    if _shares_its_number(model, i):
        raise NoAxis("its attention has experts too, and their numbers are the same attributes")
    members = members_of(model, i)
    made = model.experiment("experts", other_experts)
    governed = [g for g in model.governed(made, i) if members.number_of(g.name) is None]
    if not members.stacks and not members.lists:
        raise NoAxis("no stack or list of weights has one for each expert")
    shapes = model.base[i]
    matrices = [g.name for g in governed if len(shapes[g.name]) == 2 and min(shapes[g.name]) > 1]
    return ExpertsAxis(
        size=moe.num_local_experts,
        weights=tuple(g.axis("experts") for g in governed),
        lists=members.lists,
        router=tuple(name for name in matrices if name not in members.stacks),
        per_token=moe.num_experts_per_tok,
        fewer_per_token=_fewer_per_token(model, i),
    )


def members_of(model: ModelExperiments, i: int) -> Members:
    """The weights of a layer that belong to experts.

    Raises:
        NoAxis: Layers with another number of experts cannot be built.
    """
    moe = model.blocks[i].ffn.moe
    if moe is None:
        return Members(0)
    count = moe.num_local_experts
    if _shares_its_number(model, i):
        of_attention = model.attention_weights(i)
        shapes = {name: shape for name, shape in model.base[i].items() if name not in of_attention}
        return Members(count, tuple(n for n, s in shapes.items() if len(s) == 3 and s[0] == count))
    made = model.experiment("experts", other_experts)
    if made.problem:
        raise NoAxis(made.problem)
    sizes, effect = made.sizes[i], made.effects[i]
    assert sizes is not None
    fewer = sizes[0] - sizes[1]
    stacks = tuple(
        name
        for name, shape in effect.before.items()
        if len(shape) >= 2
        and shape[0] >= count
        and shape[0] != effect.shapes[name][0]
        and shape[0] - effect.shapes[name][0] == fewer
        and (len(shape) == 3 or _is_stack_of_vectors(model.base[i], name, effect))
    )
    flat = model.described.layer_facts(i).flat_experts
    lists = sorted({_before_numbers(name) for name in effect.came_or_went} - {""})
    return Members(count, (*stacks, *flat), tuple(lists), flat)


def why_no_experts(model: ModelExperiments, i: int) -> str:
    """Why weights of an FFN are stacks though its config names no number of experts; empty if none are."""
    shapes = {n: s for n, s in model.base[i].items() if len(s) == 3 and n not in model.attention_weights(i)}
    numbers = " and ".join(f"{shape[0]} in {name}" for name, shape in shapes.items())
    several = len(shapes) > 1 and all(min(shape) > 1 for shape in shapes.values())
    return f"its experts are stacks ({numbers}), and no attribute is the number of all" if several else ""


def _shares_its_number(model: ModelExperiments, i: int) -> bool:
    """Whether experts of the attention have the same number in the config, and the FFN's cannot differ alone."""
    facts = model.described.layer_facts(i)
    return facts.experts_of_both and not facts.ffn_experts


def _fewer_per_token(model: ModelExperiments, i: int) -> bool:
    """Whether the config says how many experts a token uses."""
    moe = model.blocks[i].ffn.moe
    assert moe is not None
    if moe.num_experts_per_tok < 2:
        return False
    fewer = Alternative(i, "ffn", "experts_per_token", size=moe.num_experts_per_tok - 1)
    blocks = (model.blocks[i], fewer.block_config(model.blocks[i]))
    before, after = (model.descriptor.block_config_to_layer_overrides(block) for block in blocks)
    return before != after or bool(model.described.layer_facts(i).ffn_experts)


def _is_stack_of_vectors(shapes: dict[str, tuple[int, ...]], name: str, effect: Effect) -> bool:
    """Whether a matrix holds a bias for each of a stack of matrices in its module, rather than rows of a router."""
    module = name.rpartition(".")[0]
    matrices: Sequence[str] = [n for n, shape in shapes.items() if n.rpartition(".")[0] == module and len(shape) == 3]
    return any(n in effect.shapes or n in effect.came_or_went for n in matrices)


def _before_numbers(name: str) -> str:
    """The part of a name before the last component that is a number."""
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1]]) if numbers else ""
