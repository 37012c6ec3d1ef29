"""``tools/walk_checkpoints.py --log`` goes on from its own log, and from no other file."""

from __future__ import annotations

import json

import pytest
from hostile import damaged, damaged_bytes
from hypothesis import HealthCheck, given, settings
from walk_checkpoints import Layout, Walked, _read, _write

MADE_WITH = "megatron-core 0.19.2"
DONE = [Walked(Layout("1.1B", "xielu", 1, 2, 44, ""), "ok", 3.5, 7, {"dp_reshardable": "no"})]
LOG = {
    "made with": MADE_WITH,
    "walked": [vars(DONE[0]) | {"layout": list(DONE[0].layout)}],
}


def test_what_is_written_is_read(tmp_path):
    log = tmp_path / "log.json"
    assert _read(log, MADE_WITH) == []
    _write(log, MADE_WITH, DONE)
    assert json.loads(log.read_text()) == LOG
    assert _read(log, MADE_WITH) == DONE
    with pytest.raises(
        SystemExit, match=r"is of .megatron-core 0\.19\.2., not another; give another"
    ):
        _read(log, "another")


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(damaged_bytes(json.dumps(LOG).encode()) | damaged(LOG).map(json.dumps).map(str.encode))
def test_any_damage_is_refused_in_a_line(tmp_path, content):
    log = tmp_path / "log.json"
    log.write_bytes(content)
    try:
        _read(log, MADE_WITH)
    except SystemExit as error:
        assert str(error.code).endswith("; give another --log")
        assert len(str(error.code).splitlines()) == 1
