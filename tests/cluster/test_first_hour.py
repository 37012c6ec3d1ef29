"""`examples/first_hour.sh`: all of it that runs without a GPU, and how it ends where it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import REPOSITORY, free_port


def first_hour(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DEVICE": "cpu", "GPUS_PER_NODE": "2", "PYTHON": sys.executable}
    environment |= {"MASTER_PORT": str(free_port())}
    return subprocess.run(
        [REPOSITORY / "examples/first_hour.sh", folder, *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_every_step_is_as_expected(tmp_path):
    """With what a shell may have exported for another run."""
    run = first_hour(tmp_path / "hour", MODEL="llama_1b", LR="8e-4", TP="4", SEQ_LENGTH="4096")
    assert run.returncode == 0, run.stdout + run.stderr
    said = run.stdout
    for step in ("numbers", "preflight", "train", "evaluate", "report", "convert"):
        assert f"\n{step:<10} ok, " in said
    assert "last loss" in said and "FAILED" not in said
    assert (tmp_path / "hour/debug/report/report.html").is_file()
    assert (tmp_path / "hour/debug/hf/config.json").is_file()


def test_a_step_that_fails_ends_it_and_names_its_log(tmp_path):
    run = first_hour(tmp_path / "hour", PYTHON="false")
    assert run.returncode == 1
    last = run.stdout.splitlines()[-1]
    assert last.startswith("numbers    FAILED") and last.endswith("logs/numbers.log")


@pytest.mark.parametrize(
    "arguments, variables, words",
    [
        ([], {"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0"),
        ([], {"DEVICE": "tpu"}, "DEVICE=tpu"),
        ([], {"MASTER_PORT": "x"}, "MASTER_PORT=x is not a whole number"),
        ([], {"PYTHON": "/no/such"}, "PYTHON=/no/such: there is no such program"),
        (["--dry-run"], {}, "takes one folder"),
    ],
)
def test_refuses_in_one_line(tmp_path, arguments, variables, words):
    run = first_hour(tmp_path / "hour", *arguments, **variables)
    assert run.returncode == 2
    assert words in run.stderr and run.stderr.count("\n") == 1


def test_removes_no_folder_but_its_own(tmp_path):
    """A run's folder has logs, too."""
    (tmp_path / "logs").mkdir()
    run = first_hour(tmp_path, PYTHON="false")
    assert run.returncode == 2 and "not of this script" in run.stderr
    assert (tmp_path / "logs").is_dir()
    for _ in range(2):
        assert first_hour(tmp_path / "hour", PYTHON="false").returncode == 1
