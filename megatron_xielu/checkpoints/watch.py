"""Beside a training: verifies every new checkpoint, deletes old ones, warns of a full disk.

Kept are the last K that passed a whole check, multiples of E, and what the tracker names. Nothing
is deleted while that one has not passed. A folder is renamed before it is removed, so that half a
folder never looks like a checkpoint.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from megatron_xielu.checkpoints.check import Damaged, check
from megatron_xielu.checkpoints.folder import checkpoints, read_tracker, size_and_stamp
from megatron_xielu.checkpoints.ledger import Policy, Record, kept, lock
from megatron_xielu.common import event_log, text

_ROOM = 1.1  # free space wanted for the next checkpoint, in sizes of the last


class Watcher:
    """Verifies every new checkpoint, prunes old ones, warns before the disk is full.

    Args:
        save_dir: the ``--save`` folder; need not exist yet.
        keep_last: how many of the newest verified checkpoints are kept, 1 or more.
        keep_every: multiples of it are kept, too; 0 for none.
    """

    def __init__(self, save_dir: Path, *, keep_last: int, keep_every: int) -> None:
        self._save_dir = save_dir
        self._policy = Policy(keep_last, keep_every)
        self._damaged: dict[str, int] = {}  # folder -> the stamp that was found damaged
        self._done: tuple[int, ...] = ()  # the tracker and the checkpoints after the last step
        self._warned: int | None = None  # the tracker at the last warning about the disk

    def step(self) -> None:
        """Do what is to be done now."""
        self._remove_leftovers()
        tracker, found = read_tracker(self._save_dir), checkpoints(self._save_dir)
        if not isinstance(tracker, int):
            return
        state = (tracker, *found)
        if state != self._done:
            for iteration, folder in found.items():
                if iteration <= tracker:  # a newer one is still being written
                    self._verify(iteration, folder)
            self._prune()
            self._done = state
        if tracker in found and tracker != self._warned:
            self._warn_of_full_disk(tracker, found[tracker])

    def _verify(self, iteration: int, folder: Path) -> None:
        with suppress(FileNotFoundError):  # gone in the meantime
            stamp = size_and_stamp(folder)[1]
            record = Record(self._save_dir)
            if folder in record or self._damaged.get(folder.name) == stamp:
                return
            start = time.monotonic()
            try:
                check(folder, whole=True, hashes=record.hashes(folder))
            except Damaged as error:
                if folder.exists():
                    self._damaged[folder.name] = stamp
                    event_log.write("checkpoint-damaged", str(error), iteration=iteration)
                return
            with _lock(self._save_dir):
                record = Record(self._save_dir)
                record.add(folder)
                record.save()
            event_log.write(
                "checkpoint",
                f"verified, {text.size(record.verified[folder.name].bytes)}",
                iteration=iteration,
                seconds=f"{time.monotonic() - start:.1f}",
            )

    def _prune(self) -> None:
        with _lock(self._save_dir):
            record = Record(self._save_dir)
            found = checkpoints(self._save_dir)
            changed, record.policy = record.policy != self._policy, self._policy
            unwanted = [i for i in found if i not in kept(self._save_dir, record)]
            for iteration in unwanted:
                folder = found[iteration]
                record.verified.pop(folder.name, None)
                folder.rename(folder.with_name(f".deleting_{folder.name}"))
                event_log.write("checkpoint-deleted", "not kept by the policy", iteration=iteration)
            if changed or unwanted:
                record.save()
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for folder in self._save_dir.glob(".deleting_iter_*"):
            shutil.rmtree(folder, ignore_errors=True)  # what is still open goes the next time

    def _warn_of_full_disk(self, tracker: int, folder: Path) -> None:
        free, size = shutil.disk_usage(self._save_dir).free, size_and_stamp(folder)[0]
        if free < size * _ROOM:
            self._warned = tracker
            event_log.write(
                "disk-low",
                f"{text.size(free)} free in {self._save_dir}, a checkpoint takes "
                f"{text.size(size)}: the next save will fail; make room, or keep fewer checkpoints",
                iteration=tracker,
            )


@contextmanager
def _lock(save_dir: Path) -> Iterator[None]:
    """`lock`, held for moments; a SIGTERM waits, or it could leave the lock to the next start.

    To block the signal is not enough: another thread (NumPy has some) would take it.
    """
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        with lock(save_dir):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for number in came[:1]:
            signal.raise_signal(number)


def watch(save_dir: Path, *, keep_last: int, keep_every: int, interval: float) -> NoReturn:
    """Run a `Watcher` until SIGTERM, at the lowest priority."""

    def stop(*_: Any) -> None:
        raise SystemExit

    signal.signal(signal.SIGTERM, stop)
    os.nice(19)
    watcher, failure = Watcher(save_dir, keep_last=keep_last, keep_every=keep_every), ""
    while True:
        try:
            watcher.step()
            failure = ""
        except OSError as error:  # of a file system that may come back
            if str(error) != failure:
                event_log.write("watch-failed", str(error))
            failure = str(error)
        time.sleep(interval)
