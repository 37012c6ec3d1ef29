"""Runs rank 0 under NVIDIA's nsys, which writes what the GPU did in the steps of PROFILE_STEPS.

Megatron's ``--profile`` begins and ends the range; nsys only has to be there. It stands between the
launcher and the rank, and says nothing of signals: this process takes its place under the launcher,
passes signals on to the rank itself, and ends with the rank's exit code.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from megatron_xielu.common import processes

FOLDER = "MEGATRON_XIELU_PROFILES"  # for nsys' reports; without it nobody is profiled
_INSIDE = "MEGATRON_XIELU_PROFILED"
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR2)
_RANK = ["-m", "megatron_xielu.cluster.rank"]


def is_inside() -> bool:
    """Whether this process is the rank that nsys has started."""
    return _INSIDE in os.environ


def is_wanted() -> bool:
    """Whether this process is to start the rank under nsys."""
    return bool(os.environ.get(FOLDER)) and os.environ.get("RANK") == "0" and not is_inside()


def run(arguments: Sequence[str]) -> int:
    """Run the rank with these arguments under nsys; returns its exit code."""
    folder = Path(os.environ[FOLDER])
    folder.mkdir(parents=True, exist_ok=True)
    # By time: the report of an earlier start stays.
    report = folder / time.strftime("%Y%m%dT%H%M%SZ-rank_0", time.gmtime())
    process = subprocess.Popen(
        [
            *("nsys", "profile", "--sample=none", "--trace=cuda,nvtx", f"--output={report}"),
            *("--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--kill=none"),
            *(sys.executable, *_RANK, *arguments),
        ],
        env={**os.environ, _INSIDE: str(os.getpid())},
        preexec_fn=processes.end_with_parent,
    )
    # Only now: nsys and the rank inherit what is ignored, and nsys is to stay.
    for number in _PASSED_ON:
        signal.signal(number, partial(_pass_on, f"{_INSIDE}={os.getpid()}".encode()))
    code = process.wait()
    return code if code >= 0 else 128 - code


def _pass_on(mark: bytes, number: int, _frame: Any) -> None:
    """To the rank, and not to the processes that it has forked, which look like it."""
    ranks = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if words[1:3] == [os.fsencode(word) for word in _RANK] and mark in (
                (path / "environ").read_bytes().split(b"\0")
            ):
                ranks[int(path.name)] = (path / "stat").read_text().rpartition(")")[2].split()[1]
    for pid, parent in ranks.items():
        if int(parent) not in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
