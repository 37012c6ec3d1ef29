"""Several hosts on one machine: each with its own network, address, host name, hosts file and
processes.

A host is a set of kernel namespaces (network, UTS, mount, PID) that one process holds, its init.
Its link ends in a switch, a bridge in a network namespace of its own, to which the machine outside
is linked too. Nothing has a name outside: when the holders die, even because the test was killed,
the kernel takes the processes, links and mounts of every host with them. Only the folder's mount on
itself, which hands mounts made below it on to all hosts, is for a process that outlives the test.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

REPOSITORY = Path(__file__).resolve().parents[2]

# Run by a host's init, which then only reaps orphans: /run and /dev/shm end with the host.
INIT = """
set -e
hostname {name}
mount --bind {hosts} /etc/hosts
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
sleep infinity >/dev/null 2>&1 &
echo ready
exec >/dev/null 2>&1
wait
"""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment with this repository's Python first, and without an outer Slurm job."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    variables["PATH"] = f"{REPOSITORY / '.venv/bin'}:{os.environ['PATH']}:/usr/sbin:/sbin"
    return variables | dict(extra or {})


def until(what: str, condition: Callable[[], object], *, timeout: float) -> None:
    """Wait for ``condition``; AssertionError naming ``what`` after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout} s: {what}"
        time.sleep(0.05)


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=environment())
    assert not check or not done.returncode, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def _free_subnet() -> str:
    """The first three numbers of a /24 of 198.18.0.0/15, which RFC 2544 keeps for benchmarks."""
    routes = _run("ip", "-4", "route", "show", "table", "all")
    choices = [f"198.{a}.{b}" for a in (18, 19) for b in range(256)]
    return random.SystemRandom().choice([c for c in choices if f"{c}." not in routes])


class Network:
    """Hosts ``names`` with addresses .1, .2, … behind one switch; ``outside`` is this machine's.

    ``folder`` is on every host, with the mounts below it; by default a temporary one that `close`
    removes. All methods take a host's name.
    """

    def __init__(self, names: Sequence[str], folder: Path | None = None) -> None:
        self._own = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="hosts-"))
        self._daemons: list[subprocess.Popen] = []
        self.subnet = _free_subnet()
        self.addresses = {name: f"{self.subnet}.{i}" for i, name in enumerate(names, 1)}
        self.outside = f"{self.subnet}.254"
        self._unmounter: subprocess.Popen | None = None
        self.uplink = f"xi{random.SystemRandom().randrange(16**8):08x}"
        self._holders: dict[str, subprocess.Popen] = {}
        self._pid_namespaces: dict[str, str] = {}
        self._inits: dict[str, list[int]] = {}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        known = {"localhost": "127.0.0.1", socket.gethostname(): self.outside, **self.addresses}
        lines = [f"{address} {name}\n" for name, address in known.items()]
        (self.folder / "hosts").write_text("".join(lines))
        self._unmounter = subprocess.Popen(
            ["bash", "-c", 'read; umount --recursive --lazy "$0"', str(self.folder)],
            stdin=subprocess.PIPE,  # ends with this process, if not before
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        _run("mount", "--bind", str(self.folder), str(self.folder))
        _run("mount", "--make-shared", str(self.folder))
        self._hold("switch")
        self._on_switch("ip", "link", "add", "name", "bridge", "up", "type", "bridge")
        switch = str(self._holders["switch"].pid)
        peer = ["peer", "name", "outside", "netns", switch]
        _run("ip", "link", "add", "name", self.uplink, "type", "veth", *peer)
        _run("ip", "address", "add", f"{self.outside}/24", "dev", self.uplink)
        _run("ip", "link", "set", "dev", self.uplink, "up")
        self._on_switch("ip", "link", "set", "dev", "outside", "master", "bridge", "up")
        for name in self.addresses:
            self.start(name)

    def _on_switch(self, *command: str, check: bool = True) -> str:
        return _run(
            "nsenter", f"--target={self._holders['switch'].pid}", "--net", *command, check=check
        )

    def _hold(self, name: str) -> None:
        """Start the namespaces of ``name``; they end with the holder, and it with this process."""
        holder = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),
                *("unshare", "--net", "--uts", "--mount", "--propagation=slave"),
                *("--pid", "--fork", "--kill-child", "--mount-proc"),
                *("bash", "-c"),
                INIT.format(name=name, hosts=shlex.quote(f"{self.folder}/hosts")),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._holders[name] = holder
        assert holder.stdout
        said = holder.stdout.readline()
        assert said == "ready\n", f"no namespaces for {name}: {said}{holder.stdout.read()}"
        self._pid_namespaces[name] = os.readlink(f"/proc/{holder.pid}/ns/pid_for_children")
        self._inits[name] = self._all(name)

    def start(self, name: str) -> None:
        """Start the host and its link, at the address it always has."""
        self._hold(name)
        number = int(self.addresses[name].rpartition(".")[2])
        # The same hardware address after a restart: the others need not forget the old one.
        hardware = f"02:00:00:00:00:{number:02x}"
        self._on_switch("ip", "link", "delete", "dev", name, check=False)
        pids = [str(self._holders[host].pid) for host in ("switch", name)]
        peer = ["peer", "name", "eth0", "address", hardware, "netns", pids[1]]
        _run("ip", "link", "add", "name", name, "netns", pids[0], "type", "veth", *peer)
        inside = ["nsenter", f"--target={pids[1]}", "--net", "ip"]
        _run(*inside, "address", "add", f"{self.addresses[name]}/24", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")
        self.restore_link(name)

    def stop(self, name: str) -> None:
        """SIGKILL every process of the host. Its kernel stays for a moment and closes connections:
        cut the link first to have others see the silence of a power failure."""
        holder = self._holders.pop(name, None)
        if holder is None:
            return
        # The kernel ends a PID namespace with its init, and the holder ends when all have ended.
        for pid in self._inits.pop(name, [holder.pid]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        holder.wait(timeout=20)
        if holder.stdout:
            holder.stdout.close()

    @property
    def environment(self) -> dict[str, str]:
        """What programs need to find the services of these hosts."""
        return {}

    def is_up(self, name: str) -> bool:
        """Whether the host has been started, and not stopped."""
        return name in self._holders

    def cut_link(self, name: str) -> None:
        """Packets from and to the host vanish; as with a switch gone, neither end is told."""
        self._on_switch("ip", "link", "set", "dev", name, "nomaster", "up")

    def restore_link(self, name: str) -> None:
        """Undo `cut_link`."""
        self._on_switch("ip", "link", "set", "dev", name, "master", "bridge", "up")

    def command(self, name: str, *command: str, folder: Path | None = None) -> list[str]:
        """A command line that runs ``command`` on the host, in ``folder``."""
        pid = self._holders[name].pid
        return [
            *("nsenter", f"--target={pid}", "--net", "--uts", "--mount"),
            *(f"--pid=/proc/{pid}/ns/pid_for_children", "--"),
            *("env", f"--chdir={folder or self.folder}", *command),
        ]

    def run(
        self,
        name: str,
        command: str | Sequence[str],
        *,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run on the host, a string by bash; stdout and stderr are both in ``stdout``. After
        ``timeout`` seconds it is killed, and the return code is 137."""
        if isinstance(command, str):
            command = ["bash", "-c", command]
        limited = self.command(
            name, "timeout", "--signal=KILL", str(timeout), *command, folder=folder
        )
        # A file, not a pipe: a process left in the background holds it open.
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            done = subprocess.run(
                limited,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(env),
            )
            output.seek(0)
            return subprocess.CompletedProcess(command, done.returncode, output.read())

    def daemon(self, name: str, log: Path, *command: str) -> None:
        """Start a program on the host that stays until the host is stopped."""
        with log.open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    self.command(name, *command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment(self.environment),
                )
            )

    def _all(self, name: str) -> list[int]:
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and (
                    os.readlink(f"/proc/{entry}/ns/pid") == self._pid_namespaces[name]
                ):
                    found.append(int(entry))
        return sorted(found)

    def processes(self, name: str, pattern: str = "") -> list[int]:
        """Processes of the host whose command line has the regular expression; zombies are none.

        The ids are the machine's, for `os.kill`, not those that the processes see.
        """
        found = []
        for pid in self._all(name):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                line = b" ".join(words).decode(errors="replace").strip()
                if line and pid not in self._inits[name] and re.search(pattern, line):
                    found.append(pid)
        return found

    def kill(self, name: str, pattern: str, number: int = signal.SIGKILL) -> list[int]:
        """Send a signal to these processes; return their ids."""
        pids = self.processes(name, pattern)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    def close(self) -> None:
        """End every host; the folder goes, unless it was given. Safe to call twice, and after a
        failed start."""
        for name in list(self._holders):
            self.stop(name)
        _run("ip", "link", "delete", "dev", self.uplink, check=False)
        if self._unmounter is not None:
            self._unmounter.communicate(timeout=20)
            self._unmounter = None
        for daemon in self._daemons:
            daemon.wait(timeout=20)
        if self._own:
            shutil.rmtree(self.folder, ignore_errors=True)
