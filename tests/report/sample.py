"""What a run gives, in the shape of ``collect``; of any size."""

from __future__ import annotations

import math
from typing import Any

COSTS = {
    "parameters": 4_771_392,
    "active_parameters": 4_771_392,
    "weight_bytes": 9_542_784,
    "kv_cache_bytes": 0,
    "memory_bytes": 9_542_784,
}
KINDS = ("parent", "kv_heads", "window", "linear", "no_op")


def _subblock(before: str, after: str, kind: str, kept: float) -> dict[str, Any]:
    costs = {name: int(value / 100 * kept) for name, value in COSTS.items()}
    whole = {name: value // 100 for name, value in COSTS.items()}
    return {
        "parent": before, "child": after, "kind": kind, "method": "pool" if kind == "kv_heads" else "", "kept": kept,
        "parameters": costs["parameters"], "parent_parameters": whole["parameters"], "costs": costs,
        "parent_costs": whole, "score": 0.0 if kind == "parent" else 0.25,
    }  # fmt: skip


def _cell(value: float | None, chosen: bool = False, exact: int = 2) -> dict[str, Any]:
    return {
        "value": value, "standard_error": None if value is None else value / 9, "loss": value, "chosen": chosen,
        "metrics": {}, "exact_rows": exact, "rows": 32, "costs": {name: v // 200 for name, v in COSTS.items()},
    }  # fmt: skip


def sample_report(layers: int = 3, names: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """A report of so many layers; ``names`` are of alternatives, ``changes`` replace parts of it."""
    names = names or ("attention 2 KV heads (contribution)", "attention 2 KV heads (pool)", "attention no-op", "ffn 32")
    words = {"parent": "4 KV heads", "kv_heads": "2 KV heads", "window": "4 KV heads, window", "linear": "linear"}
    rows = []
    for i in range(layers):
        kind = KINDS[(i + 1) % len(KINDS)]
        kept = {"parent": 1.0, "kv_heads": 0.75, "window": 1.0, "linear": 0.3, "no_op": 0.0}[kind]
        attention = _subblock("4 KV heads", words.get(kind, "no-op"), kind, kept)
        rows.append({"layer": i, "attention": attention, "ffn": _subblock("width 64", "width 64", "parent", 1.0)})
    cells: list[list[dict[str, Any] | None]] = [
        [_cell(math.exp(-5 + 4 * math.sin(i + 2 * j)), chosen=j == 0) for j in range(len(names))] for i in range(layers)
    ]
    cells[0][-1] = None
    cells[-1][-1] = _cell(None)
    report = {
        "schema": 1,
        "title": "demo: 4.77M to 3.34M parameters",
        "parent": {"name": "demo", **COSTS},
        "child": {"name": "demo, child", **COSTS, "parameters": 3_340_000},
        "batch": 1,
        "context": 4096,
        "budget": [
            {"label": "parameters", "limit": 3_341_000, "unit": "count", "used": 3_340_000, "parent": 4_771_392},
        ],
        "evaluation": {
            "tokens": 16384,
            "sequences": 64,
            "rows": [
                {"metric": "loss", "label": "LM loss", "parent": 2.5, "child": 2.6, "child_standard_error": 0.01,
                 "difference": 0.1, "difference_standard_error": 0.002, "lower_is_better": True},
                {"metric": "kl_divergence", "label": "KL", "parent": None, "child": float("nan"),
                 "child_standard_error": None, "difference": None, "difference_standard_error": None,
                 "lower_is_better": True},
            ],
        },
        "layers": rows,
        "scores": {
            "objective": "kl_divergence", "unit": "nats a token", "columns": list(names), "rows": cells,
        },
        "importance": [],
        "times": None,
        "checks": {"scores": [], "sums": [], "times": []},
        "search": {
            "score": 0.5, "proven_optimal": False, "bound": 0.4375,
            "refined": {
                "tried": 7, "passes": 6.5, "objective": "kl_divergence", "rows": 24, "plain": 0.25, "choice": 0.125,
                "error": 0.01, "difference": -0.125, "difference_standard_error": 0.005,
            },
        },
        "frontier": None,
        "distillation": None,
        "samples": [{"prompt": "def f():", "parent": "</pre><script>alert(1)</script>", "child": "pass"}],
        "recipe": {"seed": 0, "data": {"sequence_length": 32}},
        "environment": {"layersmith": "0.1.0", "torch": "2.13.0"},
        "timings": [
            {"stage": "library", "seconds": 71.5, "interruptions": 1}, {"stage": "scores", "seconds": 5025.0,
             "interruptions": 0},
        ],
        "warnings": ["something <b>odd</b>"],
        "notes": ["layer 1: <i>no</i> window"],
    }  # fmt: skip
    return report | changes


def full_report(layers: int = 9, **changes: Any) -> dict[str, Any]:
    """With every section that a report can have."""
    curve = [{"left": 64 - k, "lost": (k / 64) ** 2} for k in range(0, 65, 4)]
    curves: list[dict[str, Any]] = [
        {"layer": i, "subblock": sub, "of": of, "name": f"{i}.{part}.0", "units": 64,
         "points": [{**p, "lost": p["lost"] ** (1 + i / layers)} for p in curve]}
        for sub, part, of in (("ffn", "ffn", "FFN channels"), ("attention", "attention", "KV heads"))
        for i in range(layers)
    ]  # fmt: skip
    estimates = [
        {"layer": i, "subblock": s, "alternative": f"{s} {n}", "estimated": e, "exact": e * (1 + 0.1 * n), "rows": 2}
        for i in range(layers)
        for s in ("attention", "ffn")
        for n, e in enumerate((0.01 * (i + 1), 0.3))
    ]
    parts: dict[str, Any] = {
        "importance": curves,
        "checks": {
            "scores": estimates,
            "sums": [{"what": "this child", "predicted": 0.5, "measured": 0.7, "error": 0.02},
                     {"what": "frontier", "predicted": 0.2, "measured": 0.25, "error": 0.01}],
            "times": [{"what": what, "phase": phase, "fraction": 0.7, "predicted": 0.75, "measured": 0.73}
                      for what in ("made-up choice 1", "this child") for phase in ("prefill", "decode")],
        },
        "times": {"parent": {"prefill_seconds": 0.08}, "child": {"prefill_seconds": 0.06}, "batch": 1, "prompt": 384,
                  "generated": 128, "device": "a CPU, 1 thread"},
        "frontier": frontier(),
        "distillation": {
            "curves": [{"name": "global", "x": "tokens",
                        "points": [{"tokens": 1000 * k, "loss": 3 / (k + 1)} for k in range(20)]}],
            "alternatives": [
                {"of": f"layer {i}: {s} 32", "layer": i, "subblock": s, "before": 0.5, "after": 0.2 + 0.02 * i,
                 "tokens": 4096, "curve": [[0, 0.5], [2048, 0.3], [4096, 0.2 + 0.02 * i]]}
                for i in range(layers) for s in ("attention", "ffn")
            ],
        },
    }  # fmt: skip
    return sample_report(layers, **parts | changes)


def frontier() -> dict[str, Any]:
    """As ``frontier/frontier.json`` has it, without the solutions."""

    def points(factor: float, measured: bool) -> list[dict[str, Any]]:
        return [
            {
                "cost": int(f * COSTS["parameters"]), "fraction": f, "score": factor * (1 / f - 1) ** 1.5,
                "measured": {"mean": 1.2 * factor * (1 / f - 1) ** 1.5, "error": 0.05 * factor} if measured else None,
            }
            for f in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
        ]  # fmt: skip

    baselines = [("uniform narrowing", 1.0), ("layers dropped", 1.6), ("random", 3.0)]
    return {
        "cost": "parameters",
        "objective": "kl_divergence",
        "points": points(0.3, True),
        "baselines": [{"name": n, "points": points(k, n == "random")} for n, k in baselines],
        "budget": {"limit": int(0.7 * COSTS["parameters"])},
    }
