"""Experiments ask one question each; layers that a family refuses are an answer, errors of layersmith are not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from layersmith.errors import UnsupportedModel
from layersmith.model_descriptor.experiment import (
    Effect,
    Experiment,
    LayersByChange,
    Outcome,
    Shapes,
    first_refutation,
)

EVEN = Experiment[int, int](question="Is {} even?", expectation=lambda n, _: n % 2 == 0, conclusion="it is odd")
SQUARE = Experiment[int, int](
    question="Is {} a square?",
    changes=lambda n: iter(range(n + 1)),
    expectation=lambda n, root: root * root == n,
    conclusion=lambda n: f"{n} lies between squares",
)


def test_an_outcome_keeps_question_answer_and_reason() -> None:
    assert SQUARE.run(16) == Outcome("Is 16 a square?", held=True)
    assert SQUARE.run(16).change == 4
    refuted = SQUARE.run(18)
    assert (refuted.held, refuted.reason) == (False, "18 lies between squares")
    assert str(refuted) == "Is 18 a square? no: 18 lies between squares"


def test_the_first_refutation_ends_a_series() -> None:
    asked: list[int] = []

    def changes(n: int) -> Iterator[int]:
        asked.append(n)
        return iter(())

    last = Experiment[int, int](question="Does anything change?", changes=changes, expectation=lambda n, change: True)
    assert first_refutation((EVEN, SQUARE), 16) is None
    assert first_refutation((EVEN, last), 3) == Outcome("Is 3 even?", held=False, reason="it is odd")
    assert asked == []


def test_an_effect_says_which_dimensions_changed() -> None:
    base = {"norm": (8,), "up": (16, 8), "down": (8, 16), "gone": (3,)}
    effect = Effect.between(base, {"norm": (8,), "up": (32, 8), "down": (8, 32)}, 32)
    assert list(effect.shapes) == ["up", "down"]
    assert (effect.dims("up"), effect.dims("down")) == ([0], [1])
    assert effect.came_or_went == {"gone"}
    assert not Effect.between(base, base, 1)


def test_a_change_is_built_once_and_a_refusal_is_kept() -> None:
    built: list[int] = []

    def build(width: int) -> list[Shapes]:
        built.append(width)
        if width > 8:
            raise UnsupportedModel("too wide")
        return [{"up": (width, 4)}]

    layers = LayersByChange(build)
    assert layers.shapes(8) == layers.shapes(8) == [{"up": (8, 4)}]
    assert layers.shapes(16) is None
    assert layers.reason(16) == "too wide"
    assert layers.reason(8) == ""
    assert built == [8, 16]


def test_errors_of_code_that_is_not_foreign_go_on() -> None:
    layers = LayersByChange(lambda change: [{}][change])  # raised in this file, so it counts as foreign
    assert layers.shapes(1) is None
    with pytest.raises(LookupError):
        first_refutation((Experiment[int, int](question="?", expectation=_broken),), 1)


def _broken(subject: int, change: int) -> bool:
    raise LookupError
