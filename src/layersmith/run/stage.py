"""A stage: one step of the pipeline. It has a folder of its own in the run, and is done once for the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from layersmith.run.journal import Recording
from layersmith.run.progress import Advance, Progress

Job = TypeVar("Job")
Artifact = TypeVar("Artifact")


class StageProgress(Progress):
    """Shows the work inside a stage under the stage's name, so that the bar and ``--until`` use the same words."""

    def __init__(self, shown: Progress, name: str):
        self.shown, self.name, self.clock = shown, name, shown.clock

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        shown = self.name if name == self.name else f"{self.name}: {name}"
        timeline, so_far = self.shown.timeline, 0.0
        part = None if timeline is None else timeline.begin(name)
        with self.shown.stage(shown, total, unit) as advance:

            def done(steps: float, left: float | None = None, said: str = "") -> None:
                nonlocal so_far
                so_far += steps
                if timeline is not None and part is not None and total > 1:
                    timeline.done(part, so_far / total, left)
                advance(steps, left, said)

            yield done

    def note(self, text: str) -> None:
        self.shown.note(text)


@dataclass(frozen=True)
class Making:
    """What a stage is given while it is made.

    Attributes:
        folder: New folder for the stage's files. It appears in the run when the stage is complete.
        inputs: Digest of everything the result depends on; unfinished work of other inputs is not used.
        unfinished: File that keeps results as they come.
        scratch: Folder for the same purpose, removed when the stage is complete.
        progress: Receives steps and notes.
        elsewhere: The stage adds files that it wrote elsewhere in the run.
    """

    folder: Path
    inputs: str
    unfinished: Path
    scratch: Path
    progress: Progress
    elsewhere: list[Path] = field(default_factory=list)

    @property
    def recording(self) -> Recording:
        """For work that keeps its results in :attr:`unfinished`."""
        return Recording(self.unfinished, self.inputs, self.progress)


def _always(job: Any) -> bool:
    return True


@dataclass(frozen=True)
class Stage(Generic[Job, Artifact]):
    """One step of the pipeline.

    Attributes:
        name: One of :data:`layersmith.stages.NAMES`.
        inputs: JSON data that the result depends on. The stage is skipped if it was made from equal data.
        make: Writes the result.
        read: Reads the result from its folder.
        is_wanted: Whether the job has this stage at all; default: always.
        meanwhile: Part of the work that the other processes of a launcher do while the first makes the
            stage; default: they wait.
        is_shared: Whether other runs of the same inputs take the result instead of making it again.
    """

    name: str
    inputs: Callable[[Job], Any]
    make: Callable[[Job, Making], None]
    read: Callable[[Job, Path], Artifact]
    is_wanted: Callable[[Job], bool] = _always
    meanwhile: Callable[[Job, Making], object] | None = None
    is_shared: bool = False
