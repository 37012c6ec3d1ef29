"""What a flag takes."""

import os
import re
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from megatron_xielu.common.flags import output_file

ROOT = Path(__file__).parents[2]


def test_a_file_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    assert output_file(str(tmp_path / "new.md")) == tmp_path / "new.md"
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "x", "cannot be written: No such file or directory"),
        (tmp_path / ("x" * 255), "cannot be written: File name too long"),  # to be renamed
        ("/proc/new.md", "cannot be written: No such file or directory"),  # though root may
    ):
        with pytest.raises(ArgumentTypeError, match=words):
            output_file(str(path))
    assert not any(tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert output_file("/dev/null") == Path("/dev/null")
    with pytest.raises(ArgumentTypeError, match="cannot be written: No space left on device"):
        output_file(str(tmp_path / "new.md"))


@pytest.mark.parametrize(
    "command",
    [
        "walk_checkpoints.py --minutes 0 --out",
        "bench/inspect_kernels.py --output",
        "bench/measure_activation_memory.py --output",
    ],
)
def test_a_tool_says_so_before_it_measures(command, tmp_path):
    program, *words = command.split()
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / program, *words, tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert re.search(r"error: argument --out\w*: .* is a folder; name a file in it", done.stderr)
