"""Prove an export: the child and what the target's reader loads give the same logits and the same greedy tokens.

Both run the same token ids in float32, so what differs is only the order of sums. The tokens are drawn at random from
the vocabulary: equality does not depend on which they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from layersmith.export.source import CannotExport, Source
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.checkpoint import load
from layersmith.model_descriptor.stock import quiet_transformers
from layersmith.modeling_layersmith import refuse_incomplete

# Largest difference of logits, relative to the largest logit, in float32. Children of four layers differ by 1e-6; a
# wrong tensor changes them by 1e-2 or more.
TOLERANCE = 1e-4
ROWS, LENGTH, GENERATED = 2, 48, 12
# Windows up to this many tokens are exceeded by the proof's rows.
_LONGEST = 512


class Reader(Protocol):
    """A model as the target loads it."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, T, V]`` of token ids ``[B, T]``."""

    def greedy(self, tokens: torch.Tensor, count: int) -> list[int]:
        """The ``count`` tokens that follow token ids ``[1, T]`` when each is the most probable one."""


@dataclass(frozen=True)
class TransformersReader:
    """A model of Transformers; generation uses its cache."""

    model: Any

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model(input_ids=tokens, use_cache=False).logits.float()

    def greedy(self, tokens: torch.Tensor, count: int) -> list[int]:
        # The checkpoint's own settings, such as a penalty or an end token, are not what is compared.
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        with quiet_transformers():
            made = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count)
        return [int(t) for t in made[0, tokens.shape[1] :]]


def with_layersmith(folder: Path) -> Reader:
    """The reader of every layout that layersmith reads."""
    return TransformersReader(load(folder, dtype=torch.float32).eval())


def with_stock_transformers(folder: Path) -> Reader:
    """Transformers' own class for the folder, without remote code; missing or unused weights are refused."""
    cls: Any = AutoModelForCausalLM
    how = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
    model, info = cls.from_pretrained(folder, **how)
    refuse_incomplete(info, str(folder))
    return TransformersReader(model.eval())


@dataclass(frozen=True)
class Proof:
    """What was compared and what came out.

    Attributes:
        target: Name of the target.
        reader: What loaded the export, in words.
        tokens: Number of token ids whose logits were compared.
        difference: Largest difference of logits, relative to the largest logit.
        tolerance: The difference that is allowed.
        greedy: Number of generated tokens that are equal.
    """

    target: str
    reader: str
    tokens: int
    difference: float
    tolerance: float
    greedy: int

    def __str__(self) -> str:
        return (
            f"loaded by {self.reader}, it gives the child's logits for {self.tokens} tokens (largest difference "
            f"{self.difference:.1e} of the largest logit, tolerance {self.tolerance:.0e}) and the same "
            f"{self.greedy} greedy tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        """The proof as JSON data."""
        return asdict(self)


def prove(
    source: Source, folder: Path, target: str, reader: str, read: Callable[[Path], Reader], tolerance: float = TOLERANCE
) -> Proof:
    """Compare an export with the child. One of the two is in memory at a time.

    Raises:
        CannotExport: The target's reader refuses it, or it is another model.
    """
    tokens = sample_tokens(source)
    wanted, text = _run(with_layersmith(source.folder), tokens)
    with foreign_code(f"does {reader} load the export?", refusal_is_answer=True) as attempt:
        seen, said = _run(attempt.call(read, folder), tokens)
    if attempt.failed:
        raise CannotExport(f"--to {target}: {reader} cannot load the export ({attempt.reason}).") from attempt.error
    scale = wanted.abs().max().clamp_min(1e-9)
    difference = float((seen - wanted).abs().max() / scale) if seen.shape == wanted.shape else float("inf")
    if not difference <= tolerance:  # also where it is not a number
        raise CannotExport(
            f"--to {target}: this family computes something that the layout does not express: the logits of the export "
            f"differ by {difference:.1e} of the largest."
        )
    if text != said and not _is_tie(source, tokens[:1], text, said, tolerance * float(scale)):
        raise CannotExport(f"--to {target}: the export generates other tokens than the child: {said}, not {text}.")
    return Proof(target, reader, tokens.numel(), difference, tolerance, len(text))


def sample_tokens(source: Source) -> torch.Tensor:
    """Token ids ``[ROWS, T]``, longer than the windows of attention where these are short."""
    language = source.language
    most = getattr(language, "max_position_embeddings", None) or LENGTH
    window = getattr(language, "sliding_window", None) or 0
    length = min(most - GENERATED, max(LENGTH, window + 8) if window <= _LONGEST else LENGTH)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, int(language.vocab_size), (ROWS, max(1, length)), generator=generator)


def _run(reader: Reader, tokens: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    return reader.logits(tokens), reader.greedy(tokens[:1], GENERATED)


def _is_tie(source: Source, tokens: torch.Tensor, text: list[int], said: list[int], within: float) -> bool:
    """Whether the first different token is as probable as the child's, up to the tolerance."""
    at = next((i for i, (a, b) in enumerate(zip(text, said, strict=False)) if a != b), None)
    if at is None:
        return False
    context = torch.cat([tokens, torch.tensor([text[:at]], dtype=torch.long)], 1)
    logits = with_layersmith(source.folder).logits(context)[0, -1]
    return float(logits[text[at]] - logits[said[at]]) <= 2 * within
