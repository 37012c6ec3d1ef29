"""A lock that is a file, for processes of all nodes, and says who holds it.

Only one process can create the file; it renews the file's time while it holds the lock, and removes
it in the end. ``flock`` is not to be relied on on NFS and Lustre, and nodes' clocks differ: the
file's time is only compared with itself. Who reads it opens it, after which NFS asks the server.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_xielu.common import processes, schema, text
from megatron_xielu.common.schema import Count


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        node: its name, for messages.
        pid: the process that it is held for.
        place: where that number is known: one boot of one machine, one PID namespace of it.
        since: when it was taken.
        run: what the process is part of, such as a Slurm job; may be empty.
        attempt: which start of ``run`` it is; an earlier one has ended when there is a later one.
    """

    node: str
    pid: Count
    place: str
    since: str
    run: str = ""
    attempt: Count = 0

    def has_ended(self) -> bool:
        """Whether its process was here and is no more."""
        return self.place == _place() and not processes.is_alive(self.pid)

    def is_before(self, other: Holder) -> bool:
        """Whether it is an earlier attempt of the other's run, or the very same process."""
        if self.run == other.run != "" and self.attempt < other.attempt:
            return True
        return (self.pid, self.place) == (other.pid, other.place)


class LockFile:
    """One lock, as one process sees it; `take` until it is true, `renew` while it is needed.

    Args:
        path: the file; its folder exists.
        pid: the process that the lock is held for.
        node: its node's name, for messages.
        since: as `Holder.since`, if not now.
        run: as `Holder.run`.
        attempt: as `Holder.attempt`.
    """

    def __init__(
        self,
        path: Path,
        *,
        pid: int,
        node: str = "",
        since: str = "",
        run: str = "",
        attempt: int = 0,
    ) -> None:
        self._path = path
        node = node or os.uname().nodename
        self._own = Holder(node, pid, _place(), since or text.now(), run, attempt)
        self._content = json.dumps(asdict(self._own)).encode()
        self._seen: tuple[int, bytes] | None = None
        self._looked = 0.0
        self.is_renewed = False  # whether another holder has renewed it while this one looked
        self.silence = 0.0  # seconds in which another holder did not
        self.holder: Holder | None = None  # the one that this one has seen last

    def create(self) -> bool:
        """Whether there was no such lock, and it is this process's now."""
        try:
            file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with suppress(OSError):  # a full disk: it is held, but does not say by whom
            os.write(file, self._content)
        os.close(file)
        return True

    def look(self) -> None:
        """See who holds it, and whether it is renewed."""
        now, content, stamp = time.monotonic(), b"", 0
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            content, stamp = file.read(), os.fstat(file.fileno()).st_mtime_ns
        if self._seen is None or content != self._seen[1]:
            self.is_renewed, self.silence, self.holder = False, 0.0, None
            with suppress(schema.Malformed):
                self.holder = schema.check(Holder, schema.parse(content, self._path), self._path)
        elif stamp != self._seen[0]:
            self.is_renewed, self.silence = True, 0.0
        else:
            # No more than a second for each look: a file system that hung has hung for the holder.
            self.silence += min(now - self._looked, 1.0)
        self._seen, self._looked = (stamp, content), now

    def is_free(self, stale_after: float) -> bool:
        """Whether the holder seen is no more, or did not renew the lock for so many seconds."""
        if self.silence > stale_after:
            return True
        if not self.holder:
            return False
        return self.holder.is_before(self._own) or self.holder.has_ended()

    def take_over(self) -> bool:
        """Remove the lock that was seen and create this one; whether that came about.

        Another process may do the same at the same moment: `renew` a moment later says who has it.
        """
        self._path.unlink(missing_ok=True)
        return self.create()

    def renew(self) -> bool:
        """Say that the holder lives; whether it is still the holder.

        One that was deleted is created again; a file system that fails may come back.
        """
        try:
            if self._path.read_bytes() not in (self._content, b""):
                return False
            os.utime(self._path)
        except FileNotFoundError:
            with suppress(OSError):
                return self.create()
        except OSError:
            pass
        return True

    def release(self) -> None:
        """Give it up, if it is still held."""
        with suppress(OSError):
            if self._path.read_bytes() in (self._content, b""):
                self._path.unlink()


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return os.uname().nodename
