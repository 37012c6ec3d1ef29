"""Two hosts of namespaces.py with a real sshd each, for what starts trainings over ssh."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

from namespaces import Network, until

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


class TwoHosts(Network):
    """Hosts host1 and host2: ``ssh -F str(hosts.ssh_config) host1 …`` works from outside and on
    each of them. Commands over ssh see sshd's own short environment, as on a real host.
    """

    names = ("host1", "host2")

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(self.names, folder)
        self.ssh_config = self.folder / "ssh_config"

    def _start(self) -> None:
        super()._start()
        for key in ("key", "host_key"):
            options = ["-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)]
            subprocess.run(["ssh-keygen", *options], check=True, timeout=20)
        (self.folder / "sshd_config").write_text(SERVER.format(folder=self.folder))
        hosts = "".join(
            f"Host {name}\n  HostName {address}\n" for name, address in self.addresses.items()
        )
        self.ssh_config.write_text(hosts + CLIENT.format(folder=self.folder))
        known = ",".join((*self.names, *self.addresses.values()))
        public = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"{known} {public}")
        for name in self.names:
            self._serve(name)

    def _serve(self, name: str) -> None:
        # The folder for privilege separation is in /run, which every host has empty.
        command = 'mkdir -p /run/sshd && exec "$(command -v sshd)" -D -e -f "$0"'
        sshd = ("bash", "-c", command, str(self.folder / "sshd_config"))
        self.daemon(name, self.folder / f"sshd-{name}.log", *sshd)
        until(f"sshd on {name}", lambda: self._listens(name), timeout=10)

    def _listens(self, name: str) -> bool:
        try:
            socket.create_connection((self.addresses[name], 22), timeout=1).close()
        except OSError:
            return False
        return True

    @property
    def ssh(self) -> list[str]:
        """The ssh command, to be followed by a host's name and a command."""
        return ["ssh", "-F", str(self.ssh_config)]

    def start_host(self, name: str) -> None:
        """Boot a host that was stopped; returns when its sshd answers."""
        self.start(name)
        self._serve(name)
