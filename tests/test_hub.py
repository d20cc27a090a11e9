"""Uploads to the Hub, against a Hub that is a small server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

import layersmith
from layersmith import hub
from layersmith.errors import InputError, UsageError
from tests.conftest import FAMILIES, stock_model


class _Hub(BaseHTTPRequestHandler):
    """Answers like the Hub to what an upload of small files asks, and keeps what it was asked."""

    asked: list[tuple[str, str, Any]]
    address: str

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        lines = [json.loads(line) for line in body.splitlines() if line]
        type(self).asked.append((self.path, str(self.headers.get("Authorization")), lines))
        if self.path.endswith("/repos/create"):
            self._answer({"url": f"{self.address}/me/small", "name": "me/small"})
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in lines[0]["files"]]
            self._answer({"files": [f | {"shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            self._answer({"commitUrl": f"{self.address}/me/small/commit/1", "commitOid": "1", "success": True})
        else:
            self._answer({})

    def do_GET(self) -> None:
        self._answer({"id": "me/small", "sha": "0" * 40, "siblings": []})

    def _answer(self, data: Any) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, Any]]]:
    _Hub.asked = []
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = _Hub.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub, "HfApi", lambda token: HfApi(endpoint=address, token=token))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield _Hub.asked
    server.shutdown()


@pytest.fixture
def child(tmp_path: Path) -> Path:
    layersmith.save(stock_model(FAMILIES["llama"]()), tmp_path / "child")
    (tmp_path / "child" / "README.md").write_text("---\nlicense: mit\n---\n")
    return tmp_path / "child"


def test_a_child_is_uploaded_as_a_private_repository(child: Path, asked: list[tuple[str, str, Any]]) -> None:
    address = layersmith.push(child, "me/small", token="hf_secret")
    assert "me/small" in address
    created = next(body[0] for path, _, body in asked if path.endswith("/repos/create"))
    assert created.get("private") is True or created.get("visibility") == "private"
    assert created["name"] == "small"
    assert {token for _, token, _ in asked} == {"Bearer hf_secret"}
    committed = next(body for path, _, body in asked if "/commit/" in path)
    sent = {line["value"]["path"] for line in committed if line["key"] == "file"}
    assert {"README.md", "config.json"} <= sent


def test_what_cannot_be_uploaded(child: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="hf auth login"):
        layersmith.push(child, "me/small")
    for name in ("small", "a/b/c", "me/"):
        with pytest.raises(UsageError, match="user/name"):
            layersmith.push(child, name, token="x")
    with pytest.raises(InputError, match=r"config\.json"):
        layersmith.push(tmp_path, "me/small", token="x")
    monkeypatch.setattr(hub, "HfApi", lambda token: HfApi(endpoint="http://127.0.0.1:1", token=token))
    with pytest.raises(InputError, match="cannot be reached"):
        layersmith.push(child, "me/small", token="x")
