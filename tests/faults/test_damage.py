"""A file of a finished run is damaged, and a command is called: the file is made again, or the command refuses and its
advice works, or the file is kept as someone's edit and that is said. Nothing is used in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Said, Tiny, command, contents, copy_of, spread

Harm = Callable[[Path], object]


def flip(file: Path) -> None:
    """Change one bit in the middle; in text, a digit."""
    data = bytearray(file.read_bytes())
    digits = [i for i, byte in enumerate(data) if byte in b"0123456789"]
    place = digits[len(digits) // 2] if file.suffix in (".json", ".jsonl", ".yaml", ".html") else len(data) // 2
    data[place] ^= 1
    file.write_bytes(data)


HARMS: dict[str, Harm] = {
    "flip": flip,
    "truncate": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "delete": lambda file: file.unlink(),
}
# Written anew by every command that writes, or only added to.
WITHOUT_A_WORD = ("recipe.yaml", "log.jsonl", ".lock")


def files_of(run: Path) -> list[str]:
    return [path.relative_to(run).as_posix() for path in sorted(run.rglob("*")) if path.is_file()]


def outcome(said: Said, before: dict[str, str], run: Path, name: str) -> str:
    """What a command that writes into the run made of a damaged file."""
    assert "Traceback" not in said.err, said.err
    if said.code:
        return "refused"
    after = contents(run)
    changed = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
    if not changed:
        is_said = name in said.err or Path(name).name in said.err
        return "made again" if is_said or name in WITHOUT_A_WORD else "restored in silence"
    is_kept = changed == {name} and f"{name} was edited; it is kept." in said.err
    return "kept as an edit" if is_kept else f"SILENT: {sorted(changed)}"


def refused_with_true_advice(said: Said, run: Path, tiny: Tiny, again: list[str], reference: Path) -> None:
    """Follow what the message says, and see that it helps."""
    assert said.code == 2
    text = " ".join(said.err.split())
    advised = re.search(r"Run the same (compress|distill) command again, which makes", text)
    if advised:
        made = command(*(tiny.compress(run) if advised[1] == "compress" else tiny.distill(run)))
        assert made.code == 0, made.err
        repeated = command(*again)
        assert repeated.code == 0, repeated.err
        return
    assert "with another folder" in text or "Choose another folder" in text, text
    other = run.with_name("another")
    assert command(*tiny.compress(other)).code == 0
    assert (other / "child" / "model.safetensors").read_bytes() == (
        reference / "child" / "model.safetensors"
    ).read_bytes()


def cases(every: int) -> list[str]:
    """Kinds of damage by number: the files are only known when the run is there."""
    return spread([f"{harm}-{number}" for number in range(60) for harm in HARMS], every)


def pick(case: str, run: Path, skip: tuple[str, ...] = ()) -> tuple[str, Harm]:
    harm, number = case.split("-")
    names = [name for name in files_of(run) if name not in (".lock", *skip)]
    if int(number) >= len(names):
        pytest.skip("fewer files")
    return names[int(number)], HARMS[harm]


@pytest.mark.parametrize("case", cases(37))
def test_compress_again(case: str, tiny: Tiny, compressed: Path, tmp_path: Path, figures: Callable) -> None:
    name, harm = pick(case, compressed)
    run = copy_of(compressed, tmp_path / "run")
    harm(run / name)
    said = command(*tiny.compress(run))
    found = outcome(said, contents(compressed), run, name)
    if found == "refused":
        refused_with_true_advice(said, run, tiny, tiny.compress(run), compressed)
    figures("compress", case.split("-")[0], name, found)
    assert found in ("made again", "refused", "kept as an edit"), (name, said.err)


@pytest.mark.parametrize("case", cases(61))
def test_distill_again(case: str, tiny: Tiny, distilled: Path, tmp_path: Path, figures: Callable) -> None:
    name, harm = pick(case, distilled)
    run = copy_of(distilled, tmp_path / "run")
    harm(run / name)
    said = command(*tiny.distill(run))
    found = outcome(said, contents(distilled), run, name)
    if found.startswith("SILENT") and not name.startswith(("distil", "run.json")):
        after = contents(run)
        changed = {n for n, digest in contents(distilled).items() if after.get(n) != digest}
        found = "not read" if changed <= {name} else found
    if found == "restored in silence" and name == "report.html":
        found = "not read"
    if found == "refused":
        refused_with_true_advice(said, run, tiny, tiny.distill(run), distilled)
    figures("distill", case.split("-")[0], name, found)
    assert found in ("made again", "refused", "kept as an edit", "not read"), (name, said.err)


@pytest.mark.parametrize("case", cases(61))
@pytest.mark.parametrize("what", ["search", "search --out", "report"])
def test_commands_that_read(
    what: str, case: str, tiny: Tiny, compressed: Path, tmp_path: Path, figures: Callable
) -> None:
    """They give the same answer as with an undamaged run, or refuse."""
    name, harm = pick(case, compressed)
    run, sound = copy_of(compressed, tmp_path / "run"), copy_of(compressed, tmp_path / "sound")

    def ask(folder: Path) -> tuple[Said, object]:
        out = folder.with_name(f"{folder.name}-child")
        more = ["--out", str(out)] if what == "search --out" else []
        said = command(*(["report", folder] if what == "report" else tiny.search(folder, *more)))
        written: object = contents(out) if out.exists() else None
        if what == "report" and said.code == 0:
            report = json.loads((folder / "report.json").read_text())
            written = [report | {"timings": []}, contents(folder).get("child/README.md")]
        return said, (said.out.replace(str(folder), ""), written)

    _, expected = ask(sound)
    harm(run / name)
    said, answer = ask(run)
    assert "Traceback" not in said.err, said.err
    if said.code:
        found = "refused"
        again = ["report", str(run)] if what == "report" else tiny.search(run)
        refused_with_true_advice(said, run, tiny, again, compressed)
    elif answer == expected:
        found = "made again" if name in said.err else "same answer"
    else:
        found = "kept as an edit" if f"{name} was edited; it is kept." in said.err else "SILENT"
    figures(what, case.split("-")[0], name, found)
    assert found != "SILENT", (name, said.err)
