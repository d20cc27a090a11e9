"""Measured times in the user's cache, so that a second run on the same machine does not time the same shapes again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from layersmith.costs.budget import Workload
from layersmith.costs.clock import device_name
from layersmith.costs.times import Check, Timing
from layersmith.errors import LayersmithError
from layersmith.execution.parent import Parent
from layersmith.model_descriptor.infer.findings_cache import key_of
from layersmith.model_descriptor.stock import causal_lm_config
from layersmith.recipe import CostsRecipe
from layersmith.records import parse
from layersmith.run.artifacts import fingerprint, read_json, write_json
from layersmith.run.user_cache import cache_folder

logger = logging.getLogger(__name__)

# Raised when the way of measuring changes; times of another version are not used.
_VERSION = 2


class MeasurementCache:
    """Times measured earlier for the same model code, shapes, device, dtype and workload.

    Attributes:
        parent: Time of the parent, or None if nothing was measured yet.
        savings: Saving of each shape as a share of the parent's time, by the shape's name.
        checks: Whole children that were timed, by a digest of the shapes that they correct.
    """

    def __init__(self, parent: Parent, workload: Workload, recipe: CostsRecipe):
        self.parent: Timing | None = None
        self.savings: dict[str, Timing] = {}
        self.checks: dict[str, list[Check]] = {}
        self._path = _path_for(parent, workload, recipe)
        if self._path is not None and self._path.is_file():
            try:
                self._read(self._path)
            except (LayersmithError, KeyError, TypeError, ValueError, AttributeError) as error:
                logger.debug("%s: damaged, times are measured again (%s)", self._path, error)
                self.parent, self.savings, self.checks = None, {}, {}

    def _read(self, path: Path) -> None:
        data = read_json(path)
        self.savings = {name: Timing(*timing) for name, timing in data["savings"].items()}
        self.checks = {name: [parse(Check, c, "checks") for c in checks] for name, checks in data["checks"].items()}
        self.parent = Timing(*data["parent"])

    def saving(self, name: str) -> Timing:
        """Seconds that a shape saves in one layer, at the speed of the latest session."""
        assert self.parent is not None
        return self.savings[name].scaled(self.parent.prefill, self.parent.decode)

    def add(self, parent: Timing, savings: Mapping[str, Timing]) -> None:
        """Keep the parent's time and savings in seconds. Of two sessions the later says how fast the machine is."""
        self.parent = parent
        self.savings |= {name: t.scaled(1 / parent.prefill, 1 / parent.decode) for name, t in savings.items()}
        self._write()

    def add_checks(self, name: str, checks: list[Check]) -> None:
        self.checks[name] = checks
        self._write()

    def _write(self) -> None:
        if self._path is None or self.parent is None:
            return
        data = {
            "parent": [self.parent.prefill, self.parent.decode],
            "savings": {name: [t.prefill, t.decode] for name, t in self.savings.items()},
            "checks": {name: [asdict(c) for c in checks] for name, checks in self.checks.items()},
        }
        with suppress(OSError, LayersmithError):  # a cache that cannot be written is done without
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, data)


def _path_for(parent: Parent, workload: Workload, recipe: CostsRecipe) -> Path | None:
    folder = cache_folder("times")
    if folder is None:
        return None
    key = fingerprint(
        [
            _VERSION,
            key_of(causal_lm_config(parent.config)),
            [b.to_json() for b in parent.blocks],
            device_name(parent.runtime),
            str(parent.runtime.dtype),
            [workload.batch, workload.prompt, workload.generated],
            [recipe.backend, recipe.decode_steps],
            parent.stream is not None,
        ]
    )
    return folder / f"{key}.json"
