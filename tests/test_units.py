from decimal import Decimal

import pytest

from layersmith.errors import UsageError
from layersmith.units import (
    format_bytes,
    format_cost,
    format_count,
    format_seconds,
    parse_amount,
    split_amount,
)


def test_amounts_are_written_with_their_unit() -> None:
    assert format_count(4_771_392) == "4.77M"
    assert format_count(12) == "12"
    assert format_bytes(9_542_784) == "9.10 MiB"
    seconds = (0, 2e-6, 0.00342, 1.25, 59.9, 75, 200, 5025, 7500)
    assert [format_seconds(s) for s in seconds] == [
        "0.0 s", "2 µs", "3.42 ms", "1.2 s", "59.9 s", "1 min 15 s", "3 min 20 s", "1 h 24 min", "2 h 05 min",
    ]  # fmt: skip
    assert format_cost("decode_seconds", 0.012) == "12 ms"
    assert format_cost("token_seconds", 1 / 1234) == "1,234 tokens/s"
    assert format_cost("memory_bytes", 1024) == "1.00 KiB"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10GiB", 10 * 1024**3), ("12ms", Decimal("0.012")), ("7B", 7 * 10**9), ("70%", Decimal("0.7")), ("2 mb", 2e6)],
)
def test_amounts_are_read(text: str, expected: object) -> None:
    assert parse_amount(text, "here") == expected


@pytest.mark.parametrize("text", ["", "10", "ten", "5 parsecs", "..", "-3GiB"])
def test_what_is_not_an_amount_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="here"):
        parse_amount(text, "here")


def test_a_number_and_its_unit() -> None:
    assert split_amount("3_500 MB") == (3500, "MB")
    assert split_amount("1,000") == (1000, "")
    assert split_amount("ten") is None
    assert split_amount("1.2.3GB") is None
