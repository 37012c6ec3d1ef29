"""`common.indexed_dataset`: what Megatron writes is read, any damage to the head is a line."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hostile import damaged_bytes
from hypothesis import HealthCheck, given, settings
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_xielu.common import indexed_dataset
from megatron_xielu.common.indexed_dataset import Damaged, Index

DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16")


def write(prefix: Path, dtype: str, *, documents: int = 3, multimodal: bool = False) -> None:
    """Documents of 1, 2, 3, … tokens, by Megatron."""
    kind = np.dtype(dtype).type
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=kind, multimodal=multimodal)
    for length in range(1, documents + 1):
        builder.add_document(np.arange(length), [length], [0] if multimodal else None)
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multimodal", [False, True])
def test_what_megatron_writes(tmp_path, dtype, multimodal):
    write(tmp_path / "a.b", dtype, multimodal=multimodal)
    assert indexed_dataset.read(tmp_path / "a.b") == Index(dtype, np.dtype(dtype).itemsize, 3, 4)
    assert indexed_dataset.sample(tmp_path / "a.b") == (0, 2)


def test_without_documents(tmp_path):
    write(tmp_path / "a", "int32", documents=0)
    assert indexed_dataset.read(tmp_path / "a") == Index("int32", 4, 0, 1)
    assert indexed_dataset.sample(tmp_path / "a") == (0, 0)


@pytest.mark.parametrize(
    ("at", "content", "message"),
    [
        (0, b"X", r"starts with b'XMIDIDX\\x00\\x00'"),
        (9, b"\2", "of version 2, not 1"),
        (17, b"\0", "of the unknown type 0"),
        (17, b"\xff", "of the unknown type 255"),
        (18, b"\4", "it has 102 bytes, and for 4 sequences 114"),
        (18, b"\xff" * 8, "it has 102 bytes, and for 18446744073709551615 sequences"),
        (26, b"\xff" * 8, "it has 102 bytes, and for 3 sequences"),
        (42, struct.pack("<i", -1), "its last sequence is -1 tokens at byte 6"),
        (42, struct.pack("<i", 10**9), r"a\.bin is damaged: it has 12 bytes where its .idx says"),
        (62, struct.pack("<q", -1), "its last sequence is 3 tokens at byte -1"),
        (94, b"\2", "its documents end with sequence 2 of 3"),
    ],
)
def test_damage(tmp_path, at, content, message):
    write(tmp_path / "a", "uint16")
    path = tmp_path / "a.idx"
    good = path.read_bytes()
    path.write_bytes(good[:at] + content + good[at + len(content) :])
    with pytest.raises(Damaged, match=message):
        indexed_dataset.read(tmp_path / "a")


@pytest.mark.parametrize(
    ("suffix", "size", "message"),
    [
        ("idx", 0, r"a\.idx is damaged: it ends after 0 bytes, in its head"),
        ("idx", 33, "it ends after 33 bytes"),
        ("idx", 101, "it has 101 bytes, and for 3 sequences 102"),
        ("bin", 11, r"a\.bin is damaged: it has 11 bytes where its \.idx says 12"),
        ("bin", 0, "it has 0 bytes"),
    ],
)
def test_cut_off(tmp_path, suffix, size, message):
    write(tmp_path / "a", "uint16")
    with (tmp_path / f"a.{suffix}").open("r+b") as file:
        file.truncate(size)
    with pytest.raises(Damaged, match=message):
        indexed_dataset.read(tmp_path / "a")


def test_any_damage_is_read_or_refused_in_a_line(tmp_path):
    write(tmp_path / "a", "int32")
    path = tmp_path / "a.idx"

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged_bytes(path.read_bytes()))
    def try_it(content: bytes) -> None:
        path.write_bytes(content)
        try:
            found = indexed_dataset.read(tmp_path / "a")
        except Damaged as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
        else:
            read = IndexedDataset(str(tmp_path / "a"))  # Megatron's can map it, too
            assert len(read.sequence_lengths) == found.sequences

    try_it()
