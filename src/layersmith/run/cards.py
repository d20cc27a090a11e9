"""Model cards: the one file of a stage that people edit. A card that someone edited is kept.

For each child the header of a run has the digests of the cards that layersmith wrote, and whether these have an
evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from layersmith.run.artifacts import write_text
from layersmith.run.header import read_header, write_header
from layersmith.run.progress import Progress

CARD = "README.md"


def write_card_of(run: Path, stage: str, card: Path, text: str, is_complete: bool) -> None:
    """Write the model card of a stage's child, after its digest."""
    header = read_header(run)
    header["cards"].setdefault(stage, {})[_digest(text.encode())] = is_complete
    write_header(run, header)
    write_text(card, text)


def only_current(run: Path, stage: str, cards: dict[str, dict[str, bool]]) -> None:
    """Of a stage that was made again, forget the cards of the child that it had before."""
    card = run / stage / CARD
    current = _digest(card.read_bytes()) if card.is_file() else ""
    if current in cards.get(stage, {}):
        cards[stage] = {current: cards[stage][current]}


def is_edited(run: Path, stage: str) -> bool:
    """Whether someone edited the model card of a stage's child. One that is missing or empty is not an edited one."""
    card = run / stage / CARD
    text = card.read_bytes() if card.is_file() else b""
    return bool(text) and _digest(text) not in read_header(run)["cards"].get(stage, {})


def keep_card(run: Path, stage: str, progress: Progress, write: Callable[[], None] | None) -> None:
    """Write a card that is missing or lacks the evaluation; say of an edited one that it is kept.

    Args:
        run: Folder of the run.
        stage: The stage of a child that was evaluated.
        progress: Receives notes.
        write: Writes it; None if only the command ``distill`` can.
    """
    card, name = run / stage / CARD, f"{stage}/{CARD}"
    text = card.read_bytes() if card.is_file() else b""
    is_complete = read_header(run)["cards"].get(stage, {}).get(_digest(text))
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
