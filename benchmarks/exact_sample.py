"""How well the scores of a run agree with exact ones, on a sample of its alternatives.

    python -m benchmarks.exact_sample RUN --alternatives 60 --out sample.json

RUN is a folder that ``compress --until scores`` made. The sample has as many alternatives of every kind as there are,
in proportion, and at least four of each. Each of them runs exactly, as a whole model with one change, on all scoring
rows: its KL divergence to the parent is compared with the run's score and with the second-order estimate of the run.
Finished rows are stored next to the output file, so an interrupted call resumes.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from layersmith.execution.layerwise import split_layers
from layersmith.scoring.exact import in_groups, run_exactly
from layersmith.scoring.score import Score
from layersmith.scoring.task import KL
from layersmith.stages.data import DATA
from layersmith.stages.job import job_of_run
from layersmith.stages.library import LIBRARY
from layersmith.stages.scores import SCORES

LEAST = 4


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("run")
    options.add_argument("--alternatives", type=int, default=60)
    options.add_argument("--rows", type=int, help="scoring rows; default: all")
    options.add_argument("--out", type=Path, required=True)
    args = options.parse_args()
    torch.set_num_threads(1)
    job = job_of_run(args.run, (DATA, LIBRARY, SCORES))
    library, tokens = job.read(LIBRARY), job.read(DATA).scoring[: args.rows]
    chosen = sample([s for s in job.read(SCORES) if s.alternative.kind != "parent"], args.alternatives)
    groups = in_groups([s.alternative for s in chosen], 4)
    partial = args.out.with_suffix(".partial.json")
    kept: dict[str, Any] = json.loads(partial.read_text()) if partial.is_file() else {"seconds": 0.0, "rows": []}
    layerwise = split_layers(library.parent, library)
    for row in tokens[len(kept["rows"]) :]:
        begin = time.process_time()
        measured = run_exactly(library, layerwise, groups, row[None])
        kept["rows"].append({m.alternative.key: m.rows[0][KL] for m in measured if m.alternative is not None})
        kept["seconds"] += time.process_time() - begin
        partial.write_text(json.dumps(kept))
        print(f"{len(kept['rows'])} of {len(tokens)} rows", flush=True)
    result = compared(chosen, kept["rows"]) | {"run": Path(args.run).name, "seconds": kept["seconds"]}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "alternatives"}, indent=1))


def sample(scores: Sequence[Score], count: int) -> list[Score]:
    """Scores of a sample, the same for the same run."""
    kinds: dict[str, list[Score]] = {}
    for score in scores:
        kinds.setdefault(f"{score.alternative.subblock} {score.alternative.kind}", []).append(score)
    rng = random.Random(0)
    chosen = []
    for members in kinds.values():
        chosen += rng.sample(members, min(len(members), max(LEAST, round(count * len(members) / len(scores)))))
    return chosen


def compared(chosen: Sequence[Score], rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Spearman's correlation overall and in each kind, and the relative errors."""
    keys = [s.alternative.key for s in chosen]
    exact = np.array([[row[key] for row in rows] for key in keys]).mean(1)
    score = np.array([np.mean(s.rows[KL][: len(rows)]) for s in chosen])
    kinds = np.array([f"{s.alternative.subblock} {s.alternative.kind}" for s in chosen])
    by_kind = {
        str(kind): {
            "alternatives": int((kinds == kind).sum()),
            "spearman": float(spearmanr(exact[kinds == kind], score[kinds == kind]).statistic),
        }
        for kind in dict.fromkeys(kinds)
    }
    errors = np.abs(score / exact - 1)
    return {
        "spearman": float(spearmanr(exact, score).statistic),
        "by_kind": by_kind,
        "relative error": {"median": float(np.median(errors)), "90th percentile": float(np.quantile(errors, 0.9))},
        "alternatives": {key: [float(e), float(s)] for key, e, s in zip(keys, exact, score, strict=True)},
    }


if __name__ == "__main__":
    main()
