import json
from pathlib import Path
from typing import Any

import pytest
import torch

from layersmith.data.mixture import interleave, read_mixture
from layersmith.data.overlap import Runs
from layersmith.errors import InputError, UsageError
from tests.data.test_splits import prepare

SIZES: dict[str, Any] = {
    "sequence_length": 16, "calibration_sequences": 20, "scoring_sequences": 10, "evaluation_sequences": 10, "seed": 0,
}  # fmt: skip


def source(path: Path, word: str, count: int) -> Path:
    path.write_text("".join(json.dumps({"text": f"{word} {i} " * 12}) + "\n" for i in range(count)))
    return path


def mixture(folder: Path, *parts: str) -> Path:
    (folder / "mix.yaml").write_text("mixture:\n" + "".join(f"  - {part}\n" for part in parts))
    return folder / "mix.yaml"


def test_any_stretch_has_the_shares() -> None:
    parts = [{f"{p}{i}": f"{p}{i}" for i in range(60)} for p in "ab"]
    tokens = [dict.fromkeys(parts[0], 10.0), dict.fromkeys(parts[1], 5.0)]
    documents, ended = interleave(parts, [3.0, 1.0], tokens)
    assert ended == 0
    order = list(documents)
    for start in range(0, len(order) - 20, 5):
        stretch = [name[0] for name in order[start : start + 20]]
        first, other = 10 * stretch.count("a"), 5 * stretch.count("b")
        assert first / (first + other) == pytest.approx(0.75, abs=0.05)
    again, ended = interleave([parts[0], {**parts[1], **parts[0]}], [1.0, 1.0], [tokens[0], tokens[0] | tokens[1]])
    assert len(again) == len(set(again.values())) == 91
    assert ended == 1


def test_a_mixture_is_dealt_to_every_split(tmp_path: Path, tokenizer: Any) -> None:
    source(tmp_path / "a.jsonl", "apple", 200)
    source(tmp_path / "b.jsonl", "berry", 200)
    mixed = mixture(tmp_path, "{source: a.jsonl, weight: 0.8}", "{source: b.jsonl, weight: 0.2, field: text}")
    splits = prepare(mixed, tokenizer, **SIZES | {"training_sequences": 60})
    for rows in (splits.calibration, splits.training):
        text = tokenizer.decode(rows.flatten())
        share = text.count("apple") / (text.count("apple") + text.count("berry"))
        assert share == pytest.approx(0.8, abs=0.12)
    assert [part["weight"] for part in splits.description["mixture"]] == [0.8, 0.2]
    again = prepare(mixed, tokenizer, **SIZES | {"training_sequences": 60})
    assert torch.equal(again.training, splits.training)
    source(tmp_path / "b.jsonl", "berry", 3)
    warned = prepare(mixed, tokenizer, **SIZES | {"training_sequences": 500}).description["warnings"]
    assert any("b.jsonl ends first" in warning for warning in warned)


def test_what_is_no_mixture(tmp_path: Path) -> None:
    (tmp_path / "text.yaml").write_text("some: text\n")
    assert read_mixture(tmp_path / "text.yaml") is None
    assert read_mixture("org/name") is None
    for parts, error, match in (
        (["{source: a, wieght: 1}"], UsageError, "Did you mean 'weight'"),
        (["{source: a, weight: -1}"], UsageError, "must be greater than 0"),
        (["{source: "], InputError, "not a YAML mixture"),
    ):
        with pytest.raises(error, match=match):
            read_mixture(mixture(tmp_path, *parts))
    (tmp_path / "mix.yaml").write_text("mixture: [{source: a}]\nmore: 1\n")
    with pytest.raises(UsageError, match="one key"):
        read_mixture(tmp_path / "mix.yaml")


def test_copies_are_found_whatever_stands_between_the_letters(text_folder: Path, tokenizer: Any) -> None:
    text = (text_folder / sorted(path.name for path in text_folder.iterdir())[0]).read_text()
    length = 256

    def rows(text: str) -> torch.Tensor:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        return ids[: len(ids) // length * length].view(-1, length)

    held, others = rows(text[:6000]), rows(text[9000:30000])
    runs = Runs(held, tokenizer)
    assert 100 < runs.length <= 200
    assert runs.within(held).float().mean() > 0.7  # some have few letters
    assert not runs.within(others).any()
    densest = max(held, key=lambda row: len(tokenizer.decode(row).replace(" ", "")))
    copied = "x = 1\n" + tokenizer.decode(densest).replace("\n", " \n# ").title() + " and so on " * 300
    is_copied = runs.within(rows(copied))
    assert is_copied[:2].any()
    assert not is_copied[-1]
    ids = Runs(torch.arange(400).view(4, 100), None)
    assert ids.length == 50
    assert ids.within(torch.cat([torch.arange(900, 940), torch.arange(130, 190)])[None]).tolist() == [True]
    assert ids.within(torch.cat([torch.arange(900, 960), torch.arange(130, 170)])[None]).tolist() == [False]


def test_what_is_done_about_copies(tmp_path: Path, tokenizer: Any) -> None:
    words = [f"{chr(97 + i % 26)}{i * 7919 % 1000003}" for i in range(9000)]
    documents = [" ".join(words[start : start + 60]) for start in range(0, 9000, 60)]
    held = tmp_path / "held.txt"
    held.write_text("\n".join(documents[:8]))
    frame = "answer the question below as well as you can and say where what you know comes from "
    copies = [f"# of another\n{document.upper()}" for document in documents[:6]]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*documents[8:], *copies]))

    def dealt(what: Any) -> Any:
        wanted = SIZES | {"sequence_length": 128, "training_sequences": 10**6, "overlap": what}
        return prepare(texts, tokenizer, **wanted, evaluation_source=str(held))

    allowed, warned, left_out = dealt("allow"), dealt("warn"), dealt("leave_out")
    runs = Runs(allowed.evaluation, tokenizer)
    splits = ("calibration", "scoring", "training")
    count = {name: int(runs.within(getattr(allowed, name)).sum()) for name in splits}
    assert sum(count.values()) > 0
    assert allowed.description["overlap"] is None
    assert warned.description["overlap"] == left_out.description["overlap"] == count
    for name in splits:
        assert torch.equal(getattr(warned, name), getattr(allowed, name))
        assert len(getattr(left_out, name)) == len(getattr(allowed, name)) - count[name]
        assert not runs.within(getattr(left_out, name)).any()
    for splits_made, said in ((warned, "are used"), (left_out, "left out")):
        assert sum(said in warning for warning in splits_made.description["warnings"]) == sum(map(bool, count.values()))
    with pytest.raises(
        InputError, match=r"share long runs of text with evaluation\. Give other text, or set data\.over"
    ):
        dealt("refuse")
    # What several evaluation rows have in common is no copy of any.
    framed = [tokenizer(4 * frame + documents[i] + documents[i + 20])["input_ids"][:400] for i in range(5)]
    *held_rows, other = torch.tensor(framed)
    assert Runs(torch.stack(held_rows), tokenizer).within(torch.stack([*held_rows, other])).tolist() == [True] * 4 + [
        False
    ]
    assert Runs(torch.stack(held_rows[:2]), tokenizer).within(other[None]).all()
