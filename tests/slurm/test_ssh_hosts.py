"""launch.sh on two hosts: the link is cut and comes back, a rank hangs, a key is pressed, it is
started twice, or killed.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hosts import TwoHosts
from launch import REPOSITORY
from namespaces import environment, until
from trajectory import (
    SETTINGS,
    assert_no_secrets,
    assert_same_run,
    count,
    events,
    latest,
    reached,
)


@pytest.fixture(scope="module")
def hosts():
    with TwoHosts() as two:
        yield two


class Launch:
    """launch.sh at work; ``log`` is its output."""

    def __init__(self, hosts: TwoHosts, run: Path, *flags: str, **variables: str) -> None:
        self.path = run.parent / f"launch-{time.monotonic_ns()}.log"
        self.process = subprocess.Popen(
            [str(REPOSITORY / "examples/torchrun/launch.sh"), "host1", "host2", "--", *flags],
            env=environment(
                {
                    **SETTINGS,
                    "RUN_DIR": str(run),
                    "GPUS_PER_NODE": "1",
                    "SSH": f"{' '.join(hosts.ssh)} -o ServerAliveInterval=3",
                    "RESTART_DELAY": "1",
                    **variables,
                }
            ),
            # Of tests under nohup, too: a shell cannot trap what it has been told to ignore.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            stdout=self.path.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        return self.path.read_text(errors="replace")

    def wait(self, code: int, timeout: float = 200) -> None:
        try:
            assert self.process.wait(timeout) == code, self.log[-6000:]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(self.log[-6000:]) from None


def test_cut_link_and_interrupt(hosts, reference, tmp_path):
    """The link is cut and comes back; then Ctrl-C, and the same command again. Of a run whose
    folder has a name that no shell may read."""
    run = tmp_path / "it's a $run"
    launch = Launch(hosts, run)
    until("ten steps", lambda: latest(run) >= 10, timeout=120)
    hosts.cut_link("host2")
    until("the loss to be noticed", lambda: "does not answer" in launch.log, timeout=120)
    hosts.restore_link("host2")
    before = latest(run)
    until("training again", lambda: reached(run, before + 3) and latest(run) > before, timeout=120)

    os.killpg(launch.process.pid, signal.SIGINT)  # as the terminal does
    launch.wait(75)
    assert count(run, "stopped") == 2
    again = Launch(hosts, run)
    again.wait(0)
    assert count(run, "finished") == 2
    assert_same_run(run, reference)
    assert_no_secrets(run, launch.log, again.log)
    assert not hosts.processes("host1", "cluster.rank")


def test_started_twice_killed_and_hung_up(hosts, reference, tmp_path):
    """The second disturbs nothing; the third, when the first was killed, has its ranks save."""
    run = tmp_path / "run"
    first = Launch(hosts, run, PREFLIGHT="0", STEP_TIME="1")
    until("ten steps", lambda: latest(run) >= 10, timeout=120)
    before = events(run)
    second = Launch(hosts, run, PREFLIGHT="0")
    second.wait(2)
    (line,) = [line for line in second.log.splitlines() if "error" in line]
    assert re.search(f"belongs to another training of launch.sh {first.process.pid} ", line)
    assert f"on {os.uname().nodename}, `kill {first.process.pid}` saves and ends it" in line
    assert [line for line in events(run) if "checkpoint" not in line] == [
        line for line in before if "checkpoint" not in line
    ]
    assert first.process.poll() is None and hosts.processes("host1", "cluster.rank")

    first.process.kill()
    third = Launch(hosts, run, PREFLIGHT="0", STEP_TIME="1")
    until("the ranks to be taken back", lambda: count(run, "stopped") == 2, timeout=60)
    assert f"(process {first.process.pid}) has left on the hosts" in third.log
    saved = latest(run)
    until("training again", lambda: reached(run, saved + 1), timeout=120)
    os.killpg(third.process.pid, signal.SIGHUP)  # as a closed terminal does
    third.wait(75)
    assert latest(run) > saved and not hosts.processes("host2", "megatron_xielu")
    Launch(hosts, run, PREFLIGHT="0", STEP_TIME="0").wait(0)
    assert_same_run(run, reference)


def test_hung_rank(hosts, reference, tmp_path):
    """A rank that never returns: the others' collectives time out, and all start again."""
    run = tmp_path / "run"
    timeout = ("--distributed-timeout-seconds-after-init", "15")
    Launch(hosts, run, *timeout, FAULT="hang@15@1", PREFLIGHT="0", STEP_TIME="0").wait(0)
    assert any(re.search("event=worker-failed.*(timed out|timeout)", x, re.I) for x in events(run))
    assert count(run, "restart") >= 2
    (line,) = [line for line in events(run) if "event=desync" in line]
    assert "rank=1 " in line and re.search("rank 1 did not enter .* in which rank 0 waits", line)
    stack = next(run.glob("flight_recorder/2*/stack_1")).read_text()
    assert "in loss_and_fault" in stack
    assert_same_run(run, reference)
