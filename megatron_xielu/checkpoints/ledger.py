"""``verified.json``, which says what is known of a save folder's checkpoints; and its lock."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_xielu.checkpoints.folder import checkpoints, read_tracker, size_and_stamp
from megatron_xielu.common import event_log, files, processes, text

RECORD = "verified.json"
_LOCK = ".checkpoints.lock"
# Longer than NFS keeps a file's attributes: a holder that lives renews the lock in between.
_STALE_AFTER = 120.0
_RENEW_EVERY = 5.0


class Record:
    """``verified.json``: the checkpoints that passed a whole check, and the policy of `watch`."""

    def __init__(self, save_dir: Path) -> None:
        self._path = save_dir / RECORD
        try:
            content = json.loads(self._path.read_bytes())
            self.verified: dict[str, dict[str, Any]] = dict(content["checkpoints"])
            self.policy: dict[str, int] = dict(content["policy"])
        except (OSError, ValueError, KeyError, TypeError):
            self.verified, self.policy = {}, {}

    def __contains__(self, folder: Path) -> bool:
        entry = self.verified.get(folder.name)
        return isinstance(entry, dict) and entry.get("stamp") == size_and_stamp(folder)[1]

    def add(self, folder: Path) -> None:
        """Note that a folder passed, as it is now."""
        size, stamp = size_and_stamp(folder)
        self.verified[folder.name] = {"bytes": size, "stamp": stamp, "time": text.now()}

    def save(self) -> None:
        """Write it; a full disk costs only the checks that are then made again."""
        content = {"policy": self.policy, "checkpoints": self.verified}
        try:
            files.write(self._path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            event_log.write("checkpoint-record-failed", f"{self._path}: {error.strerror}")


@contextmanager
def lock(save_dir: Path) -> Iterator[None]:
    """One process at a time, on all nodes: a file that only one can create, renewed while held.

    A lock whose holder was on this node and has ended, or that nobody renewed, is taken over.
    Should its holder wake up again, no harm is done: every step is a rename that happens once, or
    is repeated with the same result.
    """
    path = save_dir / _LOCK
    seen, since = None, time.monotonic()
    while True:
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            time.sleep(0.05)
        else:
            with suppress(OSError):  # a full disk
                os.write(file, f"{os.uname().nodename} {os.getpid()}".encode())
            os.close(file)
            break
        with suppress(FileNotFoundError):
            stamp = path.stat().st_mtime_ns
            if stamp != seen:  # its own clock against itself: nodes' clocks differ
                seen, since = stamp, time.monotonic()
            if time.monotonic() - since > _STALE_AFTER or _has_ended(path.read_text()):
                path.unlink()
    done = threading.Event()

    def renew() -> None:
        while not done.wait(_RENEW_EVERY):
            with suppress(OSError):
                os.utime(path)

    threading.Thread(target=renew, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        path.unlink(missing_ok=True)


def _has_ended(holder: str) -> bool:
    """Whether the process that wrote this into its lock was on this node and is no more."""
    node, _, pid = holder.partition(" ")
    return node == os.uname().nodename and pid.isdigit() and not processes.is_alive(int(pid))


def kept(save_dir: Path, record: Record) -> dict[int, str]:
    """The checkpoints that the policy in the record keeps, with the reason."""
    keep_last, keep_every = (record.policy.get(name, 0) for name in ("keep_last", "keep_every"))
    tracker, found = read_tracker(save_dir), checkpoints(save_dir)
    verified = [iteration for iteration, folder in found.items() if folder in record]
    reasons = {}
    for iteration, folder in found.items():
        if iteration == tracker:
            reasons[iteration] = "the tracker names it"
        elif keep_last < 1:
            reasons[iteration] = "nothing watches this folder"
        elif not isinstance(tracker, int) or iteration > tracker:
            reasons[iteration] = "newer than the tracker says"
        elif tracker not in verified:
            reasons[iteration] = "the newest is not verified"
        elif len(verified) < keep_last or iteration >= verified[keep_last - 1]:
            reasons[iteration] = f"one of the last {keep_last}"
        elif keep_every and iteration % keep_every == 0:
            reasons[iteration] = f"a multiple of {keep_every}"
        elif folder.is_symlink():
            reasons[iteration] = "a link"
    return reasons
