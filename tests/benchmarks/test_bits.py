"""The program with formats: as many candidates as a large model has, and five limits that bind."""

import time

from benchmarks.bits import _LIMITS, with_formats
from benchmarks.search import made_up
from layersmith.search.solve import Solver, total_of


def test_shapes_in_formats_are_proven_in_seconds() -> None:
    groups, fixed, parent = made_up(40, 27, 0)
    groups = with_formats(groups, 0)
    assert sum(len(group.candidates) for group in groups) > 40 * 2 * 26 * 8
    limits = {name: int(parent[name] * share) for name, share in _LIMITS.items()}
    started = time.process_time()
    solution = Solver(groups, fixed, parent).solve(limits)
    assert time.process_time() - started < 5
    assert solution.proven_optimal
    chosen = [
        next(i for i, c in enumerate(group.candidates) if c.key == key)
        for group, key in zip(groups, solution.chosen, strict=True)
    ]
    assert all(total_of(groups, chosen, fixed, name) <= limit for name, limit in limits.items())
    assert len({key.rsplit(" ", 1)[1] for key in solution.chosen}) > 2
