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


def write_tokenizer(
    folder: Path, vocabulary: list[str], added: dict[str, int] | None = None, **parts: object
) -> None:
    """A tokenizer.json with these tokens; ``merges`` among its parts are the model's."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = parts.pop("merges", [])
    vocab = {token: i for i, token in enumerate(vocabulary)}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    more = [{"id": i, "content": token} for token, i in (added or {}).items()]
    (folder / "tokenizer.json").write_text(
        json.dumps({"added_tokens": more, **parts, "model": model})
    )


def write_prepared(
    folder: Path,
    vocabulary: list[str],
    added: dict[str, int] | None = None,
    *,
    name: str = "tokenizer.json",
    **parts: object,
) -> None:
    """What of a folder of tools/prepare_data.py a training needs: 20 documents of tokens 0.

    Of added tokens the last ends a document, else token 0; parts are `write_tokenizer`'s.
    """
    write_tokenizer(folder / "tokenizer", vocabulary, added, **parts)
    shards = []
    for split in ("train", "valid"):
        (folder / split).mkdir(parents=True)
        write_dataset(folder / split / "00000", [3] * 20)
        shards.append({"prefix": f"{split}/00000", "split": split, "text_bytes": 60})
    digest = hashlib.sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    ids = [*range(len(vocabulary)), *(added or {}).values()]
    tokenizer = {"name": name, "sha256": digest, "vocab_size": max(ids) + 1}
    tokenizer["eod_id"] = [0, *(added or {}).values()][-1]
    manifest = {"tokenizer": tokenizer, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "data_args.txt").write_text(f"60 {folder}/train/00000\n")
    by_split = {"train": ["60", f"{folder}/train/00000"], "valid": [f"{folder}/valid/00000"]}
    (folder / "per_split_data_args.json").write_text(json.dumps({**by_split, "test": None}))
