"""Layers are dealt so that processes have equal shares and wait little."""

import random

import pytest
import torch

from layersmith.execution.dealing import deal, efficiency, group_size, groups_of, makespan
from layersmith.execution.division import Division
from layersmith.run import ranks


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8])
def test_neighbours_go_to_different_processes_and_shares_are_fair(processes: int) -> None:
    rng = random.Random(processes)
    for _ in range(20):
        sizes = [rng.choice((1.0, 3.0)) for _ in range(rng.randrange(1, 30))]
        owners = deal(sizes, processes)
        for start in range(0, len(sizes), processes):
            neighbours = owners[start : start + processes]
            assert len(set(neighbours)) == len(neighbours)
        shares = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == p) for p in range(processes)]
        assert max(shares) <= sum(sizes) / processes + max(sizes)
    assert deal([1.0] * 7, 3) == [0, 1, 2, 0, 1, 2, 0]


def test_a_period_of_two_kinds_of_layers_is_not_split_by_kind() -> None:
    sizes = [1.0, 3.0] * 12
    owners = deal(sizes, 2)
    assert sum(size for size, owner in zip(sizes, owners, strict=True) if owner) == sum(sizes) / 2
    # A process that finishes a small layer waits for the large one before it, so time is lost all the same.
    assert efficiency(sizes, 2, 1000) == pytest.approx(2 / 3, abs=0.01)
    assert efficiency([1.0] * 24, 2, 8) > 0.98


def test_time_of_a_pass() -> None:
    assert makespan([1.0] * 6, [0] * 6, 4) == pytest.approx(6)  # one process never waits
    assert makespan([1.0] * 6, deal([1.0] * 6, 3), 1) == pytest.approx(6)  # a single batch is in one place at a time
    # In the end each of three processes worked for two units, and the last began two batches later.
    assert makespan([1.0] * 6, deal([1.0] * 6, 3), 4) == pytest.approx(2 + 2 / 4)
    # Without dealing, the second process waits until the first has finished all of its layers but one batch.
    assert makespan([1.0] * 6, [0, 0, 0, 1, 1, 1], 4) == pytest.approx(5 + 1 / 4)


def test_many_processes_are_groups_that_have_all_layers() -> None:
    assert [groups_of(3, processes) for processes in (1, 2, 3, 5, 6, 8, 9)] == [1, 1, 1, 1, 2, 2, 3]
    assert [group_size(3, processes) for processes in (1, 2, 3, 5, 6, 8, 9)] == [1, 2, 3, 5, 3, 4, 3]
    assert deal([1.0] * 3, 7) == deal([1.0] * 3, 3) == [0, 1, 2]
    # A group takes half of the batches: it is twice as fast, but for the beginning and the end of a pass.
    assert efficiency([1.0] * 3, 6, 1000, in_groups=True) > 0.98
    assert efficiency([1.0] * 3, 6, 1000) == pytest.approx(efficiency([1.0] * 3, 3, 1000) / 2)
    assert efficiency([1.0] * 3, 6, 3, in_groups=True) < efficiency([1.0] * 3, 6, 4, in_groups=True)


def test_each_batch_goes_through_all_layers_of_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[int, int]] = []
    monkeypatch.setattr(ranks, "count", lambda: 7)
    division = Division(deal([1.0] * 3, 7), torch.device("cpu"), is_open=True)
    for process in range(7):
        monkeypatch.setattr(ranks, "number", lambda process=process: process)
        for n in filter(division.is_of_group, range(5)):
            for i in division.here_in_group:
                runs.append((i, n))
                assert division.owner_in_group(i, n) == process
        assert division.here == division.mine == ([process] if process < 3 else [])
    assert sorted(runs) == [(i, n) for i in range(3) for n in range(5)]
