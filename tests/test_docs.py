"""What docs tell people to type exists, and so does what they link to."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from layersmith.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"])
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_exist(page: Path) -> None:
    """In blocks, also after a launcher or an environment variable."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            said = re.match(r"^(?:\$ )?(?:\w+=\S+ )*(?:torchrun .*?-m |python -m )?layersmith (\w.*)$", line)
            if not said:
                continue
            words = shlex.split(said[1], comments=True)
            assert words[0] in COMMANDS, line
            known = {o for parameter in COMMANDS[words[0]].params for o in (*parameter.opts, *parameter.secondary_opts)}
            assert {word for word in words if word.startswith("--")} <= known, line


def test_options_of_the_reference_exist() -> None:
    text = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    known = {o for c in COMMANDS.values() for p in c.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    assert set(re.findall(r"`(--[\w-]+)", text)) <= known
    assert set(re.findall(r"^\| `(\w+) ", text, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        target = (page.parent / link) if link else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, link
