import json
import random
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict

from layersmith.data import read, splits
from layersmith.data.read import read_documents
from layersmith.data.splits import TokenSplits, check_vocabulary, load_tokenizer
from layersmith.errors import InputError, UsageError
from layersmith.recipe import DataRecipe

SIZES: dict[str, Any] = {
    "sequence_length": 16, "calibration_sequences": 6, "scoring_sequences": 4, "evaluation_sequences": 5, "seed": 0,
}  # fmt: skip
CHAT = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]


def prepare(source: Any, tokenizer: Any, *, seed: int = 0, **sizes: Any) -> TokenSplits:
    """Rows with sizes given by name; without training rows or a look at overlaps unless they are asked for."""
    wanted = DataRecipe(**{"training_sequences": 0, "overlap": "allow"} | sizes)
    return splits.prepare(source, tokenizer, wanted, seed)


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_kind_of_source(tmp_path: Path) -> None:
    texts = [f"document {i}\n" for i in range(4)]
    records = [{"text": text} for text in texts]
    (tmp_path / "a.txt").write_text(texts[0])
    lines(tmp_path / "b.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "c.parquet")
    (tmp_path / "d.json").write_text(json.dumps(records))
    Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"train": Dataset.from_list(records)}).save_to_disk(str(tmp_path / "saved_splits"))
    assert list(read_documents(tmp_path / "a.txt")) == texts[:1]
    for name in ("b.jsonl", "c.parquet", "d.json", "saved", "saved_splits"):
        assert list(read_documents(tmp_path / name)) == texts, name
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x.py").write_text("x = 1\n")
    (folder / ".hidden").write_text("no")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    lines(folder / "y.jsonl", records)
    assert list(read_documents(folder)) == ["x = 1\n", *texts]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]},
        {"prompt": "How?", "completion": "So."},
        {"instruction": "How?", "input": "", "output": "So."},
    ],
)
def test_chats(tmp_path: Path, record: dict) -> None:
    assert list(read_documents(lines(tmp_path / "chat.jsonl", [record]))) == [CHAT]


def test_messages_of_several_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": "this?"}]
    source = lines(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": parts}]}])
    assert list(read_documents(source)) == [[{"role": "user", "content": "What is this?"}]]


def test_chats_go_through_the_template(tmp_path: Path, tokenizer: Any) -> None:
    source = lines(
        tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": f"word {i} " * 9}]} for i in range(60)]
    )
    with pytest.raises(UsageError, match="no chat template"):
        prepare(source, tokenizer, **SIZES)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    from copy import deepcopy

    with_template = deepcopy(tokenizer)
    with_template.chat_template = template
    rows = prepare(source, with_template, **SIZES)
    assert "<user>word" in with_template.decode(rows.calibration.flatten())


def test_a_named_field(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [{"text": "no", "body": "yes"}])
    assert list(read_documents(source, field="body")) == ["yes"]
    with pytest.raises(UsageError, match="There are text, body"):
        list(read_documents(source, field="bdy"))


def test_splits_share_no_document(text_folder: Path, tokenizer: Any) -> None:
    splits = prepare(text_folder, tokenizer, **SIZES)
    assert splits.calibration.shape == (6, 16)
    assert splits.scoring.shape == (4, 16)
    assert splits.evaluation.shape == (5, 16)
    larger = prepare(text_folder, tokenizer, **SIZES | {"calibration_sequences": 12})
    assert torch.equal(larger.evaluation, splits.evaluation)
    assert torch.equal(larger.calibration[:6], splits.calibration)


def test_documents_stay_in_one_split(tmp_path: Path, tokenizer: Any) -> None:
    """Each document has a number of its own that appears in all of its tokens' text."""
    source = lines(tmp_path / "n.jsonl", [{"text": f"n{i} " * 30} for i in range(100)] * 2)
    splits = prepare(source, tokenizer, **SIZES)
    seen = [
        {
            word
            for word in tokenizer.decode(rows.flatten()).replace("<end>", " ").split()
            if word in {f"n{i}" for i in range(100)}
        }
        for rows in (splits.calibration, splits.scoring, splits.evaluation)
    ]
    assert all(seen)
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_own_evaluation_text_is_taken_out_of_the_rest(tmp_path: Path, tokenizer: Any) -> None:
    records = [{"text": f"n{i} " * 30} for i in range(100)]
    source = lines(tmp_path / "all.jsonl", records)
    held_out = lines(tmp_path / "held.jsonl", records[:20])
    splits = prepare(source, tokenizer, **SIZES, evaluation_source=str(held_out))
    text = tokenizer.decode(torch.cat([splits.calibration, splits.scoring]).flatten())
    assert not {f"n{i}" for i in range(20)} & set(text.replace("<end>", " ").split())


def test_deterministic(text_folder: Path, run_python: Callable, tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = (
        "import sys, json; from layersmith.data.splits import *\n"
        "from layersmith.recipe import DataRecipe\n"
        "t = load_tokenizer(sys.argv[1])\n"
        f"sizes = {SIZES!r}; seed = sizes.pop('seed')\n"
        "wanted = DataRecipe(**sizes, training_sequences=0, overlap='allow')\n"
        "print(json.dumps(prepare(sys.argv[2], t, wanted, seed).description['sha256'], sort_keys=True))"
    )
    done = run_python(script, str(tmp_path / "tokenizer"), str(text_folder))
    digests = prepare(text_folder, tokenizer, **SIZES).description["sha256"]
    assert json.loads(done.stdout) == digests, done.stderr
    other = prepare(text_folder, tokenizer, **SIZES | {"seed": 1}).description["sha256"]
    assert other != digests


def test_too_little_text_is_shared_out(tmp_path: Path, tokenizer: Any) -> None:
    source = lines(tmp_path / "n.jsonl", [{"text": f"some words {i}"} for i in range(30)])
    splits = prepare(source, tokenizer, **SIZES | {"calibration_sequences": 1000, "scoring_sequences": 500})
    assert min(len(splits.calibration), len(splits.scoring), len(splits.evaluation)) >= 1
    assert len(splits.calibration) > len(splits.scoring)
    assert splits.description["warnings"]


@pytest.mark.parametrize("content", ["", "   \n", "one line"])
def test_empty_or_nearly(tmp_path: Path, tokenizer: Any, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(InputError):
        prepare(tmp_path / "a.txt", tokenizer, **SIZES)


def test_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(InputError, match="line 2"):
        list(read_documents(tmp_path / "bad.jsonl"))
    pq.write_table(pa.table({"text": ["a" * 1000]}), tmp_path / "cut.parquet")
    data = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"cut\.parquet"):
        list(read_documents(tmp_path / "cut.parquet"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        list(read_documents(tmp_path / "binary.txt"))
    with pytest.raises(InputError, match="no such file"):
        list(read_documents(tmp_path / "nowhere.txt"))
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="empty folder"):
        list(read_documents(tmp_path / "none"))


def test_an_unreachable_hub_dataset() -> None:
    with pytest.raises(InputError, match="neither a file or folder here nor a dataset"):
        list(read_documents("nobody/nothing"))


def test_token_files(tmp_path: Path) -> None:
    ids = np.arange(16 * 40) % 500
    np.save(tmp_path / "tokens.npy", ids)
    splits = prepare(tmp_path / "tokens.npy", None, **SIZES)
    rows = {tuple(row.tolist()) for part in (splits.calibration, splits.scoring, splits.evaluation) for row in part}
    assert rows <= {tuple(row.tolist()) for row in ids.reshape(-1, 16)}


def test_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="token id 511"):
        check_vocabulary(512, 500)


def test_training_takes_what_the_others_leave(tokenizer: Any, tmp_path: Path) -> None:
    """Other rows are what they are without it, and none of its documents is in another split."""
    records = [{"text": f"<{i}>" * 40} for i in range(80)]
    source = lines(tmp_path / "numbered.jsonl", records)
    without = prepare(source, tokenizer, **SIZES)
    given = prepare(source, tokenizer, training_sequences=7, **SIZES)
    assert len(without.training) == 0
    assert given.training.shape == (7, 16)
    seen = {
        name: set(re.findall(r"<(\d+)>", " ".join(map(tokenizer.decode, getattr(given, name)))))
        for name in ("calibration", "scoring", "evaluation", "training")
    }
    for name in ("calibration", "scoring", "evaluation"):
        assert torch.equal(getattr(given, name), getattr(without, name))
        assert seen[name]
        assert seen[name].isdisjoint(seen["training"])
    all_of_it = prepare(source, tokenizer, training_sequences=10**6, **SIZES)
    assert torch.equal(all_of_it.scoring, given.scoring)
    assert 7 < len(all_of_it.training) < 10**6
    assert any("training rows" in warning for warning in all_of_it.description["warnings"])
    few = prepare(
        lines(tmp_path / "few.jsonl", records[:12]), tokenizer, training_sequences=50, **SIZES | {"sequence_length": 64}
    )
    assert min(map(len, (few.calibration, few.scoring, few.evaluation, few.training))) >= 1


# ---------------------------------------------------------------------------------------------- large sources


def test_a_long_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    """Read in pieces, it gives the documents that the whole text gives."""
    generator = random.Random(0)
    words = ("a" * generator.randrange(1, 12) + generator.choice([" ", " ", " ", "\n", "\n\n"]) for _ in range(600_000))
    text = "".join(words) + "b" * 40_000
    (tmp_path / "long.txt").write_text(text)
    documents = [str(document) for document in read_documents(tmp_path / "long.txt")]
    assert "".join(documents) == text
    assert max(map(len, documents)) <= 16_000
    assert all(document.endswith("\n\n") for document in documents[:-5])


def test_a_source_larger_than_memory(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large file no more is read, or kept in memory, than what the rows need and a fixed amount."""
    source = lines(tmp_path / "large.jsonl", [{"text": f"n{i} " * 400} for i in range(20_000)])
    assert source.stat().st_size > 40e6
    monkeypatch.setattr(splits, "_READ_AT_LEAST", 1_000_000)
    tracemalloc.start()
    try:
        prepare(source, tokenizer, **SIZES)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8e6


def test_a_large_folder_gives_some_of_every_file(tmp_path: Path) -> None:
    sizes = {"small.txt": 3_000, "middle.txt": 200_000, "large.txt": 900_000}
    for name, size in sizes.items():
        (tmp_path / name).write_text((name[0] + "\n") * (size // 2))
    texts = [str(document) for document in read_documents(tmp_path, limit=300_000)]
    characters = {name: sum(text.count(name[0]) * 2 for text in texts) for name in sizes}
    assert characters["small.txt"] == 3_000
    assert 130_000 < characters["middle.txt"] < 170_000
    assert 130_000 < characters["large.txt"] < 170_000
    assert list(read_documents(tmp_path, limit=300_000)) == texts


def test_of_very_many_files_some_are_drawn(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number:03}.txt").write_text(f"{number:03}" * 1000)
    drawn = [read_documents(tmp_path, limit=30_000, seed=seed) for seed in (0, 0, 1)]
    first, again, other = ({str(document)[:3] for document in documents} for documents in drawn)
    assert len(first) == read._FILES_AT_LEAST
    assert first == again != other
