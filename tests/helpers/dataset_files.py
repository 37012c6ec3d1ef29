"""Megatron's ``.bin``/``.idx`` files without Megatron, for tests that look at their heads."""

from __future__ import annotations

import struct
from pathlib import Path


def write_dataset(prefix: Path, lengths: list[int]) -> None:
    """A dataset as Megatron writes it (indexed_dataset.py), int32 tokens, a document a sequence."""
    count = len(lengths)
    offsets = [4 * sum(lengths[:i]) for i in range(count)]
    prefix.with_suffix(".bin").write_bytes(bytes(4 * sum(lengths)))
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 4, count, count + 1)
        + struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *offsets, *range(count + 1))
    )
