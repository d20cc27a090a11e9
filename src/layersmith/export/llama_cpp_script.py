"""What layersmith asks of llama.cpp, as a script: llama.cpp ends the process where it finds a file impossible.

    python llama_cpp_script.py ask FILE REQUEST.json ANSWER.npz
    python llama_cpp_script.py quantize FILE OUT Q4_K_M

It needs llama-cpp-python and numpy, and imports nothing of layersmith.
"""

import json
import sys
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as library
import numpy as np

_default_params = library.llama_model_default_params


def _without_repacking() -> Any:
    """Parameters of a model whose weights stay as they are in the file.

    Repacked weights are multiplied by AMX where the compiler knew it, and virtual machines that do not permit it end
    the process.
    """
    params = _default_params()
    params.use_extra_bufts = False
    return params


def ask(file: str, request: str, answer: str) -> None:
    """Logits of rows of token ids, and token ids of texts, both as llama.cpp computes them."""
    with open(request, encoding="utf-8") as stream:
        asked: dict[str, Any] = json.load(stream)
    length = max(map(len, asked["rows"]))
    library.llama_model_default_params = _without_repacking
    # A cache in float32: in float16, the default, it would be the largest difference.
    model = llama_cpp.Llama(
        file, n_ctx=max(256, length), logits_all=True, type_k=0, type_v=0, n_threads=asked["threads"], verbose=False
    )
    answers: dict[str, Any] = {}
    for number, row in enumerate(asked["rows"]):
        model.reset()
        model.eval(row)
        answers[f"logits{number}"] = model.scores[: len(row)].copy()
    for number, text in enumerate(asked["texts"]):
        answers[f"ids{number}"] = np.array(model.tokenize(text.encode(), add_bos=True, special=True))
    np.savez(answer, **answers)


def quantize(file: str, out: str, name: str) -> None:
    """Quantize a file; ``name`` is one of llama.cpp's, such as ``Q4_K_M``."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    if code := llama_cpp.llama_model_quantize(file.encode(), out.encode(), settings):
        sys.exit(f"llama_model_quantize returned {code}")


if __name__ == "__main__":
    {"ask": ask, "quantize": quantize}[sys.argv[1]](*sys.argv[2:])
