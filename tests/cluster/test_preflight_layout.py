"""The preflight walks the layout that is to be trained: its first rank does, with real Megatron.

test_preflight.py has a layout that Megatron refuses.
"""

import os
import subprocess
from pathlib import Path

from launch import TINY_LLAMA, free_port, python
from test_preflight import lines

REPOSITORY = Path(__file__).parents[2]


def preflight(folder: Path, *training: str) -> tuple[int, str]:
    """Two ranks on one node, with the arguments of a training."""
    run = subprocess.run(
        [str(REPOSITORY / "examples/preflight.sh"), "--disk-mib", "1", "--", *training],
        env={
            **os.environ,
            **{"GPUS_PER_NODE": "2", "DEVICE": "cpu", "PYTHON": python()},
            **{"MASTER_ADDR": "127.0.0.1", "LOCAL_ADDR": "127.0.0.1", "RUN_DIR": str(folder)},
            "MASTER_PORT": str(free_port()),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return run.returncode, run.stdout


def test_a_layout_that_keeps_its_state_passes(tmp_path):
    flags = [
        "--xielu",
        "--bf16",
        "--use-distributed-optimizer",
        "--dist-ckpt-optim-fully-reshardable",
    ]
    code, output = preflight(tmp_path, *TINY_LLAMA, *flags)
    assert code == 0, output
    (line,) = lines(output, "ok", "layout")
    assert line.startswith("2 GPUs, DP 2: each element of ")
    assert "loaded back on 2 ranks (fully_reshardable" in line
