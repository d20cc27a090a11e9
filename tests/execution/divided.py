"""Compare a library and its scores, made by several processes that divide a parent, with those that one process makes.

    python -m tests.execution.divided FOLDER [PARENT]

A module of its own, so that processes are forked from one that has imported everything and run nothing.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from layersmith.costs.budget import Workload
from layersmith.distillation.layer_by_layer import TrainingSetup
from layersmith.distillation.local import distill_locally
from layersmith.errors import InputError
from layersmith.execution.dealing import group_size
from layersmith.execution.layerwise import split_layers
from layersmith.execution.parent import load_parent
from layersmith.library.alternative import Alternative
from layersmith.library.build import build_library
from layersmith.library.library import Library, write_library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.recipe import LibraryRecipe, LocalDistillationRecipe, ScoringRecipe
from layersmith.run import ranks
from layersmith.run.artifacts import write_json
from layersmith.run.journal import Recording, shared_work_folder
from layersmith.run.progress import SILENT
from layersmith.run.runtime import Runtime
from layersmith.scoring.children import ChildEvaluator, child_evaluator
from layersmith.scoring.formats import FormatTask, score_formats
from layersmith.scoring.library_scores import score_library
from layersmith.stages.costs import cost_table, smaller_caches
from tests.conformance.tiny import tiny_config, tiny_model

TOKENS = torch.randint(0, 99, (8, 24), generator=torch.Generator().manual_seed(4))
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "vocab_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
# Layers that 2, 3 and 5 do not divide, a mixture, and a hybrid.
PARENTS: dict[str, Callable[[], Any]] = {
    "shallow": lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SMALL)),
    "quick": lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **SMALL)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=7, tie_word_embeddings=True, **SMALL)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_hidden_layers=3, num_local_experts=4, **SMALL)),
    "granitemoehybrid": lambda: tiny_model(tiny_config("granitemoehybrid")),
}  # fmt: skip
# Five processes are two groups for two layers, and one that has none.
NUMBERS = {"llama": (2, 3, 5), "mixtral": (2,), "granitemoehybrid": (3,), "shallow": (4, 5)}
RECIPE = LibraryRecipe(ffn_fractions=(0.5,), expert_fractions=(0.5,), head_fractions=(0.5,))


def write_parents(folder: Path) -> None:
    for name, make in PARENTS.items():
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(4)  # every subblock matters
        model.save_pretrained(folder / name)


QUICK = LibraryRecipe(ffn_fractions=(0.5,), kv_heads=(), linear=(), query_heads=False, head_fractions=())


def library_of(path: Path, out: Path, runtime: Runtime, is_streamed: bool) -> Library:
    parent = load_parent(path, runtime, stream_near=out if is_streamed else None)
    recipe = QUICK if path.name == "quick" else RECIPE
    surveyed = ranks.from_first(lambda: survey(parent, recipe))
    ranked = build_library(parent, recipe, surveyed, Calibration(TOKENS, 2))
    library = Library(
        parent=parent, axes=surveyed.axes, alternatives=surveyed.alternatives, notes=[],
        orders=ranks.from_first(lambda: ranked.orders), maps=ranks.from_first(lambda: ranked.maps),
    )  # fmt: skip
    setup = TrainingSetup(LocalDistillationRecipe(tokens=96, batch_tokens=48), folder=out / "layers", inputs="same")
    return distill_locally(library, TOKENS[:4], TOKENS[2:], setup)


def make(path: Path, out: Path, is_streamed: bool) -> None:
    """Write a library and its scores; all processes call this."""
    runtime = Runtime.detect("cpu", "float32")
    ranks.start(runtime)
    ranks.on_first(lambda: out.mkdir(parents=True))
    library = library_of(path, out, runtime, is_streamed)
    if is_streamed and runtime.world_size > 1:
        held = [not any(p.is_meta for p in layer.parameters()) for layer in library.parent.layers]
        library.parent.let_go()
        place = runtime.rank % group_size(len(held), runtime.world_size)
        assert held == [owner == place for owner in library.parent.owners]
    recording = Recording(out / "journal", "same", is_kept=ranks.is_first())
    recipes = ScoringRecipe(mode="exact", batch_tokens=48), ScoringRecipe(mode="second_order", batch_tokens=48)
    scores = [
        score_library(library, TOKENS, recipe, recording=recording if recipe.mode == "exact" else Recording())
        for recipe in recipes
    ]

    of_formats = scores_of_formats(library, out)

    def write() -> None:
        write_library(library, out / "library")
        write_json(out / "formats.json", of_formats)
        write_json(out / "scores.json", [[score.to_dict() for score in of_recipe] for of_recipe in scores])

    ranks.on_first(write)
    ranks.on_first(lambda: evaluate(library, out), lambda: evaluator(library, out).crew.follow())


def scores_of_formats(library: Library, out: Path) -> list[Any]:
    """Scores of formats, and the mean product of the head's inputs."""
    folder = shared_work_folder(out / "rounded", "same")
    costs = cost_table(library.parent, library, Workload(1, 64), [], ["fp8"])
    task = FormatTask(
        library=library,
        layerwise=split_layers(library.parent, library),
        formats=["q8_0", "q5_0"],
        kv_alternatives=smaller_caches(library.alternatives, costs, ["fp8"]),
        calibration=TOKENS[:4],
        scoring=TOKENS[4:],
        recipe=ScoringRecipe(batch_tokens=24),
        seed=5,
        folder=folder,
        progress=SILENT,
    )
    scores, moment = score_formats(task)
    return [scores, None if moment is None else moment.tolist()]


def evaluator(library: Library, out: Path) -> ChildEvaluator:
    return child_evaluator(library, TOKENS, ScoringRecipe(batch_tokens=48), SILENT, out)


def evaluate(library: Library, out: Path) -> None:
    """Write what whole children lose, and the effects of exchanges; the other processes help."""
    places: dict[tuple[int, str], list[Alternative]] = {}
    for a in library.alternatives:
        places.setdefault((a.layer, a.subblock), []).append(a)
    children = [[members[k % len(members)] for members in places.values()] for k in range(4)]
    children.append([*children[1][:-1], children[2][-1]])  # begins as another does
    others = [a for a in library.alternatives if a not in children[1]]
    models = evaluator(library, out)
    with models.crew.led():
        losses = [models.run(children, range(6)), models.run(children[:2], range(6))]
        effects = models.exchange_effects(children[1], others, range(6), seed=3)
    data = {
        "losses": losses,
        "place": effects.place,
        "linear": effects.linear.tolist(),
        "mixed": effects.mixed.tolist(),
    }
    write_json(out / "children.json", data)


def fail(path: Path, out: Path) -> None:
    """One process fails in the middle of what all do together."""
    runtime = Runtime.detect("cpu", "float32")
    ranks.start(runtime)
    parent = load_parent(path, runtime, stream_near=out)
    layer, surveyed = parent.layers[parent.owners.index(1)], ranks.from_first(lambda: survey(parent, QUICK))

    def refuse(*_: object) -> None:
        raise InputError("the weights of this layer are damaged")

    if runtime.rank == 1:
        layer.register_forward_pre_hook(refuse)
    try:
        ranks.together(lambda: build_library(parent, QUICK, surveyed, Calibration(TOKENS, 2)))
    except InputError as error:
        assert "of this layer are damaged" in str(error)  # noqa: PT017 - in every process
    else:
        raise AssertionError("went on")


def forked(number: int, work: Callable[[], None]) -> None:
    """Call ``work`` in so many processes, with the environment that a launcher gives.

    Raises:
        RuntimeError: One of them failed.
    """
    environment = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}
    children = []
    for rank in range(number):
        child = os.fork()
        if not child:
            os.environ |= environment | {"RANK": str(rank)}
            try:
                work()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        raise RuntimeError(f"one of {number} processes failed")


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


def digest(folder: Path) -> dict[str, str]:
    files = [folder / name for name in ("scores.json", "formats.json", "children.json")]
    files += [*sorted((folder / "rounded").rglob("*.safetensors")), *sorted((folder / "library").rglob("*"))]
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }


def main() -> None:
    """Compare all parents, or of one the quick part."""
    folder, only = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    forked(1, lambda: write_parents(folder))
    for name, numbers in dict.fromkeys(only, (2,)).items() or NUMBERS.items():
        for is_streamed in (True, False):
            made = {}
            for number in (1, *(numbers if is_streamed else numbers[:1])):
                out = folder / f"{name}-{number}-{is_streamed}"
                forked(number, lambda name=name, out=out, s=is_streamed: make(folder / name, out, s))
                made[number] = digest(out)
                different = [file for file in made[1] if made[1][file] != made[number].get(file)]
                if number > 1:
                    where = "on the disk" if is_streamed else "in memory"
                    print(f"{name}: {number} processes, {where}: {different or 'equal'}", flush=True)
    forked(2, lambda: fail(folder / "quick", folder))
    print("all failed with one error")


if __name__ == "__main__":
    main()
