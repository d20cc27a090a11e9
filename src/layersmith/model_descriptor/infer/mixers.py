"""Find the config attributes that set the sizes of a Mamba or linear-attention mixer, by their effect on its state.

Such a mixer keeps a state of fixed size in the cache: ``[B, H, P, N]``, or ``[B, H, N, P]``, or ``[B, P, N]`` where
there are no heads. The last projection of the mixer takes H * P numbers. So an attribute whose double makes H and that
length twice as long is the number of heads; one that makes another dimension longer and not that length is the size of
the state. Heads of one group share what writes to the state and what reads it: N entries of each, for every group.

Shapes: H heads, P size of a head, N size of the state, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product

from torch import nn

from layersmith.block_config import MambaConfig
from layersmith.model_descriptor.experiment import Experiment, Shapes
from layersmith.model_descriptor.infer.attributes import AttributePath
from layersmith.model_descriptor.infer.cache_contents import filled_cache, keys_in_cache, recurrent_states
from layersmith.model_descriptor.infer.sizes import MixerSizes
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.infer.trial import Trial, Values


@dataclass(frozen=True)
class _Mixer:
    """A mixer as it is, and what other values of attributes do to it.

    Attributes:
        trial: The kind of layer.
        state: Shape of the state in the cache.
        reader: The weight that reads all heads.
        refused: Values that were tried and did not run, and touch a size of the state.
    """

    trial: Trial
    state: tuple[int, ...]
    reader: str
    refused: list[Values] = field(default_factory=list)

    @property
    def headless(self) -> bool:
        return len(self.state) == 3

    @property
    def heads(self) -> int:
        return 1 if self.headless else self.state[1]

    @property
    def length(self) -> int:
        """H * P: the numbers that the reader takes."""
        return self.trial.base[self.reader][1]

    @property
    def paths(self) -> list[AttributePath]:
        """Attributes that change weights of the mixer and no others."""
        owners = self.trial.kind.owners
        return [
            path
            for path, effect in self.trial.effects.items()
            if not effect.came_or_went and all(owners.get(name) == "attention" for name in effect.shapes)
        ]

    def rows_more(self, shapes: Shapes) -> int:
        """Rows that all matrices of the layer together have more with other shapes."""
        pairs = [(shape, shapes[name]) for name, shape in self.trial.base.items() if name in shapes]
        return sum(new[0] - old[0] for old, new in pairs if len(old) == 2)

    def reaction(self, values: Values, heads_alone: bool = False) -> _Reaction | None:
        """What other values do; None if they do not run, or make something else than a state twice as long.

        Args:
            values: Values of attributes.
            heads_alone: Run only if the reader takes twice as much, as it does for twice the heads alone.
        """
        shapes = self.trial.shapes(values)
        if heads_alone and shapes is not None and shapes.get(self.reader, (0, 0))[1] != 2 * self.length:
            return None
        specimen = self.trial.specimen_with(values) if shapes is not None and self.reader in shapes else None
        states = _states(specimen, self.trial.index) if specimen is not None else []
        if shapes is None or not states:
            if any(self.trial.value(path) in self.state[1:] for path in values):
                self.refused.append(values)
            return None
        state = states[0]
        if len(state) != len(self.state) or any(b not in (a, 2 * a) for a, b in zip(self.state, state, strict=True)):
            return None
        dims = [d for d, (a, b) in enumerate(zip(self.state, state, strict=True)) if a != b]
        return _Reaction(self, values, dims, shapes)

    def why_refused(self) -> str:
        """Why the first of the values that touch a size of the state does not run; empty if all run."""
        if not self.refused:
            return ""
        return self.trial.survey.refusal(self.refused[0]) or self.trial.refusal(self.refused[0])


@dataclass(frozen=True)
class _Reaction:
    """A mixer with twice as much of some attributes: dimensions of its state that are twice as long, and its shapes."""

    mixer: _Mixer
    values: Values
    dims: list[int]
    shapes: Shapes

    def __str__(self) -> str:
        return " and ".join(".".join(path) for path in self.values)

    @property
    def times(self) -> float:
        """How many times as much the reader takes."""
        return self.shapes[self.mixer.reader][1] / self.mixer.length

    def doubles_one_size(self) -> bool:
        """Whether one attribute is the length of one dimension of the state, and doubles it alone."""
        (path,) = self.values
        return len(self.dims) == 1 and self.mixer.trial.value(path) == self.mixer.state[self.dims[0]]


# What a single attribute can be.
_SIZES = {
    "num_heads": Experiment[_Reaction, None](
        "Does twice {} double the heads of the state, and what the last projection takes?",
        lambda it, _: it.doubles_one_size() and it.dims == [1] and not it.mixer.headless and it.times == 2,
    ),
    "head_dim": Experiment[_Reaction, None](
        "Does twice {} double another side of the state, and what the last projection takes?",
        lambda it, _: it.doubles_one_size() and it.dims != [1] and not it.mixer.headless and it.times == 2,
    ),
    "state_dim": Experiment[_Reaction, None](
        "Does twice {} double another side of the state, and not what the last projection takes?",
        lambda it, _: it.doubles_one_size() and (it.dims != [1] or it.mixer.headless) and it.times == 1,
    ),
}


def find_mixer(trial: Trial) -> MixerSizes | None:
    """The attributes of a kind of layer's mixer; None if it has none with a state in the cache."""
    states = _states(trial.specimen, trial.index) if trial.kind.attention is not None else []
    reader = _reader(trial, states[0]) if len(states) == 1 and len(states[0]) in (3, 4) else None
    if reader is None:
        return None
    mixer = _Mixer(trial, states[0], reader)
    reactions = [mixer.reaction({path: 2 * trial.value(path)}) for path in mixer.paths]
    ran = [reaction for reaction in reactions if reaction is not None]
    alone = {name: next(filter(experiment.holds, ran), None) for name, experiment in _SIZES.items()}
    num_heads, head_dim, state = (tuple(it.values) if it is not None else () for it in alone.values())
    if not mixer.headless:
        num_heads = num_heads or _in_proportion(mixer, mixer.paths, mixer.heads, (1,))
        # One attribute may be the size of a head where another is the width of all of them.
        either = [*mixer.paths, *trial.idle_everywhere]
        head_dim = head_dim or _in_proportion(mixer, either, mixer.length // mixer.heads, (2, 3))
    groups, num_groups = mixer.heads, None
    if (of_state := alone["state_dim"]) is not None:
        # Entries that write to one number of the state and read it, of all groups.
        groups = max(1, mixer.rows_more(of_state.shapes) // trial.value(state[0]) // 2)
        num_groups = _num_groups(mixer, groups, num_heads, state[0])
    keys = keys_in_cache(trial.specimen, trial.index)
    refusal = "" if num_heads or head_dim or state else mixer.why_refused()
    return MixerSizes(
        num_heads=num_heads,
        state_dim=state[0] if state else None,
        head_dim=head_dim,
        num_groups=num_groups,
        reader=reader,
        headless=mixer.headless,
        square=not state and not mixer.headless and any(reaction.dims == [2, 3] for reaction in ran),
        groups={1: 1, mixer.heads: 0}.get(groups),
        is_alone=keys is None or not keys.numel(),
        problem=f"with other sizes of its mixer it does not run ({refusal})" if refusal else "",
    )


def _in_proportion(
    mixer: _Mixer, firsts: Sequence[AttributePath], size: int, dims: tuple[int, ...]
) -> tuple[AttributePath, ...]:
    """Two attributes that together are a size of the state, the second in proportion to the first.

    Args:
        mixer: The mixer.
        firsts: Attributes that may be the size itself.
        size: The size.
        dims: Dimensions of the state that may have it.
    """
    trial = mixer.trial
    for pair in product(firsts, mixer.paths):
        if pair[0] == pair[1] or trial.value(pair[0]) != size or not trial.value(pair[1]):
            continue
        reaction = mixer.reaction({path: 2 * trial.value(path) for path in pair}, heads_alone=True)
        if reaction is None or len(reaction.dims) != 1 or reaction.dims[0] not in dims or reaction.times != 2:
            continue
        # The second has to take any share, also where that is no whole number.
        new = size + size // 2
        if trial.shapes({path: in_proportion(trial.value(path), new, size) for path in pair}) is not None:
            return pair
    return ()


def _num_groups(
    mixer: _Mixer, groups: int, num_heads: tuple[AttributePath, ...], state_dim: AttributePath
) -> AttributePath | None:
    """The attribute that adds or takes rows for each group, runs, and leaves the state as it is."""
    trial = mixer.trial
    if mixer.headless:
        return None
    entries = 2 * trial.value(state_dim)
    for path in mixer.paths:
        value = trial.value(path)
        if value != groups or (path,) == num_heads:
            continue
        for other in (2 * value, value // 2):
            shapes = trial.shapes({path: other}) if other else None
            if shapes is None or mixer.rows_more(shapes) != entries * (other - value):
                continue
            specimen = trial.specimen_with({path: other})
            if specimen is not None and _states(specimen, trial.index) == [mixer.state]:
                return path
    return None


def _states(specimen: Specimen, index: int) -> list[tuple[int, ...]]:
    """Shapes of the states that a layer leaves in the cache."""
    cache = filled_cache(specimen)
    return [] if cache is None else [tuple(state.shape) for state in recurrent_states(cache, index)]


def _reader(trial: Trial, state: tuple[int, ...]) -> str | None:
    """The weight of the last linear map that runs in a module of the attention and takes all the heads."""
    assert trial.kind.attention is not None
    lengths = {state[1]} if len(state) == 3 else {state[1] * state[2], state[1] * state[3]}
    specimen, base = trial.specimen, trial.base
    linear = {name for name, module in specimen.model.named_modules() if isinstance(module, nn.Linear)}
    called = [call.name for call in specimen.trace(specimen.ids, keep=()) if call.name in linear]
    for module in trial.kind.attention.modules:
        inside = [name for name in called if name.startswith(f"{trial.prefix}{module}.")]
        weight = f"{inside[-1]}.weight".removeprefix(trial.prefix) if inside else ""
        if weight in base and base[weight][1] in lengths:
            return weight
    return None


# ------------------------------------------------------------------------------------ sizes in configs and weights


def mamba_config(
    sizes: MixerSizes, numbers: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> MambaConfig | None:
    """The sizes of a mixer in a full model; None where one of them is unknown.

    Args:
        sizes: Attributes that set the sizes of the mixer.
        numbers: ``num_heads``, ``state_dim`` and ``num_groups``, as far as attributes set them.
        shapes: Shapes of the layer.
    """
    if sizes.reader not in shapes or not (sizes.num_heads or sizes.state_dim):
        return None
    heads = 1 if sizes.headless else numbers.get("num_heads")
    if not heads or shapes[sizes.reader][1] % heads:
        return None
    head_dim = shapes[sizes.reader][1] // heads
    state = numbers.get("state_dim") or (head_dim if sizes.square else None)
    groups = numbers.get("num_groups") or (heads if sizes.groups == 0 else sizes.groups)
    return MambaConfig(state, heads, head_dim, groups) if state and groups else None


def mixer_values(
    sizes: MixerSizes | None, mamba: MambaConfig | None, value: Callable[[AttributePath], int]
) -> list[tuple[AttributePath, int | float]]:
    """Attributes, and the values that they need for the wanted sizes; attributes that stay as they are are left out.

    Args:
        sizes: Attributes that set the sizes of the mixer.
        mamba: The wanted sizes.
        value: Gives the value of an attribute in the config of the full model.
    """
    if sizes is None or mamba is None:
        return []
    shares: dict[AttributePath, Fraction] = {}
    for together, size in ((sizes.num_heads, mamba.num_heads), (sizes.head_dim, mamba.head_dim)):
        for path in together:
            shares[path] = shares.get(path, Fraction(1)) * Fraction(size, value(together[0]))
    values: list[tuple[AttributePath, int | float]] = [
        (path, in_proportion(value(path), share.numerator, share.denominator)) for path, share in shares.items()
    ]
    wanted = ((sizes.state_dim, mamba.state_dim), (sizes.num_groups, mamba.num_groups))
    values += [(path, size) for path, size in wanted if path is not None]
    return [(path, size) for path, size in values if size != value(path)]


def in_proportion(value: int, new: int, old: int) -> int | float:
    """``value * new / old``. A share that is no whole number is rounded up, so that products with it are not less."""
    exact = Fraction(value * new, old)
    if exact.denominator == 1:
        return int(exact)
    near = float(exact)
    return near if Fraction(near) >= exact else math.nextafter(near, math.inf)
