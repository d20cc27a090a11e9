"""Results kept in the user's cache: read as they were written, or computed again."""

from __future__ import annotations

from pathlib import Path

import pytest

from layersmith.run import user_cache


def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERSMITH_CACHE", str(tmp_path))
    assert user_cache.read("times", "one") is None
    user_cache.write("times", "one", {"seconds": [1.5, None]})
    assert user_cache.read("times", "one") == {"seconds": [1.5, None]}
    assert user_cache.read("times", "another") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"payload": 1}', '{"payload": 1, "digest": "0"}'])
def test_what_is_damaged_is_not_read(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERSMITH_CACHE", str(tmp_path))
    user_cache.write("times", "one", 1)
    (tmp_path / "times" / "one.json").write_text(text)
    assert user_cache.read("times", "one") is None


def test_the_cache_can_be_turned_off_or_unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERSMITH_CACHE", "")
    assert user_cache.cache_folder("times") is None
    user_cache.write("times", "one", 1)
    assert user_cache.read("times", "one") is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYERSMITH_CACHE", str(tmp_path / "file"))
    user_cache.write("times", "one", 1)
    assert user_cache.read("times", "one") is None


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LAYERSMITH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache.cache_folder("times") == tmp_path / "layersmith" / "times"
