"""The model card: the ``README.md`` that lies in a child's folder.

It says what is known and nothing else: a licence only if the parent's own card or config names one, quality only once
it was measured.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from layersmith.library.library import Library
from layersmith.modeling_layersmith import FILE_NAME
from layersmith.recipe import Overlap, Recipe
from layersmith.report.collect import described, parent_name
from layersmith.report.optional import read_clock, trained_alternatives
from layersmith.report.words import (
    DASH,
    cost_label,
    load_in_words,
    metric_label,
    number,
    ordered_costs,
    ratio,
    share,
    with_noise,
)
from layersmith.run.artifacts import read_json, write_text
from layersmith.run.folder import Run
from layersmith.search.problem import Solution
from layersmith.units import format_cost

CARD = "README.md"
_LICENSE_KEYS = ("license", "license_name", "license_link")


def write_card(folder: Path, run: Run, library: Library, solution: Solution, recipe: Recipe, **learned: Any) -> None:
    """Write the card of a child that was not evaluated yet into its folder, beside the rest of it."""
    write_text(folder / CARD, model_card(folder, run, library, solution, recipe, **learned))


def complete_card(
    folder: Path,
    run: Run,
    library: Library,
    solution: Solution,
    recipe: Recipe,
    evaluation: dict[str, Any],
    **learned: Any,
) -> None:
    """Put what the evaluation gave into a card that is as :func:`write_card` left it; what someone else wrote stays.

    ``learned``: the last arguments of :func:`model_card`.
    """
    card = folder / CARD
    if folder.is_dir():
        unfinished = model_card(folder, run, library, solution, recipe, **learned)
        if not card.is_file() or card.read_text(encoding="utf-8", errors="replace") == unfinished:
            write_text(card, model_card(folder, run, library, solution, recipe, evaluation, **learned))


def model_card(
    folder: Path,
    run: Run,
    library: Library,
    solution: Solution,
    recipe: Recipe,
    evaluation: dict[str, Any] | None = None,
    learned_tokens: int = 0,
    learned_from: str | None = None,
) -> str:
    """A child's card.

    Args:
        folder: the child's, with its weights and code in it.
        run: that it comes from.
        library: the alternatives, and the parent.
        solution: the solution.
        recipe: how it was made.
        evaluation: as in ``evaluation/evaluation.json``; None if the child was not evaluated.
        learned_tokens: of global distillation, if there was any.
        learned_from: the text that they are of.
    """
    header = run.header() | {"data": read_json(run.folder / "data" / "data.json")}
    parent = str(header["parent"]["path"])
    before, after = solution.parent_costs["parameters"], solution.costs["parameters"]
    front = {
        "base_model": base_model(parent),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["layersmith", "puzzle", "pruning", "heterogeneous-layers"],
        **license_of(parent, library.parent.config.to_dict()),
    }
    changed = [a for a in solution.alternatives if a.kind != "parent"]
    lines = [
        f"# {_md(parent_name(header))}, made smaller: {format_cost('parameters', after)} parameters",
        f"A child of {_md(base_model(parent))} with {format_cost('parameters', after)} of its "
        f"{format_cost('parameters', before)} parameters ({share(after, before)}). "
        + (
            f"{len(changed)} of its {len(solution.alternatives)} attentions and FFNs differ from the parent's, so its "
            "layers are not all alike."
            if changed
            else "Nothing was changed: the budget allowed the parent itself."
        ),
        "## What was changed",
        _changes(library, solution) if changed else "Nothing.",
        _costs(run, solution),
        "## Quality",
        _quality(evaluation, _copies(recipe.data.overlap, header["data"].get("overlap"))),
        "## How to load it",
        _loading((folder / FILE_NAME).is_file(), recipe.trust_remote_code),
        "## How it was made",
        _made(header, bool(trained_alternatives(run.folder)), learned_tokens, learned_from, solution, recipe),
    ]
    yaml_text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{yaml_text}---\n\n" + "\n\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------- what is known


def base_model(parent: str) -> str:
    """The parent's name on the hub, also from a folder of the hub's cache; of any other folder its own name."""
    cached = re.search(r"models--(.+?)/snapshots/", f"{parent}/")
    if cached is not None:
        return cached[1].replace("--", "/")
    return parent if not Path(parent).exists() else Path(parent).resolve().name


def license_of(parent: str, config: dict[str, Any]) -> dict[str, str]:
    """What the parent's own card says of its licence, else what its config does; empty where neither does."""
    front = _front_matter(parent)
    found = {key: str(front[key]) for key in _LICENSE_KEYS if isinstance(front.get(key), str)}
    if "license" in found:
        return found
    return {"license": config["license"]} if isinstance(config.get("license"), str) else {}


def _front_matter(parent: str) -> dict[str, Any]:
    """The YAML at the head of the parent's card, if the card is on this machine."""
    card: Any = Path(parent) / CARD
    if not Path(parent).is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            card = try_to_load_from_cache(parent, CARD)
        except HFValidationError:
            return {}
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return {}
    found = re.match(
        r"---\s*\n(.*?)\n---\s*(?:\n|$)", Path(card).read_text(encoding="utf-8", errors="replace"), re.DOTALL
    )
    try:
        data = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


# ---------------------------------------------------------------------------------------------- parts


def _changes(library: Library, solution: Solution) -> str:
    rows: dict[int, dict[str, str]] = {}
    for alternative in solution.alternatives:
        was, now = described(library, alternative)
        words = "" if alternative.kind == "parent" else f"{was} → {'removed' if now == 'no-op' else now}"
        rows.setdefault(alternative.layer, {})[alternative.subblock] = words
    return table(
        ["layer", "attention", "FFN"],
        [
            [str(layer), own.get("attention", ""), own.get("ffn", "")]
            for layer, own in rows.items()
            if any(own.values())
        ],
        align="---",
    )


def _costs(run: Run, solution: Solution) -> str:
    rows = []
    times = read_clock(run.folder)
    whole, own_costs = solution.parent_costs, solution.costs
    if times is not None:
        whole, own_costs = whole | times["parent"], own_costs | times["child"]
    for name in ordered_costs(own_costs):
        before, after = whole[name], own_costs[name]
        limit = format_cost(name, solution.limits[name]) if name in solution.limits else ""
        left = ratio(name, before, after)
        own = DASH if left is None else f"{left:.0%}"
        rows.append([cost_label(name), format_cost(name, before), format_cost(name, after), own, limit])
    load = f"KV cache for a batch of {solution.budget.batch} with {solution.budget.context:,} tokens each."
    if times is not None:
        load += f" Timed on {load_in_words(times)}."
    return table(["", "parent", "child", "left", "budget"], rows) + f"\n\n{load}"


def _quality(evaluation: dict[str, Any] | None, copies: str) -> str:
    if evaluation is None:
        return "Not evaluated."
    rows = [
        [
            row["label"],
            number(row["parent"]),
            with_noise(row["child"], row["child_standard_error"]),
            with_noise(row["difference"], row["difference_standard_error"], True),
        ]
        for row in evaluation["rows"]
    ]
    return (
        table(["", "parent", "child", "difference"], rows)
        + f"\n\nOn {evaluation['tokens']:,} tokens in {evaluation['sequences']} rows of documents that nothing else "
        f"has seen{copies}. ± is one standard error over rows; differences are paired."
    )


def _copies(what: Overlap, found: dict[str, int] | None) -> str:
    """What is to be said of rows that share long runs of text with evaluation's."""
    if found is None:
        return ""
    count = sum(found.values())
    return f" ({count} of its rows share long runs of text with theirs)" if what == "warn" and count else ""


def _loading(own_code: bool, remote: bool) -> str:
    trust = ", trust_remote_code=True" if remote else ""
    text = f"""With layersmith installed:

```python
import layersmith

model = layersmith.load("path/to/this/folder"{trust})
```"""
    if own_code:
        return f"""{text}

Without it, with Transformers alone and the one small modelling file that lies here:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

Without `trust_remote_code=True` Transformers refuses, rather than fill in weights that are not there."""
    return f"""{text}

Its layers are alike, so Transformers alone loads it as any other model, by `AutoModelForCausalLM.from_pretrained`."""


def _made(
    header: dict[str, Any],
    locally: bool,
    learned_tokens: int,
    learned_from: str | None,
    solution: Solution,
    recipe: Recipe,
) -> str:
    data, versions = header["data"], header["versions"]
    rows, length = data["sequences"], data["sequence_length"]
    proven = ", proven to be the least within the budget" if solution.proven_optimal else ""
    training = [
        "Alternatives were trained against their parent subblocks (local distillation)." if locally else "",
        f"The child then learned from its parent on {learned_tokens:,} tokens"
        + (f" of {_md(data_name(learned_from))}" if learned_from is not None else "")
        + " (global distillation)."
        if learned_tokens
        else "",
    ]
    trained = " ".join(filter(None, training))
    trained = trained or "Nothing was trained: the weights are the parent's, cut, or solved for by least squares."
    used = f"{rows['calibration']} rows of {length} tokens for importance, {rows['scoring']} for scores"
    if locally:
        used += f", {rows['training']} for local distillation"
    return (
        "Every layer's alternatives were scored by what each alone does to the parent's predictions "
        f"({metric_label(recipe.scoring.objective)}), and an integer program chose one for each attention and FFN: the "
        f"sum of scores is {number(solution.score)}{proven}. The method is that of "
        f"[Puzzle](https://arxiv.org/abs/2411.19146). {trained}\n\n"
        f"- data: {_md(data_name(data['source']))}; {used}\n"
        f"- seed {header['seed']}; layersmith {versions['layersmith']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}"
    )


def data_name(source: Any) -> str:
    """A hub data set's name as it is; of a place on this machine its last part."""
    text = str(source)
    return Path(text).name if Path(text).is_absolute() or Path(text).exists() else text


# ---------------------------------------------------------------------------------------------- Markdown


def table(headings: list[str], rows: list[list[str]], align: str = "---:") -> str:
    lines = [headings, ["---", *[align] * (len(headings) - 1)]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [*lines, *([_md(c) for c in row] for row in rows)])


def _md(text: str) -> str:
    """Text that Markdown takes as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", " ".join(text.split()))
