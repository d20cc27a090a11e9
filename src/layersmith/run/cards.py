"""Model cards: the one file of a stage that people edit. A card that someone edited is kept.

The header of a run has the digest of every card that layersmith wrote, and whether the card has an evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from layersmith.run.artifacts import write_text
from layersmith.run.header import read_header, write_header
from layersmith.run.progress import Progress

CARD = "README.md"


def write_card_of(run: Path, card: Path, text: str, is_complete: bool) -> None:
    """Write a model card, after its digest."""
    header = read_header(run)
    header["cards"][_digest(text.encode())] = is_complete
    write_header(run, header)
    write_text(card, text)


def is_edited(run: Path, card: Path) -> bool:
    """Whether someone edited a model card. One that is missing or empty is not an edited one."""
    text = card.read_bytes() if card.is_file() else b""
    return bool(text) and _digest(text) not in read_header(run)["cards"]


def keep_card(run: Path, card: Path, progress: Progress, write: Callable[[], None] | None) -> None:
    """Write a card that is missing or lacks the evaluation; say of an edited one that it is kept.

    Args:
        run: Folder of the run.
        card: The card of a child that was evaluated.
        progress: Receives notes.
        write: Writes it; None if only the command ``distill`` can.
    """
    name = card.relative_to(run)
    text = card.read_bytes() if card.is_file() else b""
    is_complete = read_header(run)["cards"].get(_digest(text))
    if text and is_complete is None:
        progress.note(f"{name} was edited; it is kept.")
    elif not is_complete:
        if not text:
            by = "the same distill command writes it" if write is None else "it is written"
            progress.note(f"{name} is missing or empty; {by} again.")
        if write is not None:
            write()


def _digest(card: bytes) -> str:
    return hashlib.sha256(card).hexdigest()
