"""Models in memory as parents: they are written to the user's cache, since everything else reads checkpoints."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from layersmith.errors import InputError
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.checkpoint import save
from layersmith.run.digests import content_digest
from layersmith.run.user_cache import folder_for

# A checkpoint folder, hub id or GGUF file; or a model in memory, with its tokenizer if it was not loaded with one.
Model: TypeAlias = str | Path | PreTrainedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase]


def checkpoint_of(model: Model) -> str:
    """The path or hub id of a model.

    A model in memory is written to the user's cache under the digest of its files, so that equal models have the same
    path and a run can be resumed.

    Raises:
        InputError: A model in memory has no tokenizer.
    """
    if isinstance(model, str | Path):
        return str(model)
    model, tokenizer = model if isinstance(model, tuple) else (model, None)
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"the model is a {type(model).__name__}. Give a path, a hub id, or a PreTrainedModel.")
    tokenizer = tokenizer or _tokenizer_of(model)
    place = folder_for("models")
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        written = Path(temporary) / "model"
        save(model, written, tokenizer=tokenizer)
        folder = place / content_digest(written)
        if not folder.exists():
            written.rename(folder)
    return str(folder)


def _tokenizer_of(model: PreTrainedModel) -> Any:
    with foreign_code("does the model's name lead to its tokenizer?", refusal_is_answer=True) as attempt:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    raise InputError(
        f"the model's tokenizer is not at {model.name_or_path!r} ({attempt.reason}). Give the pair (model, tokenizer)."
    )
