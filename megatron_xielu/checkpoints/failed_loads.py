"""Checkpoints that pass every check, and that Megatron cannot load all the same.

A rank whose load failed notes it beside the checkpoints (`note`), and the next start acts on it
(`repair`). A checkpoint that failed twice in a row is set aside for the next older one, once: if
that one fails, too, the fault is not in the files (another model's flags), so the first gets its
name back, and the start is refused.

All this is about one loader: the same entry, flags, number of ranks and versions. For another, what
failed may be good: nothing counts that was noted before, and what was set aside is tried again.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_xielu.checkpoints.folder import read_tracker
from megatron_xielu.common import event_log, files, schema
from megatron_xielu.common.schema import Count

NOTE = "failed_load.json"
_ENOUGH = 2  # times in a row
_LONGEST = 200  # characters of an error that are kept: PyTorch's list all keys


@dataclass(frozen=True)
class FailedLoad:
    """What is known of the last loads.

    Attributes:
        iteration: the checkpoint that could not be loaded, or that took the place of one.
        loader: a digest of what could not load it.
        error: what Megatron said; nothing yet where it is new in its place.
        times: in how many starts in a row it could not.
        is_new: whether the last start failed so, and no start has acted on it yet.
        aside: the newer one that could not be loaded before, and was set aside: what it was, …
        aside_name: … what its folder is called now, …
        aside_error: … and what Megatron said.
    """

    iteration: Count
    loader: str = ""
    error: str = ""
    times: Count = 0
    is_new: bool = False
    aside: Count | None = None
    aside_name: str = ""
    aside_error: str = ""

    def is_enough_for(self, iteration: int) -> bool:
        """Whether this checkpoint has failed often enough to be set aside."""
        return self.aside is None and self.iteration == iteration and self.times >= _ENOUGH


def read(save_dir: Path) -> FailedLoad | None:
    """The note of a save folder; None where there is none, or none that can be read."""
    with suppress(OSError, schema.Malformed):
        return schema.load(FailedLoad, save_dir / NOTE)
    return None


def write(save_dir: Path, failed: FailedLoad | None) -> None:
    """Keep the note, or remove it; a full disk costs no more than that."""
    try:
        if failed is None:
            (save_dir / NOTE).unlink(missing_ok=True)
        else:
            files.write(save_dir / NOTE, json.dumps(asdict(failed), indent=1) + "\n")
    except OSError as error:
        event_log.write("failed-load-not-noted", f"{save_dir / NOTE}: {error.strerror}")


def note(save_dir: Path, error: str, loader: str) -> bool:
    """Note that what the tracker names could not be loaded; any rank may, all say the same.

    Returns:
        Whether there was such a checkpoint.
    """
    iteration, before = read_tracker(save_dir), read(save_dir)
    if not isinstance(iteration, int):
        return False
    if before is None or (before.iteration, before.loader) != (iteration, loader):
        before = FailedLoad(iteration, loader)
    write(save_dir, replace(before, error=error[:_LONGEST], is_new=True))
    return True


def at_a_start(save_dir: Path) -> FailedLoad | None:
    """The note, with what the last start adds to it.

    A start that did not fail so clears it; but not while one is set aside, until `repair` finds a
    newer checkpoint than the one in its place: that start may have ended before it loaded.
    """
    failed = read(save_dir)
    if failed and failed.is_new:
        return replace(failed, times=failed.times + 1, is_new=False)
    return failed if failed and failed.aside is not None else None
