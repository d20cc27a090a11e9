"""A spread of families in which every hard feature is there once; ``make conformance`` examines all of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tests.conformance import table
from tests.conformance.checks import CHECKS, OK, Verdict, by_parent, examine
from tests.conformance.kinds import DECODER, HYBRID

# What is special about each, and the checks that its stock parent fails itself.
SPREAD: dict[str, tuple[str, ...]] = {
    "llama": (),  # the plain one
    "gemma3_text": (),  # norms before and after each subblock, a pattern of windows
    "olmo2": (),  # norms after each subblock only
    "falcon": (),  # attention and FFN in parallel, one norm for both, fused qkv with one KV head
    "gpt2": (),  # Conv1D, positions learned
    "bloom": (),  # the residual is added inside the subblocks, no rotary embedding
    "gpt_oss": (),  # attention sinks, fused experts with biases, windows
    "mixtral": (),  # experts
    "qwen3_next": (),  # linear attention and attention, shared experts
    "deepseek_v3": (),  # MLA, dense layers before the layers with experts
    "phi3": (),  # fused qkv, fused gate and up
    "granitemoehybrid": (),  # Mamba and attention
    "qwen2_vl": (),  # a vision tower beside the language model
    "bart": ("left padding",),  # cross-attention that does not run, layers of an encoder-decoder
}
# What layersmith does not do yet. A check that is mended is taken out here.
KNOWN: dict[str, tuple[str, ...]] = {}
KINDS = {"qwen3_next": HYBRID, "granitemoehybrid": HYBRID, "bart": "encoder-decoder"}


@pytest.mark.parametrize("model_type", SPREAD)
def test_every_check_passes_but_those_that_the_stock_parent_fails(model_type: str) -> None:
    verdict = examine(model_type)
    assert not verdict.parent
    assert not verdict.refused
    assert list(verdict.results) == list(CHECKS)
    assert verdict.kind == KINDS.get(model_type, DECODER)
    parents = SPREAD[model_type]
    known = KNOWN.get(model_type, ())
    failed = {name: result for name, result in verdict.results.items() if result != OK and name not in parents + known}
    assert not failed
    assert all(by_parent(verdict.results[name]) for name in parents)
    assert all(verdict.results[name] != OK for name in known), "mended: take it out of KNOWN"


def test_layers_that_share_modules_are_refused_with_the_reason() -> None:
    verdict = examine("zamba2")
    assert "it is built from modules that several layers share" in verdict.refused
    assert not verdict.results


def test_a_parent_that_needs_pictures_says_so() -> None:
    verdict = examine("blip")
    assert "pixel_values" in verdict.parent
    assert not verdict.described


def test_the_summary_has_every_family_and_its_failures_in_words(tmp_path: Path) -> None:
    ok = dict.fromkeys(CHECKS, OK)
    verdicts = [
        Verdict("llama", DECODER, True, results=ok, axes={"KV heads": OK, "experts": "it has no experts"}),
        Verdict("bart", "encoder-decoder", results=ok | {"left padding": "parent: logits differ"}),
        Verdict("gptj", DECODER, True, results=ok | {"groups": "x is in 2 weight groups"}),
        Verdict("zamba2", HYBRID, True, refused="shared modules."),
        Verdict("blip", parent="needs pixel_values"),
    ]
    text = table.rendered(verdicts, {"transformers": "5"})
    lines = text.splitlines()
    assert "Of the 3 types" in text
    assert "**1** are described" in text
    for line in (
        "| `llama` | decoder | all | KV heads |",
        "| `bart` | encoder-decoder | all but, as the parent, left padding | – |",
        "| `gptj` | decoder | fails groups | – |",
        "| `zamba2` | hybrid | refused | – |",
        "| `blip` |  | parent does not run | – |",
        "- `gptj`: groups: x is in 2 weight groups.",
        "- `zamba2`: shared modules.",
        "`blip`.",
    ):
        assert line in lines
    table.write(verdicts, tmp_path)
    kept, _ = table.read(tmp_path)
    assert {v.model_type: v for v in kept} == {v.model_type: v for v in verdicts}


def test_the_searchable_page_reads_what_a_verdict_has() -> None:
    page = (table.DOCS / "families.html").read_text(encoding="utf-8")
    used = set(re.findall(r"\bfamily\.(\w+)", page))
    assert {"results", "axes", "notes", "refused", "parent"} <= used
    assert used <= {field.name for field in dataclasses.fields(Verdict)}


def test_what_passed_and_does_not_any_more_is_worse() -> None:
    ok = dict.fromkeys(CHECKS, OK)
    before = [
        Verdict("llama", results=ok),
        Verdict("gptj", results=ok | {"groups": "bad"}),
        Verdict("blip", parent="x"),
    ]
    assert table.worse(before, before) == []
    parents = [Verdict("llama", results=ok | {"generation": "parent: it cannot"})]
    assert table.worse(before, parents) == []
    now = [Verdict("llama", results=ok | {"generation": "bad"}), Verdict("gptj", refused="no")]
    assert [line.split(":")[0] for line in table.worse(before, now)] == ["llama", "gptj"]


def test_the_committed_table_is_that_of_the_committed_data() -> None:
    verdicts, made_with = table.read()
    if not verdicts:
        pytest.skip("no table is kept yet")
    assert (table.DOCS / "families.md").read_text(encoding="utf-8") == table.rendered(verdicts, made_with)
    assert [v.model_type for v in verdicts] == table.ALL_TYPES
