"""The model card: ``README.md`` in a child's folder.

It states only what is known: a license if the parent's card or config names one, quality once it was measured.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from layersmith.data.splits import Description
from layersmith.library.library import Library
from layersmith.modeling_layersmith import FILE_NAME, remote_code
from layersmith.recipe import Recipe
from layersmith.report.collect import described, parent_name
from layersmith.report.data import Evaluation
from layersmith.report.optional import read_clock, trained_alternatives
from layersmith.report.words import (
    DASH,
    cost_label,
    metric_label,
    number,
    ordered_costs,
    ratio,
    share,
    with_noise,
    workload_in_words,
)
from layersmith.run.artifacts import read_json
from layersmith.run.cards import CARD, is_edited, write_card_of
from layersmith.run.folder import Run
from layersmith.run.header import first_parent
from layersmith.search.solution import Solution
from layersmith.units import format_cost
from layersmith.untrusted import MAX_YAML_BYTES, parse_yaml

_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Child:
    """What a card says of a child besides its evaluation.

    Attributes:
        run: The run that made it.
        library: The run's library, with the parent.
        solution: The solution that the child realizes.
        recipe: The run's recipe.
        learned_tokens: Tokens of global distillation; 0 for none.
        learned_from: The text of these tokens.
    """

    run: Run
    library: Library
    solution: Solution
    recipe: Recipe
    learned_tokens: int = 0
    learned_from: str | None = None

    @property
    def stage(self) -> str:
        """The stage that writes it."""
        return "distilled" if self.learned_tokens else "child"

    @property
    def changed(self) -> int:
        """Number of subblocks that differ from the parent's."""
        return sum(not a.is_parent for a in self.solution.alternatives)

    def header(self) -> dict[str, Any]:
        """The run's header with the description of its data."""
        return self.run.header() | {"data": read_json(self.run.folder / "data" / "data.json", Description)}


def write_card(folder: Path, child: Child, evaluation: Evaluation | None = None) -> None:
    """Write the card of a run's child into its folder."""
    text = model_card(folder, child, evaluation)
    write_card_of(child.run.folder, child.stage, folder / CARD, text, is_complete=evaluation is not None)


def complete_card(folder: Path, child: Child, evaluation: Evaluation) -> None:
    """Add the evaluation to the card of a run's child, unless someone has edited the card."""
    if not is_edited(child.run.folder, child.stage):
        write_card(folder, child, evaluation)


def model_card(folder: Path, child: Child, evaluation: Evaluation | None = None) -> str:
    """The text of a child's card; ``folder`` has its weights and code."""
    header, solution = child.header(), child.solution
    parent = base_model(first_parent(header))
    before, after = (format_cost("parameters", c["parameters"]) for c in (solution.parent_costs, solution.costs))
    left = share(solution.costs["parameters"], solution.parent_costs["parameters"])
    title = f"{parent_name(header)} compressed to {after} parameters"
    rounds = child.recipe.rounds.count > 1
    if rounds:
        summary = f"It was made in {child.recipe.rounds.count} rounds, each of which compressed the child of the last."
    elif child.changed:
        summary = f"{child.changed} of its {len(solution.alternatives)} attentions and FFNs differ from the parent's."
    else:
        summary = "Nothing was changed: the budget allows the parent itself."
    if "first_parent" in header and not rounds:
        summary = f"Its hidden size was made smaller. {summary.replace('the parent', 'what was left')}"
    lines = [
        f"# {_md(title)}",
        f"This model was made from {_md(parent)} with layersmith. It has {after} of the parent's {before} parameters "
        f"({left}). {summary}",
        "## Changes in the last round" if rounds else "## Changes",
        _changes(child) if child.changed else "None.",
        _costs(child),
        "## Quality",
        _quality(evaluation, _copies(child.recipe, header)),
        "Intended uses, limitations and biases are those of the parent. Evaluate the model on your task before use.",
        "## How to load it",
        _loading((folder / FILE_NAME).is_file(), bool(remote_code(child.library.parent.config))),
        "## How it was made",
        _made(child, header),
    ]
    front = yaml.safe_dump(_front_matter(child, header, title, evaluation), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------- front matter


def _front_matter(child: Child, header: dict[str, Any], title: str, evaluation: Evaluation | None) -> dict[str, Any]:
    parent = first_parent(header)
    card = _parent_front_matter(parent)
    sources = [header["data"]["source"], *([child.learned_from] if child.learned_from else [])]
    datasets = [name for name in map(_hub_data_set, sources) if name]
    name = hub_name(parent)
    front: dict[str, Any] = {
        **({} if name is None else {"base_model": name, "base_model_relation": "finetune"}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["layersmith", "puzzle", "pruning", "heterogeneous-layers"],
        **license_of(parent, child.library.parent.config.to_dict()),
    }
    if card.get("language"):
        front["language"] = card["language"]
    if datasets:
        front["datasets"] = sorted(set(datasets))
    if evaluation is not None:
        front["model-index"] = [{"name": title, "results": _model_index(child, header, evaluation)}]
    return front


def _model_index(child: Child, header: dict[str, Any], evaluation: Evaluation) -> list[dict[str, Any]]:
    """The evaluation's figures in the form that the Hub shows: one entry for the text and one for each task."""
    source = str(child.recipe.data.evaluation_source or header["data"]["source"])
    text = {"name": f"{data_name(source)}, held-out rows", "type": _hub_data_set(source) or "text"}
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": text if task is None else {"name": task, "type": task},
            "metrics": [
                {"type": row.metric.split("/")[-1], "name": row.label, "value": float(f"{row.child:.6g}")}
                for row in evaluation.rows
                if row.task == task and math.isfinite(row.child)
            ],
        }
        for task in dict.fromkeys(row.task for row in evaluation.rows)
    ]


def _hub_data_set(source: Any) -> str | None:
    """The name of a Hub dataset without its config; None for local data."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(:.*)?", str(source))
    return match[1] if match and not Path(str(source)).exists() else None


def base_model(parent: str) -> str:
    """The parent's name on the Hub, also for a folder of the Hub's cache; for other folders the folder's name."""
    return hub_name(parent) or (parent if not Path(parent).exists() else Path(parent).resolve().name)


def hub_name(parent: str) -> str | None:
    """The parent's name on the Hub, also for a folder of the Hub's cache; None for other folders."""
    cached = re.search(r"models--(.+?)/snapshots/", f"{parent}/")
    if cached is not None:
        return cached[1].replace("--", "/")
    return parent if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", parent) and not Path(parent).exists() else None


def license_of(parent: str, config: dict[str, Any]) -> dict[str, str]:
    """The license that the parent's card names, else its config; empty if neither does."""
    card = _parent_front_matter(parent)
    license_fields = {key: str(card[key]) for key in _LICENSE_KEYS if isinstance(card.get(key), str)}
    if "license" in license_fields:
        return license_fields
    return {"license": config["license"]} if isinstance(config.get("license"), str) else {}


def _parent_front_matter(parent: str) -> dict[str, Any]:
    """The YAML at the top of the parent's card, if the card is on this machine."""
    card: Any = Path(parent) / CARD
    if not Path(parent).is_dir():
        try:
            card = try_to_load_from_cache(parent, CARD)
        except HFValidationError:
            return {}
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return {}
    with open(card, encoding="utf-8", errors="replace") as file:
        text = file.read(MAX_YAML_BYTES)
    match = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    try:
        data = parse_yaml(match[1]) if match else None
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


# ---------------------------------------------------------------------------------------------- sections


def _changes(child: Child) -> str:
    rows: dict[int, dict[str, str]] = {}
    for alternative in child.solution.alternatives:
        was, now = described(child.library, alternative)
        words = "unchanged" if alternative.is_parent else f"{was} → {'removed' if now == 'no-op' else now}"
        rows.setdefault(alternative.layer, {})[alternative.subblock] = words
    cells = [[str(layer), row.get("attention", ""), row.get("ffn", "")] for layer, row in rows.items()]
    return table(["layer", "attention", "FFN"], [r for r in cells if "→" in r[1] + r[2]], align="---")


def _costs(child: Child) -> str:
    solution, clock = child.solution, read_clock(child.run.folder)
    before, after = dict(solution.parent_costs), dict(solution.costs)
    workload = f"KV cache for a batch of {solution.workload.batch} with {solution.workload.context:,} tokens each."
    if clock is not None:
        before, after = before | clock.parent, after | clock.child
        workload += f" They are {_md(workload_in_words(clock))}."
    rows = []
    uncertain = clock.child if clock is not None and clock.is_busy else {}
    for name in ordered_costs(after):
        left = None if name in uncertain else ratio(name, before[name], after[name])
        amounts = [format_cost(name, before[name]), format_cost(name, after[name])]
        limit = format_cost(name, solution.limits[name]) if name in solution.limits else ""
        rows.append([cost_label(name), *amounts, DASH if left is None else f"{left:.0%}", limit])
    formats = Counter(a.format for a in solution.alternatives if a.format)
    if formats:
        counts = ", ".join(f"{name} in {n}" for name, n in sorted(formats.items()))
        workload += f" Number formats of the weights: {counts} of {len(solution.alternatives)} attentions and FFNs."
    caches = Counter(a.kv_format for a in solution.alternatives if a.kv_format)
    if caches:
        counts = ", ".join(f"{name} in {n}" for name, n in sorted(caches.items()))
        workload += f" Number formats of the KV cache: {counts} attentions."
    return table(["", "parent", "child", "child / parent", "budget"], rows) + f"\n\n{workload}"


def _quality(evaluation: Evaluation | None, copies: str) -> str:
    if evaluation is None:
        return "Not evaluated."
    rows = [
        [
            row.label,
            number(row.parent),
            with_noise(row.child, row.child_standard_error),
            with_noise(row.difference, row.difference_standard_error, True),
        ]
        for row in evaluation.rows
    ]
    return (
        table(["", "parent", "child", "difference"], rows)
        + f"\n\nMeasured on {evaluation.tokens:,} tokens in {evaluation.sequences} rows of documents that were used "
        f"for nothing else{copies}. ± is one standard error over rows; differences are paired by row."
        + (" Tasks were measured with lm-eval; their noise is that over items." if _has_tasks(evaluation) else "")
    )


def _has_tasks(evaluation: Evaluation) -> bool:
    return any(row.task is not None for row in evaluation.rows)


def _copies(recipe: Recipe, header: dict[str, Any]) -> str:
    """A remark on training and scoring rows that share long runs of text with the evaluation's."""
    count = sum((header["data"].get("overlap") or {}).values())
    if recipe.data.overlap != "warn" or not count:
        return ""
    return f" ({count} of the other rows share long runs of text with them)"


def _loading(has_code: bool, parent_is_remote_code: bool) -> str:
    trust = ", trust_remote_code=True" if parent_is_remote_code else ""
    text = f"""With layersmith:

```python
import layersmith

model = layersmith.load("path/to/this/folder"{trust})
```"""
    if has_code:
        return f"""{text}

With Transformers alone, through the modelling file in this folder:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

Without `trust_remote_code=True`, loading fails instead of initialising missing weights at random."""
    return f"""{text}

All layers have the same shape, so `AutoModelForCausalLM.from_pretrained` loads it like any other model."""


def _made(child: Child, header: dict[str, Any]) -> str:
    data, versions, solution = header["data"], header["versions"], child.solution
    rows, length = data["sequences"], data["sequence_length"]
    locally = bool(trained_alternatives(child.run.folder))
    proven = ", which is proven to be the minimum within the budget" if solution.proven_optimal else ""
    training = []
    if locally:
        training.append("Alternatives were trained against the parent's subblocks (local distillation).")
    if child.learned_tokens:
        source = "" if child.learned_from is None else f" of {_md(data_name(child.learned_from))}"
        training.append(
            f"Then the child was trained against the parent on {child.learned_tokens:,} tokens{source} (global "
            "distillation)."
        )
    trained = (
        " ".join(training) or "Nothing was trained: weights are sliced from the parent or refitted in closed form."
    )
    used = f"{rows['calibration']} rows of {length} tokens for importance statistics, {rows['scoring']} for scores"
    if locally:
        used += f", {rows['training']} for local distillation"
    return (
        "For every attention and FFN, cheaper alternatives were scored by how much each one changes the parent's "
        f"predictions ({metric_label(child.recipe.scoring.objective)}). An integer program chose one per subblock. The "
        f"sum of scores is {number(solution.score)}{proven}. The method is "
        f"[Puzzle](https://arxiv.org/abs/2411.19146). {trained}\n\n"
        f"- data: {_md(data_name(data['source']))}; {used}\n"
        f"- seed {header['seed']}; "
        + ", ".join(f"{name} {_md(versions.get(name, '?'))}" for name in ("layersmith", "torch", "transformers"))
    )


def data_name(source: Any) -> str:
    """The name of a Hub dataset; of a local path its last part."""
    text = str(source)
    return Path(text).name if Path(text).is_absolute() or Path(text).exists() else text


# ---------------------------------------------------------------------------------------------- Markdown


def table(headings: list[str], rows: list[list[str]], align: str = "---:") -> str:
    """A Markdown table; ``align`` is the rule under all columns but the first."""
    lines = [headings, ["---", *[align] * (len(headings) - 1)]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [*lines, *([_md(c) for c in row] for row in rows)])


def _md(text: str) -> str:
    """Text with all characters escaped that mean something in Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", " ".join(text.split()))
