"""What one scoring run works on, shared by exact runs and estimates, and how its progress is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from layersmith.block_config import BlockConfig
from layersmith.execution.hidden_states import States, StatesOnDisk
from layersmith.execution.layerwise import LayerwiseParent, tokens_at_once
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.recipe import ScoringRecipe
from layersmith.run.journal import Journal
from layersmith.run.progress import Advance, Progress
from layersmith.scoring.work import Work

PARENT = "parent"
KL = "kl_divergence"


@dataclass
class ScoringProgress:
    """Shows the share of all work that is done, in alternatives, and details of the current part.

    Attributes:
        advance: Moves the stage's progress.
        num_alternatives: Steps of the stage.
        length: Tokens in a row.
        clock: Reads the time in seconds.
        work: Accounts for all work of the run.
    """

    advance: Advance
    num_alternatives: int
    length: int
    clock: Callable[[], float]
    work: Work = field(init=False)
    _steps: float = 0.0

    def __post_init__(self) -> None:
        self.work = Work(self.clock)
        self.work.show = self.show
        self.begin("scored", 1)

    def begin(self, what: str, rows: float) -> None:
        """Begin a part of the work in which ``rows`` rows make up one alternative."""
        self._what, self._rows, self._began = what, max(1.0, rows), self.clock()
        self._done = self._resumed = 0.0

    def add(self, rows: float) -> None:
        """Count rows of alternatives that were just done."""
        self._done += rows
        self.show()

    def add_resumed(self, rows: float) -> None:
        """Count rows that an interrupted run did; they don't count for the speed."""
        self._resumed += rows

    def show(self) -> None:
        share, left = self.work.share, self.work.seconds_left
        if share is None or left is None:
            return
        steps = max(self._steps, share * self.num_alternatives)
        speed = self._done * self.length / max(self.clock() - self._began, 1e-9)
        text = f"{(self._resumed + self._done) / self._rows:,.0f} {self._what}, {speed:,.0f} tokens/s"
        self.advance(steps - self._steps, left, text)
        self._steps = steps


def clock_of(progress: Progress, device: torch.device) -> Callable[[], float]:
    """A clock that first waits for all work that was queued on the device."""

    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return progress.clock()

    return read


@dataclass(eq=False)
class ScoringTask:
    """The inputs of one scoring run, and the journal of its results.

    Attributes:
        library: The library whose alternatives are scored.
        layerwise: The parent split into layers; None if it cannot be.
        tokens: ``[N, T]`` scoring rows.
        recipe: Settings of scoring.
        folder: Folder for hidden states if the parent's weights stay on the disk.
        progress: Shows the work.
        results: Results so far, also those of an interrupted run.
    """

    library: Library
    layerwise: LayerwiseParent[Library] | None
    tokens: torch.Tensor
    recipe: ScoringRecipe
    folder: Path
    progress: ScoringProgress
    results: Journal

    @cached_property
    def pending(self) -> list[Alternative]:
        """The alternatives to score: all but the parent's subblocks."""
        return [a for a in self.library.alternatives if a.kind != PARENT]

    @property
    def work(self) -> Work:
        return self.progress.work

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.tokens.shape[1]

    @property
    def streamed(self) -> bool:
        """Whether layers are read from the disk one at a time, each once for all that goes through it."""
        return self.layerwise is not None and self.layerwise.streamed

    @property
    def spill_bytes(self) -> float:
        return self.recipe.spill_gib * 1024**3

    @cached_property
    def tokens_at_once(self) -> int:
        return tokens_at_once(self.library.parent, self.layerwise, self.recipe.batch_tokens)

    def states(self) -> States:
        return StatesOnDisk(self.folder) if self.streamed else States()

    def rows(self, numbers: Sequence[int]) -> torch.Tensor:
        """Rows ``[B, T]`` on the parent's device."""
        return self.tokens[list(numbers)].to(self.library.parent.runtime.device)

    def batches(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of rows, as many at a time as run together."""
        size = max(1, self.tokens_at_once // self.length)
        for start in range(0, len(numbers), size):
            yield list(numbers[start : start + size])

    def exact_cost(self, alternative: Alternative) -> float:
        """Cost of an exact run on all rows, in forward passes of the parent."""
        return self._share_from_layer[alternative.layer]

    @cached_property
    def _share_from_layer(self) -> list[float]:
        """For each layer, the share of the parent's weights that are in it and after it."""
        parent = self.library.parent
        layers = [sum(p.numel() for p in layer.parameters()) for layer in parent.layers]
        head = sum(p.numel() for p in parent.head.parameters())
        return [(sum(layers[i:]) + head) / (sum(layers) + head) for i in range(len(layers))]


def has_experts(blocks: Sequence[BlockConfig]) -> bool:
    """Whether any layer is a mixture of experts."""
    return any(block.ffn.moe is not None for block in blocks)


def exact_passes(recipe: ScoringRecipe, is_mixture: bool) -> float:
    """Forward passes that exact runs may take: three times as many with routers, where estimates are less accurate."""
    return recipe.exact_passes * (3 if is_mixture else 1)


def row_order(num_rows: int) -> list[int]:
    """Rows in the order in which exact runs take them (bit-reversed), so that the first few are far apart."""
    bits = max(1, (num_rows - 1).bit_length())
    reversed_bits = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [i for i in reversed_bits if i < num_rows]
