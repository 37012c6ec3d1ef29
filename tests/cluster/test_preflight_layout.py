"""The preflight walks the layout that is to be trained: its first rank does, with real Megatron."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import TINY_LLAMA
from test_preflight import free_port, lines

REPOSITORY = Path(__file__).parents[2]


def preflight(folder: Path, *training: str, **environment: str) -> tuple[int, str]:
    """Two ranks on one node, with the arguments of a training."""
    run = subprocess.run(
        [str(REPOSITORY / "examples/preflight.sh"), "--disk-mib", "1", "--", *training],
        env={
            **os.environ,
            **{"GPUS_PER_NODE": "2", "DEVICE": "cpu", "PYTHON": sys.executable},
            **{"MASTER_ADDR": "127.0.0.1", "LOCAL_ADDR": "127.0.0.1", "RUN_DIR": str(folder)},
            **{"MASTER_PORT": str(free_port()), **environment},
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


@pytest.mark.parametrize("check", ["1", "0"])
def test_a_layout_without_a_proof_fails_unless_it_is_not_asked_for(tmp_path, check):
    code, output = preflight(tmp_path, *TINY_LLAMA, "--no-such-flag", LAYOUT_CHECK=check)
    assert code == int(check), output
    found = lines(output, "FAIL", "layout")
    assert len(found) == int(check)
    assert all("unrecognized arguments: --no-such-flag" in line for line in found)
    assert not any("LAYOUT_CHECK" in line for line in found)
