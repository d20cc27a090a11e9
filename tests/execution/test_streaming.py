"""Parents whose weights stay on the disk: the same scores and children, one layer in memory."""

import gc
import json
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, MixtralConfig, PretrainedConfig

import layersmith
from layersmith.errors import InputError
from layersmith.execution.exchange import forward
from layersmith.execution.hidden_states import States, StatesOnDisk
from layersmith.execution.parent import Parent, load_parent
from layersmith.execution.streaming import is_too_large
from layersmith.library.alternative import Alternative
from layersmith.library.build import build_library
from layersmith.library.library import Library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.recipe import LibraryRecipe, ScoringRecipe
from layersmith.run.journal import Recording
from layersmith.run.progress import SILENT, Progress
from layersmith.run.runtime import Runtime
from layersmith.scoring.children import child_evaluator
from layersmith.scoring.library_scores import score_library
from tests.conftest import TINY_RECIPE

CPU = Runtime(torch.device("cpu"), torch.float32)
TOKENS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(4))
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 256, **HEADS}
CONFIGS: dict[str, PretrainedConfig] = {
    # Experts become one tensor while they are loaded; embeddings are scaled, tied, and have a padding token.
    "mixtral": MixtralConfig(**SMALL, intermediate_size=64, num_local_experts=4),
    "gemma": GemmaConfig(**SMALL, intermediate_size=64, head_dim=8, pad_token_id=200),
}


def both(path: Path, near: Path) -> list[Parent]:
    return [load_parent(path, CPU, stream_near=where) for where in (None, near)]


def test_rotary_frequencies_are_those_of_transformers_in_any_dtype(
    make_parent: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_parent("llama", torch.bfloat16)
    ids = torch.arange(250)[None] * 7 % 500  # at late positions they matter most
    expected = layersmith.load(path).eval()(input_ids=ids).logits
    for where in (None, tmp_path):
        parent = load_parent(path, Runtime(torch.device("cpu"), torch.bfloat16), stream_near=where)
        assert torch.equal(forward(parent, ids)[0], expected)


def library_of(parent: Parent) -> Library:
    recipe = LibraryRecipe(ffn_fractions=(0.5,))
    return build_library(parent, recipe, survey(parent, recipe), Calibration(TOKENS, 3))


@pytest.fixture(params=["llama_tied", "qwen2_windows", *CONFIGS])
def checkpoint(request: pytest.FixtureRequest, make_parent: Callable[..., Path], tmp_path: Path) -> Path:
    if request.param not in CONFIGS:
        return make_parent(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(6)  # every subblock matters
    model.to(torch.bfloat16).save_pretrained(tmp_path / "parent", max_shard_size="40kB")
    return tmp_path / "parent"


def test_scores_and_children_are_those_of_a_parent_in_memory(checkpoint: Path, tmp_path: Path) -> None:
    at_once, streamed = map(library_of, both(checkpoint, tmp_path))
    assert streamed.parent.identity == at_once.parent.identity
    assert streamed.parent.dtype == at_once.parent.dtype
    assert streamed.identity == at_once.identity
    for recipe in (ScoringRecipe(mode="exact"), ScoringRecipe(mode="second_order", exact_passes=3)):
        expected, scores = (score_library(library, TOKENS, recipe) for library in (at_once, streamed))
        for a, b in zip(expected, scores, strict=True):
            assert b.exact_rows == a.exact_rows
            for metric, values in a.rows.items():
                assert b.rows[metric] == pytest.approx(values, rel=1e-3, abs=1e-5)
    chosen = [next(a for a in at_once.alternatives if a.layer == i and a.subblock == s and a.kind != "parent")
              for i in range(2) for s in ("attention", "ffn")]  # fmt: skip
    children = [library.compose(chosen) for library in (at_once, streamed)]
    with torch.no_grad():
        assert torch.equal(children[0](TOKENS).logits, children[1](TOKENS).logits)


def test_whole_children_lose_what_they_do_in_memory(checkpoint: Path, tmp_path: Path) -> None:
    at_once, streamed = map(library_of, both(checkpoint, tmp_path))
    rng, solutions = random.Random(0), []
    for _ in range(5):
        places: dict[tuple[int, str], list[Alternative]] = {}
        for a in at_once.alternatives:
            places.setdefault((a.layer, a.subblock), []).append(a)
        solutions.append([rng.choice(members) for members in places.values()])
    solutions.append([a for a in at_once.alternatives if a.kind == "parent"])
    solutions.append([*solutions[0][:-1], solutions[-1][-1]])  # begins as the first does
    little = ScoringRecipe(batch_tokens=48, spill_gib=5 * 2 * 48 * 32 * 4 / 1024**3)
    expected, streamed_losses, in_parts = (
        child_evaluator(library, TOKENS, recipe, SILENT, tmp_path)
        for library, recipe in ((at_once, ScoringRecipe()), (streamed, ScoringRecipe()), (streamed, little))
    )
    for chosen, rows in ((solutions, range(6)), (solutions[:2], range(1, 5)), (solutions[2:], range(1, 5))):
        losses = [
            [[row["kl_divergence"] for row in members] for members in models.run(chosen, rows)]
            for models in (expected, streamed_losses, in_parts)
        ]
        for one, other in zip(losses[0], losses[1], strict=True):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
        for one, other in zip(losses[0], losses[2], strict=True):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_exchanges_do_what_they_do_in_memory(make_parent: Callable[..., Path], tmp_path: Path) -> None:
    at_once, streamed = map(library_of, both(make_parent("llama"), tmp_path))
    chosen = [next(a for a in at_once.alternatives if (a.layer, a.subblock) == (i, s) and a.kind != "parent")
              for i in range(len(at_once.parent.blocks)) for s in ("attention", "ffn")]  # fmt: skip
    others = [a for a in at_once.alternatives if a not in chosen]
    one, *more = (
        child_evaluator(library, TOKENS, scoring, SILENT, tmp_path).exchange_effects(chosen, others, range(5), 3)
        for library, scoring in (
            (at_once, ScoringRecipe(batch_tokens=48)),
            (streamed, ScoringRecipe(batch_tokens=48)),
            (streamed, ScoringRecipe(batch_tokens=48, spill_gib=9 * 48 * 32 * 4 / 1024**3)),  # one batch at a time
        )
    )
    for other in more:
        assert other.place == one.place
        assert other.linear == pytest.approx(one.linear, rel=1e-3, abs=1e-6)
        assert other.mixed == pytest.approx(one.mixed, rel=1e-3, abs=1e-6)


def test_all_children_go_through_a_layer_before_the_next_is_read(
    make_parent: Callable[..., Path], tmp_path: Path
) -> None:
    parent = load_parent(make_parent("llama"), CPU, stream_near=tmp_path)
    assert parent.stream is not None
    library, read, names = library_of(parent), parent.stream.files.read, []

    def noted(name: str, device: torch.device) -> torch.Tensor:
        names.append(name)
        return read(name, device)

    models = child_evaluator(library, TOKENS, ScoringRecipe(batch_tokens=48), SILENT, tmp_path)
    parent.stream.files.read = noted  # type: ignore[method-assign]
    narrow = [a for a in library.alternatives if a.kind == "ffn_width"]
    models.run([[a] for a in narrow], range(6))
    queries = [name for name in names if name.endswith("q_proj.weight")]
    assert len(queries) == len(set(queries)) == len(parent.blocks)


def test_the_next_layer_is_read_while_one_runs(make_parent: Callable[..., Path], tmp_path: Path) -> None:
    parent = load_parent(make_parent("llama"), CPU, stream_near=tmp_path)
    assert parent.stream is not None
    library, read = library_of(parent), parent.stream.files.read
    threads: list[str] = []

    def noted(name: str, device: torch.device) -> torch.Tensor:
        if name.endswith("q_proj.weight"):
            threads.append(threading.current_thread().name)
        return read(name, device)

    parent.stream.files.read = noted  # type: ignore[method-assign]
    for _ in range(2):  # the first time, it is not known yet that a backward pass follows
        threads.clear()
        score_library(library, TOKENS, ScoringRecipe())
    in_advance = sum(name.startswith("weights") for name in threads)
    assert len(threads) - in_advance <= 4  # passes begin with a layer that has to be waited for
    assert len(threads) <= 5 * len(parent.blocks) + 2  # few that are not needed then


def test_one_layer_is_in_memory(
    make_parent: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a layer is read nothing holds on to the weights of another, be it a stage, an alternative or a graph.

    That is where memory is short, so that none is read in advance.
    """
    monkeypatch.setattr("layersmith.execution.streaming.SHARE_FOR_TWO", 0.0)
    parent = load_parent(make_parent("llama"), CPU, stream_near=tmp_path)
    assert parent.stream is not None
    library = library_of(parent)
    gc.collect()  # models of other tests, and that from which the checkpoint was written
    shape = tuple(parent.layers[0].get_parameter("self_attn.q_proj.weight").shape)
    alive: list[int] = []
    read = parent.stream.files.read

    def counted(name: str, device: torch.device) -> torch.Tensor:
        if name.endswith("q_proj.weight"):
            tensors = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
            alive.append(len({t.data_ptr() for t in tensors if not t.is_meta and tuple(t.shape) == shape}))
        return read(name, device)

    parent.stream.files.read = counted  # type: ignore[method-assign]
    # How often layers are read; gathering the statistics of the library has checked the parent already.
    layers = len(parent.blocks)
    for mode, reads in (("second_order", 5 * layers - 1), ("exact", 2 * layers)):
        alive.clear()
        score_library(library, TOKENS, ScoringRecipe(mode=mode))
        assert len(alive) == reads
        assert set(alive) == {0}
    alive.clear()
    models = child_evaluator(library, TOKENS, ScoringRecipe(), SILENT, tmp_path)
    changed = [a for a in library.alternatives if a.kind == "ffn_width"]
    models.run([changed, changed[1:]], range(6))
    unchanged = [a for a in library.alternatives if a.kind == "parent"]
    models.exchange_effects(unchanged, changed, range(6), 0)
    assert len(alive) == 3 * layers
    assert set(alive) == {0}


def test_statistics_read_a_layer_once_however_many_batches_there_are(
    make_parent: Callable[..., Path], tmp_path: Path
) -> None:
    parent = load_parent(make_parent("llama"), CPU, stream_near=tmp_path)
    assert parent.stream is not None
    recipe, read, counts = LibraryRecipe(ffn_fractions=(0.5,)), parent.stream.files.read, [0]

    def counted(name: str, device: torch.device) -> torch.Tensor:
        counts[-1] += name.endswith("q_proj.weight")
        return read(name, device)

    space = survey(parent, recipe)
    build_library(parent, recipe, space, Calibration(TOKENS, 6))  # checks once that the layers run one at a time
    parent.stream.files.read = counted  # type: ignore[method-assign]
    for batch_sequences in (6, 1):
        build_library(parent, recipe, space, Calibration(TOKENS, batch_sequences))
        counts.append(0)
    assert counts[0] == counts[1] > 0


def test_interrupted_it_goes_on_to_the_same_scores(make_parent: Callable[..., Path], tmp_path: Path) -> None:
    library = library_of(load_parent(make_parent("llama"), CPU, stream_near=tmp_path))
    for recipe in (
        ScoringRecipe(mode="exact", spill_gib=30 * 24 * 32 * 4 / 1024**3, batch_tokens=48),  # a few alternatives a wave
        ScoringRecipe(mode="second_order", spill_gib=2 * 30 * 24 * 32 * 4 / 1024**3, batch_tokens=48),
    ):
        journal = tmp_path / f"{recipe.mode}.journal"
        whole = score_library(library, TOKENS, recipe, recording=Recording(journal, "a"))
        lines = journal.read_bytes().splitlines(keepends=True)
        for kept in (1, len(lines) // 3, len(lines) - 1):
            journal.write_bytes(b"".join(lines[:kept]) + lines[kept][:17])
            again = score_library(library, TOKENS, recipe, recording=Recording(journal, "a"))
            assert [s.rows for s in again] == [s.rows for s in whole]


class Slow(Progress):
    """On its clock all work takes long; it stops a run after so many looks at it."""

    def __init__(self, looks: int):
        self.looks = self.seconds = 0
        self.most = looks
        self.clock = self.look

    def look(self) -> float:
        if self.looks == self.most:
            raise KeyboardInterrupt
        self.looks, self.seconds = self.looks + 1, self.seconds + 100
        return self.seconds


@pytest.mark.parametrize("mode", ["exact", "second_order"])
def test_work_that_takes_long_gives_its_results_by_the_way(
    make_parent: Callable[..., Path], tmp_path: Path, mode: str
) -> None:
    library = library_of(load_parent(make_parent("llama"), CPU, stream_near=tmp_path))
    tokens, recipe = TOKENS.repeat(4, 1), ScoringRecipe(mode=mode, batch_tokens=48, exact_passes=0)  # type: ignore[arg-type]
    whole, slow, journal = score_library(library, tokens, recipe), Slow(10**9), tmp_path / "journal"
    assert [s.rows for s in score_library(library, tokens, recipe, recording=Recording(progress=slow))] == [
        s.rows for s in whole
    ]
    with pytest.raises(KeyboardInterrupt):
        score_library(library, tokens, recipe, recording=Recording(journal, "a", progress=Slow(slow.looks * 2 // 3)))
    known = [json.loads(line.rsplit(b" ", 1)[0])["of"] for line in journal.read_bytes().splitlines()[1:]]
    done = sum(of != "parent" for of in known)
    assert 0.2 < done / (len(whole) * len(tokens)) < 0.8
    again = score_library(library, tokens, recipe, recording=Recording(journal, "a"))
    assert [s.rows for s in again] == [s.rows for s in whole]


def test_the_main_job_from_the_disk(make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path) -> None:
    parent = make_parent("llama")
    results = [
        layersmith.compress(parent, tmp_path / how, data=text_folder, budget=0.8, recipe={**TINY_RECIPE, "stream": how})
        for how in ("never", "always")
    ]
    assert all((tmp_path / how / "refine" / "refine.json").is_file() for how in ("never", "always"))
    assert results[0].solution.alternatives == results[1].solution.alternatives
    for metric in ("loss", "kl_divergence"):
        assert results[1].metric(metric)["child"] == pytest.approx(results[0].metric(metric)["child"], rel=1e-4)
    children = [layersmith.load(result.child) for result in results]
    with torch.no_grad():
        assert torch.equal(children[0](TOKENS).logits, children[1](TOKENS).logits)
    left = [p for p in tmp_path.rglob(".*") if p.name not in (".lock", ".store")]
    assert not left


def test_what_cannot_be_read_is_said(make_parent: Callable[..., Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    load_parent(make_parent("llama"), CPU).model.save_pretrained(broken)
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(InputError, match="truncated"):
        load_parent(broken, CPU, stream_near=tmp_path)
    load_parent(make_parent("llama"), CPU).model.save_pretrained(broken)
    parent = load_parent(broken, CPU, stream_near=tmp_path)
    os.truncate(weights, weights.stat().st_size // 2)  # in place: the file that is open
    with pytest.raises(InputError, match="shorter"):
        parent.layer(len(parent.blocks) - 1)


def test_whether_weights_fit(make_parent: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_parent("llama")
    model = load_parent(path, CPU).model
    count = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr("layersmith.execution.streaming.free_memory", lambda device: 4 * count / 0.76)
    assert is_too_large(path, CPU)
    assert not is_too_large(path, Runtime(torch.device("cpu"), torch.bfloat16))
    assert not is_too_large("a/name-on-a-hub", CPU)


def test_states_wait_in_a_file_without_a_name(tmp_path: Path) -> None:
    kept, spilled = States(), StatesOnDisk(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        size = (1 + step % 3, 5)
        key = ("a", step % 7)
        value = torch.randn(size, generator=generator).to(torch.bfloat16 if step % 2 else torch.float32)
        for states in (kept, spilled):
            states.put(key, value)
        if step % 5 == 4:
            assert torch.equal(kept.pop(("a", (step - 2) % 7)), spilled.pop(("a", (step - 2) % 7)))
    for number in range(7):
        try:
            expected = kept.get(("a", number))
        except KeyError:
            continue
        assert torch.equal(spilled.get(("a", number)), expected)
    hidden = torch.randn(3, 7, 4, generator=generator)
    for states in (kept, spilled):
        states.put("hidden", hidden)
        assert torch.equal(states.part("hidden", 2, 6), hidden[:, 2:6])
        states.forget("hidden")
    assert not list(tmp_path.iterdir())
