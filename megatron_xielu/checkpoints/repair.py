"""Points a save folder at its newest good checkpoint, and sets damaged ones aside.

Before a start, in one process, and never beside a training that saves. A damaged checkpoint becomes
``damaged_iter_…``. The newest good one counts even if the tracker does not name it: the run died
between the two. To go back to an older checkpoint, rename the newer ones.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from megatron_xielu.checkpoints.check import Damaged, check
from megatron_xielu.checkpoints.folder import (
    RELEASE,
    TRACKER,
    checkpoints,
    read_tracker,
    size_and_stamp,
)
from megatron_xielu.checkpoints.ledger import RECORD, Record, lock
from megatron_xielu.common import event_log, files, text


class NoGoodCheckpoint(RuntimeError):
    """There were checkpoints and none is good: a start would train from scratch."""


def repair(save_dir: Path, *, last: int = 2) -> int | None:
    """Set damaged checkpoints aside and point the tracker at the newest good one.

    Args:
        save_dir: the ``--save`` folder; need not exist.
        last: of so many of the newest, one counts as good only if a whole check says so, now or
            before; older ones only get the quick check.

    Returns:
        The iteration that a start resumes from; None: from none, or ``release``.

    Raises:
        NoGoodCheckpoint: there were checkpoints, and none is good.
    """
    if not save_dir.is_dir():
        print("resume none", flush=True)
        return None
    with lock(save_dir):
        return _repair(save_dir, last)


def _repair(save_dir: Path, last: int) -> int | None:
    tracker = read_tracker(save_dir)
    if tracker == RELEASE:
        print("resume release", flush=True)
        return None
    record, newest = Record(save_dir), None
    for position, (iteration, folder) in enumerate(checkpoints(save_dir).items()):
        whole = newest is None and position < last and folder not in record
        try:
            check(folder, whole=whole)
        except Damaged as error:
            record.verified.pop(folder.name, None)
            aside = _set_aside(folder)
            reason = f"{error}; now {aside.name}, {text.size(size_and_stamp(aside)[0])}"
            print(f"iter {iteration} DAMAGED: {reason}", flush=True)
            event_log.write("checkpoint-damaged", reason, iteration=iteration)
            continue
        if whole:
            record.add(folder)
            record.save()
        newest = iteration if newest is None else newest

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
    while aside.exists():
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
