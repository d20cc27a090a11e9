"""What a message advises works: each message with advice in the source is provoked here and its advice followed, or
names the test that does so."""

from __future__ import annotations

import ast
import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from layersmith.errors import InputError
from layersmith.run.artifacts import read_json, read_tensors, saying_disk_full
from layersmith.run.header import read_header, write_header
from tests.faults.conftest import Tiny, command, copy_of

SOURCE = Path(__file__).parents[2] / "src" / "layersmith"
ADVICE = re.compile(
    r"same [\w{} ]*command again|[Cc]hoose another folder|[Rr]estore (it|them|the)|Download it again|Wait for it|"
    r"Remove it"
)


class Place:
    """A copy of a finished run, the request that made it, and a folder for more."""

    def __init__(self, tiny: Tiny, compressed: Path, folder: Path):
        self.tiny, self.folder, self.run = tiny, folder, copy_of(compressed, folder / "run")

    def refused(self, *arguments: str, match: str) -> None:
        said = command(*arguments)
        assert said.code == 2, said
        assert re.search(match, " ".join(said.err.split())), said.err

    def works(self, *arguments: str) -> None:
        said = command(*arguments)
        assert said.code == 0, said.err


def not_finished(at: Place) -> None:
    shutil.rmtree(at.run)
    at.works(*at.tiny.compress(at.run, "--until", "costs"))
    at.refused(*at.tiny.search(at.run), match="not finished. Run the same compress command again")
    at.works(*at.tiny.compress(at.run))
    at.works(*at.tiny.search(at.run))


def another_folder(at: Place) -> None:
    """A file, a folder of something else and a link to nowhere are refused; another folder is taken."""
    (at.folder / "file").write_text("x")
    (at.folder / "other").mkdir()
    (at.folder / "other" / "precious").write_text("x")
    (at.folder / "link").symlink_to(at.folder / "nowhere")
    for name in ("file", "other", "link"):
        at.refused(*at.tiny.compress(at.folder / name), match="Choose another folder")
    at.works(*at.tiny.compress(at.folder / "new", "--until", "data"))


def another_request(at: Place) -> None:
    """The advice is to search for another budget, to restore the recipe, or to take another folder."""
    asked = at.tiny.compress(at.run)
    asked[asked.index("0.9")] = "0.8"
    at.refused(*asked, match="another budget .* ask this run for another budget with `layersmith search`")
    at.works("search", str(at.run), "--params", "0.8")
    at.refused(*at.tiny.compress(at.run, "--set", "seed=3"), match="seed: 0 => 3.*restore the recipe")
    at.works(*at.tiny.compress(at.run))
    header = read_header(at.run)
    write_header(at.run, header | {"versions": header["versions"] | {"torch": "1.0"}})
    at.refused(*at.tiny.compress(at.run), match="another versions .torch.*Choose another folder")
    at.works(*at.tiny.compress(at.folder / "new", "--until", "data"))


def another_format(at: Place) -> None:
    header = read_header(at.run)
    write_header(at.run, header | {"format": 1})
    at.refused(*at.tiny.compress(at.run), match="another version of layersmith. Choose another folder")
    at.works(*at.tiny.compress(at.folder / "new", "--until", "data"))


def another_parent(at: Place) -> None:
    parent = copy_of(at.tiny.parent, at.folder / "parent")
    header = read_header(at.run)
    write_header(at.run, header | {"parent": header["parent"] | {"path": str(parent)}})
    whole = (parent / "config.json").read_text()
    (parent / "config.json").write_text(whole.replace('"vocab_size"', '"more": 1, "vocab_size"'))
    at.refused(*at.tiny.search(at.run), match="not the parent of .* Restore them")
    (parent / "config.json").write_text(whole)
    at.works(*at.tiny.search(at.run))


def damaged_parent(at: Place) -> None:
    """Missing, truncated or damaged weights are to be downloaded again."""
    parent = copy_of(at.tiny.parent, at.folder / "parent")
    asked = at.tiny.compress(at.folder / "new", "--until", "describe")
    asked[asked.index(str(at.tiny.parent))] = str(parent)
    weights = (parent / "model.safetensors").read_bytes()
    (parent / "model.safetensors").write_bytes(weights[:-100])
    at.refused(*asked, match="Download it again")
    (parent / "model.safetensors").unlink()
    (parent / "model-1.safetensors").write_bytes(weights)
    (parent / "model.safetensors.index.json").write_text("{")
    at.refused(*asked, match="Download it again")
    (parent / "model.safetensors.index.json").unlink()
    (parent / "model-1.safetensors").rename(parent / "model.safetensors")
    at.works(*asked)


def code_on_the_hub(at: Place) -> None:
    """An attention implementation that is code on the Hub is to be removed from the config."""
    parent = copy_of(at.tiny.parent, at.folder / "parent")
    asked = at.tiny.compress(at.folder / "new", "--until", "describe")
    asked[asked.index(str(at.tiny.parent))] = str(parent)
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps(config | {"attn_implementation": "someone/kernel"}))
    at.refused(*asked, match="names code on the Hub.*Remove it")
    (parent / "config.json").write_text(json.dumps(config))
    at.works(*asked)


def child_is_there(at: Place) -> None:
    (at.folder / "child").mkdir()
    at.refused(*at.tiny.search(at.run, "--out", str(at.folder / "child")), match="already there. Choose another folder")
    at.works(*at.tiny.search(at.run, "--out", str(at.folder / "new")))


def at_work(at: Place) -> None:
    with FileLock(at.run / ".lock"):
        at.refused("report", str(at.run), match="another process is at work in this run. Wait for it")
    at.works("report", str(at.run))


def read_while_damaged(at: Place) -> None:
    """Damage that comes after the check of a stage's files."""
    for name, read in (("library/library.json", read_json), ("library/tensors.safetensors", read_tensors)):
        (at.run / name).write_bytes(b"{")
        with pytest.raises(InputError, match="Run the same compress command again"):
            read(at.run / name)
    at.works(*at.tiny.compress(at.run))
    at.works(*at.tiny.search(at.run))


def link(at: Place) -> None:
    (at.run / ".lock").unlink()
    (at.run / ".lock").symlink_to(at.folder / "victim")
    at.refused("report", str(at.run), match="is a link, .* Remove it and run the same command again")
    (at.run / ".lock").unlink()
    at.works("report", str(at.run))


def read_only(at: Place) -> None:
    with pytest.raises(InputError, match="Choose another folder"), saying_disk_full(at.run):
        raise OSError(errno.EROFS, "Read-only file system")
    at.works(*at.tiny.compress(at.folder / "new", "--until", "data"))


# Part of a message => what provokes it and follows it, or the name of the test that does.
FOLLOWED: dict[str, Callable[[Place], None] | str] = {
    "is not finished. Run the same compress command again": not_finished,
    "is a file. Choose another folder": another_folder,
    "a link that leads nowhere. Choose another folder": another_folder,
    "already there and not a run of layersmith": another_folder,
    "Choose another folder: next to": another_request,
    "next to this one it shares": another_request,
    "or restore the recipe": another_request,
    "restore the recipe": another_request,
    "Choose another folder": another_request,
    "another version of layersmith": another_format,
    "not the parent of": another_parent,
    "Download it again": damaged_parent,
    "names code on the Hub": code_on_the_hub,
    "already there. Choose another folder": child_is_there,
    "the folder already exists and is not empty": child_is_there,
    "another process is at work": at_work,
    "which makes what is damaged again": read_while_damaged,
    "which makes it again": read_while_damaged,
    "is a link, which is not followed": link,
    "cannot be written": read_only,
    "which makes": "test_damage.py::test_commands_that_read",
    "it takes over what both have in common": "test_damage.py::test_compress_again",
    "the same distill command writes it": "test_damage.py::test_distill_again",
    "To resume, run the same command again": "test_interrupts.py::test_an_interrupted_command_goes_on",
    "no space left on the disk": "test_interrupts.py::test_an_interrupted_command_goes_on",
    "Lower scoring.batch_tokens": "test_interrupts.py::test_an_interrupted_command_goes_on",
    "out of memory": "test_interrupts.py::test_an_interrupted_command_goes_on",
    "Free some and run the same command again": "test_interrupts.py::test_an_interrupted_command_goes_on",
    "logits that are not numbers. Restore the checkpoint": damaged_parent,
    "became shorter while it was read": "../execution/test_streaming.py",
}


def messages() -> dict[str, str]:
    """Texts with advice, by where they are; joined strings and f-strings as one text."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documents = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        inner -= {id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner | documents:
                text = node.value
            else:
                continue
            if ADVICE.search(text):
                found[f"{path.relative_to(SOURCE)}:{node.lineno}"] = text
    return found


def test_every_message_with_advice_is_followed() -> None:
    found = messages()
    assert len(found) > 15
    assert not {where: text for where, text in found.items() if not any(part in text for part in FOLLOWED)}
    here = Path(__file__).parent
    for test in (value for value in FOLLOWED.values() if isinstance(value, str)):
        file, _, name = test.partition("::")
        assert f"def {name}" in (here / file).read_text(encoding="utf-8"), test


SCENARIOS = sorted({case.__name__: case for case in FOLLOWED.values() if callable(case)}.items())


@pytest.mark.parametrize(("name", "scenario"), SCENARIOS)
def test_advice_works(
    name: str, scenario: Callable[[Place], None], tiny: Tiny, compressed: Path, tmp_path: Path, figures: Callable
) -> None:
    scenario(Place(tiny, compressed, tmp_path))
    figures("messages", "advice", name, "works")
