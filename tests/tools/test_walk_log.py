"""The log that tools/walk_checkpoints.py goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import walk_checkpoints as tool
from hostile import damaged
from hypothesis import given, settings

DONE = [tool.Walked(tool.Layout("3B", "xielu", 2, 1, 8, "x"), "fails", 1.5, 3, {"a": "b"})]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert tool._read(tmp_path / "none.json", "m") == []
    tool._write(tmp_path / "walk.json", "m", DONE)
    assert tool._read(tmp_path / "walk.json", "m") == DONE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "it is [], not an object"),
        ({}, "is of None, not m; give another --log"),
        ({"made with": "m"}, "it is None, not a list"),
        ({"made with": "m", "walked": [{"layout": [1] * 6}]}, "[0].layout[0] is 1, not text"),
        ({"made with": "m", "walked": [{"layout": []}]}, "[0].layout is [], not 6 values"),
    ],
)
def test_refusals(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "walk.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as end:
        tool._read(tmp_path / "walk.json", "m")
    assert str(end.value).startswith(str(tmp_path)) and message in str(end.value)
    assert "\n" not in str(end.value)
    with pytest.raises(SystemExit, match=r"cannot be read: Is a directory; give another --log"):
        tool._read(tmp_path, "m")


def test_any_damage_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "walk.json"
    tool._write(path, "m", DONE)

    @settings(max_examples=100, deadline=None)
    @given(damaged(json.loads(path.read_text())))
    def damage(content: Any) -> None:
        path.write_text(json.dumps(content))
        try:
            done = tool._read(path, "m")
        except SystemExit as end:
            assert str(path) in str(end) and "\n" not in str(end)
        else:
            assert not done or tool.report(done, "m")

    damage()
