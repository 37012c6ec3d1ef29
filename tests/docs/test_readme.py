"""The README's training command, as it stands there, under torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch import REPOSITORY


@pytest.mark.parametrize("more", ["", " --sequence-parallel --xielu-check-tp-sync 5"])
def test_training_command(more, tmp_path):
    readme = (REPOSITORY / "README.md").read_text()
    command = re.search(r"```sh\n(torchrun .*?)```", readme, re.S)[1]
    done = subprocess.run(
        ["bash", "-c", command.strip() + more],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(x) for x in re.findall(r"\| lm loss: (\S+) \|", done.stdout + done.stderr)]
    assert len(losses) == 20 and losses[-1] < losses[0]
