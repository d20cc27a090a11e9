"""How alternatives of different layers work together, and whether the search gains from knowing it.

    python -m benchmarks.interactions RUN [RUN ...] --out benchmarks/results/interactions.md

A RUN is a folder that ``compress --until scores`` made. The sweep of second-order scores has for every alternative a
and every token t the product p_at = g_t . delta_at; the score is half the mean of its squares. To the same order a
child of several alternatives loses half the mean of (sum_a p_at)^2, so the mean products of all pairs tell how they
work together, at no further pass of the model. With s the scores and r_ab the cosine of p_a and p_b,

    KL(child) ~ sum_ab r_ab sqrt(s_a s_b).

Children at several budgets, the program's own and others that random factors on the scores give, are run as whole
models on the scoring rows; the sum of scores and the form above are compared with what they lose. Then exchanges are
searched that make the form least within the budget, from the program's choice and others, and what is found is run on
evaluation rows, which nothing else has seen. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from layersmith import pipeline
from layersmith.again import reopen, scoring_rows
from layersmith.artifacts import read_tensors
from layersmith.library.alternative import Alternative
from layersmith.run import Run, versions
from layersmith.scoring.score import standard_error
from layersmith.scoring.together import Together
from layersmith.search.budget import parse_budget
from layersmith.search.choose import Space
from layersmith.search.whole import whole_models

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
_OTHERS, _STARTS, _EXCHANGES = 5, 3, 4000
_SHARE = 0.75  # of the cosines, when they are searched by: they are noisy, and the least of noisy values is too low

Chosen = Sequence[Alternative]


@dataclasses.dataclass
class Form:
    """What children lose by scores and cosines."""

    losses: dict[str, float]
    together: Together

    def __call__(self, chosen: Chosen, share: float = 1.0) -> float:
        alone = math.fsum(self.losses[a.key] for a in chosen)
        return alone + share * float(self.together.of_pairs(self.losses, [chosen])[0])


def examined(folder: str, seed: int) -> dict[str, Any]:
    run = Run.existing(folder)
    recipe, library = reopen(run)
    rows, scores = scoring_rows(run), pipeline.read_scores(run, library)
    unseen = read_tensors(run.folder / "data" / "tokens.safetensors")["evaluation"]
    costs = pipeline.cost_table(library.parent, library, parse_budget(params="1.0"))
    rng = random.Random(seed)
    spaces = {f: pipeline.search_space(library, scores, recipe, costs, parse_budget(params=str(f))) for f in BUDGETS}
    models = whole_models(library, rows, recipe, pipeline.SILENT)
    known = models.together(library.alternatives, range(len(rows)), seed)
    if known is None:
        raise SystemExit(f"{folder}: its parent cannot be taken apart.")
    form = Form(dict(spaces[BUDGETS[0]].losses), known)

    def truth(choices: Sequence[Chosen], on: torch.Tensor) -> list[list[float]]:
        models = whole_models(library, on, recipe, pipeline.SILENT)
        return [[row["kl_divergence"] for row in own] for own in models.run(choices, range(len(on)))]

    children = [(f, own) for f, space in spaces.items() for own in [space.best().alternatives, *others(space, rng)]]
    lost = [fmean(own) for own in truth([own for _, own in children], rows)]
    predicted = [
        {"budget": f, "kl": kl, "sum": math.fsum(form.losses[a.key] for a in own), "form": form(own)}
        for (f, own), kl in zip(children, lost, strict=True)
    ]
    searched = []
    for f, space in spaces.items():
        plain = space.best().alternatives
        starts = [plain, *others(space, rng, _STARTS - 1)]
        better = min((descend(space, start, lambda c: form(c, _SHARE), rng) for start in starts), key=lambda x: x[0])[1]
        before, after = truth([plain, better], unseen)
        searched.append(
            {"budget": f, "plain": fmean(before), "found": fmean(after),
             "error": standard_error([a - b for a, b in zip(after, before, strict=True)])}
        )  # fmt: skip
    return {
        "name": f"{Path(library.parent.path).name}, {len(library.parent.blocks)} layers",
        "alternatives": len(known.place), "tokens": rows.numel(), "unseen": unseen.numel(),
        "children": predicted, "searched": searched,
    }  # fmt: skip


def others(space: Space, rng: random.Random, count: int = _OTHERS) -> list[Chosen]:
    """Optima of the program with random factors on the scores of each place."""
    found: list[Chosen] = []
    for _ in range(count):
        factors: dict[tuple[int, str], float] = {}
        for a in space.alternatives:
            factors.setdefault((a.layer, a.subblock), math.exp(rng.gauss(0, 0.5)))
        other = space.best_by({a.key: space.losses[a.key] * factors[a.layer, a.subblock] for a in space.alternatives})
        if other is not None:
            found.append(other.alternatives)
    return found


def descend(space: Space, start: Chosen, judge: Callable[[Chosen], float], rng: random.Random) -> tuple[float, Chosen]:
    """Random exchanges in one to three places, kept where they are better and fit."""
    value = judge(start)
    for _ in range(_EXCHANGES):
        changed = {(a.layer, a.subblock): a for a in start}
        for own in rng.sample(space.members, rng.choice((1, 2, 2, 2, 3))):
            for a in own[rng.randrange(len(own))]:
                changed[a.layer, a.subblock] = a
        other = tuple(changed[a.layer, a.subblock] for a in start)
        if (better := judge(other)) < value and space.fits(other):
            start, value = other, better
    return value, start


def rendered(found: Sequence[dict[str, Any]]) -> str:
    said = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = ["# How alternatives work together", "", f"One thread, float32. {said}."]
    for one in found:
        lines += [
            "", f"## {one['name']}", "",
            f"{one['alternatives']} alternatives; scored on {one['tokens']:,} tokens, one sample of signs; unseen "
            f"{one['unseen']:,} tokens. Of {len(one['children'])} children the logarithm of what they lose over what "
            "was predicted, its mean ± standard deviation.", "",
            "| budget | KL of the program's child | sum of scores | with cosines | children: over the sum "
            "| over the form with cosines |", "| --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for budget in [*BUDGETS, None]:
            own = [c for c in one["children"] if budget in (None, c["budget"])]
            cells = ["all", "", "", ""] if budget is None else [
                f"{budget}", *(f"{own[0][name]:.4f}" for name in ("kl", "sum", "form"))
            ]  # fmt: skip
            for name in ("sum", "form"):
                logs = [math.log(c["kl"] / c[name]) for c in own]
                cells.append(f"{fmean(logs):+.3f} ± {pstdev(logs):.3f}")
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", "Searched by the form, KL on unseen rows:", "", "| budget | program's | found | change |"]
        lines.append("| --- | --- | --- | --- |")
        for row in one["searched"]:
            change, error = row["found"] / row["plain"] - 1, row["error"] / row["plain"]
            cells = f"{row['budget']} | {row['plain']:.4f} | {row['found']:.4f} | {change:+.1%} ± {error:.1%}"
            lines.append(f"| {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("runs", nargs="+")
    options.add_argument("--out", type=Path)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    found = [examined(run, chosen.seed) for run in chosen.runs]
    text = rendered(found)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text)
        chosen.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
