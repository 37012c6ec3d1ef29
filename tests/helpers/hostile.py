"""Damage to what a program reads: hypothesis strategies for tests that look for tracebacks."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

# Of other types, and of the right type where no sense can be made of it.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3.5, 10**29, float("nan"), float("inf"), -float("inf")),
    *("", "3", "é", "a b", "a\nb", "a\0b", "\ud800", "../..", "x" * 5000),
    *([], [[]], [None], {}, {"a": {}}, {"content": 1}),
)


def _places(value: Any) -> list[tuple[Any, ...]]:
    """The way to each value within a value, itself left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [
        (name, *rest)
        for name, one in inner
        for rest in [(), *(_places(one) if isinstance(one, dict | list) else [])]
    ]


@st.composite
def damaged(draw: st.DrawFn, good: Any) -> Any:
    """JSON values like ``good``, a dictionary or list, with one value replaced or left out.

    Once in a while something else stands in the place of the whole.
    """
    places = [(), *_places(good)]
    place = draw(st.sampled_from(places))
    value = copy.deepcopy(draw(st.sampled_from(_VALUES)))
    if not place:
        return value
    found = copy.deepcopy(good)
    parent = found
    for name in place[:-1]:
        parent = parent[name]
    if draw(st.booleans()):
        parent[place[-1]] = value
    else:
        del parent[place[-1]]
    return found


def damaged_bytes(good: bytes) -> st.SearchStrategy[bytes]:
    """A file's bytes: cut, with bytes replaced, or with more behind them."""
    place = st.integers(0, max(len(good) - 1, 0))
    cut = place.map(lambda i: good[:i])
    longer = st.binary(min_size=1, max_size=16).map(lambda more: good + more)
    replaced = st.tuples(place, st.binary(min_size=1, max_size=8)).map(
        lambda change: good[: change[0]] + change[1] + good[change[0] + len(change[1]) :]
    )
    return st.one_of(cut, longer, replaced)
