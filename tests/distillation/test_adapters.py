"""Global distillation of low-rank adapters, which are merged at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

import layersmith
from layersmith.distillation import adapters, trainer
from layersmith.errors import UsageError
from layersmith.execution.streaming import WeightStream
from layersmith.run.artifacts import read_json
from layersmith.stages.distill_finished import distill
from tests.conformance.tiny import tiny_config
from tests.conftest import TINY_RECIPE, stock_model
from tests.distillation.test_long_context import Interrupted, Watching

SETTINGS: dict[str, Any] = {
    "tokens": 2048, "lora_rank": 4, "batch_tokens": 128, "device_tokens": 128, "learning_rate": 0.01, "log_every": 1,
    "save_seconds": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bamba", "deepseek_v3"])
def test_adapters_add_nothing_at_first_and_are_merged(family: str) -> None:
    pytest.importorskip("peft")
    model = stock_model(tiny_config(family)).float()
    ids = torch.arange(3, 15)[None]
    before, names = model(ids).logits, list(model.state_dict())
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapters.add_adapters(model, layersmith.describe(model), 4, 0)
    assert torch.equal(model(ids).logits, before)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in trained) < sum(p.numel() for p in frozen.values())
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05)
    after = model(ids).logits
    assert not torch.allclose(after, before, atol=1e-3)
    adapters.merge_adapters(model)
    torch.testing.assert_close(model(ids).logits, after, rtol=1e-3, atol=1e-4)
    assert list(model.state_dict()) == names
    embeddings = model.get_input_embeddings().weight
    assert any(torch.equal(embeddings, weight) for weight in frozen.values())


@pytest.fixture(scope="module")
def run(make_parent: Callable[..., Path], text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "run"
    layersmith.compress(make_parent("llama_tied"), out, data=text_folder, budget=0.6, recipe=TINY_RECIPE)
    return out


def test_a_child_learns_by_adapters_and_is_resumed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    whole, other = (Path(shutil.copytree(run, tmp_path / name)) for name in ("whole", "other"))
    made = distill(whole, recipe={"distillation": SETTINGS | {"long_tokens": 512, "long_sequence_length": 64}})
    before, after = ({r["metric"]: r["child"] for r in e["rows"]} for e in (made.before, made.after))
    assert after["kl_divergence"] < 0.98 * before["kl_divergence"]
    assert (made.child / "config.json").read_text() == (run / "child" / "config.json").read_text()
    children = [layersmith.load(folder).state_dict() for folder in (run / "child", made.child)]
    assert children[0].keys() == children[1].keys()
    changed = [name for name, weight in children[0].items() if not torch.equal(weight, children[1][name])]
    assert changed
    assert all("proj" in name for name in changed)

    monkeypatch.setattr(trainer, "_SAVING_SHARE", float("inf"))  # a checkpoint after every step
    with pytest.raises(Interrupted):
        distill(other, recipe={"distillation": SETTINGS}, progress=Watching(1024))
    checkpoints = sorted((other / "distillation" / "global" / "checkpoints").glob("checkpoint-*/states"))
    written = FileSystemReader(checkpoints[-1]).read_metadata().state_dict_metadata
    assert all("lora_" in name for name in written if name.startswith("model."))  # no frozen weights
    watching = Watching()
    distill(other, recipe={"distillation": SETTINGS}, progress=watching)
    assert watching.steps[0] >= 512
    again = Path(shutil.copytree(run, tmp_path / "again"))
    distill(again, recipe={"distillation": SETTINGS})
    for file in ("distilled/model.safetensors", "distillation/global/log.json"):
        assert (other / file).read_bytes() == (again / file).read_bytes(), file
    assert len(read_json(again / "distillation" / "global" / "log.json")["points"]) == 16


def test_what_adapters_do_not_go_with_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UsageError, match="finalists are trained whole"):
        distill(run, recipe={"distillation": SETTINGS | {"finalists": 2}})
    monkeypatch.setattr(adapters, "find_spec", lambda package: None)
    with pytest.raises(UsageError, match=r"pip install 'layersmith\[lora\]'"):
        distill(run, recipe={"distillation": SETTINGS})
    assert not (run / "distillation").exists()


@pytest.mark.parametrize("family", ["gpt2", "deepseek_v3"])
def test_weights_may_stay_on_the_disk(
    family: str, text_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child is that of weights in memory, to the bit, also of a training that was interrupted."""
    pytest.importorskip("peft")
    parent, out = tmp_path / "parent", tmp_path / "in_memory"
    config = tiny_config(family)
    config.vocab_size = len(tokenizer)
    stock_model(config).float().save_pretrained(parent)
    tokenizer.save_pretrained(parent)
    quick = TINY_RECIPE | {"local_distillation": {"tokens": 0, "coupled_tokens": 0}}
    layersmith.compress(parent, out, data=text_folder, budget=0.8, recipe=quick)
    on_disk = Path(shutil.copytree(out, tmp_path / "on_disk"))
    there: list[int] = []  # before each layer of the child runs, how many have weights in memory
    run_again = WeightStream.run_again_in_backward

    def watched(stream: WeightStream) -> None:
        run_again(stream)
        for layer in stream.layers:
            layer.register_forward_pre_hook(lambda module, args: there.append(_number_there(stream.layers)))

    monkeypatch.setattr(WeightStream, "run_again_in_backward", watched)
    settings = SETTINGS | {"tokens": 1024}
    distill(out, recipe={"distillation": settings})
    monkeypatch.setattr(trainer, "_SAVING_SHARE", float("inf"))  # a checkpoint after every step
    with pytest.raises(Interrupted):
        distill(on_disk, recipe={"distillation": settings, "stream": "always"}, progress=Watching(512))
    made = distill(on_disk, recipe={"distillation": settings, "stream": "always"})
    for file in ("distilled/model.safetensors", "distilled/config.json", "distillation/global/log.json"):
        assert (on_disk / file).read_bytes() == (out / file).read_bytes(), file
    assert made.after
    assert len(there) > 8
    assert set(there) == {1}


def _number_there(layers: Sequence[torch.nn.Module]) -> int:
    frozen = [[p for name, p in layer.named_parameters() if "lora_" not in name] for layer in layers]
    return sum(any(not parameter.is_meta for parameter in of_layer) for of_layer in frozen)
