"""What supervises a rank: the event log, how a rank's end is told, failures that torchrun reports.

The whole of it, with Megatron and several nodes, is tested in tests/slurm.
"""

import dataclasses
import errno
import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

import launch
import pytest
import torch

from megatron_xielu.checkpoints import failed_loads
from megatron_xielu.checkpoints.check import check
from megatron_xielu.checkpoints.folder import TRACKER, read_tracker
from megatron_xielu.checkpoints.ledger import RECORD
from megatron_xielu.checkpoints.repair import repair
from megatron_xielu.cluster import rank as supervised
from megatron_xielu.common import event_log


@pytest.fixture
def log(tmp_path, monkeypatch):
    path = tmp_path / "n1.log"
    monkeypatch.setenv("MEGATRON_XIELU_EVENTS", str(path))
    monkeypatch.setenv("MEGATRON_XIELU_NODE", "n1")
    monkeypatch.setenv("RANK", "3")
    return path


def test_one_line_per_event(log, capsys):
    event_log.write("checkpoint", '\n  verified "well"\nand more\n', iteration=200)
    event_log.write("start")
    first, second = log.read_text().splitlines()
    time, _, rest = first.partition(" ")
    assert len(time) == len("2026-11-24T10:17:20Z")
    assert rest == r'node=n1 rank=3 event=checkpoint iteration=200 reason="verified \"well\""'
    assert second.endswith("node=n1 rank=3 event=start")
    assert capsys.readouterr().err.splitlines() == [f"[event] {first}", f"[event] {second}"]


def test_a_log_that_cannot_be_written_ends_nothing(log, monkeypatch, capsys):
    monkeypatch.setenv("MEGATRON_XIELU_EVENTS", str(log / "absent"))
    event_log.write("start")
    assert "event=start" in capsys.readouterr().err


def test_an_output_that_nobody_reads_ends_nothing(log, tmp_path, monkeypatch):
    class Unread(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Unread())
    event_log.write("start")
    assert log.read_text().endswith("event=start\n")
    monkeypatch.setenv("MEGATRON_XIELU_EVENTS", str(tmp_path / "absent/n1.log"))
    event_log.write("lost")


def test_a_file_name_that_is_no_text(log):
    event_log.write("checkpoint-damaged", "a\udcff")
    assert log.read_text().endswith('reason="a\\udcff"\n')


@dataclass
class Ended:
    """A process that has ended."""

    returncode: int
    output: str


def rank(tmp_path, *arguments: str) -> Ended:
    """Run ``python -m megatron_xielu.cluster.rank`` from a process that has imported PyTorch."""
    output = tmp_path / "output"
    process = launch._warm_python().start(
        ["-m", "megatron_xielu.cluster.rank", *arguments],
        environment={**os.environ, "MEGATRON_XIELU_FINISHED": str(tmp_path / "finished")},
        folder=launch.REPOSITORY,
        output=output,
    )
    return Ended(process.wait(), output.read_text())


def launched(tmp_path, script: str, *flags: str, **environment: str) -> Ended:
    """Run a script as one supervised rank under the launcher."""
    (tmp_path / "script.py").write_text(script)
    command = [launch.python(), "-m", "megatron_xielu.cluster.launcher", "--standalone", *flags]
    command += ["-m", "megatron_xielu.cluster.rank", str(tmp_path / "script.py")]
    done = subprocess.run(
        [*command, "--save", str(tmp_path / "checkpoints")],
        env={**os.environ, "MEGATRON_XIELU_FINISHED": str(tmp_path / "finished"), **environment},
        cwd=launch.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Ended(done.returncode, done.stdout + done.stderr)


@pytest.mark.parametrize(
    "script, code, finished, reason",
    [
        ("import sys; assert sys.argv[1] == '--save'", 0, True, None),
        ("raise SystemExit", 0, False, None),
        ("raise SystemExit(16)", 16, False, "a loss was rejected"),
        ("raise SystemExit('no such file: x')", 1, False, "no such file: x"),
        ("raise SystemExit('megatron_xielu: error: --x')", 2, False, "megatron_xielu: error: --x"),
        ("raise ValueError('one\\ntwo')", 1, False, "ValueError: one"),
        (
            "class CheckpointException(Exception): pass\n"
            "raise CheckpointException('write\\nno space')",
            1,
            False,
            "CheckpointException: write",
        ),
    ],
)
def test_how_a_rank_ends(log, tmp_path, script, code, finished, reason):
    path = tmp_path / "script.py"
    path.write_text(script)
    done = rank(tmp_path, str(path), "--save", str(tmp_path / "checkpoints"))
    assert done.returncode == code, done.output
    assert (tmp_path / "finished").exists() is finished is (code == 0 and "Exit" not in script)
    lines = log.read_text().splitlines() if log.exists() else []
    failures = [line for line in lines if "event=worker-failed" in line]
    assert len(failures) == (reason is not None)
    assert all(reason in line and "rank=3" in line for line in failures)


@pytest.mark.parametrize("words", [["/no/such/script.py"], ["-m", "no.such"]])
def test_a_script_that_is_not_there(log, tmp_path, words):
    """Found by no start after this one either: no restart, and no traceback."""
    done = rank(tmp_path, *words)
    assert done.returncode == 2 and "Traceback" not in done.output
    reason = f'reason="megatron_xielu: error: ENTRY: there is no {words[-1]}"'
    assert reason in log.read_text()


def test_the_launcher_tells_of_killed_ranks_and_restarts(log, tmp_path):
    """With the rank goes what it started: a checkpoint writer must not outlive it."""
    script = f"""
import os, pathlib, subprocess, sys, time
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
    os.kill(os.getpid(), {int(signal.SIGKILL)})
"""
    # torchrun's own child, whose number is that of its session.
    done = launched(tmp_path, script, "--max-restarts", "1", PYTHON_EXEC=sys.executable)
    assert done.returncode == 0, done.output
    first, second = log.read_text().splitlines()[-3:-1]
    assert 'rank=0 event=rank-failed local_rank=0 exit=-9 reason="killed by SIGKILL"' in first
    assert "event=restart" in second
    assert (tmp_path / "finished").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)


@pytest.mark.parametrize(
    ("script", "tee", "reason"),
    [
        (
            "raise SystemExit('megatron_xielu: error: --x: choose y')",
            False,
            "megatron_xielu: error: --x: choose y",
        ),
        (
            "import argparse\nargparse.ArgumentParser('train').parse_args()",
            True,
            "train: error: unrecognized arguments: --save SAVE",
        ),
        ("raise SystemExit(2)", False, "exit code 2; the output of the rank says why"),
    ],
    ids=["ours", "argparse", "number"],
)
def test_what_is_refused_is_not_tried_again(log, tmp_path, script, tee, reason):
    """One line at the end says why, for two ranks, and so do the events."""
    flags = ("--log-dir", str(tmp_path / "logs"), "--tee", "3") if tee else ()
    done = launched(tmp_path, script, "--nproc-per-node", "2", "--max-restarts", "3", *flags)
    reason = reason.replace("SAVE", str(tmp_path / "checkpoints"))
    assert done.returncode == 2, done.output
    assert "Traceback" not in done.output
    assert [line for line in done.output.splitlines() if line.startswith(reason)] == [reason]
    assert done.output.endswith(f"{reason}\n")
    assert "event=restart" not in log.read_text()
    (told, *_) = re.findall("event=rank-failed .* exit=2 reason=(.*)", log.read_text())
    assert told == f'"{reason}"'


# As nsys does it: the program is a child, in which signals are not its own affair.
NSYS = """#!/bin/sh
while [ "${1#-}" != "$1" ] || [ "$1" = profile ]; do echo "$1" >>"$OPTIONS"; shift; done
"$@"
"""
PROFILED = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[2]).parent
def save(*_):
    (folder / f"saved-{os.environ['RANK']}").touch()
    sys.exit(3)
signal.signal(signal.SIGTERM, save)
if os.fork() == 0:  # as a checkpoint writer: what is for the rank is not for it
    signal.signal(signal.SIGTERM, lambda *_: (folder / "passed-on-to-child").touch())
    time.sleep(3)
    os._exit(0)
(folder / f"parent-{os.environ['RANK']}").write_text(str(os.getppid()))
if os.environ["RANK"] == "0":
    os.kill(int(os.environ["MEGATRON_XIELU_PROFILED"]), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_rank_under_nsys(log, tmp_path):
    """A stand-in for nsys: rank 0 alone is under it, gets the signal, and its code comes out."""
    nsys = tmp_path / "bin/nsys"
    nsys.parent.mkdir()
    nsys.write_text(NSYS)
    nsys.chmod(0o755)
    variables = {"MEGATRON_XIELU_PROFILES": str(tmp_path / "profiles")}
    variables |= {"OPTIONS": str(tmp_path / "options")}
    variables |= {"PATH": f"{nsys.parent}:{os.environ['PATH']}", "PYTHON_EXEC": sys.executable}
    done = launched(tmp_path, PROFILED, "--nproc-per-node", "2", **variables)
    assert done.returncode == 1, done.output
    assert (tmp_path / "saved-0").exists() and not (tmp_path / "saved-1").exists()
    assert not (tmp_path / "passed-on-to-child").exists()
    assert "rank=0 event=rank-failed local_rank=0 exit=3" in log.read_text()
    assert (tmp_path / "parent-0").read_text() != (tmp_path / "parent-1").read_text()
    options = (tmp_path / "options").read_text()
    assert f"--output={tmp_path / 'profiles'}/" in options and "cudaProfilerApi" in options
    assert options.count("profile\n") == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A save folder with checkpoints of iterations 2 and 4, of 6."""
    folder = tmp_path_factory.mktemp("saved")
    launch.train(folder, "--xielu --save checkpoints --save-interval 2 --exit-interval 4")
    return folder / "checkpoints"


@pytest.fixture
def save_dir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def resumed(save_dir, *flags: str, wrong: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Go on under the launcher."""
    command = [launch.python(), "-m", "megatron_xielu.cluster.launcher", "--standalone", *flags]
    command += ["-m", "megatron_xielu.cluster.rank", "-m", "megatron_xielu.pretrain_gpt"]
    return subprocess.run(
        [
            *(*command, *launch.TINY_LLAMA, "--xielu", "--save-interval", "2"),
            *("--save", str(save_dir), "--load", str(save_dir), *wrong),
        ],
        env=launch._environment(),
        cwd=save_dir.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_checkpoint_damaged_after_its_check_is_not_resumed_from_again(log, save_dir):
    """Its ``.metadata`` has the size and times from when it was checked, and cannot be loaded."""
    assert repair(save_dir) == 4
    metadata = save_dir / "iter_0000004/.metadata"
    before, content = metadata.stat(), metadata.read_bytes()
    metadata.write_bytes(content.replace(b"BytesStorageMetadata", b"RytesStorageMetadata"))
    os.utime(metadata, ns=(before.st_atime_ns, before.st_mtime_ns))
    done = resumed(save_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r" iteration +(\d+)/", done.stdout) == ["3", "4", "5", "6"]
    (told,) = re.findall("event=checkpoint-damaged (.*)", log.read_text())
    assert told.startswith('iteration=4 reason=".metadata is not as it was')
    assert "event=resume iteration=2" in log.read_text()


def rename(folder, key) -> bytes:
    """Give a record another name in an index, which stays sound; returns what it was."""
    path = folder / ".metadata"
    before = path.read_bytes()
    content = pickle.loads(before)
    content.state_dict_metadata[f"{key}_"] = content.state_dict_metadata.pop(key)
    content.storage_data = {
        dataclasses.replace(index, fqn=f"{key}_") if index.fqn == key else index: info
        for index, info in content.storage_data.items()
    }
    path.write_bytes(pickle.dumps(content))
    check(folder, whole=True)
    return before


def test_what_cannot_be_loaded_is_passed_over_once(log, save_dir):
    """By Megatron, and by this entry's own look at the arguments before it."""
    newer, older = save_dir / "iter_0000004", save_dir / "iter_0000002"
    rename(newer, "decoder.final_layernorm.weight")
    sound = rename(older, "common_state/shard_0_1")
    done = resumed(save_dir, "--max-restarts", "3")
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.findall(r"event=resume iteration=(\d+)", log.read_text()) == ["4", "4", "2"]
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith(f"megatron_xielu: error: --save: {save_dir}: neither iter_0000004 (")
    assert "final_layernorm" in last and "common" in last
    assert newer.is_dir() and older.is_dir() and read_tracker(save_dir) == 4

    (older / ".metadata").write_bytes(sound)
    (save_dir / RECORD).unlink()
    log.unlink()
    done = resumed(save_dir, "--max-restarts", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r" iteration +(\d+)/", done.stdout) == ["3", "4", "5", "6"]
    assert re.findall(r"event=resume iteration=(\d+)", log.read_text()) == ["4", "4", "2"]
    assert 'event=checkpoint-damaged iteration=4 reason="it could not be' in log.read_text()


def test_flags_that_are_corrected_cost_no_checkpoint(log, save_dir):
    """Even after the wrong ones had the newest set aside."""
    done = resumed(save_dir, "--max-restarts", "2", wrong=("--mtp-num-layers", "1"))
    assert done.returncode == 1 and "mtp.layers.0" in log.read_text()
    assert (save_dir / "damaged_iter_0000004").is_dir()
    done = resumed(save_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r" iteration +(\d+)/", done.stdout) == ["5", "6"]
    assert re.findall(r"event=resume iteration=(\d+)", log.read_text()) == ["4", "4", "2", "4"]
    assert "event=checkpoint-tried-again iteration=4" in log.read_text()


MEGATRONS_LOADER = """
from torch.distributed.checkpoint.api import CheckpointException
def load_checkpoint(error, how):
    if how == "wrapped":
        raise CheckpointException("read", {0: (KeyError("x"), None), 1: (error, None)})
    try:
        raise error
    except BaseException:
        if how == "sys.exit":
            raise SystemExit
        raise
"""
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("how", ["raised", "wrapped", "sys.exit"])
@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (OUT_OF_MEMORY, False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (MemoryError(), False),
        (KeyboardInterrupt(), False),
        (SystemExit(128 + signal.SIGTERM), False),
        (torch.distributed.DistBackendError("unhandled system error"), False),
        (OSError(errno.ESTALE, "Stale file handle"), False),
        (OSError(errno.EIO, "Input/output error"), True),
        (RuntimeError("Missing key in checkpoint state_dict: x."), True),
        (KeyError("cuda_rng_state"), True),
    ],
    ids=repr,
)
def test_what_counts_as_a_load_that_failed(tmp_path, error, counts, how):
    (tmp_path / TRACKER).write_text("4")
    megatron = {"__name__": "megatron.training.checkpointing"}
    exec(MEGATRONS_LOADER, megatron)
    flags = supervised._flags(["--save", str(tmp_path), "--load", str(tmp_path)])
    try:
        megatron["load_checkpoint"](error, how)
    except BaseException as end:
        assert supervised._note(end, supervised._of_a_load(end), flags, "loader")
    assert (tmp_path / failed_loads.NOTE).exists() is counts


def test_what_another_loader_is(monkeypatch):
    """Another flag, value, order, entry, number of ranks or version; not another process."""
    words = ["-m", "entry", "--a", "b"]
    digests = [supervised._loader(words)]
    for other in (["-m", "entry", "--a"], ["-m", "entry", "--a", "c"], ["-m", "e", "--a", "b"]):
        digests.append(supervised._loader(other))
    for setting in ("WORLD_SIZE", "torch", "megatron_xielu", "Megatron"):
        with monkeypatch.context() as patch:
            if setting == "WORLD_SIZE":
                patch.setenv(setting, "7")
            elif setting == "Megatron":
                patch.setattr("megatron_xielu.workarounds.releases.installed", lambda: (0, "0.7"))
            else:
                patch.setattr(f"{setting}.__version__", "0.7")
            digests.append(supervised._loader(words))
    assert len(set(digests)) == len(digests)
    monkeypatch.setenv("RANK", "1")
    assert supervised._loader(words) == digests[0]


@pytest.mark.parametrize(
    "then", ["raise SystemExit", "raise SystemExit('megatron_xielu: error: x')"]
)
def test_an_end_for_want_of_memory_is_tried_again(tmp_path, then):
    """Neither an early leave, after Megatron's `sys.exit`, nor what this entry refuses."""
    (tmp_path / "script.py").write_text(f"""
megatron = {{"__name__": "megatron.training.checkpointing"}}
exec({MEGATRONS_LOADER!r}, megatron)
try:
    megatron["load_checkpoint"](MemoryError(), "raised")
except MemoryError:
    {then}
""")
    done = rank(tmp_path, str(tmp_path / "script.py"))
    assert done.returncode == 1 and not (tmp_path / "finished").exists()


def test_a_save_folder_that_cannot_be_repaired(log, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "script.py").touch()
    monkeypatch.setenv("RANK", "0")
    done = rank(tmp_path, str(tmp_path / "script.py"), "--save", str(tmp_path / "file"))
    assert done.returncode == 2 and "Traceback" not in done.output
    (told,) = re.findall("event=worker-failed reason=(.*)", log.read_text())
    assert "megatron_xielu: error: --save: " in told and "Not a directory" in told


@pytest.mark.parametrize("arguments", [(), ("-m",)])
def test_usage(arguments, tmp_path):
    done = rank(tmp_path, *arguments)
    assert done.returncode == 1 and "usage:" in done.output
