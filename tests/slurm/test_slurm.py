"""pretrain.sbatch on two Slurm nodes: stopped, killed, requeued, preempted, none the worse."""

import re
import shutil
import threading
import time
from pathlib import Path

import pytest
from launch import REPOSITORY
from namespaces import environment, until
from slurm import SlurmCluster
from trajectory import (
    SETTINGS,
    assert_no_secrets,
    assert_same_run,
    count,
    events,
    latest,
    reached,
    undisturbed,
)

SBATCH = REPOSITORY / "examples/slurm/pretrain.sbatch"
RANK = r"^(?!.*cluster\.launcher).*cluster\.rank"
TWO_NODES = ("--nodes=2", "--cpus-per-task=2")


@pytest.fixture(scope="module")
def slurm():
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What two tensor-parallel ranks are compared with."""
    return undisturbed(tmp_path_factory.mktemp("reference") / "run", TP="2")


def submit(slurm: SlurmCluster, run: Path, *options: str, **variables: str) -> str:
    """Submit two nodes of one rank each, TP=2 across them."""
    return slurm.sbatch(
        SBATCH,
        *TWO_NODES,
        *options,
        env={
            **SETTINGS,
            "MEGATRON_XIELU_HOME": str(REPOSITORY),
            "RUN_DIR": str(run),
            "GPUS_PER_NODE": "1",
            "TP": "2",
            **variables,
        },
    )


def test_time_limit_and_killed_rank(slurm, reference, tmp_path):
    """The signal before the time limit saves and requeues; then SIGKILL takes one rank."""
    run = tmp_path / "run"
    processes: set[str] = set()
    seen = threading.Event()

    def watch_process_list() -> None:
        while not seen.wait(1):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    processes.add(path.read_text())
                except OSError:
                    continue

    watcher = threading.Thread(target=watch_process_list)
    watcher.start()
    try:
        job = submit(slurm, run, "--time=30", "--signal=B:USR1@65", STEP_TIME="2")
        until("training", lambda: reached(run, 2), timeout=150)
        # A limit is in whole minutes, this one 60 to 120 s away: the signal comes within 55 s.
        minutes = int(slurm.show(job)["RunTime"].split(":")[1])
        slurm.client("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}")
        until("a stop before the time limit", lambda: count(run, "stopped") == 2, timeout=150)
        slurm.client("scontrol", "update", f"JobId={job}", "TimeLimit=30")
        (run / "step_time").write_text("0.5")
        stopped_at = latest(run)
        assert 0 < stopped_at < 40
        slurm.wait(job, timeout=60, until={"RUNNING"})
        until("training again", lambda: reached(run, stopped_at + 2), timeout=90)
        assert slurm.kill("n2", RANK)
        slurm.wait(job, timeout=150)
    finally:
        seen.set()
        watcher.join()

    assert slurm.show(job)["Restarts"] == "1", "\n".join([*events(run), slurm.log(job)])
    assert count(run, "restart") >= 1 and count(run, "finished") == 2
    killed = next(line for line in events(run) if "killed by SIGKILL" in line)
    assert "node=n2" in killed and " rank=" in killed and "exit=-9" in killed
    assert_same_run(run, reference)
    assert_no_secrets(run, slurm.log(job), "\n".join(processes))


def test_requeue_lost_node_and_preemption(slurm, reference, tmp_path):
    """`scontrol requeue`, then a node that dies, then a job of higher priority. The checkout
    changes, and the job goes on with the code that it began with."""
    run, checkout = tmp_path / "run", tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", ".venv", ".git", "runs", "tests", "docs")
    shutil.copytree(REPOSITORY, checkout, ignore=ignored)
    home = {"MEGATRON_XIELU_HOME": str(checkout)}
    job = submit(slurm, run, "--partition=batch", STEP_TIME="0.5", PREFLIGHT="0", **home)

    until("ten steps", lambda: latest(run) >= 10, timeout=120)
    for file in (checkout / "megatron_xielu").rglob("*.py"):
        file.write_text("raise SystemExit('the code has changed')")
    (checkout / "examples/pretrain.sh").write_text("#!/bin/sh\nexit 2\n")
    slurm.requeue(job)
    slurm.wait(job, timeout=60, until={"PENDING"})
    slurm.wait(job, timeout=60, until={"RUNNING"})
    until("training again", lambda: reached(run, 14), timeout=90)

    slurm.kill_node("n2")
    until("the job's requeue", lambda: slurm.state(job) == "PENDING", timeout=90)
    slurm.start_node("n2")
    slurm.wait(job, timeout=60, until={"RUNNING"})
    until("training again", lambda: latest(run) >= 20, timeout=120)

    urgent = slurm.sbatch("sleep 1", "--partition=urgent", "--nodes=2", "--exclusive")
    slurm.wait(urgent, timeout=60)
    slurm.wait(job, timeout=200)

    assert int(slurm.show(job)["Restarts"]) >= 3
    assert count(run, "finished") == 2
    starts = [line for line in events(run) if " event=start " in line]
    (code,) = {re.search(" code=([0-9a-f]{12}) ", line)[1] for line in starts}
    assert len(starts) >= 8 and (run / "code" / f"job-{job}").resolve() == run / "code" / code
    assert_same_run(run, reference)


def test_deterministic_crash_is_not_requeued_for_ever(slurm, tmp_path):
    """Whose output srun labels, as SRUN_ARGS has it."""
    run = tmp_path / "run"
    job = submit(
        slurm,
        run,
        FAULT="always-crash@3",
        STEP_TIME="0",
        IN_JOB_RESTARTS="0",
        RESTART_BUDGET="2",
        PREFLIGHT="0",
        SRUN_ARGS="--label  --comment=of-a-test",
    )
    slurm.wait(job, timeout=200, until={"FAILED"})
    assert {"0: ", "1: "} <= {line[:3] for line in slurm.log(job).splitlines()}
    assert slurm.show(job)["ExitCode"].startswith("4:")
    assert slurm.show(job)["Restarts"] == "2"
    text = "\n".join(events(run))
    assert "RuntimeError: a fault at iteration 3, on purpose" in text
    assert "event=budget-spent" in text
    time.sleep(2)
    assert slurm.state(job) == "FAILED"


def test_what_does_not_start_is_not_requeued_for_ever(slurm, tmp_path):
    """A setting that is refused ends the job; a container that fails before the budget is counted
    is tried again, so often; one that is not there is not."""
    apptainer = tmp_path / "bin/apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text("#!/bin/sh\necho no room for the image >&2\nexit 1\n")
    apptainer.chmod(0o755)
    image = tmp_path / "image.sif"
    image.touch()
    path = f"{apptainer.parent}:{environment()['PATH']}"
    for variables, code, restarts, words in (
        ({"TP": "two"}, 2, 0, "pretrain.sh: error: TP=two is not a whole number"),
        ({"IMAGE": f"{image}.sif"}, 2, 0, f"IMAGE={image}.sif is not there"),
        ({"RUN_DIR": f"{image}/run"}, 2, 0, f"RUN_DIR={image}/run cannot be written to"),
        ({"IMAGE": str(image), "RESTART_BUDGET": "1"}, 4, 1, "before pretrain.sh counted the"),
    ):
        job = submit(slurm, tmp_path / "run", **{"PATH": path, **variables})
        slurm.wait(job, timeout=100, until={"FAILED"})
        found = slurm.show(job)
        assert (found["ExitCode"], found["Restarts"]) == (f"{code}:0", str(restarts)), slurm.log(
            job
        )
        assert words in slurm.log(job)
