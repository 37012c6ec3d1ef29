"""What lies in a Megatron save folder: checkpoints and the tracker; and which one is meant.

The rule is Megatron's (`_load_base_checkpoint` of megatron/training/checkpointing.py): what this
package reads is what a training would load.
"""

from __future__ import annotations

import errno
import os
import re
import zlib
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
IN_RUN = "checkpoints"  # the save folder in a run's folder
RELEASE = "release"  # what the tracker says where a model was converted; and its folder

# Up to 64 bits, in which Megatron counts iterations.
_CHECKPOINT = re.compile(r"iter_([0-9]{7}|[1-9][0-9]{7,17})")


class NoCheckpoint(ValueError):
    """A save folder means no checkpoint; the message names the tracker."""


class TwoSaveFolders(ValueError):
    """A folder holds checkpoints, and so does the one in it."""


def save_folder(folder: Path) -> Path:
    """The save folder: the one that is named, or of a run's folder the one in it.

    Args:
        folder: ``RUN/checkpoints``, or ``RUN``, as examples/pretrain.sh makes it.

    Raises:
        TwoSaveFolders: both hold checkpoints.
        OSError: it cannot be read.
    """
    inside = folder / IN_RUN
    if not inside.is_dir():
        return folder
    if not _holds_any(folder):
        return inside
    if _holds_any(inside):
        raise TwoSaveFolders(
            f"{folder} holds checkpoints, and so does {inside}: which are meant? Name the latter, "
            "or move one of the two elsewhere"
        )
    return folder


def run_folder(folder: Path) -> Path:
    """The run's folder, of it or of its checkpoints folder: where evaluation.json lies."""
    if folder.absolute().name == IN_RUN and not (folder / IN_RUN).is_dir():
        return folder.parent if folder.name == IN_RUN else folder.absolute().parent
    return folder


def _holds_any(folder: Path) -> bool:
    return (folder / TRACKER).exists() or bool(checkpoints(folder))


def is_there(save_dir: Path) -> bool:
    """Whether a save folder is there; a run makes it.

    Raises:
        OSError: it is no folder, or cannot be read.
    """
    try:
        os.scandir(save_dir).close()
    except FileNotFoundError:
        return False
    except ValueError as error:  # a NUL
        raise OSError(errno.EINVAL, str(error), str(save_dir)) from None
    return True


def checkpoints(save_dir: Path) -> dict[int, Path]:
    """The ``iter_…`` by iteration, newest first; none of a folder that is not there.

    One that is a file, or a link to nothing, is a damaged checkpoint: no save could take its place.

    Raises:
        OSError: it cannot be read.
    """
    names = []
    with suppress(FileNotFoundError, NotADirectoryError):
        names = os.listdir(save_dir)  # Path.glob would be silent about one that is not readable
    found = {
        int(match[1]): save_dir / match[0] for match in map(_CHECKPOINT.fullmatch, names) if match
    }
    return dict(sorted(found.items(), reverse=True))


def complete_checkpoints(save_dir: Path) -> dict[int, Path]:
    """Checkpoints of the format ``torch_dist`` that the tracker vouches for, oldest first.

    One that a crash left unfinished is newer than the tracker says. A converted model has
    iteration 0, as in Megatron.
    """
    tracker = read_tracker(save_dir)
    if tracker == RELEASE:
        found = {0: save_dir / RELEASE}
    elif isinstance(tracker, int):
        every = sorted(checkpoints(save_dir).items())
        found = {iteration: folder for iteration, folder in every if iteration <= tracker}
    else:
        found = {}
    return {i: folder for i, folder in found.items() if (folder / ".metadata").is_file()}


def read_tracker(save_dir: Path) -> int | str:
    """The iteration Megatron would load, or ``release``, or what is wrong: missing, empty, …"""
    path = save_dir / TRACKER
    if not path.is_file():
        return "missing"
    text = path.read_text(errors="replace").strip()
    try:
        if (iteration := int(text)) >= 0:
            return iteration
    except ValueError:
        pass
    return text if text == RELEASE else repr(text[:40]) if text else "empty"


def find(save_dir: Path, step: int | None = None) -> Path:
    """The checkpoint that Megatron would load; whether it is there is the caller's to see.

    Args:
        save_dir: ``--load``.
        step: ``--ckpt-step``. As for Megatron, 0 is none, a tracker that says ``release`` goes
            before it, and one that cannot be read is an error in spite of it.

    Raises:
        NoCheckpoint: the tracker is missing, and there is no step; or it names no iteration.
    """
    tracker = read_tracker(save_dir)
    if tracker == RELEASE:
        return save_dir / RELEASE
    if tracker == "missing" and not step:
        raise NoCheckpoint(f"{save_dir / TRACKER} is missing")
    if isinstance(tracker, str) and tracker != "missing":
        raise NoCheckpoint(f"{save_dir / TRACKER} names no iteration")
    return save_dir / f"iter_{step or tracker:07d}"


def to_load(load: str | None, pretrained: str | None) -> tuple[str, str | None]:
    """The flag whose folder Megatron's load_checkpoint takes, and the folder.

    Args:
        load: ``--load``.
        pretrained: ``--pretrained-checkpoint``, of a run whose ``--load`` has no checkpoint yet.
    """
    if pretrained and not (load and (Path(load) / TRACKER).is_file()):
        return "--pretrained-checkpoint", pretrained
    return "--load", load


def size_and_stamp(folder: Path, without: Collection[str] = ()) -> tuple[int, int]:
    """Bytes in a checkpoint, and a number that another set of names, sizes or times changes.

    Args:
        folder: the checkpoint.
        without: names of files that do not count.
    """
    found = []
    for parent, _, names in os.walk(folder):
        for name in set(names).difference(without):
            path = os.path.join(parent, name)
            status = os.stat(path, follow_symlinks=os.path.exists(path))  # not a link to nothing
            found.append((name, status.st_size, status.st_mtime_ns))
    return sum(size for _, size, _ in found), zlib.crc32(repr(sorted(found)).encode())
