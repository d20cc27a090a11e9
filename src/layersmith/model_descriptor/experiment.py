"""Experiments: one question about a model, answered by changing the model and comparing.

Two kinds of code ask such questions. ``model_descriptor.infer`` changes config attributes to find out what they set;
``library.axes`` changes block configs to find out which weights a size governs. Both build layers on the meta device,
where a model has all its shapes and takes no memory, and compare the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from layersmith.errors import LayersmithError, first_line
from layersmith.foreign import foreign_code

Shapes = dict[str, tuple[int, ...]]
Subject = TypeVar("Subject")
Change = TypeVar("Change")


# ------------------------------------------------------------------------------------------------ one experiment


@dataclass(frozen=True)
class Outcome:
    """The answer to the question of one experiment.

    Attributes:
        question: A plain-English question that can be answered with yes or no.
        held: Whether the answer is yes.
        reason: Why the answer is no, as a clause that a sentence can end with; empty where it is yes.
        change: The change that met the expectation; None where there was none. It is not kept on disk.
    """

    question: str
    held: bool
    reason: str = ""
    change: Any = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.question} {'yes' if self.held else 'no'}" + (f": {self.reason}" if self.reason else "")


def _nothing(subject: Any) -> tuple[Any, ...]:
    return (None,)


@dataclass(frozen=True)
class Experiment(Generic[Subject, Change]):
    """One question about a subject, e.g. about an attribute of a config that may be the number of KV heads.

    Attributes:
        question: The question, which the expectation answers with yes or no. ``{}`` stands for the subject.
        expectation: ``(subject, change) -> bool``: whether the changed model does what a yes predicts.
        changes: ``subject -> changes`` that are tried in this order until one meets the expectation. By default
            nothing is changed and the subject itself is looked at.
        conclusion: What follows from a no, as a clause, or a function that makes it from the subject.
    """

    question: str
    expectation: Callable[[Subject, Change], bool]
    changes: Callable[[Subject], Iterable[Change]] = _nothing
    conclusion: str | Callable[[Subject], str] = ""

    def run(self, subject: Subject) -> Outcome:
        """Try the changes, say whether one of them met the expectation, and conclude where none did."""
        question = self.question.format(subject)
        for change in self.changes(subject):
            if self.expectation(subject, change):
                return Outcome(question, held=True, change=change)
        reason = self.conclusion if isinstance(self.conclusion, str) else self.conclusion(subject)
        return Outcome(question, held=False, reason=reason)

    def holds(self, subject: Subject) -> bool:
        """Whether one of the changes meets the expectation; nothing is concluded, which may take experiments too."""
        return any(self.expectation(subject, change) for change in self.changes(subject))


def first_refutation(experiments: Sequence[Experiment[Subject, Any]], subject: Subject) -> Outcome | None:
    """The outcome of the first experiment whose expectation does not hold; None if all hold.

    Cheap experiments come first in ``experiments``, since those after the first no are not run.
    """
    outcomes = (experiment.run(subject) for experiment in experiments)
    return next((outcome for outcome in outcomes if not outcome.held), None)


# ------------------------------------------------------------------------------- layers that differ in their sizes


@dataclass(frozen=True)
class Effect:
    """How the weights of one layer differ once a size has another value.

    Attributes:
        other: The other value of the size.
        before, shapes: Weight to its shape without and with the change, where both layers have it and it differs.
        came_or_went: Weights that only one of the two layers has.
    """

    other: int
    before: Shapes
    shapes: Shapes
    came_or_went: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.shapes or self.came_or_went)

    @classmethod
    def between(cls, base: Shapes, changed: Shapes, other: int) -> Effect:
        """Compare a layer without and with a change; weights stay in the order in which the layer has them."""
        names = [name for name in base if name in changed and base[name] != changed[name]]
        before, after = ({name: shapes[name] for name in names} for shapes in (base, changed))
        return cls(other, before, after, frozenset(base.keys() ^ changed.keys()))

    def inside(self, prefixes: tuple[str, ...]) -> Effect:
        """The effect on weights whose names begin with one of the prefixes."""
        before, after = (
            {name: shape for name, shape in shapes.items() if name.startswith(prefixes)}
            for shapes in (self.before, self.shapes)
        )
        came_or_went = frozenset(name for name in self.came_or_went if name.startswith(prefixes))
        return Effect(self.other, before, after, came_or_went)

    def dims(self, name: str) -> list[int]:
        """The dimensions along which a weight changed."""
        pairs = zip(self.before[name], self.shapes[name], strict=False)
        return [dim for dim, (before, after) in enumerate(pairs) if before != after]


class LayersByChange(Generic[Change]):
    """Shapes of all layers of a model after a change of sizes. Each change is built once.

    Args:
        build: Makes the changed model on the meta device and gives the shapes of its layers.
    """

    def __init__(self, build: Callable[[Change], list[Shapes]]):
        self._build = build
        self._built: dict[str, list[Shapes]] = {}
        self._refusals: dict[str, Exception] = {}

    def shapes(self, change: Change) -> list[Shapes] | None:
        """Shapes of every layer; None if the family refuses the change."""
        key = repr(change)
        if key not in self._built and key not in self._refusals:
            try:
                with foreign_code("Can the layers be built with this change?", refusal_is_answer=True) as attempt:
                    self._built[key] = self._build(change)
                if attempt.error is not None:
                    self._refusals[key] = attempt.error
            except LayersmithError as refusal:  # a descriptor says in our words what its family cannot take
                self._refusals[key] = refusal
        return self._built.get(key)

    def refusal(self, change: Change) -> Exception | None:
        """What was raised when the change was built; None if it was built."""
        return None if self.shapes(change) is not None else self._refusals[repr(change)]

    def reason(self, change: Change) -> str:
        """Why the family refuses the change, in one line; empty if it does not."""
        refusal = self.refusal(change)
        return "" if refusal is None else first_line(refusal)
