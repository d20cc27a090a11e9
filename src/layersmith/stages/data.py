"""Token rows for calibration, scoring, evaluation and training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from layersmith.costs.counted import sliding_window
from layersmith.data.mixture import read_mixture
from layersmith.data.retrieval import long_rows
from layersmith.data.splits import Description, TokenSplits, check_vocabulary, digest_of_rows, prepare
from layersmith.errors import InputError
from layersmith.library.axes.find import SLIDING, has_windows
from layersmith.recipe import CONTEXT
from layersmith.run.artifacts import fingerprint, read_json, read_tensors, write_json, write_tensors
from layersmith.run.digests import content_digest
from layersmith.run.stage import Making, Stage
from layersmith.stages.job import Job

_SPLITS = ("calibration", "scoring", "evaluation", "training")
TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "*.jinja")


def digest_of(source: str | Path | None) -> Any:
    """Digest of what a source holds, wherever it is; of a hub dataset its name."""
    if source is None:
        return None
    if not str(source):
        raise InputError("the name of the data is empty. Give a file, a folder or a hub dataset.")
    path = Path(source).expanduser()
    if not path.exists():
        return str(source)
    parts = read_mixture(source)
    return [content_digest(path), [digest_of(part.source) for part in parts or ()]]


def digest_of_source(job: Job) -> str:
    """Digest of all text that rows are made from."""
    return fingerprint([digest_of(job.data), digest_of(job.recipe.data.evaluation_source)])


def _inputs(job: Job) -> Any:
    settings = {name: value for name, value in job.settings("data").items() if name != "evaluation_source"}
    source = job.run.header()["data"]["digest"]
    return [job.identity, job.files_besides_weights(*TOKENIZER_FILES), settings, job.recipe.seed, source]


def _make(job: Job, making: Making) -> None:
    recipe, parent = job.recipe.data, job.parent
    length = min(recipe.sequence_length, parent.positions or recipe.sequence_length)
    if length < 2:
        raise InputError(f"{job.path}: made for {length} position, but predicting a token takes a context of two.")
    with making.progress.stage("data", 1, "source") as advance:
        recipe = dataclasses.replace(recipe, sequence_length=length)
        tokens = prepare(job.data, job.tokenizer, recipe, job.recipe.seed)
        rows = {name: getattr(tokens, name) for name in _SPLITS}
        if wanted := _length_of_scoring_rows(job):
            rows["scoring"] = long_rows(rows["scoring"], wanted, job.recipe.seed)
            tokens.description["sequences"]["scoring"] = len(rows["scoring"])
            tokens.description["sha256"]["scoring"] = digest_of_rows(rows["scoring"])
            tokens.description["scoring_length"] = long = rows["scoring"].shape[1]
            if (window := sliding_window(parent.language_config, 0, SLIDING) or 0) >= long:
                tokens.description["warnings"].append(
                    f"scoring rows have {long:,} tokens and windows {window:,}, so scores do not see what a window "
                    "forgets. Ask for more data.scoring_sequences."
                )
        largest = max(int(split.max()) for split in rows.values() if len(split))
        check_vocabulary(largest + 1, parent.language_config.vocab_size)
        advance(1)
    for warning in tokens.description.get("warnings", ()):
        making.progress.note(warning)
    write_tensors(making.folder / "tokens.safetensors", rows)
    write_json(making.folder / "data.json", tokens.description)


def _length_of_scoring_rows(job: Job) -> int | None:
    """Tokens that a scoring row should have; None if scoring rows stay as they are."""
    wanted, language = job.recipe.data.long_scoring, job.parent.language_config
    window = sliding_window(language, 0, SLIDING)
    are_offered = job.recipe.library.windows and has_windows(getattr(language, "layer_types", None))
    if wanted == "never" or (wanted == "auto" and not are_offered):
        return None
    length = CONTEXT if window is None else 4 * window
    return min(length, job.parent.positions or length)


def _read(job: Job, folder: Path) -> TokenSplits:
    rows = read_rows(folder / "tokens.safetensors", *_SPLITS)
    return TokenSplits(
        calibration=rows["calibration"],
        scoring=rows["scoring"],
        evaluation=rows["evaluation"],
        training=rows["training"],
        description=read_json(folder / "data.json", Description),
    )


def read_rows(path: Path, *names: str) -> dict[str, torch.Tensor]:
    """Token rows by the name of their split.

    Raises:
        InputError: The file is missing or damaged, or a split is missing or no matrix of token ids.
    """
    rows = read_tensors(path)
    for name in names:
        tensor = rows.get(name)
        if tensor is None or tensor.ndim != 2 or tensor.is_floating_point() or (len(tensor) and int(tensor.min()) < 0):
            raise InputError(f"{path}: {name} is not a matrix of token ids.")
    return rows


def digest_of_split(job: Job, split: str) -> str:
    """Digest of the rows of a split."""
    job.run.require(DATA.name)
    digests: dict[str, str] = read_json(job.run.folder / DATA.name / "data.json", Description)["sha256"]
    return digests[split]


DATA = Stage(
    name="data",
    inputs=_inputs,
    make=_make,
    read=_read,
    is_shared=True,
)
