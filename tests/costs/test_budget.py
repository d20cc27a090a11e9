import pytest

from layersmith.costs.budget import Budget, Limit, parse_budget, parse_limit
from layersmith.errors import UsageError


@pytest.mark.parametrize(
    ("cost", "text", "expected"),
    [
        ("parameters", "0.7", 700_000),
        ("parameters", 0.7, 700_000),
        ("parameters", "70%", 700_000),
        ("parameters", "1.0", 1_000_000),
        ("parameters", 1, 1_000_000),
        ("parameters", "0.5M", 500_000),
        ("parameters", "7B", 7_000_000_000),
        ("parameters", "1.3b", 1_300_000_000),
        ("parameters", "3_500_000", 3_500_000),
        ("parameters", "3,500,000", 3_500_000),
        ("memory_bytes", "10GiB", 10 * 1024**3),
        ("memory_bytes", "10 gib", 10 * 1024**3),
        ("memory_bytes", "1.5MB", 1_500_000),
        ("kv_cache_bytes", "0.333", 333_000),
    ],
)
def test_amounts(cost: str, text: object, expected: int) -> None:
    assert parse_limit(cost, text).resolve(1_000_000) == expected


@pytest.mark.parametrize(
    "text", ["0", "0.0", "-0.5", "1.5", "-3GiB", "7 parsecs", "", "nan", "inf", "120%", "ten", "7GiB", "1e", "..", True]
)
def test_nonsense_counts(text: object) -> None:
    with pytest.raises(UsageError) as refused:
        parse_limit("parameters", text)
    assert "--params" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["2", "1000000", "-3GiB", "7 parsecs", "7B2", "10GiBs", "7T"])
def test_nonsense_bytes(text: str) -> None:
    with pytest.raises(UsageError, match="--memory"):
        parse_limit("memory_bytes", text)


def test_fractions_are_exact() -> None:
    whole = 123_456_789_012_345_678
    assert parse_limit("parameters", "1.0").resolve(whole) == whole
    assert parse_limit("parameters", "0.1").resolve(whole) == whole // 10


def test_budgets() -> None:
    budget = parse_budget(params="0.7", memory="10GiB", batch=8, context=2048)
    assert Budget.from_dict(budget.to_dict()) == budget
    assert Budget.parse({"params": "0.7", "memory": "10GiB", "batch": 8, "context": 2048}) == budget
    assert Budget.parse(0.7) == parse_budget(params="0.7")
    assert Budget.parse(budget) is budget
    assert str(budget.limits.each[0]) == "parameters 0.7x"


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({}, "no budget"),
        ({"parms": 0.7}, "Did you mean 'params'"),
        ({"params": 0.7, "batch": 0}, "batch"),
        ({"params": 0.7, "context": -1}, "context"),
        ({"params": 0.7, "context": 1.5}, "context"),
    ],
)
def test_budgets_that_make_no_sense(value: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Budget.parse(value)


def test_a_limit_is_one_thing() -> None:
    with pytest.raises(UsageError):
        Limit("parameters")
    with pytest.raises(UsageError):
        Limit("parameters", "0.5", 10)
    with pytest.raises(UsageError):
        Limit("paramters", "0.5")
