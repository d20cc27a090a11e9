"""Long rows: the data's tokens, joined, whose ends ask for what stood once in their beginnings."""

from __future__ import annotations

import torch

from layersmith.data.retrieval import SHARE, long_rows

ROWS = torch.randint(0, 500, (12, 64), generator=torch.Generator().manual_seed(1))


def test_rows_end_with_spans_of_their_beginning_that_occur_once() -> None:
    rows = long_rows(ROWS, 256, seed=0)
    assert rows.shape == (3, 256)
    asked = int(256 * SHARE)
    assert torch.equal(rows[:, :-asked], ROWS.reshape(3, 256)[:, :-asked])
    for row in rows:
        before = row[:-asked].unfold(0, 8, 1)
        spans = row[-asked:].view(-1, 8)
        assert len(torch.unique(spans, dim=0)) == len(spans)
        for span in spans:
            (places,) = (before[:, :4] == span[:4]).all(1).nonzero(as_tuple=True)
            assert len(places) == 1
            assert int(places) + 8 <= len(before) // 2 + 8
            assert torch.equal(before[places[0]], span)


def test_the_seed_decides_and_nothing_else_does() -> None:
    assert torch.equal(long_rows(ROWS, 256, seed=0), long_rows(ROWS, 256, seed=0))
    assert not torch.equal(long_rows(ROWS, 256, seed=0), long_rows(ROWS, 256, seed=1))


def test_two_rows_are_left_where_there_is_little_text() -> None:
    assert long_rows(ROWS, 10_000, seed=0).shape == (2, 384)
    assert long_rows(ROWS[:1], 10_000, seed=0).shape == (1, 64)


def test_rows_without_a_key_that_occurs_once_stay() -> None:
    rows = torch.ones(4, 64, dtype=torch.long)
    assert torch.equal(long_rows(rows, 128, seed=0), rows.view(2, 128))
