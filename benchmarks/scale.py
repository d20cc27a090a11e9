"""Plans of ``--dry-run`` for large parents on many devices, from their configs alone; docs/scale.md shows the tables.

    python -m benchmarks.scale llama-3.1-70b
    python -m benchmarks.scale llama-3.1-70b --device-memory 70GiB --set library.linear=[]

Nothing is downloaded: the configs below have the sizes that the models' authors published.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layersmith.costs.budget import Workload
from layersmith.errors import UsageError
from layersmith.recipe import Recipe
from layersmith.stages.arithmetic import ranking_seconds
from layersmith.stages.inspect import Outline, outline
from layersmith.stages.placement import Asked, Placement, place
from layersmith.stages.time_plan import plan_time
from layersmith.units import format_count, format_seconds, format_whole_seconds


def llama(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    """Llama 3.1 (arXiv 2407.21783, table 3)."""
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": llama(4096, 14336, 32, 32),
    "llama-3.1-70b": llama(8192, 28672, 80, 64),
    "llama-3.1-405b": llama(16384, 53248, 126, 128),
    # Kimi K2 (arXiv 2507.20534, table 2): the architecture of DeepSeek-V3 with 384 experts.
    "kimi-k2": {
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 163840,
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 384,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 2.827, "max_position_embeddings": 131072,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    },
}  # fmt: skip


def outline_of(name: str, recipe: Recipe) -> Outline:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIGS[name]))
        return outline(folder, recipe.library, Workload(1, 4096))


def placed(space: Outline, recipe: Recipe, asked: Asked) -> Placement | str:
    """The plan, or why it is refused."""
    machine = asked.machine(recipe)
    assert machine.rate is not None
    timed = plan_time(space, recipe, machine.rate, is_timed=False)
    try:
        ranking = ranking_seconds(space, machine.rate)
        return place(space, recipe, machine, timed.flops, timed.seconds, ranking)
    except UsageError as refused:
        return str(refused)


def table(space: Outline, recipe: Recipe, args: argparse.Namespace) -> Iterator[str]:
    plans = {n: placed(space, recipe, Asked(n, args.device_memory, args.device_rate)) for n in args.devices}
    fitting = {n: found for n, found in plans.items() if isinstance(found, Placement)}
    parameters = format_count(space.costs.parent["parameters"])
    yield (
        f"{args.model}, {parameters} parameters, {len(space.axes)} layers, "
        f"{sum(not a.is_parent for a in space.alternatives)} alternatives, on {args.device_rate} with "
        f"{args.device_memory}. GiB on the device, GiB on the host, and time, of the process that takes most."
    )
    if fitting:
        yield ""
        yield "| stage | " + " | ".join(f"{n} devices | host | time" for n in fitting) + " |"
        yield "| --- |" + " --- |" * (3 * len(fitting))
        for stage in next(iter(fitting.values())).stages:
            cells = [cell for found in fitting.values() for cell in _cells(found, stage)]
            yield f"| {stage} | " + " | ".join(cells) + " |"
        totals = [cell for found in fitting.values() for cell in _totals(found)]
        yield "| most memory, all time | " + " | ".join(totals) + " |"
        yield ""
        yield from map(_summary, fitting.values())
    yield from (f"- {n} devices: refused. {found}" for n, found in plans.items() if isinstance(found, str))


def _cells(found: Placement, stage: str) -> list[str]:
    share = found.stages[stage]
    return [f"{share.on_device / 1024**3:.1f}", f"{share.on_host / 1024**3:.1f}", format_whole_seconds(share.seconds)]


def _summary(found: Placement) -> str:
    until = ("describe", "data", "statistics", "library", "scores")
    scored = [share for stage, share in found.stages.items() if stage in until]
    device, host = (max(getattr(share, on) for share in scored) / 1024**3 for on in ("on_device", "on_host"))
    checks, scores = found.stages["statistics"], found.stages["scores"]
    return (
        f"- {found.arrangement}. Up to the scores: {device:.1f} GiB on the device, {host:.1f} GiB on the host, "
        f"{format_seconds(round(sum(share.seconds for share in scored)))}. The scores send "
        f"{scores.sent / 1024**3:,.0f} GiB and read {scores.read / 1024**3:,.0f} GiB; the statistics read "
        f"{checks.read / 1024**3:,.0f} GiB."
    )


def _totals(found: Placement) -> list[str]:
    shares = found.stages.values()
    sizes = (max(share.on_device for share in shares), max(share.on_host for share in shares))
    return [*(f"{size / 1024**3:.1f}" for size in sizes), format_seconds(round(found.seconds))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--device-memory", default="80GiB")
    parser.add_argument("--device-rate", default="H100")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    args = parser.parse_args()
    recipe = Recipe().with_settings(args.settings)
    print("\n".join(table(outline_of(args.model, recipe), recipe, args)))


if __name__ == "__main__":
    main()
