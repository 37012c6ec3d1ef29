"""Files that are there whole or not at all, and what is in them."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TRIED = 4096  # bytes: a disk that is full takes none


@contextmanager
def whole(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place unless the block raises.

    After a crash there is the old content or the new. What stands for no file is not replaced: of a
    link, what it leads to is written, and a device or a pipe (``/dev/null``) itself.

    Args:
        path: the file.
        mode: its permissions, less the umask.
    """
    if is_device(path):
        yield path
        return
    path, beside = _places(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _begin(beside, mode)
        yield beside
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    with suppress(OSError):  # some network file systems cannot
        sync(path.parent)


def write(path: Path, content: str | bytes) -> None:
    """Replace a file as a `whole`.

    Raises:
        OSError: it has the old content; the error names the file.
    """
    try:
        with whole(path) as beside:
            beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def try_to_write(path: Path) -> None:
    """Before work that takes long: whether what it finds can be written, without a trace of it.

    Raises:
        OSError: it cannot, or its folder is not there; the error names the file.
    """
    if is_device(path):
        return
    _, beside = _places(path)
    try:
        try:
            _begin(beside)
            beside.write_bytes(bytes(_TRIED))
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def keep(path: Path, content: str) -> None:
    """Write what a command has printed already.

    Raises:
        SystemExit: it cannot be written; in one line.
    """
    try:
        write(path, content)
    except OSError as error:
        raise SystemExit(f"error: {error}; what it was to hold is printed above") from None


def _places(path: Path) -> tuple[Path, Path]:
    """The file, where this is a link to one, and what is written beside it."""
    path = Path(os.path.realpath(path))
    return path, path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")


def _begin(beside: Path, mode: int = 0o666) -> None:
    """Make it, whatever a killed process, or somebody in a shared folder, left: a link, say."""
    beside.unlink(missing_ok=True)
    os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))


def make_folder(path: Path) -> None:
    """Make a folder, and those above it.

    Raises:
        OSError: it cannot be made, or nobody may write to it.
    """
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def is_device(path: Path) -> bool:
    """Whether this is a device, a pipe or a socket."""
    return path.exists() and not path.is_file() and not path.is_dir()


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk, not only in the kernel's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):  # `file_digest` is not of Python 3.9, as the plan is
            digest.update(block)
    return digest.hexdigest()
