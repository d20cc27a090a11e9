"""What foreign code raises is an answer; what layersmith raises is a bug and goes on as it is."""

import errno
import json
import logging

import pytest
import torch

from layersmith import errors
from layersmith.foreign import foreign_code


@pytest.fixture(autouse=True)
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAYERSMITH_STRICT", raising=False)


def test_what_foreign_code_raises_is_kept_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "layersmith"), foreign_code("is this JSON?") as attempt:
        json.loads("{")
    assert attempt.failed
    assert attempt.reason.startswith("Expecting property name")
    (record,) = caplog.records
    assert "is this JSON?" in record.message
    assert record.exc_info


def test_nothing_raised_is_no_failure() -> None:
    with foreign_code("is this JSON?") as attempt:
        json.loads("{}")
    assert not attempt.failed
    assert attempt.reason == ""


def test_our_own_errors_go_on() -> None:
    with pytest.raises(TypeError), foreign_code("what is near?", refusal_is_answer=True):
        errors.did_you_mean("a", 3)  # type: ignore[arg-type]
    with pytest.raises(errors.UsageError), foreign_code("is it usable?", refusal_is_answer=True):
        raise errors.UsageError("no")


def test_arguments_that_a_foreign_function_does_not_take_are_its_refusal() -> None:
    with foreign_code("does a linear layer take a colour?") as attempt:
        attempt.call(torch.nn.Linear, 2, 2, colour="red")
    assert "colour" in attempt.reason


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOSPC, "full"), torch.OutOfMemoryError()])
def test_what_ran_out_is_no_answer(error: Exception) -> None:
    def give_out() -> None:
        raise error

    with pytest.raises(type(error)), foreign_code("does it fit?", refusal_is_answer=True):
        give_out()


def test_strict_mode_keeps_only_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERSMITH_STRICT", "1")
    with foreign_code("is this JSON?", refusal_is_answer=True) as attempt:
        json.loads("{")
    assert attempt.failed
    with pytest.raises(json.JSONDecodeError), foreign_code("is this JSON?"):
        json.loads("{")
