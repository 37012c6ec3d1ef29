"""`common.torchrun`: what the environment says of a group of processes makes sense, or is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_xielu.common import torchrun

GOOD = {
    **{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
}


def test_what_torchrun_sets_is_good():
    torchrun.check(GOOD)
    torchrun.check({})
    torchrun.check({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "0"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "first"}, "RANK must be a whole number from 0 to 2147483647, not 'first'"),
        ({"RANK": "-1"}, "RANK must be a whole number"),
        ({"RANK": "2"}, "RANK 2 must be less than WORLD_SIZE 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number from 1"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE must be a whole number from 1"),
        ({"LOCAL_RANK": "²"}, "LOCAL_RANK must be a whole number"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK 2 must be less than LOCAL_WORLD_SIZE 2"),
        ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE must be a whole number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number from 0 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT must be a whole number from 0 to 65535"),
    ],
)
def test_wrong_variable(change, message):
    with pytest.raises(ValueError, match=message) as error:
        torchrun.check(GOOD | change)
    assert "start with torchrun" in str(error.value) and len(str(error.value)) < 140


@pytest.mark.parametrize("name", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_missing_variable(name):
    environment = {other: value for other, value in GOOD.items() if other != name}
    with pytest.raises(ValueError, match=f"RANK is set and {name} is not"):
        torchrun.check(environment)


@given(st.dictionaries(st.sampled_from(sorted(GOOD)), st.text(max_size=8)))
def test_any_environment_is_taken_or_refused_in_a_line(environment):
    try:
        torchrun.check(environment)
    except ValueError as error:
        assert "\n" not in str(error)
