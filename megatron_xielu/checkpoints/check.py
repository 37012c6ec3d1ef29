"""Is one checkpoint whole? Reads it without executing anything from it.

Good means: ``metadata.json`` and ``.metadata`` can be read, and every record that ``.metadata``
lists is there in full. A whole check also reads all bytes: every record is a zip by ``torch.save``,
with a CRC-32 of each member that was taken in memory, and none of its numbers is NaN or infinite: a
run that resumes from one ends at its first loss, whenever it is started. ``.metadata`` and
``metadata.json`` have no checksum: the records must be what the index says, where the two passed
before, they must be as they were (`ledger`), and where the save had ``--verify-integrity``, the
SHA-256 in ``integrity.json`` must be right, too. Of the format ``torch`` (``mp_rank_*``) the files'
existence and the zips are checked, but no numbers: tensors in it can be views of padded buffers.

``.metadata`` is a pickle. It is read into `inert` objects: no class of it is imported or called.
There, and in what else will be unpickled at a load, a name that no checkpoint needs is damage, too.
"""

from __future__ import annotations

import errno
import io
import itertools
import math
import os
import pickle
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from megatron_xielu.checkpoints import inert
from megatron_xielu.common import files, pickled_names, schema, text

# What a file system says of one name or place on the disk, and will say again.
OF_THIS_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO)

# The entry in .metadata of a record that is no tensor.
_PICKLED = "BytesStorageMetadata"

_BEFORE_ZIPS = b"\x80\x02\x8a"  # begins a file by `torch.save` of PyTorch 1.5 or older
_LARGEST_PICKLE = 1 << 16  # bytes beside a tensor's own; they have some hundreds
_PIECE = 1 << 20  # bytes read at a time: what fits into a core's cache

# By storage, as unsigned integers: the bits of the exponent. All are set in NaN and infinity alone.
_EXPONENTS = {
    "FloatStorage": ("<u4", 0x7F80_0000),
    "DoubleStorage": ("<u8", 0x7FF0_0000_0000_0000),
    "HalfStorage": ("<u2", 0x7C00),
    "BFloat16Storage": ("<u2", 0x7F80),
}

# Keys of the optimizer; of several, as with Muon or experts, each has a number before it.
OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")

# Of the distributed optimizer's buckets (dp_reshardable). Parameters start at multiples of 64 in
# them, and Megatron without our mend writes what lies between as it was in memory.
_OF_BUCKET, _ALIGNMENT = re.compile(r"\.gbuf_idx_\d+\..*\.bucket_idx_\d+\."), 64


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


@dataclass(frozen=True)
class _Record:
    """A record of a checkpoint: where it is in its file, and what it is.

    Attributes:
        start: in bytes.
        length: in bytes.
        is_zip: whether ``torch.save`` wrote it; a transformed one (compressed, say) is none.
        key: its name.
        sizes: of the tensor; None of what is none.
        offsets: of the tensor in the one that has been cut up.
    """

    start: int
    length: int
    is_zip: bool = True
    key: str = ""
    sizes: tuple[int, ...] | None = None
    offsets: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.length

    def may_be_padding(self) -> bool:
        """Whether nothing of a bucket may be in it but what lies between two parameters."""
        if not _OF_BUCKET.search(self.key) or not self.offsets or not self.sizes:
            return False
        start = self.offsets[0]
        return start + self.sizes[0] <= -(-start // _ALIGNMENT) * _ALIGNMENT


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
    folder: Path,
    *,
    whole: bool,
    hashes: Mapping[str, str] | None = None,
    threads: int = 1,
    only_model: bool = False,
    trusts_pickles: bool = False,
) -> None:
    """Check one checkpoint.

    Args:
        folder: an ``iter_…`` folder.
        whole: read every byte and compare checksums, too.
        hashes: SHA-256 of files in it, from when it was good.
        threads: how many read at a time.
        only_model: for a reader of nothing else: without the bytes of the optimizer's state, six
            sevenths of all, and without metadata.json.
        trusts_pickles: whatever ``mp_rank_*`` names is executed all the same.

    Raises:
        Damaged: it is not good.
        OSError: the file system does not let it be read now, which says nothing about it.
    """
    try:
        _check_kinds(folder)
        for name, expected in (hashes or {}).items():
            if files.sha256(folder / name) != expected:
                raise Damaged(f"{name} is not as it was when it was checked")
        if any(folder.glob("mp_rank_*")):
            _check_torch_format(folder, whole, trusts_pickles)
        else:
            _check_distributed_format(folder, whole, threads, only_model)
    except schema.Malformed as error:
        raise Damaged(str(error).removeprefix(f"{folder}/")) from error
    except OSError as error:
        if error.errno not in OF_THIS_FILE:
            raise
        raise Damaged(f"{Path(error.filename or folder).name}: {error.strerror}") from error


def _check_kinds(folder: Path) -> None:
    for path in (*folder.glob("*"), *folder.glob("mp_rank_*/*")):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise Damaged(f"{path.name} is a pipe or a device")  # and would be read for ever


def _check_torch_format(folder: Path, whole: bool, trusts_pickles: bool) -> None:
    for rank in sorted(folder.glob("mp_rank_*")):
        if not (rank / "model_optim_rng.pt").is_file():
            raise Damaged(f"{rank.name}/model_optim_rng.pt is missing")
    for path in sorted(folder.glob("mp_rank_*/*.pt")):
        with path.open("rb") as file:
            is_old = file.read(len(_BEFORE_ZIPS)) == _BEFORE_ZIPS  # and has no checksum
        if not is_old:
            record = _Record(0, path.stat().st_size)
            _check_records([record], path, whole=whole, names=not trusts_pickles)


def _check_distributed_format(folder: Path, whole: bool, threads: int, only_model: bool) -> None:
    metadata = folder / ".metadata"
    if whole and metadata.exists() and not inert.survives(metadata):
        raise Damaged(".metadata cannot be read: it ends the process that reads it")
    keys, records = _read_metadata(metadata)
    # The state that all ranks share is a record in Megatron 0.19, and was a file before. Formats
    # other than torch_dist have neither, and no metadata.json.
    common, megatrons = folder / "common.pt", folder / "metadata.json"
    has_common = common.exists() or any(key.startswith("common_state/") for key in keys)
    if not only_model and (has_common or megatrons.exists()):
        schema.load(_Format, megatrons)
        if not has_common:
            raise Damaged("common.pt is missing")

    for name, in_file in sorted(records.items()):
        if not (folder / name).is_file():
            raise Damaged(f"{name} is missing")
        short = max(record.end for record in in_file) - (folder / name).stat().st_size
        if short > 0:
            raise Damaged(f"{name} is {short} bytes short")
    if common.exists():
        _check_records([_Record(0, common.stat().st_size)], common, whole=whole)
    manifest = folder / "integrity.json"
    hashes = schema.load(_Integrity, manifest).files if manifest.exists() else {}
    if wrong := [name for name in hashes if not _is_name(name)]:
        raise Damaged(f"{manifest.name} names {wrong[0]!a}, which is not in the checkpoint")
    if whole:
        checks = [partial(_check_hash, expected, folder / n) for n, expected in hashes.items()]
        for name, in_file in sorted(records.items()):
            wanted = [r for r in in_file if not (only_model and OPTIMIZER.match(r.key))]
            checks.append(partial(_check_records, wanted, folder / name, whole=True))
        with ThreadPoolExecutor(threads) as pool:
            # A watch reads in its own thread: at a SIGTERM it ends in the middle of a file.
            for _ in (pool.map if threads > 1 else map)(lambda one: one(), checks):
                pass


def _read_metadata(path: Path) -> tuple[list[str], dict[str, list[_Record]]]:
    """What the index of a checkpoint says: keys; by file, its records, in their order."""
    try:
        metadata = inert.unpickle(path)
    except FileNotFoundError:
        raise Damaged(".metadata is missing: the save did not finish") from None
    except OSError:
        raise
    except Exception as error:  # whatever wrong bytes make a pickle raise
        raise Damaged(f".metadata cannot be read: {text.describe(error)}") from error
    keys = getattr(metadata, "state_dict_metadata", None)
    storage = getattr(metadata, "storage_data", None)
    if not isinstance(keys, dict) or not isinstance(storage, dict):
        raise Damaged(".metadata is not that of a checkpoint")
    try:
        return [*map(str, keys)], _records(keys, storage)
    except (AttributeError, TypeError) as error:
        raise Damaged(f".metadata is not that of a checkpoint: {text.describe(error)}") from error


def _records(keys: dict[Any, Any], storage: dict[Any, Any]) -> dict[str, list[_Record]]:
    records = defaultdict(list)
    for index, info in storage.items():
        name, start, length = (
            getattr(info, field, None) for field in ("relative_path", "offset", "length")
        )
        if not (_is_name(name) and _is_count(start) and _is_count(length)):
            raise Damaged(".metadata has a record without a place")
        is_zip = getattr(info, "transform_descriptors", None) is None
        offsets = tuple(getattr(index, "offset", None) or ())
        sizes = _sizes(keys.get(index.fqn), index.fqn, offsets)
        records[name].append(_Record(start, length, is_zip, str(index.fqn), sizes, offsets))
    for name, in_file in records.items():
        in_file.sort(key=lambda record: record.start)
        if any(one.end > after.start for one, after in itertools.pairwise(in_file)):
            raise Damaged(f".metadata has two records in one place of {name}")
    written = Counter(record.key for in_file in records.values() for record in in_file)
    for key, entry in keys.items():
        chunks = getattr(entry, "chunks", None)
        if written[str(key)] < (1 if chunks is None else len(chunks)):
            raise Damaged(f".metadata does not say where {str(key)!a} is")
        if chunks is None and type(entry).__name__ != _PICKLED:
            raise Damaged(f".metadata does not say what {str(key)!a} is made of")
        if chunks is not None:
            if not all(map(_is_shape, [entry.size, *(chunk.sizes for chunk in chunks)])):
                raise Damaged(f".metadata has no shape for {str(key)!a}")
            elements = sum(math.prod(chunk.sizes) for chunk in chunks)
            if elements != math.prod(entry.size):
                raise Damaged(f".metadata has another size for {str(key)!a} than for its pieces")
    return dict(records)


def _sizes(entry: Any, key: Any, offsets: tuple[Any, ...]) -> tuple[int, ...] | None:
    """Of the piece of a tensor that begins at ``offsets``; None of what is no tensor."""
    if not hasattr(entry, "chunks"):
        return None
    for chunk in entry.chunks:
        if tuple(chunk.offsets) == offsets:
            return tuple(chunk.sizes)
    raise Damaged(f".metadata has another place for a piece of {str(key)!a} than the piece has")


def _is_name(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value.isprintable() and Path(value).name == value


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_count, value))


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and 0 <= value < 2**63


def _check_records(records: list[_Record], path: Path, *, whole: bool, names: bool = True) -> None:
    """Check the zips among a file's records: their directories, or all their bytes."""
    with path.open("rb") as file:
        for record in records:
            if not record.is_zip:
                continue
            window = _Window(file, record.start, record.length)
            try:
                with zipfile.ZipFile(window) as archive:  # type: ignore[arg-type]
                    for member in archive.infolist():
                        if member.compress_size != member.file_size:  # torch.save only stores
                            raise zipfile.BadZipFile(member.filename)
                    if whole:
                        _read(archive, record)
                    if names and record.sizes is None:
                        _check_names(archive)
            except (OSError, Damaged):
                raise
            except pickle.UnpicklingError as error:
                raise Damaged(f"{path.name}: at byte {record.start}: {error}") from error
            except Exception as error:  # whatever wrong bytes make zipfile raise
                raise Damaged(
                    f"{path.name}: checksum at byte {record.start} is wrong "
                    f"({text.describe(error)})"
                ) from error


def _read(archive: zipfile.ZipFile, record: _Record) -> None:
    """Read all bytes of a zip.

    Raises:
        Damaged: it holds another tensor than the index says, or one that is not finite.
        Exception: a checksum is wrong.
    """
    storage = kind = ""
    for member in archive.infolist():  # the pickle comes before the storages
        is_tested = member.filename.endswith(f"/data/{storage}") and not record.may_be_padding()
        is_finite = _is_finite(archive, member, kind if storage and is_tested else "")
        if record.sizes is not None and member.filename.endswith("/data.pkl"):
            if member.file_size > _LARGEST_PICKLE:
                raise Damaged(f"{record.key} is no tensor")
            tensor = inert.saved_tensor(archive.read(member))
            if tensor is None:
                continue  # of a class of its own
            if tensor.elements != math.prod(record.sizes):
                raise Damaged(f".metadata has another size for {record.key!a} than its record")
            if tensor.fills_its_storage:
                storage, kind = tensor.storage, tensor.kind
        if not is_finite:
            raise Damaged(f"{record.key} has a number that is NaN or infinite")


def _check_names(archive: zipfile.ZipFile) -> None:
    """Check what a pickle by ``torch.save`` would call."""
    for member in archive.infolist():  # not by name: there may be two of one
        if member.filename.lower().endswith(".pkl"):
            pickled_names.check_state(archive.read(member))


def _is_finite(archive: zipfile.ZipFile, member: zipfile.ZipInfo, kind: str) -> bool:
    """Read a member; the end of it compares its checksum. False: a number in it is not finite."""
    integers, exponent = _EXPONENTS.get(kind, ("", 0))
    finite = True
    with archive.open(member) as data:
        while piece := data.read(_PIECE):
            if integers and finite:
                finite = bool((np.frombuffer(piece, integers) & exponent).max() < exponent)
    return finite


def _check_hash(expected: str, path: Path) -> None:
    if files.sha256(path) != expected:
        raise Damaged(f"{path.name}: SHA-256 is not that of integrity.json")
