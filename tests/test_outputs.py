"""``--json``: one object on standard output, of the documented schema, for results and for errors."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from layersmith.cli import app, main
from layersmith.outputs import RESULTS
from tests.conftest import TINY_RECIPE
from tests.output_schema import SCHEMA_FILE, schema_text

Command = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Run a command with ``--json``; returns its exit code and the object, which is all of standard output."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["layersmith", *map(str, arguments), "--json"])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main()
        text = capfd.readouterr().out
        assert text.count("\n") == 1, text
        answer = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert answer["schema"] == 1
        assert ("result" in answer) != ("error" in answer)
        if "result" in answer:
            TypeAdapter(RESULTS[answer["command"]]).validate_json(json.dumps(answer["result"]))
        return int(exited.value.code or 0), answer

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


def test_every_command_has_a_schema_and_the_option() -> None:
    import typer

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(RESULTS) == set(commands)
    for name, each in commands.items():
        assert "--json" in {option for parameter in each.params for option in parameter.opts}, name


def test_the_schema_in_docs_is_current() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), "run python -m tests.output_schema"


def test_commands_of_a_run(
    command: Command, make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    parent, run, recipe = make_parent("qwen3"), tmp_path / "run", tmp_path / "recipe.yaml"
    tiny = TINY_RECIPE | {"local_distillation": {"tokens": 0, "coupled_tokens": 0}, "costs": {"time_child": True}}
    recipe.write_text(yaml.safe_dump(tiny))
    given = ("compress", parent, run, "--data", text_folder, "--params", "0.85", "--recipe", recipe)

    code, planned = command(*given, "--dry-run")
    assert (code, planned["command"]) == (0, "compress")
    assert planned["result"]["costs"]["parameters"]["smallest"] < planned["result"]["costs"]["parameters"]["parent"]

    code, stopped = command(*given, "--until", "describe")
    assert (code, stopped["result"]) == (0, {"run": str(run), "stopped_after": "describe"})

    code, done = command(*given)
    result = done["result"]
    assert code == 0
    assert Path(result["child"], "config.json").is_file()
    costs = result["solution"]["costs"]["parameters"]
    assert costs["child"] <= costs["limit"] < costs["parent"]
    assert any(layer["ffn"]["is_changed"] or layer["attention"]["is_changed"] for layer in result["solution"]["layers"])
    assert {"loss", "kl_divergence"} <= {row["metric"] for row in result["evaluation"]["rows"]}
    assert result["times"]["child"]["token_seconds"] > 0

    _, searched = command("search", run, "--params", "0.8", "--solutions", "2", "--out", tmp_path / "smaller")
    first, second = searched["result"]["solutions"]
    assert first["score"] <= second["score"]
    assert searched["result"]["child"] == str(tmp_path / "smaller")

    _, asked = command("search", run, "--frontier")
    assert len(asked["result"]["frontier"]["points"]) > 2

    _, of_sizes = command("search", run, "--nested", "0.9,0.8")
    assert [size["name"] for size in of_sizes["result"]["sizes"]] == ["0.9", "0.8"]

    _, reported = command("report", run)
    assert json.loads(Path(reported["result"]["data"]).read_text())["schema"] >= 1

    _, judged = command(
        "evaluate", tmp_path / "smaller", "--parent", parent, "--data", text_folder, "--sequences", 4,
        "--sequence-length", 32,
    )  # fmt: skip
    assert judged["result"]["rows"][0]["difference"] is not None

    _, exported = command("export", result["child"], tmp_path / "export", "--to", "padded")
    assert exported["result"]["proof"]["greedy"] > 0

    _, distilled = command("distill", run, "--tokens", "64")
    assert Path(distilled["result"]["child"], "config.json").is_file()


def test_commands_on_a_model(command: Command, make_parent: Callable[..., Path]) -> None:
    parent = make_parent("llama")
    code, inspected = command("inspect", parent)
    assert code == 0
    assert inspected["result"]["blocks"][0]["layers"] == "0-3"
    code, verified = command("inspect", parent, "--verify")
    assert (code, verified["result"]["failed"]) == (0, False)
    code, times = command("costs", parent, "--batch", 1, "--context", 16, "--on", "H100")
    assert code == 0
    assert {a["layer"] for a in times["result"]["alternatives"]} == {0, 1, 2, 3}


def test_errors_are_objects_with_the_exit_code(
    command: Command, make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    given = ("compress", make_parent("llama"), tmp_path / "run", "--data", text_folder)
    for arguments, kind, exit_code in (
        ((*given, "--params", "0.01"), "Infeasible", 3),
        ((*given, "--params", "2"), "UsageError", 2),
        ((*given, "--colour", "blue"), "UsageError", 2),
        ((*given, "--params", "0.9", "--alike", "3"), "UsageError", 2),
        (("inspect", tmp_path / "nowhere"), "InputError", 2),
        (("paint",), "UsageError", 2),
    ):
        code, answer = command(*arguments)
        error = answer["error"]
        assert (code, error["exit_code"], error["kind"]) == (exit_code, exit_code, kind), answer
        assert error["message"]
        assert "uniform_groups" in error["message"] or "--alike" not in arguments
