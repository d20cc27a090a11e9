"""The command line as a user sees it: processes, their output, their exit codes."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

import layersmith
from layersmith import cli
from tests.conftest import TINY_RECIPE
from tests.faults.operations import forks

COMMAND = [sys.executable, "-c", "from layersmith.cli import main; main()"]


def layersmith_command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, forked from one that has imported everything."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        process = forks.Process(target=_command, args=(arguments, cwd, said))
        process.start()
        process.join(300)
        assert process.exitcode is not None, "the command did not end within 300 s"
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in said))


def _command(arguments: Sequence[object], cwd: Path | None, said: Sequence[Path]) -> None:
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "rw"[n > 0]) for n in range(3))
    os.environ["COLUMNS"] = "120"
    if cwd is not None:
        os.chdir(cwd)
    sys.argv = ["layersmith", *map(str, arguments)]
    cli.main()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TINY_RECIPE))
    return tmp_path / "recipe.yaml"


def test_the_commands_one_after_another(
    make_parent: Callable[..., Path], text_folder: Path, recipe: Path, tmp_path: Path
) -> None:
    parent, run = make_parent("qwen3"), tmp_path / "run"
    inspected = layersmith_command("inspect", parent)
    assert inspected.returncode == 0, inspected.stderr
    for expected in ("Qwen3ForCausalLM", "8 heads, 4 KV heads of 8", "width 64", "no-op", "embeddings"):
        assert expected in inspected.stdout

    given = ["compress", parent, run, "--data", text_folder, "--params", "0.85", "--recipe", recipe]
    dry = layersmith_command(*given, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "can be reached" in dry.stdout
    assert "nothing was written" in dry.stdout
    assert not run.exists()

    done = layersmith_command(*given)
    assert done.returncode == 0, done.stderr
    assert f"child:  {run / 'child'}" in done.stdout
    assert "KL divergence" in done.stdout
    assert "score: done in" in done.stderr  # progress and notes leave standard output to the result
    assert "done in" not in done.stdout
    assert "Traceback" not in done.stderr

    searched = layersmith_command("search", run, "--params", "0.8", "--out", tmp_path / "smaller")
    assert searched.returncode == 0, searched.stderr
    assert "=>" in searched.stdout
    assert layersmith.load(tmp_path / "smaller") is not None

    asked = layersmith_command("search", run, "--params", "0.8")
    assert "proven optimal" in asked.stdout, asked.stderr

    judged = layersmith_command(
        "evaluate", tmp_path / "smaller", "--parent", parent, "--data", text_folder,
        "--sequences", 4, "--sequence-length", 32,
    )  # fmt: skip
    assert judged.returncode == 0, judged.stderr
    assert "Perplexity" in judged.stdout

    reported = layersmith_command("report", run)
    assert reported.stdout.strip() == str(run / "report.html"), reported.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--params", "0"], 2, "more than nothing"),
        (["--params", "1.5"], 2, "at most 1"),
        (["--memory", "-3GiB"], 2, "more than nothing"),
        (["--params", "7 parsecs"], 2, "not a unit"),
        (["--params", "0.01"], 3, "smallest child"),
        ([], 2, "no budget"),
        (["--params", "0.9", "--batch", "0"], 2, "batch"),
        (["--params", "0.9", "--device", "abacus"], 2, "abacus"),
        (["--params", "0.9", "--colour", "blue"], 2, "--colour"),
        (["--params", "0.9", "--recipe", "nowhere.yaml"], 2, "no such recipe"),
        (["--params", "0.9", "--descriptor", "no.such:Thing"], 2, "no.such"),
    ],
)
def test_errors_are_one_sentence_and_an_exit_code(
    arguments: list[str], code: int, words: str, make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    done = layersmith_command("compress", make_parent("llama"), tmp_path / "run", "--data", text_folder, *arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_descriptor_from_the_working_folder(
    make_parent: Callable[..., Path], text_folder: Path, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "from layersmith import ModelDescriptor, describe\n"
        "from transformers import LlamaConfig\n"
        "class Mine(describe(LlamaConfig)):\n"
        "    attn_no_op_post_init = staticmethod(ModelDescriptor.attn_no_op_post_init)\n"
    )
    done = layersmith_command(
        "compress", make_parent("llama"), tmp_path / "run", "--data", text_folder, "--params", "0.9",
        "--recipe", recipe, "--descriptor", "mine:Mine", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no attention no-op" in done.stderr


def test_commands_on_what_is_not_a_run(tmp_path: Path) -> None:
    for command in (["search", tmp_path, "--params", "0.5"], ["report", tmp_path]):
        done = layersmith_command(*command)
        assert done.returncode == 2
        assert "not a run folder" in done.stderr
    done = layersmith_command("inspect", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "no such folder" in done.stderr


def test_help_is_quick_and_complete() -> None:
    done = layersmith_command("--help")
    assert done.returncode == 0
    for command in ("compress", "inspect", "search", "evaluate", "report", "demo"):
        assert command in done.stdout

    for command in ([], ["compress"], ["search"]):
        assert layersmith_command(*command, "-h").stdout == layersmith_command(*command, "--help").stdout


def test_version() -> None:
    for option in ("--version", "-V"):
        done = layersmith_command(option)
        assert (done.returncode, done.stdout) == (0, f"layersmith {layersmith.__version__}\n")


def test_shell_completion() -> None:
    command = f"{sys.executable} -m layersmith --show-completion; exit $?"  # it looks at the shell that calls it
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout


def test_quiet_and_verbose(make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path) -> None:
    parent = make_parent("llama")
    given = ["evaluate", parent, "--data", text_folder, "--sequences", 2, "--sequence-length", 32]
    quiet, usual, verbose = (layersmith_command(*given, *option) for option in (["-q"], [], ["-vv"]))
    assert quiet.stderr == ""
    assert "evaluate: done in" in usual.stderr
    assert quiet.stdout == usual.stdout == verbose.stdout


@pytest.mark.parametrize(("option", "instead"), [("--alike", "search.uniform_groups"), ("--seed", "seed=N")])
def test_former_options_name_what_replaced_them(option: str, instead: str, tmp_path: Path) -> None:
    done = layersmith_command("compress", tmp_path, tmp_path / "run", "--data", tmp_path, option, "3")
    assert done.returncode == 2
    assert option in done.stderr
    assert instead in done.stderr


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_interrupts_end_with_their_code_and_one_sentence(
    number: signal.Signals, code: int, word: str, make_parent: Callable[..., Path], text_folder: Path, recipe: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    given = ["compress", make_parent("llama"), tmp_path / "run", "--data", text_folder, "--params", "0.85"]
    command = [*COMMAND, *map(str, given), "--recipe", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # a first stage is done
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    assert f"layersmith: {word}. To resume, run the same command again." in errors
    assert "Traceback" not in errors


def test_a_reader_that_goes_away(make_parent: Callable[..., Path]) -> None:
    command = [*COMMAND, "inspect", str(make_parent("llama"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait(timeout=300) == 141, errors
    assert "Traceback" not in errors


def test_a_failed_verification_fails(make_parent: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(
        "from layersmith import describe\n"
        "from transformers import LlamaConfig\n"
        "class Wrong(describe(LlamaConfig)):\n"
        "    @staticmethod\n"
        "    def mlp_no_op_post_init(decoder_layer):\n"
        "        pass\n"
        "    @classmethod\n"
        "    def for_config(cls, config):\n"
        "        return cls\n"
    )
    done = layersmith_command("inspect", "--verify", make_parent("llama"), "--descriptor", "wrong:Wrong", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert layersmith_command("inspect", "--verify", make_parent("llama")).returncode == 0


@pytest.mark.parametrize(("environment", "spins"), [({}, "20000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")])
def test_threads_that_wait_do_not_spin_for_long(environment: dict[str, str], spins: str) -> None:
    """PyTorch's libgomp reads the variable when it is loaded, so it must be set before."""
    code = (
        "import os, sys; from layersmith.cli import main\n"
        "sys.argv, before = ['layersmith', '--help'], 'torch' in sys.modules\n"
        "try: main()\nfinally: print(before, os.environ.get('GOMP_SPINCOUNT'))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"False {spins}"
