"""Whatever a file or an argument holds: it is used, or refused in one sentence, within seconds and bounded memory.

``LAYERSMITH_FUZZ_SECONDS`` is the time for all targets together; without it each runs a few examples. With it, figures
are written to ``LAYERSMITH_FUZZ_FIGURES`` (default: ``runs/fuzz.json``). ``LAYERSMITH_FUZZ_SEED`` selects others.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import layersmith
from layersmith.block_config import read_block_configs
from layersmith.costs.budget import Budget, parse_budget
from layersmith.costs.times import from_csv
from layersmith.data.read import read_documents
from layersmith.data.splits import holds_tokens, prepare
from layersmith.errors import LayersmithError, brief
from layersmith.heterogeneous.checkpoint import read_subblocks
from layersmith.heterogeneous.weight_files import check_files, weight_files
from layersmith.pipeline import STAGES
from layersmith.recipe import Recipe
from layersmith.report.card import license_of
from layersmith.report.optional import read_optional
from layersmith.run.artifacts import file_digest, fingerprint, read_tensors
from layersmith.run.header import read_header, write_header
from layersmith.run.journal import Checkpoint, Journal, _line
from layersmith.run.log import Log
from layersmith.stages.job import job_of_run
from layersmith.stages.reopen import report, search
from layersmith.untrusted import read_safetensors_header
from tests.conftest import TINY_RECIPE
from tests.faults.mutate import as_json, mutated, mutated_bytes

FIRST_SEED = int(os.environ.get("LAYERSMITH_FUZZ_SEED", "0"))
SECONDS = float(os.environ.get("LAYERSMITH_FUZZ_SECONDS", "0"))
FIGURES = Path(os.environ.get("LAYERSMITH_FUZZ_FIGURES", "runs/fuzz.json"))
# Of processor time, so that a busy machine is no hang; and of wall time, for what waits.
HANG_SECONDS, STUCK_SECONDS = 5.0, 120.0
MOST_MIB = 1024
EXAMPLES = 12


@dataclass
class Place:
    """What the targets change and read: a finished run, its parent, and an empty folder."""

    run: Path
    parent: Path
    text: Path
    empty: Path

    @property
    def child(self) -> Path:
        return self.run / "child"

    @contextlib.contextmanager
    def changed(self, path: Path, data: bytes) -> Iterator[None]:
        """While open, a file holds other data and the run's header says so, as who made the run could arrange."""
        before, header = path.read_bytes(), (self.run / "run.json").read_bytes()
        path.unlink()  # others may share it
        path.write_bytes(data)
        if path.is_relative_to(self.run) and path.name != "run.json":
            name, stages = path.relative_to(self.run).as_posix(), json.loads(header)["stages"]
            for stage in stages.values():
                if name in stage["files"]:
                    stage["files"][name] = {"size": len(data), "sha256": file_digest(path)}
            write_header(self.run, read_header(self.run) | {"stages": stages})
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            path.write_bytes(before)
            (self.run / "run.json").write_bytes(header)

    def write(self, name: str, data: bytes) -> Path:
        path = self.empty / name
        path.write_bytes(data)
        return path


@pytest.fixture(scope="module")
def place(make_parent: Callable[..., Path], text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("fuzz")
    parent = folder / "parent"
    shutil.copytree(make_parent("llama", num_hidden_layers=2), parent)
    recipe = TINY_RECIPE | {"local_distillation": {"tokens": 256, "coupled_tokens": 256}}
    layersmith.compress(parent, folder / "run", data=text_folder, budget=0.9, recipe=recipe)
    (folder / "empty").mkdir()
    return Place(folder / "run", parent, text_folder, folder / "empty")


# ---------------------------------------------------------------------------------------------- targets


def recipe(place: Place, random: Random) -> None:
    data = mutated(Recipe.read(TINY_RECIPE).to_dict(), random)
    text = yaml.safe_dump(data).encode("utf-8", "replace") if random.random() < 0.7 else as_json(data, random)
    Recipe.read(place.write("recipe.yaml", mutated_bytes(text, random) if random.random() < 0.3 else text))


def setting(place: Place, random: Random) -> None:
    key = random.choice(["seed", "scoring.samples", "search.limits", "library.ffn_sizes", "a.b", "", "data", "prompts"])
    value = as_json(mutated([1, {"a": [0.5]}, "x"], random), random).decode("utf-8", "replace")
    Recipe().with_settings([f"{key}={value}", mutated_bytes(b"scoring.samples=2", random).decode("utf-8", "replace")])


def budget(place: Place, random: Random) -> None:
    texts = ["0.7", "7B", "10GiB", "12ms", "1.5x", "500tokens/s", "80%", "1e3", "0.5 GiB"]
    text = mutated_bytes(random.choice(texts).encode(), random).decode("utf-8", "replace")
    key = random.choice(
        ["params", "active_params", "weights", "kv_cache", "memory", "ttft", "time_per_token", "throughput"]
    )
    with contextlib.suppress(LayersmithError):
        limit: dict[str, Any] = {key: text}
        parse_budget(**limit, context=random.choice([1, 2, 4096, 0, -1, 2**40]))
    with contextlib.suppress(LayersmithError):
        Budget.parse(mutated({"memory": "10GiB", "batch": 8, "context": 100, "params": 0.5}, random))
    stored = json.loads((place.run / "run.json").read_bytes())["budget"]
    str(Budget.from_dict(mutated(stored, random)).limits)


def block_configs(place: Place, random: Random) -> None:
    entries = json.loads((place.child / "config.json").read_bytes())["block_configs"]
    for entry in read_block_configs(mutated(entries, random), "config.json"):
        assert read_block_configs([entry.to_dict()], "again") == [entry]


def index(place: Place, random: Random) -> None:
    data = {"metadata": {"total_size": 5}, "weight_map": {"a": "a.safetensors", "b": "sub/b.safetensors"}}
    folder = place.empty / "index"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_bytes(as_json(mutated(data, random), random))
    for file in weight_files(folder):
        assert file.resolve().is_relative_to(folder.resolve())
    check_files(folder)
    read_subblocks(folder)


def safetensors(place: Place, random: Random) -> None:
    path = place.write(
        "model.safetensors", mutated_bytes((place.run / "data" / "tokens.safetensors").read_bytes(), random)
    )
    with contextlib.suppress(LayersmithError):
        read_safetensors_header(path)
    with contextlib.suppress(LayersmithError):
        Checkpoint(path, "inputs", 1.0).load()
    read_tensors(path)


def config(place: Place, random: Random) -> None:
    """Of a parent, and of a child with its plan and its block configs."""
    folder = random.choice([place.parent, place.child])
    path = folder / "config.json"
    with place.changed(path, as_json(mutated(json.loads(path.read_bytes()), random, 2), random)):
        layersmith.load(folder)


def plan(place: Place, random: Random) -> None:
    path = place.child / "config.json"
    data = json.loads(path.read_bytes())
    data["layersmith"] = mutated(data["layersmith"], random)
    with place.changed(path, as_json(data, random)):
        layersmith.load(place.child)


def parents_weights(place: Place, random: Random) -> None:
    path = place.parent / "model.safetensors"
    with place.changed(path, mutated_bytes(path.read_bytes(), random)):
        layersmith.load(place.parent)


def run_json(place: Place, random: Random) -> None:
    header = mutated(read_header(place.run), random)
    if isinstance(header, dict):
        with contextlib.suppress(RecursionError):
            header |= {"digest": fingerprint(header)}
    with place.changed(place.run / "run.json", as_json(header, random)):
        read_header(place.run)
        job_of_run(place.run)
        if random.random() < 0.1:
            report(place.run)


def run_files(place: Place, random: Random) -> None:
    """Every JSON file of a run, under the commands that read them."""
    paths = [
        p
        for p in sorted(place.run.rglob("*.json"))
        if p.parent.name != "child" and p.name not in ("report.json", "run.json")
    ]
    path = random.choice(paths)
    with place.changed(path, as_json(mutated(json.loads(path.read_bytes()), random), random)):
        if random.random() < 0.7:
            job = job_of_run(place.run)
            for stage in STAGES:
                if job.made_from(stage) is not None:
                    job.run.require(stage.name)
                    job.read(stage)
            read_optional(job.run)
        elif path.parent.name in ("library", "scores", "describe", "costs") and random.random() < 0.5:
            search(place.run, 0.95)
        else:
            report(place.run)


def tensors_of_run(place: Place, random: Random) -> None:
    path = random.choice([p for p in sorted(place.run.rglob("*.safetensors")) if p.parent.name != "child"])
    with place.changed(path, mutated_bytes(path.read_bytes(), random)):
        search(place.run, 0.95)


def journal(place: Place, random: Random) -> None:
    with Journal(place.write("x.partial", b""), "digest") as written:
        written.write("layer 0: x", [0, 1], [{"kl": 0.5}, {"kl": 0.25}])
    lines = [json.loads(line.rsplit(b" ", 1)[0]) for line in (place.empty / "x.partial").read_bytes().splitlines()]
    text = b"".join(_line(as_json(mutated(line, random) if random.random() < 0.5 else line, random)) for line in lines)
    with Journal(place.write("x.partial", text), "digest") as read:
        assert all(isinstance(value, int | float) for values in read.known.values() for value in values.values())
    shutil.copy(place.run / "log.jsonl", place.empty / "log.jsonl")
    place.write("log.jsonl", mutated_bytes((place.run / "log.jsonl").read_bytes(), random))
    Log(place.empty).times()


def times_csv(place: Place, random: Random) -> None:
    text = "layers,subblock,alternative,prefill_ms,decode_ms\n,fixed,,1.5,0.5\n0 1,ffn,parent,1,0.5\n"
    read = from_csv(place.write("t.csv", mutated_bytes(text.encode(), random)), [], Budget.parse(0.5).workload)
    assert read.fixed.prefill >= 0


def data_files(place: Place, random: Random) -> None:
    record = {"text": "some text", "messages": [{"role": "user", "content": "x"}], "n": 1}
    kind = random.choice(["x.jsonl", "x.json", "x.txt", "x.yaml", "x.parquet"])
    if kind == "x.yaml":
        text = yaml.safe_dump({"mixture": mutated([{"source": "a.txt", "weight": 0.5}], random)}).encode(
            "utf-8", "replace"
        )
    else:
        text = b"\n".join(as_json(mutated(record, random), random) for _ in range(3))
    for number, document in enumerate(read_documents(place.write(kind, text))):
        assert document is not None
        if number > 20:
            break


def npy(place: Place, random: Random) -> None:
    np.save(place.empty / "ids.npy", np.arange(3000, dtype=np.int64) % 100)
    path = place.write("ids.npy", mutated_bytes((place.empty / "ids.npy").read_bytes(), random))
    if holds_tokens(path):
        prepare(path, None, Recipe.read(TINY_RECIPE).data, 0)


def front_matter(place: Place, random: Random) -> None:
    text = yaml.safe_dump(mutated({"license": "mit", "language": ["en"], "x": {"y": 1}}, random))
    body = mutated_bytes(f"---\n{text}\n---\n# Title\n".encode("utf-8", "replace"), random)
    (place.empty / "README.md").write_bytes(body)
    license_of(str(place.empty), {})


TARGETS: dict[str, tuple[Callable[[Place, Random], None], float]] = {  # and their shares of the time
    "recipe": (recipe, 1.0),
    "setting": (setting, 0.5),
    "budget": (budget, 0.5),
    "block configs": (block_configs, 0.5),
    "index": (index, 0.5),
    "safetensors": (safetensors, 1.0),
    "config.json": (config, 2.0),
    "plan": (plan, 2.0),
    "weights of a parent": (parents_weights, 1.0),
    "run.json": (run_json, 1.5),
    "JSON of a run": (run_files, 3.0),
    "tensors of a run": (tensors_of_run, 1.0),
    "journal and log": (journal, 0.5),
    "CSV of times": (times_csv, 0.5),
    "data": (data_files, 1.0),
    "npy": (npy, 0.5),
    "front matter": (front_matter, 0.5),
}


# ---------------------------------------------------------------------------------------------- running them


class Hang(BaseException):
    """An example took too long."""


def _ring(signum: int, frame: FrameType | None) -> None:
    raise Hang


@dataclass
class Figures:
    """What running a target showed.

    Attributes:
        problems: Crashes and hangs by where they happened, with one example of each.
    """

    executions: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: int = 0
    hangs: int = 0
    slowest_seconds: float = 0.0  # of processor time
    peak_mib: float = 0.0
    problems: dict[str, str] = field(default_factory=dict)

    def run(self, target: Callable[[Place, Random], None], place: Place, random: Random) -> None:
        self.executions += 1
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, STUCK_SECONDS)
        try:
            target(place, random)
            self.accepted += 1
        except LayersmithError as error:
            self.refused += 1
            if len(str(error)) > 5000 or (not str(error).isprintable() and set(str(error)) & set("\x1b\x00\x07")):
                self._problem("crash", error)
        except Hang as error:
            self._problem("hang", error)
        except Exception as error:
            self._problem("crash", error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.slowest_seconds = max(self.slowest_seconds, round(time.process_time() - started, 2))

    def _problem(self, kind: str, error: BaseException) -> None:
        self.crashes += kind == "crash"
        self.hangs += kind == "hang"
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if "layersmith" in f.filename or "tests" in f.filename
        ]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the target"
        where = f"{kind}: {type(error).__name__} at {place}"
        self.problems.setdefault(
            where, brief(str(error), 300) + "\n" + "".join(traceback.format_exception(error)[-12:])[-3000:]
        )


@pytest.fixture(scope="module")
def figures() -> dict[str, Figures]:
    return {}


def _keep(figures: dict[str, Figures]) -> None:
    if SECONDS:
        FIGURES.parent.mkdir(parents=True, exist_ok=True)
        FIGURES.write_text(json.dumps({name: asdict(f) for name, f in figures.items()}, indent=1))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_used_or_refused(name: str, place: Place, figures: dict[str, Figures]) -> None:
    target, share = TARGETS[name]
    found = figures[name] = Figures()
    before = _peak_mib()
    handlers = {number: signal.signal(number, _ring) for number in (signal.SIGPROF, signal.SIGALRM)}
    end = time.monotonic() + SECONDS * share / sum(share for _, share in TARGETS.values())
    try:
        for round_ in range(10**9 if SECONDS else 1):
            _examples(found, target, place, round_, end)
            if SECONDS and time.monotonic() > end:
                break
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    found.peak_mib = round(_peak_mib() - before, 1)
    _keep(figures)
    assert not found.problems, "\n".join(f"{where}\n{text}" for where, text in found.problems.items())
    assert found.peak_mib < MOST_MIB


def _examples(found: Figures, target: Callable[[Place, Random], None], place: Place, round_: int, end: float) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]

    @seed(FIRST_SEED + round_)
    @settings(
        max_examples=200 if SECONDS else EXAMPLES, deadline=None, database=None, suppress_health_check=quiet,
        phases=[Phase.generate],
    )  # fmt: skip
    @given(number=st.integers(0, 2**64 - 1))
    def one(number: int) -> None:
        if not SECONDS or time.monotonic() < end:
            found.run(target, place, Random(number))

    one()
