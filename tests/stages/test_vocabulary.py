"""Checkpoints without the tokens that the data never have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import layersmith
from layersmith.errors import InputError

TEXTS = ["def compare(a, b):\n    return a == b\n", "import sys, os\nprint(sys.argv)\n"] * 3


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_a_parent_without_tokens_that_the_data_never_have(
    make_parent: Callable[..., Path], family: str, tmp_path: Path
) -> None:
    parent = make_parent(family)
    made = layersmith.trim_vocabulary(parent, tmp_path / "small", data=TEXTS, progress=False)
    assert made.tokens < made.tokens_before == 512
    assert made.difference < 1e-6
    before, after = AutoTokenizer.from_pretrained(parent), AutoTokenizer.from_pretrained(tmp_path / "small")
    assert len(after) == made.tokens
    assert after(TEXTS[0])["input_ids"] != before(TEXTS[0])["input_ids"]
    assert after.convert_ids_to_tokens(after(TEXTS[0])["input_ids"]) == before.tokenize(TEXTS[0])
    assert after.eos_token == before.eos_token

    whole, small = (AutoModelForCausalLM.from_pretrained(folder) for folder in (parent, tmp_path / "small"))
    rows = 1 if family == "llama_tied" else 2
    gone = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in small.parameters())
    assert gone == rows * (512 - made.tokens) * whole.config.hidden_size == made.parameters_before - made.parameters
    assert small.config.eos_token_id == after.eos_token_id
    out = small.generate(**after("def compare", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert out.shape[1] == len(after("def compare")["input_ids"]) + 4
    assert torch.isfinite(small(out).logits).all()
    with pytest.raises(InputError, match="already there"):
        layersmith.trim_vocabulary(parent, tmp_path / "small", data=TEXTS)


def test_the_chat_template_is_cut_as_before(make_parent: Callable[..., Path], tmp_path: Path) -> None:
    parent = make_parent("llama")
    before = AutoTokenizer.from_pretrained(parent)
    before.chat_template = "import threading\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    before.save_pretrained(parent)
    messages = [{"role": "user", "content": "sys"}]
    layersmith.trim_vocabulary(parent, tmp_path / "small", data=TEXTS, progress=False)
    after = AutoTokenizer.from_pretrained(tmp_path / "small")
    of_chat = [t.convert_ids_to_tokens(t.apply_chat_template(messages)["input_ids"]) for t in (before, after)]
    assert of_chat[0] == of_chat[1]
