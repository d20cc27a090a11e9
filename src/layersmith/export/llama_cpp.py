"""Ask llama.cpp about a GGUF file, where llama-cpp-python is installed: in another process, see the script."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from layersmith.errors import InputError, UsageError
from layersmith.export.source import CannotExport
from layersmith.run.artifacts import temporary_folder

_SCRIPT = Path(__file__).with_name("llama_cpp_script.py")
# Largest difference of llama.cpp's logits from those in float32, relative to the largest logit. In files of 16 bits it
# rounds activations to 16 bits as well.
TOLERANCE = {"F32": 1e-3, "F16": 1e-2, "BF16": 5e-2}
# With quantized matrices it rounds activations to integers of 8 bits.
QUANTIZED_TOLERANCE = 1e-1
# What tokenizers treat differently: case, contractions, numbers, runs of spaces, line ends, code, and other scripts.
TEXTS = (
    "Hello, World! It's 12345.67 o'clock; we'LL see you've got 3 cats.",
    "def f(x):\n    return x ** 2  # squared\n\n\n\tif True:\r\n        pass   \n",
    "naïve café 東京タワー こんにちは Привет мир 🙂🚀 ½ ²³ ١٢٣",
    "a  b   c    d      e\n\n  \n x=1,y=-2;z=[3,4]{5}(6)<7>|8|~9~ http://a.b/c?d=e&f=g#h 100%",
    "CamelCaseWORDS snake_case __init__ 'quoted' \"double\" ... --- === <!-- x -->",
)


def is_installed() -> bool:
    """Whether llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


def compare(file: Path, rows: Sequence[torch.Tensor], logits: Sequence[torch.Tensor], kind: str) -> float:
    """Compare llama.cpp's logits with those in float32.

    Args:
        file: A GGUF file.
        rows: Token ids ``[T]``.
        logits: Logits ``[T, V]`` of each row.
        kind: Data type of the file's matrices: ``F32``, ``F16``, ``BF16``, or the name of a quantized one.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        CannotExport: llama.cpp does not read the file, or computes another model.
    """
    answers = _ask(file, [row.tolist() for row in rows], [])
    difference = max(
        float((torch.from_numpy(answers[f"logits{n}"]) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))
        for n, wanted in enumerate(logits)
    )
    if not difference <= TOLERANCE.get(kind, QUANTIZED_TOLERANCE):
        raise CannotExport(f"--to gguf: llama.cpp's logits differ from the child's by {difference:.1e} of the largest.")
    return difference


def compare_tokens(file: Path, ids: Sequence[list[int]]) -> None:
    """Compare llama.cpp's token ids of :data:`TEXTS` with the tokenizer's.

    Raises:
        CannotExport: They differ; the message has the text.
    """
    answers = _ask(file, [[0]], TEXTS)
    for number, (text, wanted) in enumerate(zip(TEXTS, ids, strict=True)):
        if answers[f"ids{number}"].tolist() != wanted:
            raise CannotExport(f"--to gguf: llama.cpp's tokenizer gives {text!r} other ids than the child's tokenizer.")


def quantize(file: Path, out: Path, name: str) -> None:
    """Quantize a GGUF file with llama.cpp.

    Args:
        file: The file.
        out: The new file.
        name: llama.cpp's name of the format, such as ``Q4_K_M``.

    Raises:
        UsageError: There is no such format, or llama.cpp refuses it for this model.
        InputError: llama-cpp-python is not installed.
    """
    if not is_installed():
        raise InputError("--quantize needs the package llama-cpp-python: pip install 'layersmith[llama-cpp]'")
    if not re.fullmatch(r"[A-Z0-9_]+", name):
        raise UsageError(f"--quantize {name}: not a name of llama.cpp, such as Q4_K_M or Q8_0.")
    done = _run("quantize", str(file), str(out), name)
    if done.returncode:
        raise UsageError(f"--quantize {name}: llama.cpp does not do it ({_reason(done)}).")


def _ask(file: Path, rows: Sequence[list[int]], texts: Sequence[str]) -> dict[str, np.ndarray]:
    with temporary_folder(file.parent, "llama-cpp") as folder:
        request, answer = folder / "request.json", folder / "answer.npz"
        request.write_text(json.dumps({"rows": rows, "texts": texts, "threads": torch.get_num_threads()}))
        done = _run("ask", str(file), str(request), str(answer))
        if done.returncode:
            raise CannotExport(f"--to gguf: llama.cpp does not read the file ({_reason(done)}).")
        with np.load(answer) as arrays:
            return dict(arrays)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # -P: this folder has modules with the names of packages.
    return subprocess.run([sys.executable, "-P", str(_SCRIPT), *arguments], capture_output=True, text=True, check=False)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process failed: the signal that ended it, or the last line that it wrote."""
    if done.returncode < 0:
        return f"it was ended by {signal.Signals(-done.returncode).name}"
    return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it said nothing"
