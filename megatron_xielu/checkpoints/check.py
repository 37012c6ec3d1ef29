"""Is one checkpoint whole? Reads it without executing anything from it.

Good means: ``metadata.json`` and ``.metadata`` can be read, and every record that ``.metadata``
lists is there in full. A whole check also reads all bytes: every record is a zip by ``torch.save``,
with a CRC-32 of each member that was taken in memory. ``.metadata`` and ``metadata.json`` have no
checksum: where they passed before, they must be as they were (`ledger`), and where the save had
``--verify-integrity``, the SHA-256 in ``integrity.json`` must be right, too. Of the format
``torch`` (``mp_rank_*``) the files' existence and the zips are checked.

``.metadata`` is a pickle. It is read into `inert` objects: no class of it is imported or called.
There, and in what else will be unpickled at a load, a name that no checkpoint needs is damage, too.
"""

from __future__ import annotations

import errno
import io
import os
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from megatron_xielu.checkpoints import inert
from megatron_xielu.common import files, pickled_names, schema, text

# What a file system says of one name or place on the disk, and will say again.
_OF_THIS_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO)

# The entry in .metadata of a record that is no tensor.
_PICKLED = "BytesStorageMetadata"

# Of .metadata: keys; by file, each record's place (offset and length in bytes) and if it is a zip;
# by file, the places of those that are no tensors.
_Index = tuple[list[str], dict[str, list[tuple[int, int, bool]]], dict[str, list[tuple[int, int]]]]


class Damaged(Exception):
    """A checkpoint is not whole; the message says which file and why."""


@dataclass(frozen=True)
class _Format:
    """Megatron's ``metadata.json``."""

    sharded_backend: str


@dataclass(frozen=True)
class _Integrity:
    """``integrity.json`` of ``--verify-integrity``: SHA-256 by name."""

    files: dict[str, str] = field(default_factory=dict)


class _Window(io.RawIOBase):
    """Bytes ``start`` to ``start + length`` of an open file, as a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


def check(
    folder: Path, *, whole: bool, hashes: Mapping[str, str] | None = None, threads: int = 1
) -> None:
    """Check one checkpoint.

    Args:
        folder: an ``iter_…`` folder.
        whole: read every byte and compare checksums, too.
        hashes: SHA-256 of files in it, from when it was good.
        threads: how many read at a time.

    Raises:
        Damaged: it is not good.
        OSError: the file system does not let it be read now, which says nothing about it.
    """
    try:
        for name, expected in (hashes or {}).items():
            if files.sha256(folder / name) != expected:
                raise Damaged(f"{name} is not as it was when it was checked")
        if any(folder.glob("mp_rank_*")):
            _check_torch_format(folder, whole=whole)
        else:
            _check_distributed_format(folder, whole=whole, threads=threads)
    except schema.Malformed as error:
        raise Damaged(str(error).removeprefix(f"{folder}/")) from error
    except OSError as error:
        if error.errno not in _OF_THIS_FILE:
            raise
        raise Damaged(f"{Path(error.filename or folder).name}: {error.strerror}") from error


def check_pickles(folder: Path) -> None:
    """Check what Megatron would unpickle, without the tensors of ``torch_dist``.

    Raises:
        Damaged: something of it names what no checkpoint needs, or cannot be read.
        OSError: the file system fails.
    """
    files_of_ranks = sorted(folder.glob("mp_rank_*/*.pt"))
    places = {path: [(0, path.stat().st_size)] for path in files_of_ranks}
    if not places:
        _, _, pickled = _read_metadata(folder / ".metadata")
        places = {folder / name: found for name, found in pickled.items()}
        if (common := folder / "common.pt").exists():
            places[common] = [(0, common.stat().st_size)]
    for path, found in places.items():
        _check_names(found, path)


def _check_torch_format(folder: Path, *, whole: bool) -> None:
    for rank in sorted(folder.glob("mp_rank_*")):
        if not (rank / "model_optim_rng.pt").is_file():
            raise Damaged(f"{rank.name}/model_optim_rng.pt is missing")
    for path in sorted(folder.glob("mp_rank_*/*.pt")):
        _check_zips([(0, path.stat().st_size)], path, whole=whole)
        _check_names([(0, path.stat().st_size)], path)


def _check_distributed_format(folder: Path, *, whole: bool, threads: int) -> None:
    keys, records, pickled = _read_metadata(folder / ".metadata")
    # The state that all ranks share is a record in Megatron 0.19, and was a file before. Formats
    # other than torch_dist have neither, and no metadata.json.
    common, megatrons = folder / "common.pt", folder / "metadata.json"
    has_common = common.exists() or any(key.startswith("common_state/") for key in keys)
    if has_common or megatrons.exists():
        schema.load(_Format, megatrons)
        if not has_common:
            raise Damaged("common.pt is missing")

    for name, places in sorted(records.items()):
        if not (folder / name).is_file():
            raise Damaged(f"{name} is missing")
        short = max(start + length for start, length, _ in places) - (folder / name).stat().st_size
        if short > 0:
            raise Damaged(f"{name} is {short} bytes short")
    if common.exists():
        _check_zips([(0, common.stat().st_size)], common, whole=whole)
        _check_names([(0, common.stat().st_size)], common)
    manifest = folder / "integrity.json"
    hashes = schema.load(_Integrity, manifest).files if manifest.exists() else {}
    if whole:
        checks = [partial(_check_hash, expected, folder / n) for n, expected in hashes.items()]
        for name, places in sorted(records.items()):
            zips = sorted(place[:2] for place in places if place[2])
            checks.append(partial(_check_zips, zips, folder / name, whole=True))
            checks.append(partial(_check_names, pickled[name], folder / name))
        with ThreadPoolExecutor(threads) as pool:
            # A watch reads in its own thread: at a SIGTERM it ends in the middle of a file.
            for _ in (pool.map if threads > 1 else map)(lambda one: one(), checks):
                pass


def _read_metadata(path: Path) -> _Index:
    """What the index of a checkpoint says."""
    try:
        return _index(inert.unpickle(path))
    except FileNotFoundError:
        raise Damaged(".metadata is missing: the save did not finish") from None
    except (Damaged, OSError):
        raise
    except Exception as error:  # whatever wrong bytes make a pickle raise, or what is read of it
        raise Damaged(f".metadata cannot be read: {text.describe(error)}") from error


def _index(metadata: Any) -> _Index:
    """`_read_metadata` of what was unpickled."""
    keys = getattr(metadata, "state_dict_metadata", None)
    storage = getattr(metadata, "storage_data", None)
    if not isinstance(keys, dict) or not isinstance(storage, dict):
        raise Damaged(".metadata is not that of a checkpoint")
    missing = set(map(str, keys)) - {str(getattr(index, "fqn", None)) for index in storage}
    if missing:
        raise Damaged(f".metadata does not say where {min(missing)!a} is")
    offsets = {(index.fqn, getattr(index, "offset", None)) for index in storage}
    for key, entry in keys.items():
        if type(entry).__name__ != _PICKLED and not _is_tensor(key, entry, offsets):
            raise Damaged(f".metadata does not say what {key!a} is made of")
    places, pickled = defaultdict(list), defaultdict(list)
    for index, info in storage.items():
        name, start, length = (
            getattr(info, field, None) for field in ("relative_path", "offset", "length")
        )
        if not (_is_name(name) and _is_count(start) and _is_count(length)):
            raise Damaged(".metadata has a record without a place")
        # A transformed record (compressed, say) is not a zip.
        places[name].append((start, length, getattr(info, "transform_descriptors", None) is None))
        if type(keys.get(index.fqn)).__name__ == _PICKLED and places[name][-1][2]:
            pickled[name].append((start, length))
    return [*map(str, keys)], dict(places), pickled


def _is_tensor(key: str, entry: Any, offsets: set[tuple[str, Any]]) -> bool:
    """Whether a tensor has a shape, and each of its chunks a shape and a record."""
    chunks = getattr(entry, "chunks", None)
    return (
        _is_shape(getattr(entry, "size", None))
        and isinstance(chunks, list)
        and all(_is_shape(getattr(chunk, "sizes", None)) for chunk in chunks)
        and all((key, getattr(chunk, "offsets", None)) in offsets for chunk in chunks)
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_count, value))


def _is_name(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value.isprintable() and Path(value).name == value


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and value >= 0


def _check_zips(places: list[tuple[int, int]], path: Path, *, whole: bool) -> None:
    """Check the zips at (offset, length) of a file: their directories, or all their bytes."""
    with path.open("rb") as file:
        for start, length in places:
            try:
                with zipfile.ZipFile(_Window(file, start, length)) as archive:  # type: ignore[arg-type]
                    wrong = archive.testzip() if whole else None
                    for member in archive.infolist():
                        if member.compress_size != member.file_size:  # torch.save only stores
                            wrong = member.filename
            except OSError:
                raise
            except Exception as error:  # whatever wrong bytes make zipfile raise
                wrong = text.describe(error)
            if wrong:
                raise Damaged(f"{path.name}: checksum at byte {start} is wrong ({wrong})")


def _check_names(places: list[tuple[int, int]], path: Path) -> None:
    """Check what the pickles by torch.save at (offset, length) of a file would call."""
    with path.open("rb") as file:
        for start, length in places:
            try:
                with zipfile.ZipFile(_Window(file, start, length)) as archive:  # type: ignore[arg-type]
                    for member in archive.infolist():  # not by name: there may be two of one
                        if member.filename.lower().endswith(".pkl"):
                            pickled_names.check_state(archive.read(member))
            except OSError:
                raise
            except Exception as error:  # whatever wrong bytes make zipfile or pickletools raise
                raise Damaged(f"{path.name}: at byte {start}: {text.describe(error)}") from error


def _check_hash(expected: str, path: Path) -> None:
    if files.sha256(path) != expected:
        raise Damaged(f"{path.name}: SHA-256 is not that of integrity.json")
