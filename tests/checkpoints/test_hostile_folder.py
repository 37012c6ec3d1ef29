"""A save folder in which anything may be damaged, and commands with senseless values."""

import json
import os
import resource
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile import damaged, damaged_bytes
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_xielu.checkpoints import __main__, inert
from megatron_xielu.checkpoints.check import Damaged, check
from megatron_xielu.checkpoints.folder import TRACKER, checkpoints, read_tracker
from megatron_xielu.checkpoints.ledger import RECORD, Policy, Record
from megatron_xielu.checkpoints.repair import repair
from megatron_xielu.checkpoints.watch import Watcher
from megatron_xielu.common.lock_file import Holder, LockFile

HOLDER = Holder("n1", 4711, "another boot", "2026-11-24T10:17:20Z")
LOCK = json.dumps(asdict(HOLDER)).encode()
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
fuzz = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two checkpoints that were checked, with what Megatron puts beside PyTorch's files."""
    save_dir = tmp_path_factory.mktemp("save")
    for iteration in (2, 4):
        folder = save_dir / f"iter_{iteration:07d}"
        dcp.save(
            {"a": torch.ones(9), "common_state/0": {"b": 1}}, checkpoint_id=folder, no_dist=True
        )
        (folder / "metadata.json").write_text(json.dumps(FORMAT))
        (folder / "integrity.json").write_text(json.dumps({"files": {}}))
    (save_dir / TRACKER).write_text("4")
    Watcher(save_dir, keep_last=2, keep_every=0).step()
    return save_dir


@pytest.fixture
def save_dir(written, tmp_path):
    return shutil.copytree(written, tmp_path / "save")


@pytest.fixture
def little_memory():
    """A damaged pickle may ask for more memory than there is."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def reads_at_once(monkeypatch):
    """Hundreds of times, without a process that tries it before."""
    monkeypatch.setattr(inert, "survives", lambda _: True)


def works_or_is_damaged(folder):
    try:
        check(folder, whole=True)
    except Damaged as error:
        assert len(str(error).splitlines()) == 1


def test_damaged_index(save_dir, little_memory, reads_at_once):
    path = save_dir / "iter_0000004/.metadata"

    @given(damaged_bytes(path.read_bytes()))
    @settings(fuzz, max_examples=400)
    def run(content):
        path.write_bytes(content)
        works_or_is_damaged(path.parent)

    run()


@pytest.mark.parametrize(
    ("name", "good"),
    [("metadata.json", FORMAT), ("integrity.json", {"files": {"__0_0.distcp": "ab", ".": "ab"}})],
)
def test_damaged_json(save_dir, name, good, reads_at_once):
    path = save_dir / "iter_0000004" / name

    @given(damaged(good).map(json.dumps).map(str.encode) | damaged_bytes(json.dumps(good).encode()))
    @fuzz
    def run(content):
        path.write_bytes(content)
        works_or_is_damaged(path.parent)

    run()


def test_an_index_that_ends_its_reader(save_dir):
    """The hash of what is nested so deep overflows the stack, without an exception."""
    path = save_dir / "iter_0000004/.metadata"
    path.write_bytes(b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.")
    with pytest.raises(Damaged, match=r"\.metadata cannot be read: it ends the process"):
        check(path.parent, whole=True)


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "common.pt", "more"])
def test_a_pipe_is_not_waited_for(save_dir, name):
    path = save_dir / "iter_0000004" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(Damaged, match=f"{name} is a pipe"):
        check(path.parent, whole=False)


def test_a_ledger_that_is_a_pipe_or_names_other_files(save_dir):
    record = Record(save_dir)
    entry = record.verified["iter_0000004"]
    entry.sha256["/dev/zero"] = "ab"
    record.save()
    assert "/dev/zero" not in Record(save_dir).hashes(save_dir / "iter_0000004")
    (save_dir / RECORD).unlink()
    os.mkfifo(save_dir / RECORD)
    assert not Record(save_dir).verified


def test_damaged_ledger(save_dir, capsys):
    """It says of no checkpoint that it is good, or that it is not."""
    path = save_dir / RECORD
    good = path.read_bytes()

    @given(damaged(json.loads(good)).map(json.dumps).map(str.encode) | damaged_bytes(good))
    @example(good.replace(b'"sha256": {', b'"sha256": {"../../x": "ab", '))
    @fuzz
    def run(content):
        path.write_bytes(content)
        __main__.status(save_dir)
        record = Record(save_dir)
        assert record.policy in (Policy(), Policy(2, 0))
        assert repair(save_dir) == 4
        assert len(checkpoints(save_dir)) == 2

    run()
    path.unlink()
    path.mkdir()
    assert repair(save_dir) == 4


@pytest.mark.parametrize("content", ["²", "١٢", "4" * 30, "4" * 5000, "4\n6", "-1", "1e1", "nan"])
def test_damaged_tracker(save_dir, content):
    (save_dir / TRACKER).write_text(content)
    assert repair(save_dir) == read_tracker(save_dir) == 4


@given(st.binary() | damaged_bytes(LOCK))
@example(LOCK.replace(b"4711", str(10**29).encode()))
@example(LOCK)
@fuzz
def test_damaged_lock(tmp_path, content):
    (tmp_path / "lock").write_bytes(content)
    lock = LockFile(tmp_path / "lock", pid=1)
    lock.look()
    assert not lock.is_free(60)


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_what_is_in_the_way_of_a_save_is_set_aside(save_dir, make, capsys):
    """Megatron makes the folder, hours later: a file there, or a link to an old disk, ends it."""
    for iteration in (1, 6):
        make(save_dir / f"iter_{iteration:07d}")
    Watcher(save_dir, keep_last=1, keep_every=0).step()
    assert list(checkpoints(save_dir)) == [6, 4, 1]
    assert not __main__.verify(save_dir)
    assert "iter 6 DAMAGED" in capsys.readouterr().out
    for _ in range(2):
        assert repair(save_dir) == 4
    assert list(checkpoints(save_dir)) == [4]
    make(save_dir / "iter_0000006")
    assert repair(save_dir) == 4
    assert len([path for path in os.listdir(save_dir) if path.startswith("damaged_")]) == 3


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json"])
def test_a_file_that_became_a_link_to_nothing(save_dir, name, checked, capsys):
    """As of storage that moves what is old, and is not there now."""
    path = save_dir / "iter_0000004" / name
    path.unlink()
    path.symlink_to(save_dir / "moved")
    if not checked:
        (save_dir / RECORD).unlink()
    __main__.status(save_dir)
    assert not __main__.verify(save_dir)
    printed = capsys.readouterr().out
    assert "iter 4 DAMAGED" in printed
    assert "iter 2 ok" in printed
    assert repair(save_dir) == 2


def test_number_of_an_iteration_that_megatron_cannot_count(save_dir):
    shutil.copytree(save_dir / "iter_0000004", save_dir / f"iter_{10**29}")
    assert list(checkpoints(save_dir)) == [4, 2]
    assert repair(save_dir) == 4


def command(monkeypatch, capsys, *arguments):
    """The exit code of a command, and what it wrote to standard error."""
    monkeypatch.setattr(sys, "argv", ["checkpoints", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "--last", "-1"),
        ("verify", "--last", "0"),
        ("verify", "--last", "²"),
        ("watch", "--keep-last", "0"),
        ("watch", "--keep-last", 10**29),
        ("watch", "--keep-last", "1", "--keep-every", "-1"),
        *(
            ("watch", "--keep-last", "1", "--interval", seconds)
            for seconds in ("nan", "inf", "-1", "0", "1e300", "x")
        ),
    ],
)
def test_senseless_numbers(save_dir, monkeypatch, capsys, arguments):
    code, told = command(monkeypatch, capsys, save_dir, *arguments)
    assert code == 2
    last = told.splitlines()[-1]
    assert f"error: argument {arguments[-2]}: must be " in last
    assert last.endswith(f", not {str(arguments[-1])!a}")


@pytest.mark.parametrize(
    "arguments", [("verify",), ("status",), ("repair",), ("watch", "--keep-last", "1")]
)
@pytest.mark.parametrize("what", ["file", "below a file", "NUL", "long", "unreadable"])
def test_what_is_no_save_folder(save_dir, monkeypatch, capsys, arguments, what):
    (save_dir / "file").touch()
    names = {"file": "file", "below a file": "file/x", "NUL": "a\0b", "long": "x" * 300}
    folder = save_dir / names.get(what, "")
    if what == "unreadable":
        if os.geteuid():
            folder.chmod(0)
        else:
            os.seteuid(65534)  # pytest's folders are of their owner alone
    try:
        code, told = command(monkeypatch, capsys, folder, *arguments)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        save_dir.chmod(0o700)
    assert code == 2 and "error: " in told.splitlines()[-1]
    assert repr(str(folder))[1:-1] in told.splitlines()[-1]
