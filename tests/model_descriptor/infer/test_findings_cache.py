"""A second process reads the findings of the first from the disk, and ignores damaged files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from layersmith.model_descriptor.infer import descriptor as inferred
from layersmith.model_descriptor.infer import findings_cache as cache
from layersmith.model_descriptor.infer.descriptor import find, infer
from layersmith.run.user_cache import cache_folder
from tests.conftest import FAMILIES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAYERSMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(inferred, "_known", {})
    return tmp_path / "descriptors"


def test_what_is_read_is_what_was_found(folder: Path) -> None:
    config = FAMILIES["qwen2_windows"]()
    findings = find(config)
    cache.write("key", findings)
    assert cache.read("key") == findings
    assert list(folder.iterdir()) == [folder / "key.json"]


def test_experiments_are_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FAMILIES["qwen3"]()
    first = infer(config)
    monkeypatch.setattr(inferred, "_known", {})

    def again(*args: object) -> None:
        raise AssertionError("a second time")

    monkeypatch.setattr(inferred, "find", again)
    second = infer(FAMILIES["qwen3"]())
    assert second is not first
    assert second.findings == first.findings
    with pytest.raises(AssertionError, match="a second time"):
        infer(FAMILIES["qwen3"](num_hidden_layers=3))


@pytest.mark.parametrize(
    "damage", [lambda text: text[: len(text) // 2], lambda text: text.replace("attention", "ffn", 1)]
)
def test_a_damaged_file_is_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[str], str]
) -> None:
    first = infer(FAMILIES["llama"]())
    (file,) = folder.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    monkeypatch.setattr(inferred, "_known", {})
    assert infer(FAMILIES["llama"]()).findings == first.findings
    assert file.read_text() == whole


def test_an_empty_variable_turns_it_off_and_a_bad_folder_does_no_harm(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAYERSMITH_CACHE", "")
    assert cache_folder("descriptors") is None
    infer(FAMILIES["llama"]())
    assert not folder.exists()
    monkeypatch.setattr(inferred, "_known", {})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYERSMITH_CACHE", str(tmp_path / "file"))
    infer(FAMILIES["llama"]())


def test_the_users_own_cache_is_not_used_by_tests() -> None:
    assert "layersmith-tests-" in os.environ["LAYERSMITH_CACHE"]
