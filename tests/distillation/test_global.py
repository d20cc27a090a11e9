"""Global distillation: losses that are what they say, a run that goes on after it was killed.

Several processes are in test_ranks.py.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, linear
from transformers import Cohere2Config, Gemma2Config

import layersmith
from layersmith.costs.budget import parse_budget
from layersmith.distillation import arguments
from layersmith.distillation.finalists import diverse_solutions
from layersmith.distillation.losses import FromHidden, FromTop, Mixture, cosine_distance, head_losses
from layersmith.distillation.objective import ChildLosses, ParentTargets
from layersmith.distillation.parent_logits import ParentLogits, TopTokens, remember
from layersmith.distillation.steps import RowOrder, Steps
from layersmith.distillation.train import GlobalSetup, TrainingRows, train
from layersmith.errors import InputError, UsageError
from layersmith.evaluation.compare import closed
from layersmith.execution.parent import Parent
from layersmith.recipe import DistillationRecipe, SearchRecipe
from layersmith.run.artifacts import read_json, read_tensors
from layersmith.run.header import read_header, write_header
from layersmith.run.progress import Progress
from layersmith.run.runtime import Runtime
from layersmith.stages.distill_finished import distill
from layersmith.stages.job import job_of_run
from layersmith.stages.search import problem_as_measured
from tests.conformance.tiny import tiny_config, tiny_model
from tests.conftest import FAMILIES, NO_ATTENTION, TINY_RECIPE, block, child_model, stock_model

CPU = Runtime(torch.device("cpu"), torch.float32)
QUICK: dict[str, Any] = {"batch_tokens": 128, "device_tokens": 64, "learning_rate": 0.003, "log_every": 2}


def as_parent(model: Any) -> Parent:
    descriptor = layersmith.describe(model)
    blocks = tuple(layersmith.block_configs(model.config))
    return Parent("model", model, torch.float32, descriptor, blocks, "", CPU)


# ---------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("span", [5, 64])
def test_losses_and_gradients_are_the_plain_formulas(temperature: float, span: int) -> None:
    torch.manual_seed(0)
    hidden, parents = torch.randn(37, 16, requires_grad=True), torch.randn(37, 16)
    weight, bias = torch.nn.Parameter(torch.randn(50, 16)), torch.nn.Parameter(torch.randn(50))
    parents_weight = torch.randn(50, 16)
    labels = torch.randint(50, (37,)).index_fill(0, torch.tensor([3, 36]), -1)
    target = FromHidden(parents, lambda h: linear(h, parents_weight))
    made, kl, lm = head_losses(
        hidden,
        lambda h: linear(h, weight, bias),
        [weight, bias],
        labels,
        target,
        Mixture(0.7, 0, 0.3, temperature),
        span,
    )
    (3 * made).backward()
    grads = [t.grad for t in (hidden, weight, bias)]
    for tensor in (hidden, weight, bias):
        tensor.grad = None
    logits = linear(hidden, weight, bias)
    expected_kl = temperature**2 * kl_div(
        (logits / temperature).log_softmax(-1), (linear(parents, parents_weight) / temperature).log_softmax(-1),
        log_target=True, reduction="batchmean",
    )  # fmt: skip
    expected_lm = cross_entropy(logits, labels, ignore_index=-1)
    (3 * (0.7 * expected_kl + 0.3 * expected_lm)).backward()
    torch.testing.assert_close([kl, lm], [expected_kl.detach(), expected_lm.detach()])
    torch.testing.assert_close(grads, [t.grad for t in (hidden, weight, bias)], atol=1e-6, rtol=1e-5)


def test_what_is_kept_of_the_parent_is_compared_exactly() -> None:
    torch.manual_seed(0)
    hidden, weight, parents = torch.randn(9, 16, requires_grad=True), torch.randn(50, 16), 3 * torch.randn(9, 50)
    labels = torch.full((9,), -1)

    def loss(target: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden.grad = None
        made, _, _ = head_losses(hidden, lambda h: linear(h, weight), [], labels, target, Mixture(1, 0, 0, 1), 4)
        made.backward()
        assert hidden.grad is not None
        return made.detach(), hidden.grad.clone()

    whole = loss(FromHidden(parents, lambda h: h))
    torch.testing.assert_close(loss(FromTop.of(parents, 50, 1.0)), whole, atol=1e-5, rtol=1e-5)
    value = loss(FromTop.of(parents, 7, 1.0))
    hidden.grad = None
    log_p, log_q = parents.log_softmax(-1), linear(hidden, weight).log_softmax(-1)
    others = torch.ones(9, 50, dtype=torch.bool).scatter(1, log_p.topk(7).indices, False)
    rest_p, rest_q = ((x.exp() * others).sum(-1) for x in (log_p, log_q))
    expected = ((log_p.exp() * (log_p - log_q)) * ~others).sum(-1) + rest_p * (rest_p / rest_q).log()
    expected.mean().backward()
    torch.testing.assert_close(value, (expected.mean().detach(), hidden.grad), atol=1e-6, rtol=1e-5)
    assert value[0] < whole[0]


def test_cosine_distance() -> None:
    torch.manual_seed(0)
    hidden, other = torch.randn(3, 7, 16, requires_grad=True), torch.randn(3, 7, 16)
    made = cosine_distance(hidden, other)
    expected = 1 - cosine_similarity(hidden, other, dim=-1).mean()
    grad, wanted = torch.autograd.grad(2 * made, hidden)[0], torch.autograd.grad(2 * expected, hidden)[0]
    torch.testing.assert_close([made.detach(), grad], [expected.detach(), wanted])


SPECIAL: dict[str, Callable[..., Any]] = {
    "soft cap": lambda **sizes: Gemma2Config(**sizes, final_logit_softcapping=0.7, sliding_window=8),
    "scale": lambda **sizes: Cohere2Config(**sizes, logit_scale=0.3, sliding_window=8),
}
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("kind", [*SPECIAL, "qwen3", "llama_tied"])
def test_a_models_own_losses_and_gradients(kind: str) -> None:
    """Through the tap, span by span, they are those of its whole logits, whatever its head does to them."""
    config = SPECIAL[kind](**SIZES) if kind in SPECIAL else FAMILIES[kind]()
    parent, child = stock_model(config, 1), stock_model(config, 2).train()
    child.model.layers[0].register_forward_hook(lambda module, args, output: output)
    ids = torch.randint(3, 90, (2, 11))
    mixture = Mixture(1.0, 0.5, 0.25, 1.0)
    losses, targets = ChildLosses(as_parent(child), mixture), ParentTargets(as_parent(parent), mixture)
    assert losses.tap.is_plain is (kind not in SPECIAL)
    losses.span = 4
    loss, parts = losses.losses(ids, targets.outputs({"input_ids": ids}, from_cache=False))
    loss.backward()
    grads = {name: p.grad.clone() for name, p in child.named_parameters() if p.grad is not None}
    child.zero_grad()
    losses.tap.close()
    targets.tap.close()

    layers: dict[str, list[torch.Tensor]] = {"own": [], "parents": []}
    for name, model in (("own", child), ("parents", parent)):
        for layer in model.model.layers:
            keep = layers[name].append
            layer.register_forward_hook(lambda m, a, out, keep=keep: keep(out if torch.is_tensor(out) else out[0]))
    with torch.no_grad():
        wanted = parent(input_ids=ids, use_cache=False).logits
    logits = child(input_ids=ids, use_cache=False).logits
    kl = kl_div(
        logits.log_softmax(-1).flatten(0, 1),
        wanted.log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    pairs = zip(layers["own"], layers["parents"], strict=True)
    hidden = torch.stack([1 - cosine_similarity(a, b, dim=-1).mean() for a, b in pairs]).mean()
    lm = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected = kl + 0.5 * hidden + 0.25 * lm
    expected.backward()
    torch.testing.assert_close(parts, torch.stack([kl, hidden, lm]).detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss.detach(), expected.detach(), atol=1e-5, rtol=1e-4)
    assert grads.keys() == dict(child.named_parameters()).keys()
    for name, parameter in child.named_parameters():
        torch.testing.assert_close(
            grads[name], parameter.grad, atol=2e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


# ---------------------------------------------------------------------------------------------- training


def learn(parent: Any, child: Any, folder: Path, tokens: int = 2048, **recipe: Any) -> Any:
    rows = torch.randint(3, 500, (24, 32), generator=torch.Generator().manual_seed(5))
    setup = GlobalSetup(
        recipe=DistillationRecipe(**QUICK | recipe),
        tokens=tokens,
        seed=0,
        folder=folder / "checkpoints",
        curve=folder / "log.json",
        name="test",
    )
    return train(as_parent(parent), child, TrainingRows(rows, validation=rows[:4]), setup)


def test_a_child_whose_layers_differ_learns(tmp_path: Path) -> None:
    config = FAMILIES["qwen3"]()
    parent = stock_model(config)
    blocks = [block(ffn={"intermediate_size": 32}), block(NO_ATTENTION), block(NO_ATTENTION, {"no_op": True}), block()]
    child = child_model(config, blocks)
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    trained = learn(parent, child, tmp_path, gradient_checkpointing=True)
    points = trained.curve["points"]
    assert [p["tokens"] for p in points] == list(range(256, 2049, 256))
    assert points[-1]["kl"] < 0.9 * points[0]["kl"]
    assert points[-1]["hidden"] < points[0]["hidden"]
    assert read_json(tmp_path / "log.json") == trained.curve
    assert trained.curve["validation"][-1]["kl"] == trained.validation["kl"]
    assert all(torch.equal(before[name], tensor) for name, tensor in parent.state_dict().items())
    assert "forward" not in vars(child)
    assert child(input_ids=torch.arange(5)[None]).logits.shape == (1, 5, 512)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_families_learn(family: str, tmp_path: Path) -> None:
    """With dropout; with fused weights that a checkpoint names otherwise."""
    config = tiny_config(family)
    config.vocab_size = 512
    trained = learn(tiny_model(config).float().eval(), tiny_model(config, seed=1).float(), tmp_path)
    points = trained.curve["points"]
    assert points[-1]["kl"] < 0.95 * points[0]["kl"]


def test_the_parents_own_weights_have_nothing_to_learn(tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    trained = learn(stock_model(config), stock_model(config), tmp_path, tokens=128)
    assert trained.curve["points"] == []  # one step, and a point every two
    assert trained.validation["kl"] == pytest.approx(0, abs=1e-4)


def test_steps_are_the_same_for_any_number_of_processes() -> None:
    recipe = DistillationRecipe(batch_tokens=1024, device_tokens=100)
    one, two = Steps.of(recipe, 5000, 32), Steps.of(recipe, 5000, 32, world_size=2)
    assert (one.rows, one.rows_at_once, one.accumulated, one.count, one.tokens) == (32, 2, 16, 5, 1024)
    assert (two.rows, two.rows_at_once, two.accumulated, two.count) == (32, 2, 8, 5)
    with pytest.raises(UsageError, match="Make it 1056"):
        Steps.of(recipe, 5000, 32, world_size=3)
    together = dataclasses.replace(recipe, tensor_parallel=2)
    assert Steps.of(together, 5000, 32, world_size=4) == two
    assert Steps.of(together, 5000, 32, world_size=2) == one
    with pytest.raises(UsageError, match=r"3 groups of 2 processes\. Make it 1056"):
        Steps.of(together, 5000, 32, world_size=6)
    with pytest.raises(UsageError, match="3 processes are not a multiple of 2"):
        Steps.of(together, 5000, 32, world_size=3)
    order = RowOrder(torch.arange(10)[:, None], 25, seed=1)
    seen = [int(order[i]["row"]) for i in range(25)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20]
    same = RowOrder(torch.arange(10)[:, None], 25, seed=1).for_each_of(2, rows_at_once=3)
    batches = [[int(same[i + j]["row"]) for j in range(3)] for i in range(0, len(same), 3)]
    assert batches[::2] == batches[1::2] == [seen[i : i + 3] for i in range(0, 24, 3)]


def test_remembered_logits_are_the_parents(tmp_path: Path) -> None:
    parent = as_parent(stock_model(FAMILIES["qwen3"]()))
    rows = torch.randint(3, 500, (5, 12))
    advanced: list[float] = []
    kept = remember(parent, rows, TopTokens(6, 1.0), tmp_path / "kept", 2, advanced.append)
    assert sum(advanced) == 5
    expected = FromTop.of(parent.model(input_ids=rows[[3, 1]]).logits.flatten(0, 1), 6, 1.0)
    target = kept.target(torch.tensor([3, 1]), torch.device("cpu"))
    torch.testing.assert_close([target.log_p, target.log_rest], [expected.log_p, expected.log_rest])
    assert torch.equal(target.ids, expected.ids)
    torch.testing.assert_close(target.log_p.exp().sum(-1) + target.log_rest.exp(), torch.ones(24))
    file = next((tmp_path / "kept").glob("*.safetensors"))
    written = file.stat().st_mtime_ns
    remember(parent, rows, TopTokens(6, 1.0), tmp_path / "kept", 2, advanced.append)
    assert file.stat().st_mtime_ns == written
    assert ParentLogits.bytes_for(60, 6) == sum(part.numel() * 4 for part in (kept.ids, kept.log_p, kept.log_rest))


# ---------------------------------------------------------------------------------------------- a run

RECIPE = TINY_RECIPE | {"distillation": QUICK | {"finalist_distance": 2}}


@pytest.fixture(scope="module")
def run(make_parent: Callable[..., Path], text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests work on copies of it."""
    out = tmp_path_factory.mktemp("global") / "run"
    layersmith.compress(make_parent("llama_tied"), out, data=text_folder, budget=0.6, recipe=RECIPE)
    return out


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_a_run_is_distilled(own_run: Path) -> None:
    made = distill(own_run, tokens=4096)
    before, after = ({r["metric"]: r["child"] for r in e["rows"]} for e in (made.before, made.after))
    assert after["kl_divergence"] < before["kl_divergence"]
    rows = read_json(own_run / "evaluation" / "evaluation.json")["rows"]
    assert before == {r["metric"]: r["child"] for r in rows}
    assert (made.child / "config.json").read_text() == (own_run / "child" / "config.json").read_text()
    assert (made.child / "tokenizer.json").is_file()
    curve = read_json(own_run / "distillation" / "global" / "log.json")
    assert curve["x"] == "tokens"
    assert curve["points"][-1]["tokens"] == 4096
    assert not list((own_run / "distillation").rglob("checkpoint*"))
    card = (made.child / "README.md").read_text()
    kl = next(r for r in made.after["rows"] if r["metric"] == "kl_divergence")
    assert f"{kl['child']:.4f} ± {kl['child_standard_error']:.4f}" in card
    assert "trained against the parent on 4,096 tokens of text" in card
    assert "Not evaluated." not in card
    written = (made.child / "model.safetensors").stat().st_mtime_ns
    assert distill(own_run, tokens=4096) == made
    assert (made.child / "model.safetensors").stat().st_mtime_ns == written


def test_training_never_shows_what_evaluation_does(own_run: Path, tmp_path: Path) -> None:
    """Not from the run's own data, and not from other text that holds the evaluation's in other spacing."""
    from layersmith.data.overlap import Runs
    from layersmith.data.splits import load_tokenizer

    tokenizer = load_tokenizer(own_run / "child")
    evaluation = read_tensors(own_run / "data" / "tokens.safetensors")["evaluation"]
    text = " ".join(tokenizer.batch_decode(evaluation)).replace(" ", "  ")
    (tmp_path / "other.txt").write_text("def other(name):\n    return name\n" * 40 + text)
    for data in (None, tmp_path / "other.txt"):
        distill(own_run, tokens=128 if data is None else 4096, data=data)
        rows = read_tensors(own_run / "distillation" / "data" / "tokens.safetensors")["training"]
        assert len(rows)
        assert not Runs(evaluation, tokenizer).within(rows).any()
        said = read_json(own_run / "distillation" / "data" / "data.json")["warnings"]
        assert not any("has changed since" in warning for warning in said)
    assert read_json(own_run / "distillation" / "data" / "data.json")["overlapping"] > 0
    with pytest.raises(InputError, match=r"set distillation\.overlap to leave_out or warn"):
        distill(
            own_run, data=tmp_path / "other.txt", recipe={"distillation": QUICK | {"tokens": 4096, "overlap": "refuse"}}
        )


def test_kept_logits_in_a_run(own_run: Path, tmp_path: Path) -> None:
    """With all of the vocabulary kept, the child is the one that is taught by the parent itself."""
    children = []
    for kept in (0, 512):
        settings = QUICK | {"tokens": 2048, "hidden": 0, "cache_top": kept}
        made = distill(own_run, recipe={"distillation": settings})
        children.append(layersmith.load(made.child).state_dict())
    for name, tensor in children[0].items():
        torch.testing.assert_close(tensor, children[1][name], atol=1e-4, rtol=1e-3)
    assert list((own_run / "distillation" / "parent-logits").rglob("*.safetensors"))


def test_finalists(own_run: Path) -> None:
    made = distill(own_run, tokens=1024, finalists=3)
    assert [row["number"] for row in made.finalists] == [0, 1, 2]
    others = [row["score"] for row in made.finalists[1:]]
    assert others == sorted(others)
    best = min(made.finalists, key=lambda row: row["kl"])
    assert [row["won"] for row in made.finalists] == [row is best for row in made.finalists]
    solution = read_json(own_run / "distillation" / "finalists" / "solution.json")
    assert solution["score"] == best["score"]
    assert solution["costs"]["parameters"] == sum(p.numel() for p in layersmith.load(made.child).parameters())
    assert "on 1,024 tokens" in (made.child / "README.md").read_text()
    assert distill(own_run, tokens=1024, finalists=3) == made


def test_finalists_keep_the_searchs_rules(own_run: Path) -> None:
    """The first is the run's own; all are apart from each other, within the budget, and as the rules say."""
    rules = SearchRecipe(keep_layers=(2,), max_removed_attentions=1, uniform_groups=2)
    job = job_of_run(own_run, change=lambda recipe: dataclasses.replace(recipe, search=rules))
    job.limits = parse_budget(params="0.8").limits
    problem = problem_as_measured(job)
    first = problem.best()
    solutions = diverse_solutions(problem, first, 4, distance=3)
    assert solutions[0] == first
    assert len(solutions) == 4
    for solution in solutions:
        assert problem.fits(solution.alternatives)
        kinds = {(a.layer, a.subblock): a.kind for a in solution.alternatives}
        assert kinds[2, "attention"] == kinds[2, "ffn"] == "parent"
        names = {(a.layer, a.subblock): a.name for a in solution.alternatives}
        assert all(names[0, subblock] == names[1, subblock] for subblock in ("attention", "ffn"))
        assert sum(a.kind == "no_op" and a.subblock == "attention" for a in solution.alternatives) <= 1
        for other in solutions:
            apart = sum(a != b for a, b in zip(solution.alternatives, other.alternatives, strict=True))
            assert other is solution or apart >= 3
    assert len(diverse_solutions(problem, first, 3, distance=len(problem.by_place) + 1)) == 1


KILLED = """
import json, os, signal, sys
from contextlib import contextmanager
from layersmith.distillation import trainer
from layersmith.run.progress import Progress
from layersmith.stages.distill_finished import distill

trainer._SAVING_SHARE = float("inf")  # a checkpoint after every step, however long writing it takes

class Killing(Progress):
    done = 0.0

    @contextmanager
    def stage(self, name, total, unit):
        def advance(tokens, *more):
            self.done += tokens if name == "distilled" else 0
            if self.done >= 20 * 128:
                os.kill(os.getpid(), signal.SIGKILL)
        yield advance

distill(sys.argv[1], recipe={"distillation": json.loads(sys.argv[2])}, progress=Killing())
"""


def killed(folder: Path, settings: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """A process that is killed by the system after 20 steps of the global distillation."""
    command = [sys.executable, "-c", KILLED, str(folder), json.dumps(settings)]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


class Interrupted(Exception):
    pass


class Interrupting(Progress):
    """Stops the run when a stage is so far."""

    def __init__(self, name: str, at: float):
        self.name, self.at, self.done = name, at, 0.0

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
        def advance(steps: float, *more: Any) -> None:
            self.done += steps if name == self.name else 0
            if self.done >= self.at:
                raise Interrupted

        yield advance


def test_interrupted_and_killed_it_ends_with_the_same_bits(own_run: Path, run: Path, tmp_path: Path) -> None:
    settings = QUICK | {"tokens": 5120, "log_every": 1, "save_seconds": 0.0, "finalists": 2, "finalist_distance": 2}
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    distill(whole, recipe={"distillation": settings})
    with pytest.raises(Interrupted):  # within the second finalist
        distill(own_run, recipe={"distillation": settings}, progress=Interrupting("distillation/finalists", 700))
    assert (own_run / "distillation" / "finalists.work" / "0" / "finalist.json").is_file()
    ended = killed(own_run, settings)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    steps = [
        int(path.name.partition("-")[2]) for path in (own_run / "distillation" / "global" / "checkpoints").glob("c*-*")
    ]
    advanced: list[float] = []

    class Listening(Progress):
        @contextmanager
        def stage(self, name: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
            yield lambda steps, *more: advanced.append(steps) if name == "distilled" else None

    distill(own_run, recipe={"distillation": settings}, progress=Listening())
    assert advanced[0] / 128 in steps  # it went on where it was
    assert advanced[0] >= 128 * 18
    for file in (
        "distilled/model.safetensors",
        "distillation/global/log.json",
        "distillation/finalists/finalists.json",
    ):
        assert (own_run / file).read_bytes() == (whole / file).read_bytes(), file
    assert not list((own_run / "distillation").rglob(".*"))


def test_what_is_wrong_is_said_before_work_starts(own_run: Path, run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", list)
    for change, match in (
        ({"kl": 0, "hidden": 0}, "nothing to learn"),
        ({"learning_rate": -1.0}, "must be greater than 0"),
        ({"cache_top": 5}, "no hidden states"),
        ({"trainer": {"max_grad_nrom": 1.0}}, "Did you mean 'max_grad_norm'"),
        ({"trainer": {"max_steps": 5}}, r"distillation\.tokens"),
        ({"schedule": "sideways"}, "sideways"),
        ({"warmup": 2.0}, "warmup"),
        ({"report_to": ["tensorbord"]}, "Did you mean 'tensorboard'"),
        ({"report_to": ["tensorboard"]}, "pip install tensorboard"),
        ({"tokenz": 2}, "Did you mean 'tokens'"),
    ):
        with pytest.raises(UsageError, match=match) as refused:
            distill(own_run, recipe={"distillation": QUICK | change})
        assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match="not a run folder"):
        distill(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no such file"):
        distill(own_run, tokens=128, data=tmp_path / "nowhere.txt")
    usage = shutil.disk_usage(own_run)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(InputError, match="GB"):
            distill(own_run, tokens=128)
    header = read_header(own_run)
    header["parent"]["identity"] = "another"
    write_header(own_run, header)
    with pytest.raises(InputError, match="not the parent"):
        distill(own_run, tokens=128)
    assert not (own_run / "distilled").exists()
    shutil.rmtree(own_run / "child")
    with pytest.raises(InputError, match=r"is missing\. Run the same compress command again"):
        distill(own_run, tokens=128)


def test_a_loss_that_is_not_a_number_stops_it(tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    with pytest.raises(InputError, match="not a number after"):
        learn(stock_model(config), stock_model(config, 2), tmp_path, learning_rate=1e30)


def test_models_without_common_ground_are_refused(tmp_path: Path) -> None:
    parent = stock_model(FAMILIES["llama"]())
    with pytest.raises(UsageError, match=r"distillation\.hidden"):
        learn(parent, stock_model(FAMILIES["llama"](num_hidden_layers=3)), tmp_path)
    with pytest.raises(UsageError, match=r"distillation\.kl"):
        learn(parent, stock_model(FAMILIES["llama"](vocab_size=500)), tmp_path)
    trained = learn(parent, stock_model(FAMILIES["llama"](num_hidden_layers=3)), tmp_path / "kl", tokens=256, hidden=0)
    assert trained.validation["hidden"] == 0


def test_it_logs_to_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = FAMILIES["llama"]()
    trained = learn(stock_model(config), stock_model(config, 2), tmp_path, tokens=512, report_to=("tensorboard",))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("train/kl")] == pytest.approx([p["kl"] for p in trained.curve["points"]])


def test_what_is_closed_carries_the_noise_of_its_rows() -> None:
    parent = [1.0, 2.0, 3.0, 4.0]
    above = [0.2, 0.1, 0.3, 0.2]

    def evaluation(differences: list[float]) -> dict[str, Any]:
        child = [p + d for p, d in zip(parent, differences, strict=True)]
        return {"by_row": {"parent_loss": parent, "child_loss": child}}

    before = evaluation(above)
    share, error = closed(before, evaluation([d / 4 for d in above]))
    assert share == pytest.approx(0.75)
    assert error == pytest.approx(0, abs=1e-9)  # the same share of every row
    after = [0.1, 0.0, 0.0, 0.1]
    share, error = closed(before, evaluation(after))
    assert share == pytest.approx(0.75)
    assert error == pytest.approx(stdev(a - 0.25 * b for a, b in zip(after, above, strict=True)) / 2 / 0.2)
