"""The report in a real browser, at the width of a phone and of a desk."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_html import sample_report

from layersmith.report.html import render

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
# The page in a frame of the wanted width, since a window cannot be as narrow as a phone.
FRAME = """<!doctype html><body style="margin:0">
<iframe id="f" style="width:{width}px;height:3000px;border:0" srcdoc="{page}"></iframe><pre id="result"></pre><script>
addEventListener("load", () => {{
  const page = document.getElementById("f").contentDocument;
  const outside = e => !e.closest(".scroll") && e.getBoundingClientRect().right > {width} + 1;
  const wide = [...page.querySelectorAll("body *")].filter(outside);
  document.getElementById("result").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth, title: page.title, rows: page.querySelectorAll("tbody tr").length,
    wide: wide.map(e => e.tagName + "." + e.className)}});
}});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [360, 1280])
def test_fits_its_window(width: int, tmp_path: Path) -> None:
    page = render(sample_report())
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=3000"]  # fmt: skip
    done = subprocess.run(
        [
            str(BROWSER), *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
            f"file://{tmp_path / 'frame.html'}",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    result = json.loads(html.unescape(found[1]))
    assert result["title"] == "demo: 4.77M to 3.34M parameters"
    assert result["rows"] > 10
    assert result["width"] <= width
    assert result["wide"] == []
