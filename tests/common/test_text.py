"""Tables for a terminal, and terminals that cannot show everything."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_xielu.common import event_log
from megatron_xielu.common.text import describe, table, visible_but_colours, without_secrets

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


_HOSTILE = "\x1b]0;x\x07\r\x9b2J\u202e\u2066\x7f"
_SHOWN = r"\x1b]0;x\x07\r\x9b2J\u202e\u2066\x7f"
_PRINTS = """
import argparse, logging, sys, warnings
logging.getLogger().addHandler(logging.StreamHandler())  # which keeps the stream
from tqdm import tqdm
from megatron_xielu.common import text
text.ready_output()
bad, how = sys.argv[1:]
print("name:", bad)
print("name:", "\\rbad")
print("tab\\tand", file=sys.stderr)
sys.stderr.writelines([bad, "\\n"])
logging.getLogger().error(bad)
warnings.warn(bad)
for _ in tqdm(range(2), desc=bad):
    for _ in tqdm(range(2), leave=False):
        pass
text.print_coloured("\\x1b[0m" + text.visible(bad))
sys.stdout.flush()
sys.stdout.buffer.write(b"\\x1b[binary\\n")
if how == "exit":
    sys.exit(bad)
if how == "flag":
    argparse.ArgumentParser().parse_args([bad])
raise ValueError(bad)
"""


@pytest.mark.parametrize("how", ["exit", "flag", "error"])
def test_a_terminal_obeys_no_name(how):
    """However it is printed; lines of progress are rewritten all the same."""
    done = subprocess.run(
        [sys.executable, "-c", _PRINTS, _HOSTILE, how],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
    )
    assert done.returncode != 0
    said, complained = done.stdout.decode(), done.stderr.decode()
    expected = [f"name: {_SHOWN}", r"name: \rbad", f"\x1b[0m{_SHOWN}", "\x1b[binary", ""]
    assert said.split("\n") == expected
    first, *_ = (lines := complained.split("\n"))
    assert (first, lines[1], lines[2]) == ("tab\tand", _SHOWN, _SHOWN)
    assert _SHOWN in lines[-2]  # of all ways to end
    assert f"\r{_SHOWN}: 100%|" in complained  # tqdm's own, and the name in it
    assert "\x1b[A" in complained  # to the first of two
    for character in "\x07\x9b\u202e\u2066\x7f":
        assert character not in complained
    assert "\x1b]" not in complained and "\x1b]" not in said


def test_nor_does_a_reader_of_an_event_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEGATRON_XIELU_EVENTS", str(tmp_path / "log"))
    event_log.write("failed", reason=f"why {_HOSTILE}", checkpoint=_HOSTILE)
    for line in ((tmp_path / "log").read_text(), capsys.readouterr().err):
        assert line.removesuffix("\n").isprintable()


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
            assert "ready_output(" in match[1], file


SECRET = {
    "https://me:pw@h/a.jsonl?token=1": "https://h/a.jsonl",
    "https://t0ken@h:8080/a#t0ken": "https://h:8080/a",
    "HTTPS://h/a?X-Amz-Signature=1/2&x=http://o/?sig=2": "HTTPS://h/a",
    "https://me:p@w@h/a and ftp://me:pw@h/b": "https://h/a and ftp://h/b",
    "s3://key:p/w@bucket/a": "s3://bucket/a",
    "sftp://me:p?w@h/a": "sftp://h/a",
    "az://c/a?sv=1&sig=2": "az://c/a",
    "simplecache::https://me:pw@h/a?sig=1": "simplecache::https://h/a",
    "zip://a::https://me:pw@h/a.zip?sig=1: no": "zip://a::https://h/a.zip: no",
    "500, url='http://me:pw@h/a?sig=1')>": "500, url='http://h/a')>",
    "(Caused by x) with url: /a?sig=1 (c)": "(Caused by x) with url: /a (c)",
    'a <https://h/a?sig=1>, b "https://h/a?sig=1".': 'a <https://h/a>, b "https://h/a".',
    "https://me:pw@[fe80::1]:80/a?sig=1": "https://[fe80::1]:80/a",
}
NO_SECRET = (
    "hf://datasets/a/b@refs%2Fconvert%2Fparquet/c.parquet",
    "abfs://container@account.dfs.core.windows.net/a",
    "github://org:repo@main/a",
    "http://h:8080/@x/a@b",
    "http://[::1]:80/@x",
    "s3://bucket/a?b#c.jsonl",
    "file:///a?b=c@d",
    "/a?b=c, me:pw@h and no URL",
)


@pytest.mark.parametrize("said", [*SECRET, *NO_SECRET])
def test_what_gives_access_is_not_said(said: str):
    assert without_secrets(said) == SECRET.get(said, said)
    assert describe(ValueError(said)) == f"ValueError: {SECRET.get(said, said)}"


def test_colours_of_other_programs_stay():
    assert visible_but_colours("\x1b[1;34mwandb\x1b[0m: \x1b]0;x\x07") == (
        "\x1b[1;34mwandb\x1b[0m: " + r"\x1b]0;x\x07"
    )
