"""README, docs and help texts are in plain English: words that made earlier texts hard to read do not come back.

Each of these words was used in place of the standard term, so that readers had to decode the sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from layersmith.cli import app

ROOT = Path(__file__).parents[1]
BANNED = (
    "own", "found", "told", "beside", "so many", "there is none", "bears", "as it was", "stands", "what is had",
    "of the family",
)  # fmt: skip
_BANNED = re.compile(rf"\b({'|'.join(re.escape(word).replace(' ', r's+') for word in BANNED)})\b", re.IGNORECASE)
# Standard phrases with one of these words, and why each is right where it is.
ALLOWED: dict[str, str] = {
    "deep-beside-puzzletron": "the name of a file in benchmarks/results",
}


def banned_in(text: str) -> list[str]:
    """The banned words of a text, each with what is around it."""
    for phrase in ALLOWED:
        text = re.sub(re.escape(phrase), "", text, flags=re.IGNORECASE)
    text = " ".join(text.split())
    return [text[max(0, m.start() - 40) : m.end() + 40] for m in _BANNED.finditer(text)]


def help_texts() -> Iterator[tuple[str, str]]:
    """Where a help text is, and the text, for every command and option."""
    command = typer.main.get_command(app)
    yield "layersmith", command.help or ""
    for name, subcommand in command.commands.items():  # type: ignore[attr-defined]
        yield name, subcommand.help or ""
        for parameter in subcommand.params:
            yield f"{name} {parameter.opts[0]}", getattr(parameter, "help", None) or ""


PAGES = sorted(["README.md", "CONTRIBUTING.md", *(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md"))])


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_in_plain_english(page: str) -> None:
    assert not banned_in((ROOT / page).read_text(encoding="utf-8"))


def test_help_texts_are_in_plain_english() -> None:
    texts = dict(help_texts())
    assert len(texts) > 40
    assert not {where: words for where, text in texts.items() if (words := banned_in(text))}


def test_the_words_are_seen() -> None:
    assert banned_in("what it has of its own")
    assert banned_in("so\nmany layers")
    assert not banned_in("its owner, the foundation")
