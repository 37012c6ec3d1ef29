"""A folder that is there whole or not at all, and takes the place of nothing that it did not check.

Beside ``OUT`` a conversion makes ``OUT.incomplete``, which it locks, and which says in the file
`_MARK` that a conversion made it. In it are the ``new`` folder, and the ``old`` one while the new
one takes its place. A folder of that name without the mark is somebody else's and stays as it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common import files
from megatron_xielu.common.processes import is_alive

_MARK, _NEW, _OLD = "of-a-conversion", "new", "old"
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
        Refused: it exists and may not be replaced, or holds the source; or another conversion is
            writing it.
    """
    working = _working(out)
    for folder in (out, working):
        if source.resolve().is_relative_to(folder.resolve()):
            raise Refused(f"{folder} holds {source}, which would be lost; choose another folder")
    if os.path.lexists(working):
        with _taken(working):
            _undo(out, working)
            _leave(working)
    _check_old(out, force, content)


def _check_old(out: Path, force: bool, content: Sequence[str]) -> None:
    if not os.path.lexists(out):
        return
    if os.path.ismount(out) or Path.cwd().is_relative_to(out.resolve()):
        raise Refused(
            f"{out} is a mount point, or this command runs in it, so that it cannot be replaced by "
            f"the finished output; name a folder in it, {out / 'model'}"
        )
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return
    if not force:
        raise Refused(f"{out} exists; choose another folder, or replace it with --force")
    marker = content[0]
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
def written(out: Path, *, force: bool, content: Sequence[str]) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` unless the block raises.

    Args:
        out, force, content: as `check` had them.

    Raises:
        Refused: another conversion is writing the same output, or what is at ``out`` by now may
            not be replaced: the finished output is beside it.
        OSError: it cannot be written.
    """
    working = _working(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _taken(working):
        new, old = working / _NEW, working / _OLD
        _undo(out, working)
        try:
            new.mkdir()
            yield new
            for path in [*new.rglob("*"), new]:
                files.sync(path)
            _put(out, new, old, lambda: _check_old(out, force, content))
        except BaseException as error:
            shutil.rmtree(new, ignore_errors=True)
            if isinstance(error, OSError) and error.filename is None:  # a full disk, say
                error.filename = str(out)
            raise
        finally:
            _leave(working)


def _put(out: Path, new: Path, old: Path, check_old: Callable[[], None]) -> None:
    """Put the new folder in its place; a folder of any content is not replaced by `rename`."""
    try:
        check_old()
        if out.is_dir() and any(out.iterdir()):
            out.rename(old)
        try:
            new.rename(out)
        finally:
            if old.exists() and not os.path.lexists(out):
                old.rename(out)
    except (Refused, OSError) as error:
        kept = new.with_name("finished")  # which `_undo` does not know
        new.rename(kept)
        why = error if isinstance(error, Refused) else f"{out}: {error.strerror}"
        raise Refused(f"{why} (the finished output is {kept}: move it where you want it)") from None
    shutil.rmtree(old, ignore_errors=True)


def _undo(out: Path, working: Path) -> None:
    """Clear what a killed conversion left, after undoing a replacement between its two renames."""
    new, old = working / _NEW, working / _OLD
    if old.exists() and new.exists():
        if os.path.lexists(out):
            raise Refused(f"{old} is what --force was to replace, and {out} exists: move it away")
        old.rename(out)
    for folder in (new, old):
        if folder.exists():
            shutil.rmtree(folder)


@contextlib.contextmanager
def _taken(working: Path) -> Iterator[None]:
    """Have the working folder, made or left by a conversion that is no more, for this process."""
    made = False
    with contextlib.suppress(FileExistsError):
        working.mkdir()
        made = True
    try:
        descriptor = os.open(working, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        raise _in_the_way(working) from None
    try:
        locked = _lock(working, descriptor, wait=made)
        mark = working / _MARK
        if not made:
            _check_left(working, descriptor, locked)
        mark.write_text(f"{socket.gethostname()} {os.getpid()}\n")
        yield
    finally:
        os.close(descriptor)


def _lock(working: Path, descriptor: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise Refused(f"{working}: another conversion is writing it") from None
    return True


def _check_left(working: Path, descriptor: int, locked: bool) -> None:
    """Refuse a folder that no conversion made, or one whose process may still be there."""
    try:
        host, pid = (working / _MARK).read_text().split()
        same = os.path.samestat(os.stat(working), os.fstat(descriptor))
    except (OSError, ValueError):
        raise _in_the_way(working) from None
    if not same:
        raise Refused(f"{working}: another conversion was writing it; run this again")
    # Some file systems lock for one host alone, and some not at all.
    if host != socket.gethostname() or not (locked or (pid.isdecimal() and not is_alive(int(pid)))):
        raise Refused(
            f"{working} is of a conversion on {host}, process {pid}; if that is no more, remove "
            "the folder"
        )


def _in_the_way(working: Path) -> Refused:
    return Refused(
        f"{working} is in the way, and is not what a killed conversion leaves; move it away, or "
        "choose another output"
    )


def _leave(working: Path) -> None:
    """Remove the working folder, unless something is in it that was not to be lost."""
    (working / _MARK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        working.rmdir()


def _working(out: Path) -> Path:
    return out.parent / f"{out.name}.incomplete"
