"""docs/text-to-report.md: its commands, as they stand there, one after the other."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from launch import REPOSITORY, free_port, python


def test_from_texts_to_a_page(tmp_path):
    """With fewer texts and tokens, and without the checks of the nodes, which other tests cover."""
    for name in ("tools", "examples"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    text = (REPOSITORY / "docs/text-to-report.md").read_text()
    commands = re.findall(r"```sh\n(.*?)```", text, re.S)
    assert len(commands) == 5
    for command in commands:
        for size, smaller in (("/*.py ", "/[a-d]*.py "), ("=163840", "=10240")):
            command = command.replace(size, smaller)
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=tmp_path,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(REPOSITORY),
                "MASTER_PORT": str(free_port()),
                "OMP_NUM_THREADS": "1",
                "PREFLIGHT": "0",
                "PYTHON": python(),
                "MICRO_BATCH": "8",  # two passes a step, not eight
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    run = tmp_path / "runs/first"
    assert (run / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "10"
    verified = json.loads((run / "checkpoints/verified.json").read_text())["checkpoints"]
    assert "iter_0000010" in verified  # though the training has ended with it
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert 1 < evaluation["bits_per_byte"] < 8 and len(evaluation["layers"]) == 4
    assert "<html" in (run / "report/report.html").read_text()
