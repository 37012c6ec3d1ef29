"""Points a save folder at its newest good checkpoint, and sets damaged ones aside.

Before a start, in one process, and never beside a training that saves. A damaged checkpoint becomes
``damaged_iter_…``. The newest good one counts even if the tracker does not name it: the run died
between the two. To go back to an older checkpoint, rename the newer ones.

What a start resumes from is read whole before each start, though it passed when it was written:
PyTorch does not compare checksums, and a checkpoint that cannot be loaded would be tried again and
again. One that is whole, and could not be loaded twice all the same, is set aside, too
(`failed_loads`).
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from megatron_xielu.checkpoints import failed_loads
from megatron_xielu.checkpoints.before_load import THREADS
from megatron_xielu.checkpoints.check import Damaged, check
from megatron_xielu.checkpoints.failed_loads import FailedLoad
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


class NoGoodCheckpoint(RuntimeError):
    """There were checkpoints, and none is good or can be loaded; or a start would begin anew."""


def repair(save_dir: Path, *, loader: str | None = None) -> int | None:
    """Set damaged checkpoints aside and point the tracker at the newest good one.

    Older ones than that only get the quick check.

    Args:
        save_dir: the ``--save`` folder; need not exist.
        loader: a digest of what a start loads with (`failed_loads`); None: no start follows.

    Returns:
        The iteration that a start resumes from; None: from none, or ``release``.

    Raises:
        NoGoodCheckpoint: there were checkpoints, and none is good, or can be loaded.
        OSError: the file system fails, or it is no folder.
    """
    if not is_there(save_dir):
        print("resume none", flush=True)
        return None
    with lock(save_dir):
        failed = failed_loads.at_a_start(save_dir) if loader is not None else None
        try:
            if failed and failed.loader != loader:
                _try_again(save_dir, failed)
                failed = None
            newest, failed = _repair(save_dir, failed)
        except NoGoodCheckpoint:
            failed = None  # the next start tries again: what was wrong may be mended
            raise
        finally:
            if loader is not None:
                failed_loads.write(save_dir, failed)
        return newest


def _repair(save_dir: Path, failed: FailedLoad | None) -> tuple[int | None, FailedLoad | None]:
    tracker = read_tracker(save_dir)
    if tracker == RELEASE:
        try:
            check(save_dir / RELEASE, whole=True, threads=THREADS)
        except Damaged as error:
            raise NoGoodCheckpoint(
                f"{save_dir / RELEASE}: {error}; convert the model again"
            ) from None
        print("resume release", flush=True)
        return None, None
    if failed and failed.aside is not None and failed.times:
        _refuse_a_third(save_dir, failed)
    record, newest, unloadable = Record(save_dir), None, None
    for iteration, folder in checkpoints(save_dir).items():
        if newest is None and failed and failed.is_enough_for(iteration):
            unloadable = folder
            continue
        try:
            hashes = record.hashes(folder)
            check(folder, whole=newest is None, hashes=hashes, threads=THREADS)
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

    if unloadable and failed:
        if newest is None:
            raise NoGoodCheckpoint(
                f"{unloadable} is whole, and cannot be loaded ({failed.error}); there is no older "
                "one to go on from"
            )
        failed = _set_unloadable_aside(unloadable, failed, newest)
    if newest is None:
        if tracker != "missing" or _was_good(save_dir):
            raise NoGoodCheckpoint(
                f"{save_dir}: there were checkpoints and none is good (tracker: {tracker}); put a "
                f"good iter_… folder back, or, to train from scratch, move {TRACKER}, {RECORD} and "
                "damaged_iter_… away"
            )
        print("resume none", flush=True)
        return None, None
    if tracker != newest:
        files.write(save_dir / TRACKER, str(newest))
        reason = f"tracker was {tracker}, is {newest}"
        print(reason, flush=True)
        event_log.write("tracker-repaired", reason, iteration=newest)
    print(f"resume {newest}", flush=True)
    if failed and newest > failed.iteration:  # saved since then
        failed = None
    return newest, failed and replace(failed, iteration=newest)


def _set_unloadable_aside(folder: Path, failed: FailedLoad, newest: int) -> FailedLoad:
    aside = _set_aside(folder)
    reason = f"it could not be loaded {failed.times} times: {failed.error}; now {aside.name}"
    print(f"iter {failed.iteration} CANNOT BE LOADED: {reason}", flush=True)
    event_log.write("checkpoint-damaged", reason, iteration=failed.iteration)
    return FailedLoad(
        newest,
        failed.loader,
        aside=failed.iteration,
        aside_name=aside.name,
        aside_error=failed.error,
    )


def _try_again(save_dir: Path, failed: FailedLoad) -> None:
    """With another loader, what is set aside, unless the run has gone on from the one before it."""
    if failed.aside is None or next(iter(checkpoints(save_dir)), 0) > failed.iteration:
        return
    if _give_name_back(save_dir, failed):
        reason = f"{failed.aside_name} is tried again: other flags, ranks or versions load it"
        print(f"iter {failed.aside}: {reason}", flush=True)
        event_log.write("checkpoint-tried-again", reason, iteration=failed.aside)


def _give_name_back(save_dir: Path, failed: FailedLoad) -> bool:
    """To what was set aside; whether it has it now, and nobody else had it."""
    folder = save_dir / f"iter_{failed.aside:07d}"
    if os.path.lexists(folder):
        return False
    try:
        (save_dir / Path(failed.aside_name).name).rename(folder)
    except FileNotFoundError:  # somebody has removed it
        return False
    return True


def _refuse_a_third(save_dir: Path, failed: FailedLoad) -> NoReturn:
    """Refuse to go on to a third checkpoint: whatever it is, it is not in the files."""
    if _give_name_back(save_dir, failed):
        files.write(save_dir / TRACKER, str(failed.aside))
    raise NoGoodCheckpoint(
        f"{save_dir}: neither iter_{failed.aside:07d} ({failed.aside_error}) nor "
        f"iter_{failed.iteration:07d} ({failed.error}) can be loaded, and both are whole: look for "
        "the cause in the flags and the versions of this run; both are where they were"
    )


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
