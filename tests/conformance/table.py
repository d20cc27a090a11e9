"""docs/families.md and docs/families.json: the results for every model family.

``families.md`` is a summary for people. ``families.json`` has everything; docs/families.html searches it, and the next
comparison starts from it.
"""

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

from layersmith.library.axes.axis import INNER_ROLES
from layersmith.run.artifacts import read_json, write_json, write_text
from tests.conformance.checks import CACHE_CHECKS, OK, Verdict, by_parent
from tests.conformance.kinds import DECODER, HYBRID, MEANINGS

DOCS = Path(__file__).parents[2] / "docs"
CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
ALL_TYPES = sorted(CAUSAL | set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))

# The order of axes in the table. An axis without results is left out; one that is missing here comes last.
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
    *INNER_ROLES,
    "window",
    "hidden size",
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
    """The versions that the results depend on."""
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
    # Render what was written, so that rendering again gives the same page.
    write_text(folder / "families.md", rendered(*read(folder)))


def read(folder: Path = DOCS) -> tuple[list[Verdict], dict[str, str]]:
    """The verdicts of ``families.json`` and the versions they were made with; empty if there is no such file."""
    path = folder / "families.json"
    if not path.is_file():
        return [], {}
    data = read_json(path)
    return [Verdict(**entry) for entry in data["families"]], data["versions"]


def worse(before: Iterable[Verdict], now: Iterable[Verdict]) -> list[str]:
    """One line for each check that passed before and does not pass now."""
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
    """Whether a family is a decoder or hybrid language model, as ``families.md`` defines it."""
    return verdict.model_type in CAUSAL and verdict.kind in (DECODER, HYBRID) and verdict.language_only


def is_whole(verdict: Verdict) -> bool:
    """Whether a family is described and passes the checks in ``WANTED`` that its unmodified parent passes."""
    return verdict.described and all(
        (result := verdict.results.get(name, "")) == OK or by_parent(result) for name in WANTED
    )


# ---------------------------------------------------------------------------------------------- rendering


def rendered(verdicts: Sequence[Verdict], made_with: dict[str, str]) -> str:
    """``families.md``."""
    counted = [v for v in verdicts if is_counted(v)]
    others = [v for v in verdicts if v.model_type in CAUSAL and not is_counted(v)]
    images = [v for v in verdicts if v.model_type not in CAUSAL]
    not_run = [f"`{v.model_type}`" for v in verdicts if v.parent]
    parts = [
        "# Model families",
        _how_made(verdicts, made_with),
        "## In short",
        _summary(counted, others, images),
        "## Refused",
        "layersmith says so, with the reason, before it changes anything.",
        _listing(verdicts, lambda v: [_reason(v)] if v.refused else [], "None."),
        "## Checks that fail",
        "These types are described, and a check fails that the unmodified parent passes.",
        _listing(verdicts, _failures, "None."),
        "## Parents that do not run",
        "The unmodified model does not run on text alone, or not in this environment, so nothing could be checked. "
        "Most of these need images.",
        f"{', '.join(not_run)}." if not_run else "None.",
        "## What the columns mean",
        _definitions(),
        f"## The {len(counted)} decoder and hybrid language models",
        _table(counted),
        f"## The other {len(others)} types with a causal language model",
        _table(others),
        f"## The {len(images)} image-text-to-text types",
        _table(images),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _how_made(verdicts: Sequence[Verdict], made_with: dict[str, str]) -> str:
    tools = ", ".join(f"{name} {version}" for name, version in made_with.items())
    return (
        f"This page says what layersmith can do with each of the {len(verdicts)} model types in Transformers' causal "
        f"language-model and image-text-to-text mappings. `make conformance` writes it, with {tools}; do not edit it. "
        "For each type, a small random model is built from the type's config class, described by experiment, and put "
        "to the checks of `tests/conformance/checks.py`.\n\n"
        "The [searchable table](families.html) has every check, and the reason for everything that is not offered. It "
        "reads `families.json`, so it needs a web server: `make docs`, or `python -m http.server` in `docs`. "
        '`make families TYPES="llama gpt2"` examines a few types and prints the results.'
    )


def _summary(counted: Sequence[Verdict], others: Sequence[Verdict], images: Sequence[Verdict]) -> str:
    whole = [v for v in counted if is_whole(v)]
    helped = [v for v in whole if any(by_parent(v.results[name]) for name in WANTED)]
    hybrids = [v for v in counted if v.kind == HYBRID]
    lines = [
        f"Of the {len(counted)} types that are decoder or hybrid language models and nothing else "
        f"({len(counted) - len(hybrids)} decoders, {len(hybrids)} hybrids), **{len(whole)}** are described and pass "
        "the checks of no-ops, four cache modes, heterogeneous build, save and reload."
        + (f" For {len(helped)} of them the unmodified parent fails a check too." if helped else "")
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
    everyone = [*counted, *others, *images]
    can = ", ".join(f"{axis} {n}" for axis in axes_of(everyone) if (n := sum(offers(v, axis) for v in everyone)))
    if can:
        lines.append(f"Types in which a size can shrink, by axis: {can}.")
    return "\n\n".join(lines)


def _why_not_whole(verdict: Verdict) -> str:
    if verdict.refused or verdict.parent:
        return _cleaned(_reason(verdict) or verdict.parent)
    failed = [name for name in ("describe", *WANTED) if not _passes(verdict.results.get(name, OK))]
    return _cleaned("; ".join(f"{name}: {verdict.results[name].rstrip('.')}" for name in failed))


def _definitions() -> str:
    kinds = "\n".join(f"- **{kind}**: {meaning}." for kind, meaning in MEANINGS.items())
    return (
        "**Kind** is seen in how the small model behaves (`tests/conformance/kinds.py`), not in its name. It is empty "
        "if the model does not run.\n\n"
        f"{kinds}\n\n"
        "**Decoder and hybrid language models** have a causal language model in Transformers, are a decoder or a "
        "hybrid, and have no part that text leaves idle, such as a vision tower or layers of cross-attention. Experts "
        "and adapters that only some texts use do not count as idle.\n\n"
        "**Checks** says `all` if every check passes. If the unmodified parent fails a check too, the check is named "
        "after `all but, as the parent,`. The checks:\n\n"
        "- **groups**: every weight is in one group, and no weight of an attention's or FFN's group matters only for "
        "the other one (by gradients, with each silenced in all layers).\n"
        "- **attention no-op, ffn no-op, both no-ops**: with subblocks removed, the child's logits equal, to the bit, "
        "the parent's with those outputs silenced, and the weights are gone. Subblocks are removed from the first "
        "layer of each kind of layer, and from every other layer.\n"
        "- **continuation, chunked prefill, left padding, static cache**: the child's logits through a cache equal "
        "those of a full pass. One child has no attention in the first layer and no FFN in others; one has no "
        "attention in the first layer of each type. If the parent passes only when it is given the positions of the "
        "tokens, as `generate` gives them, both are given them.\n"
        "- **generation**: greedy `generate` takes the largest logit of a full pass.\n"
        "- **heterogeneous build**: each size in the block configs is halved in the first layer of each kind. No "
        "weight of another subblock changes its shape. The child with all of it runs, is saved and reloads equal.\n"
        "- **save and reload**: both children saved and loaded give equal logits. **stock reload**: so does plain "
        "Transformers with the file in the child's folder.\n"
        "- **library**: every alternative of the default recipe, and every size inside a subblock, runs in the model, "
        "in the first layer of each kind. A child with some of each kind gives what its layers gave in the parent, "
        "continues from a cache, is saved and reloads equal.\n\n"
        "**Can shrink** lists the axes that are proved for the type. Removal and linear replacement are not listed. "
        "A head size is that of queries, keys and values alike; a key head size that of queries and keys, or of a part "
        "of them; a rank is the number of channels between two projections, as in latent attention."
    )


def axes_of(verdicts: Iterable[Verdict]) -> list[str]:
    """The axes that some type has a result for, in the order of the table."""
    known = {axis for verdict in verdicts for axis in verdict.axes}
    return [axis for axis in AXES if axis in known] + sorted(known - set(AXES))


def offers(verdict: Verdict, axis: str) -> bool:
    """Whether a type can shrink along an axis."""
    return verdict.axes.get(axis) == OK


def _table(verdicts: Sequence[Verdict]) -> str:
    rows: list[tuple[str, ...]] = [("type", "kind", "checks", "can shrink")]
    for verdict in verdicts:
        axes = ", ".join(axis for axis in axes_of([verdict]) if offers(verdict, axis))
        rows.append((f"`{verdict.model_type}`", verdict.kind, _checks(verdict), axes or NOTHING))
    return _markdown(rows)


def _checks(verdict: Verdict) -> str:
    if verdict.refused:
        return "refused"
    if verdict.parent:
        return "parent does not run"
    failed = [name for name, result in verdict.results.items() if not _passes(result)]
    if failed:
        return f"fails {', '.join(failed)}"
    parents = [name for name, result in verdict.results.items() if by_parent(result)]
    return f"all but, as the parent, {', '.join(parents)}" if parents else "all"


def _passes(result: str) -> bool:
    return result == OK or by_parent(result)


def _failures(verdict: Verdict) -> list[str]:
    """The failures that the parent does not share, checks with the same message together."""
    by_words: dict[str, list[str]] = {}
    for name, result in verdict.results.items():
        if not _passes(result):
            by_words.setdefault(result, []).append(name)
    return [f"{', '.join(names)}: {words}" for words, names in by_words.items()]


def _listing(verdicts: Sequence[Verdict], lines: Callable[[Verdict], list[str]], nothing: str) -> str:
    items = [
        f"- `{v.model_type}`: {_cleaned('; '.join(line.rstrip('.') for line in some))}"
        for v in verdicts
        if (some := lines(v))
    ]
    return "\n".join(items) or nothing


def _reason(verdict: Verdict) -> str:
    """Why a type is refused, without the sentence that every refusal ends with."""
    text = re.sub(r" A descriptor written for layersmith\.ModelDescriptor and registered.*", "", verdict.refused)
    return text.removeprefix(f"{verdict.model_type}: ")


def _cleaned(text: str) -> str:
    """One line that Markdown leaves as it is."""
    return re.sub(r"([<>|*_])", r"\\\1", " ".join(text.split())).rstrip(".") + "."


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
