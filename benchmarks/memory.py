"""Peak memory of scoring, seen from outside the process: ``python -m benchmarks.memory PARENT --text TEXT``.

A run is begun and stopped when its library is there. Scoring then goes on in a process of its own, whose resident
memory (``VmHWM`` of the Linux kernel) is read when it ends; so is that of a process that imports the same and loads
nothing. ``--stream always`` leaves the parent's weights on the disk; ``--until refine`` goes on through the search and
refinement of a child of a share of the parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from layersmith.heterogeneous.weight_files import weight_files

_PRINT_PEAK = """
print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
_RUN = """
import sys, time
from layersmith.pipeline import stages
from layersmith.run.progress import Progress
parent, out, text, until, recipe, params = sys.argv[1:]
import json
started = time.process_time()
for stage in stages(parent, out, text, float(params), json.loads(recipe)):
    if stage == until:
        break
print("seconds", time.process_time() - started)
"""
_IMPORTS = """
import layersmith.pipeline
from transformers import LlamaForCausalLM
"""


def peak_mib(code: str, *arguments: str) -> tuple[float, float]:
    """Peak resident memory of a Python process in MiB, and the CPU seconds that it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code + _PRINT_PEAK, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    values = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("peak ", "seconds ")))
    return float(values["peak"]) / 1024, float(values.get("seconds", 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent")
    parser.add_argument("--text", required=True)
    parser.add_argument("--stream", default="never", choices=["never", "always"])
    parser.add_argument("--scoring", default="auto", choices=["auto", "exact", "second_order"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--ffn", default="0.75,0.5,0.25", help="widths as fractions")
    parser.add_argument("--every", type=int, default=1, help="only every so many layers have alternatives")
    parser.add_argument("--until", default="scores", choices=["scores", "refine"])
    parser.add_argument("--params", default="1.0", help="of the child that is refined, as a fraction")
    parser.add_argument("--out", help="a JSON file for the result")
    args = parser.parse_args()
    depth = json.loads((Path(args.parent) / "config.json").read_text())["num_hidden_layers"]
    rows = {f"{name}_sequences": args.rows for name in ("scoring", "calibration", "evaluation")}
    rows["training_sequences"] = 0
    recipe = {
        "data": {"sequence_length": args.length, **rows},
        "library": {
            "ffn_fractions": [float(f) for f in args.ffn.split(",")],
            "linear": [],
            "keep_layers": [i for i in range(depth) if (i + 1) % args.every],
            "ffn_ranking": "contribution",
        },
        "local_distillation": {"reconstruct": False, "tokens": 0, "coupled_tokens": 0},
        "scoring": {"mode": args.scoring},
        "stream": args.stream,
    }
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        arguments = [args.parent, f"{folder}/run", args.text]
        before, _ = peak_mib(_RUN, *arguments, "library", json.dumps(recipe), args.params)
        peak, seconds = peak_mib(_RUN, *arguments, args.until, json.dumps(recipe), args.params)
    imports, _ = peak_mib(_IMPORTS)
    stored = sum(file.stat().st_size for file in weight_files(Path(args.parent))) / 1024**2
    result = {
        "parent": Path(args.parent).name,
        "stream": args.stream,
        "scoring": args.scoring,
        "until": args.until,
        "tokens": args.rows * args.length,
        "layers_with_alternatives": depth // args.every,
        "checkpoint_mib": round(stored, 1),
        "imports_mib": round(imports, 1),
        "peak_before_scoring_mib": round(before, 1),
        "peak_mib": round(peak, 1),
        "beyond_imports_over_checkpoint": round((peak - imports) / stored, 3),
        "cpu_seconds": round(seconds, 1),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
