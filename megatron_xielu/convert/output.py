"""A folder that is there whole or not at all: written beside its place, and renamed.

Beside ``OUT`` there may be ``OUT.incomplete``, which a running conversion locks and the next one
removes, and ``OUT.replaced``, the old folder while a new one takes its place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common import files

_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF)


def check(out: Path, source: Path, *, force: bool, content: Sequence[str]) -> None:
    """Refuse an output that may not be written.

    Args:
        out: the folder to be.
        source: what is converted.
        force: replace an old one.
        content: patterns of what a conversion writes. An old folder must have the first to be
            replaced, and nothing else, lest ``--force`` remove a home, or what training saved.

    Raises:
        Refused: it exists and may not be replaced, or holds the source.
    """
    marker = content[0]
    replaced = _beside(out, "replaced")
    if (replaced / marker).is_file() and not out.exists():
        replaced.rename(out)  # the last replacement was interrupted between its two renames
    if not out.exists() and not out.is_symlink():
        return
    if os.path.ismount(out) or Path.cwd().is_relative_to(out.resolve()):
        raise Refused(
            f"{out} is a mount point, or this command runs in it, so that it cannot be replaced by "
            f"the finished output; name a folder in it, {out / 'model'}"
        )
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return
    if source.resolve().is_relative_to(out.resolve()):
        raise Refused(f"{out} holds {source}, which would be lost; choose another folder")
    if not force:
        raise Refused(f"{out} exists; choose another folder, or replace it with --force")
    if out.is_symlink() or not (out / marker).is_file():
        raise Refused(
            f"{out} is not a conversion's output ({marker} is not in it); remove it first"
        )
    for path in sorted(out.iterdir()):
        if not any(map(path.match, content)):
            raise Refused(
                f"{out} has {path.name}, which no conversion wrote and --force would remove; move "
                "it away, or choose another folder"
            )


@contextlib.contextmanager
def written(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` unless the block raises.

    Raises:
        Refused: another conversion is writing the same output.
        OSError: it cannot be written.
    """
    staging = _beside(out, "incomplete")
    out.parent.mkdir(parents=True, exist_ok=True)
    if staging.exists():
        with _locked(staging):
            shutil.rmtree(staging)
    staging.mkdir()
    try:
        with _locked(staging):
            yield staging
            for path in [*staging.rglob("*"), staging]:
                files.sync(path)
            _replace(out, staging)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk, say
            error.filename = str(out)
        raise


def _replace(out: Path, staging: Path) -> None:
    old = _beside(out, "replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:  # a file system without locks does without
                raise Refused(f"{folder}: another conversion is writing it") from None
        yield
    finally:
        os.close(descriptor)


def _beside(out: Path, suffix: str) -> Path:
    return out.parent / f"{out.name}.{suffix}"
