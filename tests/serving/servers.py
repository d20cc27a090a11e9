"""Start and stop the servers: vLLM's CPU build, and the server of llama-cpp-python."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CONTEXT = 2048
_PATIENCE = 900.0  # seconds until a server must answer; vLLM takes a minute on a quiet machine


class Refused(Exception):
    """The server ended before it answered; the message is its reason."""


@dataclass(frozen=True)
class Server:
    """A kind of server; ``python`` is the interpreter of its environment."""

    name: str
    python: str

    def command(self, folder: Path, port: int, remote_code: bool) -> list[str]:
        """The command that serves an export."""
        if self.name == "llama.cpp":
            file = next(folder.glob("*.gguf"))
            return [
                self.python, "-m", "llama_cpp.server", "--model", str(file), "--port", str(port),
                "--n_ctx", str(CONTEXT), "--logits_all", "true", "--type_k", "0", "--type_v", "0",
                "--model_alias", "child",
            ]  # fmt: skip
        return [
            self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1",
            "--port", str(port), "--served-model-name", "child", "--dtype", "float32", "--max-model-len", str(CONTEXT),
            "--max-num-seqs", "4", "--enforce-eager", *(["--trust-remote-code"] if remote_code else []),
        ]  # fmt: skip

    @contextmanager
    def serve(self, folder: Path, log: Path, remote_code: bool = False) -> Iterator[str]:
        """Serve an export for as long as the block lasts.

        Yields:
            The base URL of the OpenAI-compatible API.

        Raises:
            Refused: The server ended, or did not answer in time.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment.pop("PYTHONPATH", None)  # the server has not installed layersmith
        with open(log, "w", encoding="utf-8") as stream:
            process = subprocess.Popen(
                self.command(folder, port, remote_code),
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                cwd=log.parent,
            )
        try:
            _await(process, f"http://127.0.0.1:{port}/v1/models", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _stop(process)


def _await(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            raise Refused(_reason(log))
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise Refused(f"no answer within {_PATIENCE:.0f} s")


def _reason(log: Path) -> str:
    """The first error in a log that is not a warning, without what the server's logger puts before it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if re.search(r"\w*(Error|ASSERT)\b.*: ", line) and "WARNING" not in line]
    return re.sub(r"^\(.*?\) ERROR \S+ \S+ \S+\s*", "", (errors or lines[-1:] or [""])[0])[:300]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started, as an operator would: asked first."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
