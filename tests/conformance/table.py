"""docs/families.md and docs/families.json: what was seen of every family, for people and for the next comparison."""

from __future__ import annotations

import dataclasses
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from layersmith.run.artifacts import read_json, write_json, write_text
from tests.conformance.checks import CACHE_CHECKS, CHECKS, OK, Verdict, by_parent
from tests.conformance.kinds import DECODER, HYBRID, MEANINGS

DOCS = Path(__file__).parents[2] / "docs"
CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
ALL_TYPES = sorted(CAUSAL | set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))

# In this order; an axis that no family has yet is left out, one that is not here comes last.
AXES = (
    "KV heads",
    "query heads",
    "FFN width",
    "experts",
    "expert width",
    "experts per token",
    "shared width",
    "mixer heads",
    "mixer head size",
    "state sizes",
    "window",
)
CACHE_MODES = tuple(name for name in CACHE_CHECKS if name != "generation")
WANTED = (
    "groups",
    "attention no-op",
    "ffn no-op",
    "both no-ops",
    *CACHE_MODES,
    "heterogeneous build",
    "save and reload",
)
NOTHING = "–"


def versions() -> dict[str, str]:
    """What a table was made with."""
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "Python": platform.python_version(),
    }


def write(verdicts: Sequence[Verdict], folder: Path = DOCS) -> None:
    """Write ``families.json`` and ``families.md``."""
    verdicts = sorted(verdicts, key=lambda v: v.model_type)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "families.json", {"versions": versions(), "families": [dataclasses.asdict(v) for v in verdicts]}
    )
    # From what was kept, so that it is the same whenever it is rendered again.
    write_text(folder / "families.md", rendered(*read(folder)))


def read(folder: Path = DOCS) -> tuple[list[Verdict], dict[str, str]]:
    """The verdicts of ``families.json`` and what they were made with; none if there is no such file."""
    path = folder / "families.json"
    if not path.is_file():
        return [], {}
    data = read_json(path)
    return [Verdict(**entry) for entry in data["families"]], data["versions"]


def worse(before: Iterable[Verdict], now: Iterable[Verdict]) -> list[str]:
    """What passed and does not pass any more, a line each."""
    known = {verdict.model_type: verdict for verdict in before}
    lines = []
    for verdict in now:
        old = known.get(verdict.model_type)
        if old is None:
            continue
        if old.described and not verdict.described:
            lines.append(
                f"{verdict.model_type}: was described. Now: {verdict.refused or verdict.parent or verdict.results}"
            )
            continue
        for check, result in verdict.results.items():
            if result != OK and not by_parent(result) and (old.passed or old.results.get(check) == OK):
                lines.append(f"{verdict.model_type}: {check}: was {old.results.get(check, 'not there')}. Now: {result}")
    return lines


def is_counted(verdict: Verdict) -> bool:
    """Whether a family is one of those that layersmith is for: see the definition in the table."""
    return verdict.model_type in CAUSAL and verdict.kind in (DECODER, HYBRID) and verdict.language_only


def is_whole(verdict: Verdict) -> bool:
    """Whether a family has all that is asked of a counted one, but for what its stock parent cannot do."""
    return verdict.described and all(
        (result := verdict.results.get(name, "")) == OK or by_parent(result) for name in WANTED
    )


# ---------------------------------------------------------------------------------------------- rendering


def rendered(verdicts: Sequence[Verdict], made_with: dict[str, str]) -> str:
    """``families.md``."""
    counted = [v for v in verdicts if is_counted(v)]
    others = [v for v in verdicts if v.model_type in CAUSAL and not is_counted(v)]
    images = [v for v in verdicts if v.model_type not in CAUSAL]
    parts = [
        "# Families",
        _how_made(verdicts, made_with),
        "## In short",
        _summary(counted, others, images),
        "## What the words mean",
        _definitions(),
        f"## The {len(counted)} decoder and hybrid language models",
        _table(counted, verdicts),
        f"## The other {len(others)} types with a causal language model",
        _table(others, verdicts),
        f"## The {len(images)} image-text-to-text types beside those",
        _table(images, verdicts),
        "## What fails",
        _listing(verdicts, _own_failures, "Nothing that a stock parent can do."),
        "## What the stock parent fails itself",
        "A check is made with the stock parent where the child fails it. What the parent gave:",
        _listing(verdicts, _parents_failures, "Nothing."),
        "## Refused",
        "layersmith says so, with the reason, before it changes anything.",
        _listing(verdicts, lambda v: [_reason(v)] if v.refused else [], "None."),
        "## Stock parents that do not run on text alone",
        _listing(verdicts, lambda v: [v.parent] if v.parent else [], "None."),
        "## What is not offered, and why",
        _listing(verdicts, _not_offered, "Everything is."),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _how_made(verdicts: Sequence[Verdict], made_with: dict[str, str]) -> str:
    tools = ", ".join(f"{name} {version}" for name, version in made_with.items())
    return (
        f"Made by `make conformance` with {tools}; not edited by hand. Each of the {len(verdicts)} model types in "
        "Transformers' causal language-model and image-text-to-text mappings is examined in a process of its own. Its "
        "own config class makes a config of a few narrow layers in which every kind of layer of the default pattern is "
        "there (`tests/conformance/tiny.py`); a model of it with random float32 weights is the parent. "
        "`layersmith.describe` finds its descriptor by experiment. Then all checks of `tests/conformance/checks.py` "
        "are made, and where a child fails one, with the stock parent too. `families.json` beside this file has the "
        'same as data. `make families TYPES="llama gpt2"` examines a few and prints what it sees.'
    )


def _summary(counted: Sequence[Verdict], others: Sequence[Verdict], images: Sequence[Verdict]) -> str:
    whole = [v for v in counted if is_whole(v)]
    helped = [v for v in whole if any(by_parent(v.results[name]) for name in WANTED)]
    hybrids = [v for v in counted if v.kind == HYBRID]
    lines = [
        f"Of the {len(counted)} types that are decoder or hybrid language models and nothing else "
        f"({len(counted) - len(hybrids)} decoders, {len(hybrids)} hybrids), **{len(whole)}** are described with both "
        "no-ops, all four cache modes, heterogeneous build, save and reload"
        + (
            f"; for {len(helped)} of them a check says `parent`, because the stock parent fails it too."
            if helped
            else "."
        )
    ]
    missing = [v for v in counted if not is_whole(v)]
    if missing:
        lines.append("The others:")
        lines.append("\n".join(f"- `{v.model_type}`: {_why_not_whole(v)}" for v in missing))
    rows = [("", "types", "described", "all checks pass", "refused", "parent does not run")]
    named = (("decoders and hybrids", counted), ("other causal types", others), ("image-text-to-text", images))
    for name, group in named:
        numbers = (
            len(group),
            sum(v.described for v in group),
            sum(v.passed for v in group),
            sum(bool(v.refused) for v in group),
            sum(bool(v.parent) for v in group),
        )
        rows.append((name, *(str(n) for n in numbers)))
    lines.append(_markdown(rows))
    return "\n\n".join(lines)


def _why_not_whole(verdict: Verdict) -> str:
    if verdict.refused or verdict.parent:
        return _cleaned(_reason(verdict) or verdict.parent)
    failed = [name for name in ("describe", *WANTED) if not _passes(verdict.results.get(name, OK))]
    return _cleaned("; ".join(f"{name}: {verdict.results[name].rstrip('.')}" for name in failed))


def _definitions() -> str:
    kinds = "\n".join(f"- **{kind}**: {meaning}." for kind, meaning in MEANINGS.items())
    return (
        "The kind of a family is seen in how its tiny model behaves (`tests/conformance/kinds.py`), not in its name. "
        "A kind is left empty where the model does not run.\n\n"
        f"{kinds}\n\n"
        "The **decoder and hybrid language models** counted above are the types that have a causal language model in "
        "Transformers, are a decoder or a hybrid, and have no part that a text leaves idle, such as a vision tower or "
        "layers of cross-attention (experts and adapters that some texts use do not count as idle).\n\n"
        "Cells: `ok`; `parent` where the stock parent fails the check itself; `fails`; `–` where there is nothing to "
        "check, because the family is not described or has no such thing. The checks:\n\n"
        "- **groups**: every weight is in one group, and no weight of an attention's or FFN's group matters only for "
        "the other one (by gradients, with each silenced in all layers).\n"
        "- **attention, FFN, both**: with subblocks removed (from the first layer of each kind of layer; from every "
        "other layer) the child's logits equal, to the bit, the parent's with those outputs silenced, and the weights "
        "are gone.\n"
        "- **continuation, chunks, padding, static**: the child's logits by way of a cache (several tokens at a time, "
        "a prompt in chunks, padding on the left of one of two texts, a static cache) equal those of a full pass; for "
        "a child without attention in the first layer and FFNs in others, and for one without attention in the first "
        "layer of each type. Where the stock parent passes only if it is told the positions of the tokens, as "
        "`generate` tells them, both are told. **generation**: greedy `generate` takes the largest logit of a full "
        "pass.\n"
        "- **build**: each size that the block configs give is halved in the first layer of each kind: no weight of "
        "another subblock changes shape; the child with all of it runs, is saved and reloads equal.\n"
        "- **reload**: both children saved and loaded give equal logits. **stock**: so does plain Transformers by the "
        "file in the child's folder, with layersmith's wrapping taken off.\n"
        "- **library**: of the library that the default recipe makes, every alternative runs in the model, in the "
        "first layer of each kind; a child of some of each kind gives what its layers gave in the parent, goes on from "
        "a cache, is saved and reloads equal."
    )


_SHORT = {
    "attention no-op": "attention",
    "ffn no-op": "FFN",
    "both no-ops": "both",
    "chunked prefill": "chunks",
    "left padding": "padding",
    "static cache": "static",
    "heterogeneous build": "build",
    "save and reload": "reload",
    "stock reload": "stock",
}


def _table(verdicts: Sequence[Verdict], everything: Sequence[Verdict]) -> str:
    known = {axis for verdict in everything for axis in verdict.axes}
    axes = [axis for axis in AXES if axis in known] + sorted(known - set(AXES))
    rows: list[tuple[str, ...]] = [("family", "kind", "described", *(_SHORT.get(c, c) for c in CHECKS), *axes)]
    for verdict in verdicts:
        described = (
            OK if verdict.described else "refused" if verdict.refused else "parent" if verdict.parent else "fails"
        )
        checks = [_cell(verdict.results.get(name)) for name in CHECKS]
        own_axes = [OK if verdict.axes.get(axis) == OK else NOTHING for axis in axes]
        rows.append((f"`{verdict.model_type}`", verdict.kind, described, *checks, *own_axes))
    return _markdown(rows)


def _cell(result: str | None) -> str:
    if result is None:
        return NOTHING
    return OK if result == OK else "parent" if by_parent(result) else "fails"


def _passes(result: str) -> bool:
    return result == OK or by_parent(result)


def _own_failures(verdict: Verdict) -> list[str]:
    return [f"{name}: {result}" for name, result in verdict.results.items() if not _passes(result)]


def _parents_failures(verdict: Verdict) -> list[str]:
    """The failures of a parent, checks with the same one together."""
    by_words: dict[str, list[str]] = {}
    for name, result in verdict.results.items():
        if by_parent(result):
            by_words.setdefault(result.removeprefix("parent: "), []).append(name)
    return [f"{', '.join(names)}: {words}" for words, names in by_words.items()]


def _not_offered(verdict: Verdict) -> list[str]:
    return [*verdict.notes, *(f"{axis}: {reason}" for axis, reason in verdict.axes.items() if reason != OK)]


def _listing(verdicts: Sequence[Verdict], lines: Callable[[Verdict], list[str]], nothing: str) -> str:
    items = [
        f"- `{v.model_type}`: {_cleaned('; '.join(line.rstrip('.') for line in own))}"
        for v in verdicts
        if (own := lines(v))
    ]
    return "\n".join(items) or nothing


def _reason(verdict: Verdict) -> str:
    """Why a family is refused, without what is said of every refused one."""
    text = re.sub(r" A descriptor written for layersmith\.ModelDescriptor and registered.*", "", verdict.refused)
    return text.removeprefix(f"{verdict.model_type}: ")


def _cleaned(text: str) -> str:
    """One line that Markdown leaves as it is."""
    return re.sub(r"([<>|*_])", r"\\\1", " ".join(text.split())).rstrip(".") + "."


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
