"""Something that a run depends on changes between two calls: the run follows, as a fresh one would, or refuses and says
what has changed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from layersmith.execution.parent import _tensor_digests
from layersmith.run.header import read_header
from tests.faults.conftest import ALL, RECIPE, Tiny, command, contents, copy_of

DESCRIPTOR = """
from layersmith.model_descriptor.factory import ModelDescriptorFactory
class Mine(ModelDescriptorFactory.get("llama")):
    pass
"""


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | values))


def change_one_weight(parent: Path) -> None:
    tensors = load_file(parent / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    save_file(tensors, parent / "model.safetensors", {"format": "pt"})


# Each of these is followed.
FOLLOWED: dict[str, Callable[[Tiny], object]] = {
    "generation config": lambda t: edit_json(t.parent / "generation_config.json", max_length=77),
    "tokenizer config": lambda t: edit_json(t.parent / "tokenizer_config.json", model_max_length=77),
    "chat template": lambda t: (t.parent / "chat_template.jinja").write_text("{{ messages }}"),
}
# Each of these is refused, and this is said.
REFUSED: dict[str, tuple[Callable[[Tiny], object], str]] = {
    "one weight": (lambda t: change_one_weight(t.parent), "another parent"),
    "config": (lambda t: edit_json(t.parent / "config.json", rms_norm_eps=1e-5), "another parent"),
    "data": (lambda t: (t.data / "more.txt").write_text("something else " * 200), "another data"),
    "recipe": (lambda t: edit_json(t.recipe, seed=7), "seed: 0 => 7"),
}


def own(tiny: Tiny, folder: Path) -> Tiny:
    """Copies of parent, data and recipe."""
    folder.mkdir(exist_ok=True)
    return Tiny(
        copy_of(tiny.parent, folder / "parent"),
        copy_of(tiny.data, folder / "data"),
        Path(shutil.copy(tiny.recipe, folder / "recipe.json")),
    )


@pytest.mark.parametrize("what", FOLLOWED if ALL else ["all"])
def test_what_is_followed(what: str, tiny: Tiny, compressed: Path, tmp_path: Path) -> None:
    """The run becomes what a fresh one is, but for the parent's place in run.json."""
    mine, run, fresh = own(tiny, tmp_path), copy_of(compressed, tmp_path / "run"), tmp_path / "fresh"
    for change in FOLLOWED.values() if what == "all" else [FOLLOWED[what]]:
        change(mine)
    said = command(*mine.compress(run))
    assert said.code == 0, said.err
    assert "child is made again: what it depends on has changed" in said.err
    assert command(*mine.compress(fresh)).code == 0
    found, expected = contents(run), contents(fresh)
    stages, expected_stages = read_header(run)["stages"], read_header(fresh)["stages"]
    places = ("run.json", "report.json", "child/README.md", "data/data.json")  # they name the parent or the text
    assert stages | {"data": {}} == expected_stages | {"data": {}}
    assert {k: v for k, v in found.items() if k not in places} == {k: v for k, v in expected.items() if k not in places}
    assert found != contents(compressed)


def test_what_is_refused(tiny: Tiny, compressed: Path, tmp_path: Path) -> None:
    run = copy_of(compressed, tmp_path / "run")
    before = contents(run)
    for what, (change, message) in REFUSED.items():
        mine = own(tiny, tmp_path / what)
        change(mine)
        said = command(*mine.compress(run))
        assert said.code == 2, what
        assert message in said.err
        assert contents(run) == before


def test_a_parent_in_other_files_is_the_same_parent(tiny: Tiny, compressed: Path, tmp_path: Path) -> None:
    mine, run = own(tiny, tmp_path), copy_of(compressed, tmp_path / "run")
    tensors, shards = load_file(mine.parent / "model.safetensors"), [{}, {}]
    for number, (name, tensor) in enumerate(tensors.items()):
        shards[number % 2][name] = tensor
    (mine.parent / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, mine.parent / name, {"format": "pt"})
    index = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    edit_json(mine.parent / "model.safetensors.index.json", metadata={}, weight_map=index)
    before = contents(run)
    assert command(*mine.compress(run)).code == 0
    assert contents(run) == before


def test_another_descriptor(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one, none, and the same after its source changed are refused by every command."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(DESCRIPTOR)
    run, given = tmp_path / "run", ["--descriptor", "mine:Mine"]
    assert command(*tiny.compress(run, *given)).code == 0
    for again in (tiny.compress(run), tiny.search(run), tiny.distill(run)):
        said = command(*again)
        assert said.code == 2
        assert "another descriptor" in said.err
    assert command(*tiny.search(run, *given)).code == 0
    (tmp_path / "mine.py").write_text(DESCRIPTOR + "    note = 'changed'\n")
    del sys.modules["mine"]
    said = command(*tiny.compress(run, *given))
    assert said.code == 2
    assert "source" in said.err


@pytest.mark.skipif(not ALL, reason="slow; part of `make faults`")
def test_other_training_data(tiny: Tiny, compressed: Path, tmp_path: Path) -> None:
    run, fresh, data = (
        copy_of(compressed, tmp_path / "run"),
        copy_of(compressed, tmp_path / "fresh"),
        tmp_path / "d.txt",
    )
    data.write_text("\n\n".join(path.read_text()[:20000] for path in sorted(tiny.data.iterdir())[:2]))
    assert command(*tiny.distill(run), "--data", data).code == 0
    data.write_text("\n\n".join(path.read_text()[-20000:] for path in sorted(tiny.data.iterdir())[3:]))
    for folder in (run, fresh):
        said = command(*tiny.distill(folder), "--data", data)
        assert said.code == 0, said.err
    assert contents(run) == contents(fresh)


@pytest.mark.skipif(not ALL, reason="slow; part of `make faults`")
def test_other_times(tiny: Tiny, tmp_path: Path) -> None:
    mine, times = own(tiny, tmp_path), tmp_path / "times.csv"
    asked = ["costs", str(mine.parent), "--csv", str(times), "--recipe", str(mine.recipe), "--context", "64"]
    assert command(*asked, "--on", "H100").code == 0
    mine.recipe.write_text(json.dumps(RECIPE | {"costs": {"times": str(times), "time_child": False}}))

    def compress(out: Path) -> list[str]:
        request = [str(mine.parent), str(out), "--data", str(mine.data), "--recipe", str(mine.recipe)]
        return ["compress", *request, "--time-per-token", "0.95", "--context", "64"]

    said = command(*compress(tmp_path / "run"))
    assert said.code == 0, said.err
    assert command(*asked, "--on", "A100").code == 0
    for out in ("run", "fresh"):
        said = command(*compress(tmp_path / out))
        assert said.code == 0, said.err
    assert contents(tmp_path / "run") == contents(tmp_path / "fresh")


def test_another_frontier_leaves_the_run_s(tiny: Tiny, compressed: Path, tmp_path: Path) -> None:
    run = copy_of(compressed, tmp_path / "run")
    before = contents(run)
    said = command("search", run, "--frontier", "--kv-cache", "1.0")
    assert said.code == 0, said.err
    assert (run / "asked-frontier" / "frontier.json").is_file()
    assert command(*tiny.compress(run)).code == 0
    after = contents(run)
    assert {name for name in after if after[name] != before.get(name)} == {"asked-frontier/frontier.json", "run.json"}


def test_all_weights_count(tiny: Tiny, tmp_path: Path) -> None:
    """Digests of tensors do not depend on the order in a file, and each byte counts."""
    tensors = load_file(tiny.parent / "model.safetensors")
    save_file(dict(reversed(tensors.items())), tmp_path / "a.safetensors")
    found = _tensor_digests(tmp_path / "a.safetensors")
    assert found == _tensor_digests(tiny.parent / "model.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        name = list(file.keys())[3]
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, tmp_path / "b.safetensors")
    changed = {n for n, sha in _tensor_digests(tmp_path / "b.safetensors").items() if sha != found[n]}
    assert changed == {name}
