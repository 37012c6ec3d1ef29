"""Two hosts of namespaces.py with a real sshd each, for what starts trainings over ssh."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from namespaces import Network, environment, until

SERVER = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
AcceptEnv LANG LC_*
PrintMotd no
PidFile none
Subsystem sftp internal-sftp
"""

CLIENT = """
Host *
  User root
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 5
  LogLevel ERROR
"""


class TwoHosts:
    """Hosts host1 and host2: ``ssh -F str(hosts.ssh_config) host1 …`` works from outside and on
    each of them. Commands over ssh see sshd's own short environment, as on a real host.

    All state is in ``folder``, on all hosts; by default a temporary one that `close` removes.
    """

    names = ("host1", "host2")

    def __init__(self, folder: Path | None = None) -> None:
        self._own = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="hosts-"))
        self.network = Network(self.folder, self.names)
        self.ssh_config = self.folder / "ssh_config"
        self._servers: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End both hosts; the folder goes, unless it was given."""
        self.network.close()
        for server in self._servers:
            server.wait(timeout=20)
        if self._own:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        for key in ("key", "host_key"):
            options = ["-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)]
            subprocess.run(["ssh-keygen", *options], check=True, timeout=20)
        (self.folder / "sshd_config").write_text(SERVER.format(folder=self.folder))
        hosts = "".join(
            f"Host {name}\n  HostName {address}\n"
            for name, address in self.network.addresses.items()
        )
        self.ssh_config.write_text(hosts + CLIENT.format(folder=self.folder))
        known = ",".join((*self.names, *self.network.addresses.values()))
        public = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"{known} {public}")
        self.network.__enter__()
        for name in self.names:
            self._serve(name)

    def _serve(self, name: str) -> None:
        with (self.folder / f"sshd-{name}.log").open("ab") as log:
            # The folder for privilege separation is in /run, which every host has empty.
            command = 'mkdir -p /run/sshd && exec "$(command -v sshd)" -D -e -f "$0"'
            self._servers.append(
                subprocess.Popen(
                    self.network.command(
                        name, "bash", "-c", command, str(self.folder / "sshd_config")
                    ),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment(),
                )
            )
        until(f"sshd on {name}", lambda: self._listens(name), timeout=10)

    def _listens(self, name: str) -> bool:
        try:
            socket.create_connection((self.network.addresses[name], 22), timeout=1).close()
        except OSError:
            return False
        return True

    @property
    def ssh(self) -> list[str]:
        """The ssh command, to be followed by a host's name and a command."""
        return ["ssh", "-F", str(self.ssh_config)]

    def run(
        self,
        name: str,
        command: str | Sequence[str],
        *,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run on the host, without ssh, as `Network.run`: this repository's Python is first."""
        return self.network.run(name, command, timeout=timeout, env=env)

    def kill_host(self, name: str) -> None:
        """SIGKILL everything on the host. Others see connections close; after `cut_link` they do
        not."""
        self.network.stop(name)

    def start_host(self, name: str) -> None:
        """Boot a killed host; returns when its sshd answers."""
        self.network.start(name)
        self._serve(name)

    def cut_link(self, name: str) -> None:
        """Packets from and to the host vanish."""
        self.network.cut_link(name)

    def restore_link(self, name: str) -> None:
        """Undo `cut_link`."""
        self.network.restore_link(name)

    def processes(self, name: str, pattern: str = "") -> list[int]:
        """Processes of the host whose command line has the regular expression, for `os.kill`."""
        return self.network.processes(name, pattern)

    def kill(self, name: str, pattern: str, number: int = signal.SIGKILL) -> list[int]:
        """Send a signal to these processes; return their ids."""
        return self.network.kill(name, pattern, number)
