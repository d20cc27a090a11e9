"""Inputs near valid ones: data, text or bytes with a few things changed, by a source of random numbers."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

# What readers trip over: wrong types, edges of number types, paths that lead away, and text that means something to a
# terminal, HTML, Markdown or a template.
NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, 10**30, -(2**63), 0.5, -0.5, 1e308, 1e-320, "", "x", "0", "parent",
    "../../x", "/etc/passwd", "a/../../b", "\x00", "\x1b]0;x\x07\x1b[31m", "\u202e", "\ud800",
    "<script>alert(1)</script>", "| `x` | [a](javascript:b) ![c](d)", "{{ 7 * 7 }}{% for x in y %}", "%s%n{0}",
    "a" * 3000, [], {}, [[]], [None],
    {"a": {}}, [1, 2, 3], {"x": 1}, [0.1] * 50, ["a", "b"],
)  # fmt: skip


def mutated(data: Any, random: Random, most: int = 3) -> Any:
    """JSON data with one to ``most`` values replaced, removed, added, exchanged or repeated."""
    data = copy.deepcopy(data)
    for _ in range(random.randint(1, most)):
        places = list(_places(data))
        if not places:
            return random.choice(NASTY)
        holder, key = random.choice(places)
        match random.randrange(7):
            case 0 | 1 | 2:
                holder[key] = _value(random)
            case 3:
                del holder[key]
            case 4 if isinstance(holder, list):
                holder.insert(random.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
            case 4:
                holder[random.choice(["", "x", "__class__", "../x", "0", "a" * 300])] = holder[key]
            case 5:
                other, other_key = random.choice(places)
                holder[key] = copy.deepcopy(other[other_key])
            case _ if type(holder[key]) in (int, float):
                holder[key] = holder[key] * random.choice([-1, 0, 2, 1000, 10**12, 0.5]) + random.choice([0, 1, -1])
            case _:
                holder[key] = [holder[key]]
    return data


def _value(random: Random) -> Any:
    value = copy.deepcopy(random.choice(NASTY))
    for _ in range(random.choice([0, 0, 0, 0, 1, 2, 50, 120])):
        value = [value]
    return value


def _places(data: Any, depth: int = 0) -> Any:
    """Pairs of a list or mapping and a key in it, at any depth that this function can reach."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield data, key
        if depth < 30:
            yield from _places(value, depth + 1)


def mutated_bytes(data: bytes, random: Random) -> bytes:
    """Bytes with a few flipped, removed, repeated or replaced, also as a number of eight bytes at the start."""
    result = bytearray(data)
    for _ in range(random.randint(1, 4)):
        i = random.randrange(len(result) + 1) if random.random() < 0.7 else random.randrange(min(64, len(result) + 1))
        match random.randrange(7):
            case 0 if result:
                result[i % len(result)] ^= 1 << random.randrange(8)
            case 1:
                del result[i:]
            case 2:
                del result[i : i + random.randrange(1, 20)]
            case 3:
                result[i:i] = result[: random.randrange(1, 40)]
            case 4:
                result[i : i + 1] = random.choice(
                    [b"\x00", b"\xff", b'"', b"{", b"[", b",", b"\n", b"1e999", b"NaN", b"-"]
                )
            case 5:
                result[:8] = random.choice([2**60, 2**63, 2**32, 100_000_001, 0, 8, 99]).to_bytes(8, "little")
            case _:
                result[i : i + 4] = str(random.choice([10**20, -5, 0, 2**31])).encode()
    return bytes(result)


def as_json(data: Any, random: Random) -> bytes:
    """JSON text of data, sometimes damaged once more."""
    try:
        text = json.dumps(data).encode("utf-8", "surrogatepass")
    except RecursionError:
        text = b"[" * 100_000
    if random.random() < 0.1:
        return mutated_bytes(text, random)
    if random.random() < 0.02:
        return random.choice(
            [b"[" * 200_000, b'{"a":' * 50_000, b"9" * 10_000, b"", b"\xff\xfe", b"null", b"[]", b'""']
        )
    return text
