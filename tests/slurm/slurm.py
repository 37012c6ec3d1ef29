"""A real Slurm cluster of two nodes, each a host of namespaces.py, that can lose nodes and links.

Two CPUs' worth of machine, declared as more: nothing binds a task to a CPU or a fake GPU. Partition
`urgent` preempts jobs of `batch`: SIGTERM at once, GRACE_TIME seconds later the requeue.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from namespaces import Network, environment, until

GRACE_TIME = 6  # from SIGTERM to SIGKILL of a preempted job
KILL_WAIT = 5  # the same at the time limit, and for a cancelled job

# cred_expire: a requeued job waits for it to pass, by default 2 minutes. linuxproc: cgroups are the
# machine's own. SlurmdTimeout, MessageTimeout: until a lost node is given up. PropagatePrioProcess:
# jobs run at the priority of who submits them, not at slurmd's (see `_daemon`).
CONFIGURATION = """
ClusterName=test
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,preempt_youngest_first
ReturnToService=2
SlurmdTimeout=15
MessageTimeout=8
PropagatePrioProcess=1
KillWait={kill_wait}
MinJobAge=86400
JobRequeue=1
JobFileAppend=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n1 NodeAddr={n1} CPUs=4 RealMemory=16000 Gres=gpu:2
NodeName=n2 NodeAddr={n2} CPUs=4 RealMemory=16000 Gres=gpu:2
PartitionName=batch Nodes=n1,n2 Default=YES State=UP PriorityTier=1 GraceTime={grace_time}
PartitionName=urgent Nodes=n1,n2 State=UP PriorityTier=10 PreemptMode=OFF
"""

# Of these a job does not come back by itself; PREEMPTED and NODE_FAIL pass when it is requeued.
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}


class SlurmCluster(Network):
    """Nodes n1 and n2, and host `head` with slurmctld and munged; clients run outside.

    Jobs are submitted from ``folder``/jobs: relative paths in them start there.
    """

    nodes = ("n1", "n2")

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(("head", *self.nodes), folder)
        self.jobs = self.folder / "jobs"

    def _start(self) -> None:
        super()._start()
        for name in ("state", "spool", "jobs", "log"):
            (self.folder / name).mkdir()
        for number in range(2):
            null = os.stat("/dev/null")
            os.mknod(self.folder / f"nvidia{number}", null.st_mode, null.st_rdev)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/nvidia[0-1]\n")
        configuration = CONFIGURATION.format(
            folder=self.folder,
            kill_wait=KILL_WAIT,
            grace_time=GRACE_TIME,
            **self.addresses,
        )
        (self.folder / "slurm.conf").write_text(configuration)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": self.folder / "munge.socket"}
        files |= {f"{x}-file": self.folder / f"munge.{x}" for x in ("pid", "log", "seed")}
        options = [f"--{option}={path}" for option, path in files.items()]
        self._daemon("head", "munged", "--foreground", "--force", *options)
        until("munged answers", (self.folder / "munge.socket").exists, timeout=10)
        self._daemon("head", "slurmctld", "-D")
        for node in self.nodes:
            self._daemon(node, "slurmd", "-D", "-N", node)
        for node in self.nodes:
            self._until_up(node)

    def _daemon(self, host: str, program: str, *options: str) -> None:
        # Before the ranks on these few CPUs: a slurmd that answers late is taken for a lost node.
        command = ("nice", "--adjustment=-10", program, *options)
        self.daemon(host, self.folder / "log" / f"{program}-{host}", *command)

    def _until_up(self, node: str) -> None:
        try:
            up = {"IDLE", "ALLOCATED", "MIXED"}
            until(f"{node} is up", lambda: self.node_state(node) in up, timeout=30)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.controller_log()[-3000:]}") from None

    @property
    def environment(self) -> dict[str, str]:
        """What makes Slurm's commands, run outside or on a host, talk to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def client(
        self,
        *command: str,
        timeout: float = 20,
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, of Slurm or a script that calls them, outside the hosts.

        In ``folder``, by default ``jobs``; killed with return code 124 after ``timeout`` seconds.
        AssertionError with its output when it fails, unless ``check`` is false.
        """
        done = subprocess.run(
            ["timeout", "--kill-after=2", str(timeout), *command],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=environment({**self.environment, **(env or {})}),
            cwd=folder or self.jobs,
        )
        assert not check or not done.returncode, f"{command}: {done.stdout}{done.stderr}"
        return done

    def sbatch(
        self, script: Path | str, *options: str, env: Mapping[str, str] | None = None
    ) -> str:
        """Submit a file, or a text as one that bash runs; return the job's id."""
        if isinstance(script, str):
            text, script = script, self.jobs / f"script-{time.monotonic_ns()}"
            script.write_text(text if text.startswith("#!") else f"#!/bin/bash\n{text}")
        answer = self.client("sbatch", "--parsable", *options, str(script), env=env).stdout
        return answer.strip()

    def show(self, job: str) -> dict[str, str]:
        """The fields of ``scontrol show job``: JobState, Restarts, ExitCode, Reason, StdOut, …"""
        text = self.client("scontrol", "show", "job", job).stdout
        return dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", text))

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, …"""
        return self.show(job)["JobState"]

    def node_state(self, node: str) -> str:
        """IDLE, MIXED, DOWN, …; a ``*`` behind it: does not answer."""
        text = self.client("scontrol", "show", "node", node, check=False).stdout
        found = re.search(r"State=(\S+)", text)
        return found[1] if found else "UNKNOWN"

    def wait(
        self, job: str, timeout: float, until: Collection[str] = frozenset({"COMPLETED"})
    ) -> str:
        """Wait until the state is one of ``until``, and return it.

        AssertionError with the job's and the controller's log after ``timeout`` seconds, or as soon
        as the job has ended otherwise.
        """
        end = time.monotonic() + timeout
        while (state := self.state(job)) not in until:
            if state in ENDED or time.monotonic() > end:
                raise AssertionError(
                    f"job {job} is {state}, not {' or '.join(until)}, within {timeout} s\n"
                    f"{self.show(job)}\n{self.log(job)[-6000:]}\n{self.controller_log()[-3000:]}"
                )
            time.sleep(0.1)
        return state

    def log(self, job: str) -> str:
        """What the job has written to its output file, in all its runs (appended)."""
        try:
            return Path(self.show(job)["StdOut"]).read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def controller_log(self) -> str:
        """The log of slurmctld."""
        return (self.folder / "log/slurmctld-head").read_text(errors="replace")

    def requeue(self, job: str) -> None:
        """End the job's run; it waits its turn again, a few seconds at least."""
        self.client("scontrol", "requeue", job)

    def scancel(self, job: str, *options: str, signal: str | None = None) -> None:
        """Cancel the job or, with ``signal`` ("TERM", "USR1"), send that only."""
        self.client("scancel", *([f"--signal={signal}"] if signal else []), *options, job)

    def cancel_all(self) -> None:
        """Cancel every job and wait until no node runs any, as between tests."""
        self.client("scancel", "--user=root")
        until("no jobs", lambda: not self.client("squeue", "-h").stdout.strip(), timeout=60)

    def kill_node(self, node: str) -> None:
        """SIGKILL everything on the node: slurmd, job steps, workers. Others see connections close;
        after `cut_link` they do not."""
        self.stop(node)

    def start_node(self, node: str) -> None:
        """Boot a killed node; returns when the controller knows it to be up.

        A boot takes longer than SlurmdTimeout: this first waits until the controller has missed
        the node, 15 to 25 s. (It would otherwise take the job for running, with a task lost.)
        """
        until(f"{node} is missed", lambda: "DOWN" in self.node_state(node), timeout=60)
        self.start(node)
        self._daemon(node, "slurmd", "-D", "-N", node)
        self._until_up(node)
