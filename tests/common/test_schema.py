"""`common.schema`: what is read is of the types that the data class names, or refused in a line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import pytest
from hostile import damaged
from hypothesis import given

from megatron_xielu.common import schema
from megatron_xielu.common.flags import Limits
from megatron_xielu.common.schema import Count, Malformed, Positive


@dataclass(frozen=True)
class Inner:
    share: Annotated[float, Limits(0, 1, whole=False)]
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    count: Count
    inner: Inner
    sizes: tuple[int, int]
    by_name: dict[str, Inner]
    flag: bool | None = None
    rows: list[Positive] | None = None
    anything: Any = None

    def __post_init__(self) -> None:
        if self.count > 100:
            raise ValueError("count is above 100")


GOOD: dict[str, Any] = {
    "name": "é",
    "count": 3,
    "inner": {"share": 1, "kind": "b"},
    "sizes": [1, 2],
    "by_name": {"x": {"share": 0.5, "kind": "a"}},
    "flag": True,
    "rows": [1, 2],
    "anything": [None],
}


def test_load(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD | {"from a later release": 1}))
    found = schema.load(Outer, path)
    assert found.inner == Inner(1.0, "b") and found.sizes == (1, 2)
    assert json.loads(json.dumps(asdict(found))) == GOOD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "f: name is 1, not text"),
        ({"name": "\ud800"}, "f: name is '\\ud800', not text"),
        ({"name": "a\0"}, "f: name is 'a\\x00', not text"),
        ({"count": -1}, "f: count must be 0 or more, not -1"),
        ({"count": True}, "f: count is True, not a whole number"),
        ({"count": 10**29}, "f: count is 100000000000000000000000000000, not a whole number"),
        ({"count": 101}, "f: count is above 100"),
        ({"inner": []}, "f: inner is [], not an object"),
        ({"inner": {}}, "f: it has no inner.share"),
        ({"inner": {"share": float("nan")}}, "f: inner.share is nan, not a number"),
        ({"inner": {"share": 2}}, "f: inner.share must be at most 1, not 2"),
        ({"inner": {"share": 1, "kind": "c"}}, "f: inner.kind is 'c', not 'a' or 'b'"),
        ({"sizes": [1]}, "f: sizes is [1], not 2 values"),
        ({"by_name": {"x": None}}, "f: by_name.x is None, not an object"),
        ({"rows": [1, 0]}, "f: rows[1] must be 1 or more, not 0"),
    ],
)
def test_wrong_field(change, message):
    with pytest.raises(Malformed) as error:
        schema.check(Outer, GOOD | change, "f")
    assert str(error.value) == message


@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b"[" * 100_000, b"9" * 5000])
def test_no_json(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(Malformed, match=str(path)):
        schema.read_json(path)


@given(damaged(GOOD))
def test_any_damage_is_refused_in_a_line(content):
    try:
        schema.check(Outer, content, "f")
    except Malformed as error:
        assert "\n" not in str(error)
