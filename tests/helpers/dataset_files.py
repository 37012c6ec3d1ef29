"""Megatron's ``.bin``/``.idx`` files without Megatron, for tests that look at their heads."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path


def write_dataset(prefix: Path, lengths: list[int], tokens: dict[int, int] | None = None) -> None:
    """A dataset as Megatron writes it (indexed_dataset.py), int32 tokens, a document a sequence.

    All tokens are 0, but for those of ``tokens`` by their place.
    """
    count = len(lengths)
    offsets = [4 * sum(lengths[:i]) for i in range(count)]
    content = bytearray(4 * sum(lengths))
    for place, token in (tokens or {}).items():
        struct.pack_into("<i", content, 4 * place, token)
    prefix.with_suffix(".bin").write_bytes(content)
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 4, count, count + 1)
        + struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *offsets, *range(count + 1))
    )


def write_tokenizer(folder: Path, vocabulary: list[str]) -> None:
    """A tokenizer.json with these tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(vocabulary)}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": model}))


def write_prepared(folder: Path, vocabulary: list[str], *, name: str = "tokenizer.json") -> None:
    """What of a folder of tools/prepare_data.py a training needs: 20 documents of tokens 0."""
    write_tokenizer(folder / "tokenizer", vocabulary)
    shards = []
    for split in ("train", "valid"):
        (folder / split).mkdir()
        write_dataset(folder / split / "00000", [3] * 20)
        shards.append({"prefix": f"{split}/00000", "split": split, "text_bytes": 60})
    digest = hashlib.sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    tokenizer = {"name": name, "sha256": digest, "vocab_size": len(vocabulary)}
    manifest = {"tokenizer": tokenizer, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "data_args.txt").write_text(f"60 {folder}/train/00000\n")
    by_split = {"train": ["60", f"{folder}/train/00000"], "valid": [f"{folder}/valid/00000"]}
    (folder / "per_split_data_args.json").write_text(json.dumps({**by_split, "test": None}))
