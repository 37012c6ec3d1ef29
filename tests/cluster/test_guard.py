"""One training for one RUN_DIR, and nothing that outlives its script: guard.py and its lock."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import launch
import pytest
from launch import REPOSITORY, free_port

from megatron_xielu.common import lock_file
from megatron_xielu.common.lock_file import Holder, LockFile

GUARD = """
from megatron_xielu.cluster import guard
guard._RENEW_EVERY, guard._SILENT_FOR = 0.2, 0.5
guard.main()
"""


def until(what, condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@dataclass
class Guarded:
    """A guard, and the process that it guards."""

    parent: subprocess.Popen
    guard: subprocess.Popen
    mark: str

    def answer(self) -> str:
        """What it says first: ``ready``, or nothing and why on standard error."""
        return self.guard.stdout.readline().strip() or self.guard.stderr.read()

    def is_alive(self) -> bool:
        return self.parent.poll() is None


@pytest.fixture
def guarded(tmp_path):
    """Starts guards of processes that sleep; ends all of them."""
    started = []

    def start(run_dir=None, node_rank=0, wait="1", code=GUARD, **variables):
        mark = f"test-{os.getpid()}-{len(started)}"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        environment |= {"MEGATRON_XIELU_GUARD": mark, "MEGATRON_XIELU_NODE": "n1", **variables}
        parent = subprocess.Popen(["sleep", "1000"])
        command = [sys.executable, "-c", code, str(parent.pid)]
        if run_dir:
            command += ["--run-dir", str(run_dir), "--node-rank", str(node_rank), "--wait", wait]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        guard = subprocess.Popen(command, env=environment, cwd=REPOSITORY, **pipes)
        started.append(Guarded(parent, guard, mark))
        return started[-1]

    yield start
    for one in started:
        one.parent.kill()
        one.parent.wait()
        one.guard.wait(20)


def held_by(run_dir, **fields) -> Path:
    """A lock of a process of another machine, unless the fields say something else."""
    holder = Holder("n9", 4711, "another boot", "2026-11-24T10:17:20Z")
    path = run_dir / "lock"
    path.write_text(json.dumps(asdict(holder) | fields))
    return path


def test_a_run_dir_is_one_trainings(guarded, tmp_path):
    """Whoever lives is not disturbed; it gives the lock back in the end."""
    first = guarded(tmp_path)
    assert first.answer() == "ready"
    before = (tmp_path / "lock").read_bytes()
    second = guarded(tmp_path)
    told = second.answer()
    assert second.guard.wait(20) == 2
    (line,) = told.splitlines()
    assert line.startswith(f"pretrain.sh: error: RUN_DIR={tmp_path} belongs to another training")
    assert f"(process {first.parent.pid} on n1, since 20" in line
    assert line.endswith(
        f"on n1, `kill {first.parent.pid}` saves and ends it; or choose another RUN_DIR"
    )
    assert first.is_alive() and (tmp_path / "lock").read_bytes() == before
    first.guard.send_signal(signal.SIGUSR2)
    assert first.guard.wait(20) == 0
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize(
    ("fields", "at_once"),
    [
        ({"run": "Slurm job 7", "attempt": 1}, True),
        ({"run": "Slurm job 7", "attempt": 2}, False),
        ({"run": "Slurm job 8"}, False),
        ({"place": lock_file._place(), "pid": 2**22 + 1}, True),
        ({"pid": "damaged"}, False),
    ],
    ids=["requeued", "same-job", "other-job", "process-gone", "damaged"],
)
def test_who_takes_over_and_when(guarded, tmp_path, fields, at_once):
    held_by(tmp_path, **fields)
    one = guarded(tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2")
    assert one.answer() == "ready"
    one.guard.send_signal(signal.SIGUSR2)
    said = one.guard.stderr.read()
    assert ("did not answer for" in said) is not at_once


def test_other_nodes_wait_for_the_run_of_node_0(guarded, tmp_path):
    job = {"SLURM_JOB_ID": "7", "NNODES": "2"}
    path = held_by(tmp_path, run="Slurm job 8")
    refused = guarded(tmp_path, 1, **job)
    assert "`scancel 8` saves and ends it" in refused.answer()
    assert refused.guard.wait(20) == 2
    before = held_by(tmp_path, run="Slurm job 7").read_bytes()
    assert guarded(tmp_path, 1, **job).answer() == "ready"
    assert path.read_bytes() == before


def test_a_training_that_lost_its_lock_ends(guarded, tmp_path):
    """Suspended for a minute, say: another one has been at work since then."""
    one = guarded(tmp_path, MEGATRON_XIELU_EVENTS=str(tmp_path / "log"))
    assert one.answer() == "ready"
    (tmp_path / "lock").unlink()  # by hand: not lost
    until("the lock is there again", (tmp_path / "lock").exists)
    before = held_by(tmp_path).read_bytes()
    assert one.parent.wait(20) == -signal.SIGKILL
    assert one.guard.wait(20) == 0
    assert " event=lock-lost " in (tmp_path / "log").read_text()
    assert (tmp_path / "lock").read_bytes() == before


def test_a_run_dir_that_is_gone_for_a_moment(guarded, tmp_path):
    """The guard lives, and has the lock again with the folder."""
    run = tmp_path / "run"
    run.mkdir()
    one = guarded(run)
    assert one.answer() == "ready"
    shutil.rmtree(run)
    time.sleep(1)
    run.mkdir()
    until("the lock is there again", (run / "lock").exists)
    assert one.is_alive() and one.guard.poll() is None


def test_a_guard_that_fails_cleans_up(guarded, tmp_path):
    fails = "guard._guard = lambda *_: 1 / 0\nguard.main()"
    one = guarded(tmp_path, code=GUARD.replace("guard.main()", fails))
    child = subprocess.Popen(["sleep", "99"], env={"MEGATRON_XIELU_GUARD": one.mark})
    assert child.wait(20) == -signal.SIGKILL
    assert one.guard.wait(20) == 1 and not (tmp_path / "lock").exists()


@pytest.mark.parametrize("node_rank", [0, 1])
def test_a_guard_that_waits_for_the_lock_is_stopped_at_once(guarded, tmp_path, node_rank):
    held_by(tmp_path, run="Slurm job 8")
    wait = GUARD.replace("0.5", "60")
    one = guarded(tmp_path, node_rank, "60", wait, SLURM_JOB_ID="7")
    time.sleep(1.5)
    one.guard.send_signal(signal.SIGUSR2)
    assert one.guard.wait(1) == 75


def test_launch_in_an_allocation_is_a_run_of_its_own(guarded, tmp_path):
    job = {"SLURM_JOB_ID": "7"}
    launched = job | {"MEGATRON_XIELU_LAUNCH": "launch.sh 12 n3 34", "MEGATRON_XIELU_ATTEMPT": "1"}
    first = guarded(tmp_path, **launched)
    assert first.answer() == "ready"
    assert "on n3, `kill 12` saves" in guarded(tmp_path, **launched).answer()
    first.guard.send_signal(signal.SIGUSR2)
    first.guard.wait(20)
    by_hand = guarded(tmp_path, **job)
    assert by_hand.answer() == "ready"
    # The job that both are in is not the other training.
    assert f"on n1, `kill {by_hand.parent.pid}` saves" in guarded(tmp_path, **job).answer()


# srun's code is that of the tasks that it killed.
SLURM = {
    "srun": 'while [[ $1 == -* ]]; do shift; done; SLURM_NODEID=0 "$@"; exit 137',
    "scontrol": '[[ $1 == requeue ]] && touch "$RUN_DIR/requeued" || echo n2',
    "scancel": "true",
}


@pytest.fixture
def sbatch(tmp_path):
    """Runs pretrain.sbatch as job 8, with programs that stand in for Slurm's."""
    run, programs = tmp_path / "run", tmp_path / "bin"
    for folder in (run, programs):
        folder.mkdir()

    def start(*, settings: dict[str, str] | None = None, **more: str):
        for name, script in (SLURM | more).items():
            (programs / name).write_text(f"#!/bin/bash\n{script}\n")
            (programs / name).chmod(0o755)
        return subprocess.run(
            ["bash", "examples/slurm/pretrain.sbatch"],
            env={
                **{"PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"},
                **{"SLURM_JOB_ID": "8", "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": "."},
                **{"MODEL": "debug", "DEVICE": "cpu", "GPUS_PER_NODE": "1", "RUN_DIR": str(run)},
                **{"FAULT_TOLERANCE": "0", "SLURMD_NODENAME": "n2", "SLURM_RESTART_COUNT": "40"},
                **(settings or {}),
            },
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return start


@pytest.mark.parametrize(
    ("between", "code"),
    [
        ("exit 1", 4),
        ('echo 0 >>"$RUN_DIR/attempts"; exit 1', 0),
        ('echo 75 >"$RUN_DIR/exit_code.8"', 0),
        ("kill -USR1 $PPID; sleep 0.5; exit 1", 0),
    ],
    ids=["uncounted", "counted", "stopped", "signal"],
)
def test_what_a_slurm_job_may_fail_at_in_a_row(sbatch, tmp_path, between, code):
    """Restarts for another reason are not failures; an empty verdict is none."""
    fails = ': >"$RUN_DIR/exit_code.8"; exit 1'
    for srun in (fails, fails, between):
        done = sbatch(srun=srun)
        assert done.returncode == 0, done.stderr
        assert re.search(r"requeued after exit code \d+\n", done.stderr)
    done = sbatch(srun=fails)
    assert done.returncode == code, done.stderr
    assert ("4 times in a row (RESTART_BUDGET)" in done.stderr) is (code == 4)
    assert (tmp_path / "run/uncounted.8").exists() is (code == 0)


def test_a_slurm_job_that_is_refused_is_not_requeued(guarded, sbatch, tmp_path):
    run = tmp_path / "run"
    (run / "exit_code.7").write_text("75")
    assert guarded(run, SLURM_JOB_ID="7").answer() == "ready"
    done = sbatch()
    assert done.returncode == 2 and "`scancel 7` saves and ends it" in done.stderr, done.stderr
    files = {path for path in run.rglob("*") if path.is_file() and run / "code" not in path.parents}
    assert {path.name for path in files} == {"exit_code.7", "lock"}  # no attempt, no event


def test_a_slurm_job_runs_the_code_that_it_began_with(sbatch, tmp_path):
    """Its requeues, too, whatever becomes of the checkout; the next job takes what is there."""
    run, checkout = tmp_path / "run", tmp_path / "checkout"
    shutil.copytree(REPOSITORY / "examples", checkout / "examples")
    (checkout / "megatron_xielu").mkdir()
    (checkout / "pyproject.toml").touch()
    srun = 'for word; do [[ $word != */pretrain.sh ]] || echo "$word"; done >>"$RUN_DIR/ran"'
    digests = []
    for job, restarts in (("8", "0"), ("8", "1"), ("9", "0"), ("8", "2")):
        (checkout / "megatron_xielu" / f"{len(digests)}.py").touch()
        settings = {"MEGATRON_XIELU_HOME": str(checkout), "RUN_DIR": str(run)}
        done = sbatch(
            settings=settings | {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restarts},
            srun=f'{srun}; echo 75 >"$RUN_DIR/exit_code.{job}"',
        )
        assert done.returncode == 0, done.stderr
        last = (run / "ran").read_text().splitlines()[-1]
        (digest,) = re.fullmatch(f"{run}/code/([0-9a-f]{{12}})/examples/pretrain.sh", last).groups()
        digests.append(digest)
    assert digests[0] == digests[1] == digests[3] != digests[2]
    shutil.rmtree(run / "code" / digests[0])
    gone = sbatch(settings=settings, srun=srun)
    assert (gone.returncode, gone.stdout) == (2, "") and "is gone: submit it anew" in gone.stderr


def test_a_slurm_job_that_may_not_be_requeued(sbatch):
    """`sbatch --no-requeue`: its exit code is that of the training."""
    refuses = f"[[ $1 != requeue ]] || exit 1; {SLURM['scontrol']}"
    done = sbatch(srun='echo 75 >"$RUN_DIR/exit_code.8"', scontrol=refuses)
    assert done.returncode == 75, done.stderr


def test_a_file_system_that_hangs_makes_no_holder_silent(tmp_path, monkeypatch):
    held_by(tmp_path)
    lock, now = LockFile(tmp_path / "lock", pid=1), iter([0.0, 1.0, 500.0])
    monkeypatch.setattr(lock_file.time, "monotonic", lambda: next(now))
    for _ in range(3):
        lock.look()
    assert lock.silence == 2.0 and not lock.is_free(60)


ENTRY = """
import os, signal, subprocess, sys, time
child = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(1000)"
subprocess.Popen([sys.executable, "-c", child, "left-behind"], start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
open(os.environ["READY"], "w").close()
while True: time.sleep(0.1)
"""


class Job:
    """pretrain.sh with a script that trains nothing and leaves a child to itself."""

    def __init__(self, folder: Path, name: str, **more: str) -> None:
        entry = folder / "entry.py"
        entry.write_text(ENTRY)
        self.ready, self.log = folder / f"{name}.ready", folder / f"{name}.log"
        self.variable = f"OF_THIS_TEST={folder}/{name}"
        variables = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
            **dict([self.variable.split("=")]),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **{"MODEL": "debug", "DEVICE": "cpu", "GPUS_PER_NODE": "1", "PREFLIGHT": "0"},
            **{"RUN_DIR": str(folder / "run"), "READY": str(self.ready), "ENTRY": str(entry)},
            **{"FAULT_TOLERANCE": "0", "ASYNC_SAVE": "0", "MASTER_PORT": str(free_port())},
            **more,
        }
        self.process = subprocess.Popen(
            [str(REPOSITORY / "examples/pretrain.sh")],
            env=variables,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Of tests under nohup, too: a shell cannot trap what it has been told to ignore.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )

    def processes(self, words: str = "") -> list[int]:
        """Those of this job whose command line has the words."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if self.variable.encode() in variables and words in line:
                found.append(int(folder.name))
        return found

    def wait_until_ready(self) -> None:
        until(
            "the rank trains", lambda: self.ready.exists() or self.process.poll() is not None, 120
        )
        assert self.processes("left-behind"), self.log.read_text()


def warm_rank() -> dict[str, str]:
    """One that starts at once, but to which no SIGTERM comes."""
    return {"PYTHON_EXEC": launch.python()}


@pytest.fixture
def job(tmp_path):
    jobs = []

    def start(name: str, **more: str) -> Job:
        jobs.append(Job(tmp_path, name, **more))
        return jobs[-1]

    yield start
    for one in jobs:
        one.process.kill()
        one.process.wait()
        for pid in one.processes():
            os.kill(pid, signal.SIGKILL)


def test_nothing_is_left_of_a_job(job, tmp_path):
    """Killed with its group, the next goes on at once; a closed terminal stops that."""
    first = job("first", **warm_rank())
    first.wait_until_ready()
    os.killpg(first.process.pid, signal.SIGKILL)
    until("all have ended", lambda: not first.processes(), 10)

    second = job("second")
    second.wait_until_ready()
    for name in ("attempts", "exit_code"):  # a full disk
        (tmp_path / "run" / name).unlink(missing_ok=True)
        (tmp_path / "run" / name).symlink_to("/dev/full")
    second.process.send_signal(signal.SIGHUP)
    until("it waits for the ranks", lambda: second.processes("sleep 2"))
    for pid in second.processes("sleep 2"):
        os.kill(pid, signal.SIGTERM)  # Slurm and launch.sh signal every process
    assert second.process.wait(60) == 75, second.log.read_text()
    assert "event=stopping" in second.log.read_text()
    assert not os.path.lexists(tmp_path / "run/exit_code")
    assert not second.processes() and not (tmp_path / "run/lock").exists()


def test_a_launcher_that_is_killed_leaves_nothing(job, tmp_path):
    # Nor does a guard that is killed while the lock cannot be read, and the next one fails.
    again, fails = tmp_path / "again", tmp_path / "python"
    stands_in = f'[[ "$*" == *--again* ]] && echo >>{again} && (($(wc -l <{again}) < 3)) && exit 1'
    fails.write_text(f'#!/bin/bash\n{stands_in}\nexec {sys.executable} "$@"\n')
    fails.chmod(0o755)
    one = job("one", PYTHON=str(fails), **warm_rank())
    one.wait_until_ready()
    lock = tmp_path / "run/lock"
    lock.unlink()
    lock.mkdir()
    (guard,) = one.processes("cluster.guard")
    os.kill(guard, signal.SIGKILL)
    until("there is another", lambda: again.exists() and len(again.read_text()) == 3)
    until("it guards", lambda: one.processes("cluster.guard"))
    time.sleep(1)
    lock.rmdir()
    until("it has the lock", lock.exists)
    for pid in one.processes("cluster.launcher"):
        os.kill(pid, signal.SIGKILL)
    assert one.process.wait(60) == 128 + signal.SIGKILL
    assert not one.processes()


@pytest.mark.parametrize(("tracker", "attempts"), [("", "0\n"), ("10", "")])
def test_a_start_that_ends_with_0_and_saved_nothing_counts(job, tmp_path, tracker, attempts):
    """Megatron ends like this after --exit-interval, but saves before."""
    entry = tmp_path / "ends.py"
    to = tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt"
    entry.write_text(
        f"import pathlib, sys; pathlib.Path({str(to)!r}).write_text({tracker!r}); sys.exit(0)"
    )
    one = job("one", ENTRY=str(entry), **warm_rank())
    assert one.process.wait(60) == 75, one.log.read_text()
    assert (tmp_path / "run/attempts").read_text() == attempts
    assert ("counted as a failure" in one.log.read_text()) is bool(attempts)
