"""The demo: the main job on the model in ``demo/demo-model``, with this machine's Python library as data."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

from layersmith.costs.budget import Budget
from layersmith.errors import InputError
from layersmith.pipeline import Result, compress
from layersmith.recipe import DataRecipe, LocalDistillationRecipe, Recipe
from layersmith.run.folder import Run
from layersmith.run.progress import SILENT, Progress

MODEL = Path(__file__).parent / "demo-model"
PROMPTS = ("def read_file(path):\n    with open(path",)


def recipe(evaluation_source: str | Path) -> Recipe:
    """Sized for a minute or two on one core."""
    return Recipe(
        data=DataRecipe(
            sequence_length=256,
            calibration_sequences=64,
            scoring_sequences=24,
            evaluation_sequences=96,
            training_sequences=68,
            evaluation_source=str(evaluation_source),
        ),
        # What is chosen learns; to teach the whole library takes a good half hour on two cores.
        local_distillation=LocalDistillationRecipe(tokens=0, coupled_tokens=16_384),
        completion_tokens=48,
        prompts=PROMPTS,
    )


def standard_library() -> Path:
    """Where this machine's Python keeps its sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def split_library(folder: Path) -> tuple[Path, Path]:
    """Lay out the library's modules as two folders: those the model was trained on, and those it never saw."""
    held_out = set(json.loads((MODEL / "training.json").read_text(encoding="utf-8"))["held_out_modules"])
    root = standard_library()
    places = {False: folder / "seen", True: folder / "held-out"}
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or (name not in held_out and "test" in name):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        (places[name in held_out] / name.replace("/", "__")).write_text(text, encoding="utf-8")
    if not any(places[True].iterdir()):
        raise InputError(f"{root}: this Python has none of the modules that the demo evaluates on; use CPython 3.11+.")
    return places[False], places[True]


def run_demo(out: str | Path, params: str = "0.7", progress: Progress = SILENT) -> Result:
    """Compress the demo model; :func:`layersmith.compress` with everything filled in."""
    budget = Budget.parse(params)
    Run.check(Path(out))
    seen, held_out = split_library(Path(out).with_name(f"{Path(out).name}-text"))
    return compress(MODEL, out, data=seen, budget=budget, recipe=recipe(held_out), progress=progress)
