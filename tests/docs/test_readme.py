"""The README's training command, as it stands there, under torchrun; and with more flags."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from launch import REPOSITORY, train

COMMAND = re.search(r"```sh\n(torchrun .*?)```", (REPOSITORY / "README.md").read_text(), re.S)[1]


def assert_learns(output: str) -> None:
    losses = [float(x) for x in re.findall(r"\| lm loss: (\S+) \|", output)]
    assert len(losses) == 20 and losses[-1] < losses[0]


def test_training_command(tmp_path):
    done = subprocess.run(
        ["bash", "-c", COMMAND],
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
    assert_learns(done.stdout + done.stderr)


def test_with_sequence_parallelism(tmp_path):
    module = ["-m", "megatron_xielu.pretrain_gpt"]
    words = shlex.split(COMMAND.replace("\\\n", ""))
    start = words.index(module[0])
    assert words[:start] == ["torchrun", "--nproc-per-node", "2"]
    assert words[start : start + 2] == module
    run = train(
        tmp_path,
        "--sequence-parallel --xielu-check-tp-sync 5 --micro-batch-size 4",  # half the passes
        ranks=2,
        model=words[start + 2 :],
        command=module,
    )
    assert_learns(run.output)


def test_make_alone_names_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.M)[1]
    done = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"^make (\S+)  ", done.stdout, re.M)) == sorted(targets.split())
