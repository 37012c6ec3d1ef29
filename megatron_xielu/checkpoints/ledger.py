"""``verified.json``, which says what is known of a save folder's checkpoints; and its lock."""

from __future__ import annotations

import json
import os
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_xielu.checkpoints.folder import checkpoints, read_tracker, size_and_stamp
from megatron_xielu.common import event_log, files, schema, text
from megatron_xielu.common.lock_file import LockFile
from megatron_xielu.common.schema import Count

RECORD = "verified.json"
_LOCK = ".checkpoints.lock"
# Longer than NFS keeps a file's attributes: a holder that lives renews the lock in between.
_STALE_AFTER = 120.0
_RENEW_EVERY = 5.0


@dataclass(frozen=True)
class Policy:
    """Which checkpoints `watch` keeps: so many of the last, and multiples of a number (0: none)."""

    keep_last: Count = 0
    keep_every: Count = 0


@dataclass(frozen=True)
class Entry:
    """What was known of a checkpoint when it passed a whole check.

    Attributes:
        bytes: its size.
        stamp: changes with the names, sizes and times of its files.
        data_stamp: the same of those that are not in ``sha256``.
        sha256: of the files that have no checksum in them, by name.
        time: when it was.
    """

    bytes: Count
    stamp: Count
    data_stamp: Count
    sha256: dict[str, str]
    time: str


@dataclass(frozen=True)
class _Content:
    policy: Policy
    checkpoints: dict[str, Entry]
    crc32: Count = 0  # of the rest: a wrong hash would condemn a good checkpoint

    def sum(self) -> int:
        return zlib.crc32(repr((self.policy, self.checkpoints)).encode())


class Record:
    """``verified.json``: the checkpoints that passed a whole check, and the policy of `watch`.

    One that cannot be read says that none passed.
    """

    def __init__(self, save_dir: Path) -> None:
        self._path = save_dir / RECORD
        self.policy, self.verified = Policy(), dict[str, Entry]()
        with suppress(OSError, schema.Malformed):
            content = schema.load(_Content, self._path)
            if content.crc32 == content.sum():
                self.policy, self.verified = content.policy, content.checkpoints

    def __contains__(self, folder: Path) -> bool:
        entry = self.verified.get(folder.name)
        return entry is not None and entry.stamp == size_and_stamp(folder)[1]

    def hashes(self, folder: Path) -> dict[str, str]:
        """What `check` is to find in a folder; nothing where all was written anew."""
        entry = self.verified.get(folder.name)
        if entry is None or entry.data_stamp != size_and_stamp(folder, without=entry.sha256)[1]:
            return {}
        return {name: sha for name, sha in entry.sha256.items() if Path(name).name == name}

    def add(self, folder: Path) -> None:
        """Note that a folder passed, as it is now."""
        (size, stamp), small = size_and_stamp(folder), _without_checksum(folder)
        self.verified[folder.name] = Entry(
            bytes=size,
            stamp=stamp,
            data_stamp=size_and_stamp(folder, without=small)[1],
            sha256=small,
            time=text.now(),
        )

    def save(self) -> None:
        """Write it; a full disk costs only the checks that are then made again."""
        content = _Content(self.policy, self.verified)
        written = json.dumps(asdict(replace(content, crc32=content.sum())), indent=1)
        try:
            files.write(self._path, written + "\n")
        except OSError as error:
            event_log.write("checkpoint-record-failed", f"{self._path}: {error.strerror}")


def _without_checksum(folder: Path) -> dict[str, str]:
    """SHA-256 of ``.metadata`` and its like: all that lies beside the tensors and is small."""
    return {
        path.name: files.sha256(path)
        for path in folder.iterdir()
        if path.suffix != ".distcp" and path.is_file()
    }


@contextmanager
def lock(save_dir: Path) -> Iterator[None]:
    """One process at a time, on all nodes: a file that only one can create, renewed while held.

    A lock whose holder was on this node and has ended, or that nobody renewed, is taken over.
    Should its holder wake up again, no harm is done: every step is a rename that happens once, or
    is repeated with the same result.
    """
    own = LockFile(save_dir / _LOCK, pid=os.getpid())
    while not own.create():
        own.look()
        if own.is_free(_STALE_AFTER) and own.take_over():
            break
        time.sleep(0.05)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(_RENEW_EVERY):
            own.renew()

    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()
    try:
        yield
    finally:
        done.set()
        renewing.join()
        own.release()


def kept(save_dir: Path, record: Record) -> dict[int, str]:
    """The checkpoints that the policy in the record keeps, with the reason."""
    keep_last, keep_every = record.policy.keep_last, record.policy.keep_every
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
        elif folder.is_symlink() or folder.is_file():
            reasons[iteration] = "no folder"
    return reasons
