"""Proof, on a small random model, that channels of the residual stream can be removed.

Some channels are made dead: every entry for them, in all weights that carry the residual stream, is zero. A model
without these channels must then give the same logits. It does once weights make up for what depends on the number of
channels: the mean in a norm, an embedding that is multiplied with the square root of the hidden size, logits that are
divided by it. Which weights have to be multiplied with which power of D / D' is found by running both models and
comparing them module by module, in the order of their calls.

A LayerNorm also subtracts the mean of all channels, dead ones included. There the proof holds for streams whose mean is
zero: the channels that stay are pairs of opposite numbers.

Shapes: D hidden, D' the smaller hidden size.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from layersmith.errors import UnsupportedModel, first_line
from layersmith.hidden_size.config import Configs, HiddenSize, carriers, sizes_to_try, template
from layersmith.hidden_size.narrowing import Factor, Narrowing
from layersmith.hidden_size.pair import Pair, close
from layersmith.model_descriptor.infer.shrink import shrunk
from layersmith.model_descriptor.infer.specimen import experiment
from layersmith.model_descriptor.stock import causal_lm_config, stock_model

logger = logging.getLogger(__name__)

_POWERS = (1, -1, 2, -2)
# Ways to say the hidden size that are tried.
_MOST_GUESSES = 12
# Weights with several entries for a channel whose layouts are tried; there are seldom more.
_MOST_FUSED = 2


def prove_narrowing(config: PretrainedConfig) -> Narrowing:
    """Find the hidden size of a family by experiment, and prove on a small random model that channels can go.

    Args:
        config: Config of a model of the family.

    Raises:
        UnsupportedModel: No attribute is the hidden size alone, or removing dead channels changes the logits.
    """
    config = causal_lm_config(config)
    small = shrunk(config, stock_model(config))
    configs, problems = Configs(small), list[str]()
    guesses = itertools.count()
    for paths in configs.hidden_paths():
        for size in sizes_to_try(configs.size):
            hidden_size = None
            for hidden_size in configs.found(paths, size):
                if next(guesses) >= _MOST_GUESSES:
                    break
                try:
                    return _proved(configs, hidden_size, size)
                except UnsupportedModel as problem:
                    problems.append(str(problem))
            if hidden_size is None:
                problems.append(f"with hidden size {size} it cannot be built ({configs.refusal})")
    logger.debug("no narrower model: %s", "; ".join(problems))
    if not problems:
        raise UnsupportedModel("no attribute of its config makes the embedding narrower.")
    raise UnsupportedModel(problems[0])


def _proved(configs: Configs, hidden_size: HiddenSize, size: int) -> Narrowing:
    """The narrowing with the first layout of fused weights that holds, for plain streams or for centered ones.

    Raises:
        UnsupportedModel: None does.
    """
    narrowers = [
        (way, way.narrower(configs.config, size))
        for way in (hidden_size, dataclasses.replace(hidden_size, epsilons=False))
    ]
    shapes = configs.shapes_with(narrowers[0][1])
    if shapes is None:
        raise UnsupportedModel(f"with hidden size {size} it cannot be built ({configs.refusal})")
    found = carriers(configs.base, shapes, configs.size, size)
    fused = sorted({template(c.name) for c in found if c.times > 1})[:_MOST_FUSED]
    layouts = itertools.chain.from_iterable(itertools.combinations(fused, n) for n in range(len(fused) + 1))
    first: UnsupportedModel | None = None
    for interleaved, centered in itertools.product(layouts, (False, True)):
        for way, narrower in narrowers:
            guess = Narrowing(way, frozenset(interleaved), centered=centered)
            pair = Pair(configs, narrower, guess, seed=0)
            try:
                factors = _factors(pair)
                proved = Pair(configs, narrower, dataclasses.replace(guess, factors=factors), seed=1)
                proved.check()
            except UnsupportedModel as problem:
                first = first or problem
                if not pair.fixed:  # with other epsilons it is no better
                    break
            else:
                return proved.guess
    assert first is not None
    raise first


def reason_of(config: PretrainedConfig) -> str:
    """Why the hidden size of a family cannot be smaller; empty if it can."""
    try:
        prove_narrowing(config)
    except UnsupportedModel as reason:
        return first_line(reason)
    return ""


# ---------------------------------------------------------------------------------------------- factors


def _factors(pair: Pair) -> dict[str, Factor]:
    """What weights have to be multiplied with for equal logits, by their names without numbers.

    Raises:
        UnsupportedModel: No factors give equal logits.
    """
    powers = _POWERS if pair.embedding else ()
    presets: list[tuple[dict[str, Factor], int]] = [
        ({}, 0),
        *(({pair.embedding: Factor(power)}, 0) for power in powers),
    ]
    first: UnsupportedModel | None = None
    for preset, pair.stream in [*presets, ({}, -1)]:  # the last for norms without weights, whose outputs are smaller
        pair.load(preset)
        try:
            _fix_all(pair)
            return _by_template(pair)
        except UnsupportedModel as problem:
            first = first or problem
            if not pair.fixed:  # the first norm differs, to which the size of embeddings does not matter
                raise first from None
    # Other modules may depend on the hidden size too, e.g. by a scale of what they read.
    pair.names, pair.stream = pair.with_weights, 0
    pair.load({})
    _fix_all(pair)
    return _by_template(pair)


def _fix_all(pair: Pair) -> None:
    problem = "its logits are others"
    for _ in range(2 * len(pair.names) + 1):
        name, inputs = pair.first_difference()
        if name and not _fix(pair, name, inputs):
            problem = f"{template(name)} gives others"
            break
        if not name:
            break
    if not close(pair.logits, pair.narrow_logits()) and not _fix_logits(pair):
        raise UnsupportedModel(f"without dead channels of the residual stream, {problem}.")


def _by_template(pair: Pair) -> dict[str, Factor]:
    found: dict[str, set[Factor | None]] = {}
    state = pair.small.model.state_dict()
    of_tensor = {state[name].data_ptr(): factor for name, factor in pair.fixed.items()}
    for name, tensor in state.items():  # a tied weight has several names
        found.setdefault(template(name), set()).add(of_tensor.get(tensor.data_ptr()))
    if unequal := [name for name, factors in found.items() if len(factors) > 1]:
        raise UnsupportedModel(f"{unequal[0]} depends on the hidden size in some layers only.")
    return {name: factor for name, factors in found.items() for factor in factors if factor is not None}


def _fix(pair: Pair, name: str, call: Any) -> bool:
    """Multiply weights of a module so that its output agrees; whether that is possible."""
    number, args, kwargs = call
    module = pair.small.model.get_submodule(name)

    def holds() -> bool:
        with torch.no_grad(), experiment("Does the module run?") as attempt:
            return pair.agrees(name, number, attempt.call(module, *args, **kwargs))
        return False

    weights = [weight for weight in pair.weights(name) if weight not in pair.fixed]
    return _multiplied(pair, weights, holds)


def _multiplied(pair: Pair, weights: Sequence[str], holds: Callable[[], bool]) -> bool:
    """Try factors for one of the weights, then for all; whether some hold, which are then set."""
    together = [[weight] for weight in weights] + ([list(weights)] if len(weights) > 1 else [])
    for some, offset, power in itertools.product(together, (0.0, 1.0), _POWERS):
        before = {name: pair.fixed.get(name) for name in some}
        for name in some:
            pair.multiply(name, Factor(power, offset))
        if holds():
            return True
        for name, factor in before.items():
            pair.multiply(name, factor)
    return False


def _fix_logits(pair: Pair) -> bool:
    """Try further powers for the weights of the last modules; whether the logits are then equal."""
    for name in reversed([*pair.outputs][-3:]):
        for weight in pair.weights(name):
            before = pair.fixed.get(weight, Factor(0))
            offsets = (before.offset,) if weight in pair.fixed else (0.0, 1.0)
            for offset, power in itertools.product(offsets, _POWERS):
                pair.multiply(weight, Factor(before.power + power, offset))
                if close(pair.logits, pair.narrow_logits()):
                    return True
            pair.multiply(weight, before if before.power else None)
    return False
