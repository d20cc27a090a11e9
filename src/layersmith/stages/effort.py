"""The amount of work of a run as one number, its level, and the level that fits into a given time.

The table has the settings that cost time, each with its values at the levels 0 to 6; between two levels values are
interpolated. No value ever falls from one level to the next, so more time never plans for a worse child. What each is
worth was measured as follows; docs/how-to/time.md has the tables.

* calibration rows: importance, and both refits. The refit on the child's inputs took a fifth of the KL divergence of
  SmolLM2-135M at 0.8 on 32 rows; fewer rows fit their text's statistics alone.
* scoring rows and exact runs: at four forward passes the choice by these scores is within 2% of that by exact ones.
* refinement: 1% to 10% of the KL divergence with eight passes, 2% more with sixteen.
* more rows for the refit on the child's inputs: 64 besides 64 calibration rows took 4% of the KL divergence of
  SmolLM2-135M, and 6% on other kinds of text.
* joint distillation: a third of the KL divergence on parents that were trained for minutes, 1% on SmolLM2-135M, so it
  comes last, and a run stops it where it gains too little.
* evaluation rows and repeats of timing: nothing for the child, only for how well it is known.

Training every alternative of the library is not in the table: it takes eight times the parent's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from layersmith.recipe import Recipe

# Setting => its values at levels 0 to 6. Level 3 has the defaults.
_LEVELS: dict[tuple[str, str], tuple[float, ...]] = {
    ("data", "calibration_sequences"): (16, 32, 48, 64, 128, 256, 512),
    ("data", "scoring_sequences"): (4, 6, 12, 32, 48, 64, 128),
    ("data", "training_sequences"): (64, 128, 256, 256, 512, 1024, 1024),
    ("data", "evaluation_sequences"): (8, 12, 24, 64, 64, 96, 128),
    ("scoring", "exact_passes"): (1, 1.5, 2.5, 4, 6, 8, 12),
    ("costs", "seconds"): (20, 30, 60, 120, 120, 120, 240),
}
# Those that matter only after the search, so that they can follow the time that is left then.
_LATE: dict[tuple[str, str], tuple[float, ...]] = {
    ("search", "refine_passes"): (0, 0, 5, 8, 12, 24, 32),
}
# Those that matter only after refinement.
_LAST: dict[tuple[str, str], tuple[float, ...]] = {
    ("local_distillation", "child_refit_sequences"): (0, 16, 32, 64, 128, 256, 512),
    ("local_distillation", "coupled_tokens"): (0, 0, 8_192, 32_768, 65_536, 131_072, 262_144),
}
TOP = len(next(iter(_LEVELS.values()))) - 1
# Refinement with fewer forward passes could evaluate no child besides the first.
_LEAST_PASSES = 4.0
# Levels that are tried are this far apart: a step changes the time by about 2%.
_STEP = 0.02


def at_level(recipe: Recipe, level: float, late_level: float | None = None, last_level: float | None = None) -> Recipe:
    """The recipe with the work of a level. Settings that differ from their defaults are kept.

    Args:
        recipe: All settings.
        level: From 0 to :data:`TOP`.
        late_level: Level of refinement; default: ``level``.
        last_level: Level of the work between refinement and evaluation; default: ``late_level``.
    """
    data, defaults = recipe.to_dict(), Recipe().to_dict()
    late = level if late_level is None else late_level
    for table, here in ((_LEVELS, level), (_LATE, late), (_LAST, late if last_level is None else last_level)):
        for (section, name), values in table.items():
            default = defaults[section][name]
            if data[section][name] == default:
                data[section][name] = _value(values, here, default)
    data["effort"] |= {"level": level, "late_level": late_level, "last_level": last_level}
    return Recipe.from_dict(data)


def with_effort(recipe: Recipe) -> Recipe:
    """The recipe with the work of the level that it names, if it names one."""
    effort = recipe.effort
    return recipe if effort.level is None else at_level(recipe, effort.level, effort.late_level, effort.last_level)


def _value(values: tuple[float, ...], level: float, default: Any) -> Any:
    below = min(math.floor(level), TOP - 1)
    value = values[below] + (level - below) * (values[below + 1] - values[below])
    if values == _LATE["search", "refine_passes"] and value < _LEAST_PASSES:
        return 0.0
    return round(value) if isinstance(default, int) else round(value, 2)


def highest_level(seconds: Callable[[float], float], within: float) -> float:
    """The highest level whose time, which rises with the level, is within a limit; 0 if none is."""
    below, above = 0, round(TOP / _STEP)
    while below < above:
        middle = (below + above + 1) // 2
        below, above = (middle, above) if seconds(round(middle * _STEP, 2)) <= within else (below, middle - 1)
    return round(below * _STEP, 2)
