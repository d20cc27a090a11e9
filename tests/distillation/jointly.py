"""Trains the chosen layers of a library jointly as one of several processes; see test_team.py.

python -m torch.distributed.run ... tests/distillation/jointly.py PARENT FOLDER FAILS
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from layersmith.distillation.joint import distill_jointly
from layersmith.distillation.layer_by_layer import TrainingSetup
from layersmith.distillation.one_layer import LayerDistillation
from layersmith.library.library import Library
from layersmith.run import ranks
from tests.distillation.test_local import CALIBRATION, RECIPE, TRAINING, chosen_of, open_library

TOGETHER = dataclasses.replace(RECIPE, coupled_in="all", child_refit_sequences=4, coupled_tokens=32 * 19)


def jointly(parent: Path, folder: Path) -> Library:
    library = open_library(parent)
    setup = TrainingSetup(TOGETHER, folder=folder, inputs="a")
    return distill_jointly(library, chosen_of(library), CALIBRATION, TRAINING, setup)


def main() -> None:
    parent, folder = Path(sys.argv[1]), Path(sys.argv[2])
    if sys.argv[3] == "fails":
        train = LayerDistillation._train_group

        def failing(self: LayerDistillation, *given: object) -> None:
            if self.index >= 2 and ranks.number() == 1:
                raise ValueError("a fault of the second process")
            train(self, *given)  # type: ignore[arg-type]

        LayerDistillation._train_group = failing  # type: ignore[method-assign]
    try:
        jointly(parent, folder)
    except (RuntimeError, ValueError) as error:
        line = f"{ranks.number()}: {type(error).__name__}: {error}\n"
        os.write(1, line.encode())  # at once, or lines of two processes mix


if __name__ == "__main__":
    main()
