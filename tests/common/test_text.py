"""Tables for a terminal, and terminals that cannot show everything."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_xielu.common.text import table

ROOT = Path(__file__).parents[2]


def test_a_table_is_aligned_by_what_a_terminal_shows():
    rows = [("", "loss", "n"), ("ä", "1.25", "10"), ("a\u0308中", "12.5", "3")]
    assert table(rows).split("\n") == [
        "     loss   n",
        "ä    1.25  10",
        "a\u0308中  12.5   3",
    ]
    assert table([("name", "text"), ("n", "")], left=(0, 1)) == "name  text\nn"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", rb"a\udcff\u2192"),
        ("ascii:surrogateescape", rb"a\udcff\u2192"),  # LC_ALL=C, if Python may not coerce it
        ("utf-8:strict", rb"a\udcff" + "→".encode()),  # en_US.UTF-8
        ("utf-8:surrogateescape", b"a\xff" + "→".encode()),  # C.UTF-8
    ],
)
def test_a_command_prints_whatever_its_output_can_hold(encoding, shown):
    code = "from megatron_xielu.common import text; text.ready_output(); print('a\\udcff\\u2192')"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout.strip() == shown, done.stderr


def test_a_command_whose_output_is_closed(tmp_path):
    code = (
        "import os, sys; from megatron_xielu.common import text; text.ready_output(); print(1); "
        "print(2, file=sys.stderr); sys.exit(os.open('.', os.O_RDONLY) < 3)"
    )
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == 0


def test_ctrl_c_needs_no_traceback():
    code = (
        "import os, signal; from megatron_xielu.common import text; text.ready_output(); "
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def test_every_command_readies_its_output_first():
    start = re.compile(r'^if __name__ == "__main__":\n(.*)', re.MULTILINE | re.DOTALL)
    of_the_repository_itself = {"make_docs.py", "image_dependencies.py"}
    for file in [*(ROOT / "megatron_xielu").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        if file.name in of_the_repository_itself:
            continue
        if match := start.search(file.read_text()):
            assert "ready_output()" in match[1], file
