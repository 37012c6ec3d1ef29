"""The head of Megatron's ``.idx`` files, checked before anything maps them.

After megatron/core/datasets/indexed_dataset.py: magic, version, code of the tokens' dtype, number n
of sequences and m of document ends; then int32 lengths [n], int64 offsets in ``.bin`` [n], int64
document ends [m]; and of multimodal data an int8 [n].
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from pathlib import Path

_MAGIC, _VERSION, _HEAD = b"MMIDIDX\0\0", 1, struct.Struct("<9sQBQQ")
_DTYPES = {
    **{1: ("uint8", 1), 2: ("int8", 1), 3: ("int16", 2), 4: ("int32", 4), 5: ("int64", 8)},
    **{6: ("float64", 8), 7: ("float32", 4), 8: ("uint16", 2)},
}

# Of `array`, by NumPy's names.
_ARRAYS = {
    **{"uint8": "B", "int8": "b", "int16": "h", "int32": "i", "int64": "q"},
    **{"float64": "d", "float32": "f", "uint16": "H"},
}
_SAMPLE_BYTES = 1 << 16

LENGTHS_AT = _HEAD.size


class Damaged(ValueError):
    """A file is not what its reader needs; one line that names it and the fix."""


@dataclass(frozen=True)
class Index:
    """What the head says: ``dtype`` is NumPy's name, ``itemsize`` its bytes."""

    dtype: str
    itemsize: int
    sequences: int
    documents: int  # ends of documents, with a 0 before the first


def read(prefix: Path) -> Index:
    """The head of ``prefix``.idx, which fits the sizes of that file and of ``prefix``.bin.

    Reads a few bytes, however large the files are.

    Raises:
        Damaged: it does not.
        OSError: one of them cannot be read.
    """
    path, data = (Path(f"{prefix}.{suffix}") for suffix in ("idx", "bin"))
    size, data_size = path.stat().st_size, data.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise _damaged(path, f"it ends after {len(head)} bytes, in its head")
        magic, version, code, n, m = _HEAD.unpack(head)
        if magic != _MAGIC:
            raise _damaged(path, f"it starts with {magic!r}, not {_MAGIC!r}")
        if version != _VERSION:
            raise _damaged(path, f"it is of version {version}, not {_VERSION}")
        if code not in _DTYPES:
            raise _damaged(path, f"its tokens are of the unknown type {code}")
        dtype, itemsize = _DTYPES[code]
        expected = LENGTHS_AT + 12 * n + 8 * m
        if size not in (expected, expected + n) or not m:
            raise _damaged(path, f"it has {size} bytes, and for {n} sequences {expected}")

        def number(form: str, at: int) -> int:
            file.seek(at)
            return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])

        if (last := number("<q", expected - 8)) != n:
            raise _damaged(path, f"its documents end with sequence {last} of {n}")
        length = number("<i", LENGTHS_AT + 4 * (n - 1)) if n else 0
        offset = number("<q", LENGTHS_AT + 12 * n - 8) if n else 0
    if length < 0 or offset < 0:
        raise _damaged(path, f"its last sequence is {length} tokens at byte {offset}")
    if data_size < (needed := offset + length * itemsize):
        raise _damaged(data, f"it has {data_size} bytes where its .idx says {needed}")
    return Index(dtype, itemsize, n, m)


def sample(prefix: Path) -> tuple[float, float]:
    """The least and the largest of some tokens: of the beginning, the middle and the end.

    Reads at most 192 KiB, however large the file is; 0 and 0 where there is no token.

    Raises:
        Damaged, OSError: as `read`.
    """
    index, path = read(prefix), Path(f"{prefix}.bin")
    size, least, largest = path.stat().st_size // index.itemsize * index.itemsize, 0, 0
    with path.open("rb") as file:
        for start in sorted({0, size // 2, max(0, size - _SAMPLE_BYTES)}):
            start -= start % index.itemsize
            file.seek(start)
            found = array(_ARRAYS[index.dtype])
            found.frombytes(file.read(min(_SAMPLE_BYTES, size - start)))
            if found:
                least, largest = min(least, *found), max(largest, *found)
    return least, largest


def _damaged(path: Path, what: str) -> Damaged:
    return Damaged(f"{path} is damaged: {what}; copy it again, or prepare the data again")
