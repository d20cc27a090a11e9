"""A run folder or checkpoint that someone else made runs no code and reads no file outside itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import layersmith
from layersmith.data.splits import load_tokenizer
from layersmith.errors import InputError, LayersmithError, UsageError, brief, printable
from layersmith.heterogeneous.weight_files import check_files, weight_files
from layersmith.recipe import Recipe
from layersmith.run.header import read_header, write_header
from layersmith.stages.distill_finished import distill
from layersmith.stages.evaluate_model import evaluate
from layersmith.stages.reopen import report, search
from layersmith.untrusted import MAX_DEPTH, parse_json, parse_yaml, read_safetensors_header
from tests.conftest import TINY_RECIPE

QUICK = TINY_RECIPE | {"local_distillation": {"tokens": 0, "coupled_tokens": 0}}


@pytest.fixture(scope="module")
def given_run(make_parent: Callable[..., Path], text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its parent, as someone else could send them."""
    folder = tmp_path_factory.mktemp("given")
    shutil.copytree(make_parent("llama", num_hidden_layers=2), folder / "parent")
    layersmith.compress(folder / "parent", folder / "run", data=text_folder, budget=0.9, recipe=QUICK)
    return folder / "run"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def trap(given_run: Path, tmp_path: Path) -> Path:
    """A copy of the run whose parent comes with code that leaves a file, and whose ``run.json`` allows it."""
    shutil.copytree(given_run.parent, tmp_path / "trap")
    parent, run = tmp_path / "trap" / "parent", tmp_path / "trap" / "run"
    names = {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M", "AutoTokenizer": ["trap.T", "trap.T"]}
    edit(parent / "config.json", model_type="trap", auto_map=names)
    edit(parent / "tokenizer_config.json", auto_map=names)
    (parent / "trap.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\nclass T: pass\n"
    )
    header = read_header(run)
    header["parent"]["path"] = str(parent)
    write_header(run, header)
    return run


@pytest.mark.parametrize(
    "command",
    [
        report,
        distill,
        lambda run: search(run, 0.95),
        lambda run: evaluate(run.parent / "parent", run / "recipe.yaml"),
        lambda run: layersmith.compress(run.parent / "parent", run.parent / "new", data=run, budget=0.9),
        lambda run: layersmith.load(run.parent / "parent"),
        lambda run: layersmith.describe(run.parent / "parent"),
        lambda run: layersmith.export(run.parent / "parent", run.parent / "new", "vllm"),
    ],
    ids=["report", "distill", "search", "evaluate", "compress", "load", "describe", "export"],
)
def test_no_file_can_allow_code_to_run(command: Callable[[Path], Any], trap: Path, tmp_path: Path) -> None:
    with pytest.raises(LayersmithError, match="--trust-remote-code"):
        command(trap)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_runs_no_code(trap: Path, tmp_path: Path) -> None:
    load_tokenizer(trap.parent / "parent")  # as a stock one
    assert not (tmp_path / "ran").exists()


def test_a_recipe_cannot_allow_code_and_says_what_can(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("trust_remote_code: true")
    for make in (lambda: Recipe.read(tmp_path / "r.yaml"), lambda: Recipe().with_settings(["trust_remote_code=true"])):
        with pytest.raises(UsageError, match="--trust-remote-code"):
            make()


def test_a_run_cannot_allow_code(given_run: Path, tmp_path: Path) -> None:
    shutil.copytree(given_run, tmp_path / "run")
    header = read_header(tmp_path / "run")
    header["recipe"]["trust_remote_code"] = True
    write_header(tmp_path / "run", header)
    with pytest.raises(UsageError, match="--trust-remote-code"):
        report(tmp_path / "run")


# ---------------------------------------------------------------------------------------------- paths


def test_a_run_names_no_descriptor_to_import(given_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(given_run, tmp_path / "run")
    (tmp_path / "run" / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path / "run")
    header = read_header(tmp_path / "run")
    write_header(tmp_path / "run", header | {"descriptor": {"name": "trap:Trap", "source": "0"}})
    with pytest.raises(InputError, match="another descriptor"):
        report(tmp_path / "run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_a_run_names_no_file_outside(name: str, given_run: Path, tmp_path: Path) -> None:
    shutil.copytree(given_run, tmp_path / "run")
    header = read_header(tmp_path / "run")
    header["stages"]["scores"]["files"][name] = {"size": 1, "sha256": "0"}
    write_header(tmp_path / "run", header)
    with pytest.raises(InputError, match="which is not in"):
        report(tmp_path / "run")


def test_a_link_out_of_a_run_is_not_followed(given_run: Path, tmp_path: Path) -> None:
    shutil.copytree(given_run, tmp_path / "run")
    scores = tmp_path / "run" / "scores" / "scores.json"
    scores.rename(tmp_path / "elsewhere.json")
    scores.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match="leads out of the folder"):
        report(tmp_path / "run")


@pytest.fixture
def checkpoint(given_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(given_run.parent / "parent", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../s.safetensors", "", "a\0b"]
)
def test_an_index_names_only_files_in_its_folder(name: str, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "secret.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    for use in (weight_files, check_files, layersmith.load):
        with pytest.raises(InputError, match="which is not in"):
            use(checkpoint)


def test_a_linked_shard_is_read(checkpoint: Path) -> None:
    """The Hub's cache consists of links."""
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "blob")
    (checkpoint / "model.safetensors").symlink_to(checkpoint.parent / "blob")
    assert layersmith.load(checkpoint).num_parameters() > 0


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("config.json", {"transformers_weights": "../other/model.safetensors"}, "transformers_weights"),
        ("config.json", {"attn_implementation": "someone/kernel"}, "attn_implementation"),
        ("config.json", {"_attn_implementation": "someone/kernel:x"}, "attn_implementation"),
        ("adapter_config.json", {"base_model_name_or_path": "/etc"}, "adapter"),
        ("tokenizer_config.json", {"tokenizer_file": "/etc/passwd"}, "tokenizer_file"),
        ("tokenizer_config.json", {"vocab_file": "../x"}, "vocab_file"),
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ],
)
def test_a_checkpoint_names_nothing_outside(
    file: str, changes: dict[str, Any], sentence: str, checkpoint: Path
) -> None:
    if not (checkpoint / file).exists():
        (checkpoint / file).write_text("{}")
    edit(checkpoint / file, **changes)
    with pytest.raises(InputError, match=sentence):
        (load_tokenizer if "tokenizer" in file else layersmith.load)(checkpoint)


# ---------------------------------------------------------------------------------------------- bounds

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [BOMB, f"seed: {'[' * 5000}", f"prompts: [{'x,' * 200_000}]", "seed: 2026-99-99"])
def test_a_yaml_bomb_is_refused_at_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(LayersmithError) as raised:
        Recipe.read(tmp_path / "r.yaml")
    assert len(str(raised.value)) < 1000


def test_a_recipe_that_layersmith_writes_is_read(tmp_path: Path) -> None:
    """PyYAML writes aliases for values that are the same object."""
    text = "x" * 100
    recipe = Recipe(prompts=(text, text))
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert Recipe.read(tmp_path / "r.yaml") == recipe
    assert "&" not in yaml.safe_dump(json.loads(json.dumps(recipe.to_dict())))


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, "NaN", "[Infinity]", "9" * 10_000, "\ud800"])
def test_json_is_bounded(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text.encode("utf-8", "surrogatepass"))


def test_depth_is_counted() -> None:
    deep: Any = 1
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    assert parse_json(json.dumps(deep)) == parse_yaml(json.dumps(deep)) == deep
    for parse in (parse_json, parse_yaml):
        with pytest.raises(ValueError, match="deep"):
            parse(json.dumps([[deep]]))


@pytest.mark.parametrize("size", [2**60, 2**63 - 1, 99_000_000])
def test_a_header_that_claims_to_be_long_takes_no_memory(size: int, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(size.to_bytes(8, "little") + b"{}")
    for use in (check_files, layersmith.load, lambda path: read_safetensors_header(path / "model.safetensors")):
        with pytest.raises(InputError, match=r"model.safetensors: truncated or damaged"):
            use(checkpoint)


def test_a_header_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert read_safetensors_header(tmp_path / "a.safetensors")[0]["a"]["shape"] == [2]
    for text in (b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}'):
        (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(InputError, match="damaged"):
            read_safetensors_header(tmp_path / "a.safetensors")


# ---------------------------------------------------------------------------------------------- messages


def test_messages_are_short_and_leave_the_terminal_alone() -> None:
    assert printable("a\x1b[31mb\x07\u202e\ud800\n\tc") == "a�[31mb���\n\tc"
    assert len(brief("x" * 10**6)) < 300
    error = UsageError("\x1b]0;owned\x07" + "x" * 10**7)
    assert len(str(error)) < 5000
    assert "\x1b" not in str(error)
    with pytest.raises(UsageError) as raised:
        Recipe.from_dict({"seed": "y" * 10**5, "x" * 10**5: 1, **{f"key{i}": 0 for i in range(500)}})
    assert len(str(raised.value)) < 4500


@pytest.mark.parametrize("wider", [{"vocab_size": 2**31}, {"intermediate_size": 2**40}])
def test_a_config_of_a_larger_model_takes_no_memory(
    make_parent: Callable[..., Path], tmp_path: Path, wider: dict[str, int]
) -> None:
    folder = shutil.copytree(make_parent("llama"), tmp_path / "parent")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | wider))
    with pytest.raises(InputError, match="more than its files can hold"):
        layersmith.load(folder)
