"""Points a save folder at its newest good checkpoint, and sets damaged ones aside.

Before a start, in one process, and never beside a training that saves. A damaged checkpoint becomes
``damaged_iter_…``. The newest good one counts even if the tracker does not name it: the run died
between the two. To go back to an older checkpoint, rename the newer ones.

What a start resumes from is read whole before each start, though it passed when it was written:
PyTorch does not compare checksums, and a checkpoint that cannot be loaded would be tried again and
again.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from megatron_xielu.checkpoints.check import Damaged, check
from megatron_xielu.checkpoints.folder import (
    RELEASE,
    TRACKER,
    checkpoints,
    is_there,
    read_tracker,
    size_and_stamp,
)
from megatron_xielu.checkpoints.ledger import RECORD, Record, lock
from megatron_xielu.common import event_log, files, text

_THREADS = 8  # nothing else runs yet


class NoGoodCheckpoint(RuntimeError):
    """There were checkpoints and none is good: a start would train from scratch."""


def repair(save_dir: Path) -> int | None:
    """Set damaged checkpoints aside and point the tracker at the newest good one.

    Older ones than that only get the quick check.

    Args:
        save_dir: the ``--save`` folder; need not exist.

    Returns:
        The iteration that a start resumes from; None: from none, or ``release``.

    Raises:
        NoGoodCheckpoint: there were checkpoints, and none is good.
        OSError: the file system fails, or it is no folder.
    """
    if not is_there(save_dir):
        print("resume none", flush=True)
        return None
    with lock(save_dir):
        return _repair(save_dir)


def _repair(save_dir: Path) -> int | None:
    tracker = read_tracker(save_dir)
    if tracker == RELEASE:
        try:
            check(save_dir / RELEASE, whole=True, threads=_THREADS)
        except Damaged as error:
            raise NoGoodCheckpoint(
                f"{save_dir / RELEASE}: {error}; convert the model again"
            ) from None
        print("resume release", flush=True)
        return None
    record, newest = Record(save_dir), None
    for iteration, folder in checkpoints(save_dir).items():
        try:
            hashes = record.hashes(folder)
            check(folder, whole=newest is None, hashes=hashes, threads=_THREADS)
        except Damaged as error:
            record.verified.pop(folder.name, None)
            aside = _set_aside(folder)
            reason = f"{error}; now {aside.name}, {text.size(size_and_stamp(aside)[0])}"
            print(f"iter {iteration} DAMAGED: {reason}", flush=True)
            event_log.write("checkpoint-damaged", reason, iteration=iteration)
            continue
        if newest is None:
            newest = iteration
            if folder not in record:
                record.add(folder)
                record.save()

    if newest is None:
        if tracker != "missing" or _was_good(save_dir):
            raise NoGoodCheckpoint(
                f"{save_dir}: there were checkpoints and none is good (tracker: {tracker}); put a "
                f"good iter_… folder back, or, to train from scratch, move {TRACKER}, {RECORD} and "
                "damaged_iter_… away"
            )
        print("resume none", flush=True)
        return None
    if tracker != newest:
        files.write(save_dir / TRACKER, str(newest))
        reason = f"tracker was {tracker}, is {newest}"
        print(reason, flush=True)
        event_log.write("tracker-repaired", reason, iteration=newest)
    print(f"resume {newest}", flush=True)
    return newest


def _set_aside(folder: Path) -> Path:
    aside, number = folder.with_name(f"damaged_{folder.name}"), 1
    while os.path.lexists(aside):
        number += 1
        aside = folder.with_name(f"damaged_{folder.name}.{number}")
    with suppress(FileNotFoundError):  # another process was first
        folder.rename(aside)
    return aside


def _was_good(save_dir: Path) -> bool:
    """Whether a save ever finished here: a run killed during its first save may start again."""
    damaged = list(save_dir.glob("damaged_iter_*"))
    return (save_dir / RECORD).exists() or any(
        (folder / name).exists() for folder in damaged for name in (".metadata", "metadata.json")
    )
