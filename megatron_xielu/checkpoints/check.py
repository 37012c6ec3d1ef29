"""Is one checkpoint whole? Reads it without executing anything from it.

Good means: ``metadata.json`` and ``.metadata`` can be read, and every record that ``.metadata``
lists is there in full. A whole check also reads all bytes: every record is a zip by ``torch.save``,
with a CRC-32 of each member that was taken in memory. Where the save had ``--verify-integrity``,
the SHA-256 in ``integrity.json`` must be right, too: they cover ``.metadata`` and the directories
of the zips, which have no checksum of their own. Of the format ``torch`` (``mp_rank_*``) the files'
existence and the zips are checked.

``.metadata`` is a pickle. It is read into `inert` objects: no class of it is imported or called.
"""

from __future__ import annotations

import errno
import io
import json
import os
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron_xielu.checkpoints import inert
from megatron_xielu.common import files


class Damaged(Exception):
    """A checkpoint is not whole; the message says which file and why."""


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


def check(folder: Path, *, whole: bool) -> None:
    """Check one checkpoint.

    Args:
        folder: an ``iter_…`` folder.
        whole: read every byte and compare checksums, too.

    Raises:
        Damaged: it is not good.
        OSError: the file system does not let it be read now, which says nothing about it.
    """
    try:
        if any(folder.glob("mp_rank_*")):
            _check_torch_format(folder, whole=whole)
        else:
            _check_distributed_format(folder, whole=whole)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EIO):
            raise
        raise Damaged(f"{Path(error.filename or folder).name}: {error.strerror}") from error


def _check_torch_format(folder: Path, *, whole: bool) -> None:
    for rank in sorted(folder.glob("mp_rank_*")):
        if not (rank / "model_optim_rng.pt").is_file():
            raise Damaged(f"{rank.name}/model_optim_rng.pt is missing")
    for path in sorted(folder.glob("mp_rank_*/*.pt")):
        _check_zips(path, [(0, path.stat().st_size)], whole=whole)


def _check_distributed_format(folder: Path, *, whole: bool) -> None:
    metadata = _read_metadata(folder / ".metadata")
    keys = getattr(metadata, "state_dict_metadata", None)
    storage = getattr(metadata, "storage_data", None)
    if not isinstance(keys, dict) or not isinstance(storage, dict):
        raise Damaged(".metadata is not that of a checkpoint")
    # The state that all ranks share is a record in Megatron 0.19, and was a file before. Formats
    # other than torch_dist have neither, and no metadata.json.
    common = folder / "common.pt"
    has_common = common.exists() or any(str(key).startswith("common_state/") for key in keys)
    if has_common or (folder / "metadata.json").exists():
        if "sharded_backend" not in _read_json(folder / "metadata.json"):
            raise Damaged("metadata.json does not name a format")
        if not has_common:
            raise Damaged("common.pt is missing")
    missing = set(keys) - {getattr(index, "fqn", None) for index in storage}
    if missing:
        raise Damaged(f".metadata does not say where {min(map(str, missing))} is")

    zips = defaultdict(list)
    for info in storage.values():
        name, start, length = (
            getattr(info, field, None) for field in ("relative_path", "offset", "length")
        )
        if not (isinstance(name, str) and isinstance(start, int) and isinstance(length, int)):
            raise Damaged(".metadata has a record without a place")
        # A transformed record (compressed, say) is not a zip.
        zips[name].append((start, length, getattr(info, "transform_descriptors", None) is None))
    for name, records in sorted(zips.items()):
        if not (folder / name).is_file():
            raise Damaged(f"{name} is missing")
        short = max(start + length for start, length, _ in records) - (folder / name).stat().st_size
        if short > 0:
            raise Damaged(f"{name} is {short} bytes short")
    if common.exists():
        _check_zips(common, [(0, common.stat().st_size)], whole=whole)
    manifest = folder / "integrity.json"
    hashes = _read_json(manifest).get("files") if manifest.exists() else {}
    if not isinstance(hashes, dict):
        raise Damaged("integrity.json lists no files")
    if whole:
        for name, records in sorted(zips.items()):
            places = [(start, length) for start, length, is_zip in records if is_zip]
            _check_zips(folder / name, sorted(places), whole=True)
        for name, expected in hashes.items():
            _check_hash(folder / name, expected)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise Damaged(f"{path.name} is missing")
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise Damaged(f"{path.name} cannot be read")
    return content


def _read_metadata(path: Path) -> Any:
    if not path.is_file():
        raise Damaged(".metadata is missing: the save did not finish")
    try:
        return inert.unpickle(path)
    except OSError:
        raise
    except Exception as error:  # whatever wrong bytes make a pickle raise
        raise Damaged(f".metadata cannot be read: {type(error).__name__}: {error}") from error


def _check_zips(path: Path, records: list[tuple[int, int]], *, whole: bool) -> None:
    """Check the zips at (offset, length) of a file: their directories, or all their bytes."""
    with path.open("rb") as file:
        for start, length in records:
            try:
                with zipfile.ZipFile(_Window(file, start, length)) as archive:  # type: ignore[arg-type]
                    wrong = archive.testzip() if whole else None
                    for member in archive.infolist():
                        if member.compress_size != member.file_size:  # torch.save only stores
                            wrong = member.filename
            except OSError:
                raise
            except Exception as error:  # whatever wrong bytes make zipfile raise
                wrong = f"{type(error).__name__}: {error}"
            if wrong:
                raise Damaged(f"{path.name}: checksum at byte {start} is wrong ({wrong})")


def _check_hash(path: Path, expected: str) -> None:
    if files.sha256(path) != expected:
        raise Damaged(f"{path.name}: SHA-256 is not that of integrity.json")
