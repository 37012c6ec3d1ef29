"""``python -m megatron_xielu``: the list of commands."""

import subprocess
import sys
from pathlib import Path

import pytest

import megatron_xielu

PACKAGE = Path(megatron_xielu.__file__).parent


def run(*words: str, options=()) -> subprocess.CompletedProcess:
    command = [sys.executable, *options, "-m", "megatron_xielu", *words]
    return subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)


def test_every_command_is_listed_and_nothing_is_imported():
    done = run(options=("-X", "importtime"))
    assert done.returncode == 0
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines()[:-1])
    rooms = {file.parent.relative_to(PACKAGE.parent) for file in PACKAGE.rglob("*/__main__.py")}
    names = {f"python -m {'.'.join(room.parts)}" for room in rooms}
    assert {*names, "python -m megatron_xielu.pretrain_gpt"} <= rows.keys()
    assert {"python tools/prepare_data.py", "python tools/compare_activations.py"} <= rows.keys()
    assert rows["python -m megatron_xielu.convert"].strip().startswith("Checkpoints from Megatron")
    for command, said in rows.items():
        assert said.strip() and command not in said, command
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "megatron_xielu" in loaded and not loaded & {"torch", "megatron", "numpy"}


def test_version():
    assert run("--version").stdout == f"megatron_xielu {megatron_xielu.__version__}\n"


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (["convert"], "it is python -m megatron_xielu.convert"),
        (["--vers"], "--version, or nothing for the commands"),
        (["--version", "x"], "--version, or nothing"),
    ],
)
def test_unknown_arguments(words, instead):
    done = run(*words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"megatron_xielu: error: '{' '.join(words)}' is no argument")
    assert instead in done.stderr
