"""Adapts pages to the site.

Pages in docs may link to other files of the repository: the site gets copies of those. Docstrings may use roles of
Sphinx, as in ``:class:`Recipe` ``: the site shows the name alone.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(\]\()((?:\.\./)+)([^)#]+)")
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):<code>~?([\w.]*?)(\w+)</code>")
_ROOT = Path(__file__).parents[1]


def on_files(files: Any, config: Any) -> Any:
    """Add every file outside docs that some page links to."""
    from mkdocs.structure.files import File

    wanted = set()
    for page in Path(config.docs_dir).rglob("*.md"):
        for _, up, rest in _LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / (up + rest)).resolve()
            if not target.is_relative_to(Path(config.docs_dir).resolve()):
                if not target.is_file():
                    raise FileNotFoundError(f"{page}: links to {up}{rest}, which does not exist")
                wanted.add(target.relative_to(_ROOT).as_posix())
    for name in sorted(wanted):
        # Markdown outside docs is copied as it is, not rendered: its links are relative to the repository.
        files.append(File.generated(config, _in_site(name), abs_src_path=str(_ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links that leave docs point to the copies."""
    folder = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, match[2] + match[3]))
        if path.startswith("docs/"):
            return match[0]
        return match[1] + posixpath.relpath(_in_site(path), folder or ".")

    return _LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show the name alone where a docstring has a role of Sphinx."""
    return _ROLE.sub(lambda match: f"<code>{match[2]}</code>", html)


def _in_site(name: str) -> str:
    return f"repository/{name}{'.txt' if name.endswith(('.md', '.py')) else ''}"
