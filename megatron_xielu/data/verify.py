"""``--verify``: reads finished data back with Megatron's own reader, and its checksums.

A damaged shard is named, and its task is marked as not done: the command without ``--verify`` does
that one again.
"""

from __future__ import annotations

import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_xielu.common import files
from megatron_xielu.data import blending, merging, records, tokenizer_files
from megatron_xielu.data import manifest as manifests
from megatron_xielu.data.errors import DataError
from megatron_xielu.data.manifest import Entry, Manifest

_SAMPLES = 3
_SAMPLE_TOKENS = 24
_BLOCK = 1 << 24  # tokens checked at a time


def verify(output: Path, *, workers: int) -> str:
    """Check everything; returns the lines to print.

    Raises:
        DataError: names every damaged shard.
    """
    if folders := blending.folders_of(output):
        raise DataError(f"--output {output}: a blend; verify the data of {' and '.join(folders)}")
    manifest = manifests.load(output)
    shards = manifest.shards
    _check_tokenizer(output, manifest)
    problems: dict[str, str] = {}
    size = sum(entry.bin.bytes + entry.idx.bytes for entry in shards)
    with (
        tqdm(total=size, unit="B", unit_scale=True, desc="verifying") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for entry, problem in zip(
            shards, pool.map(lambda entry: _check(output, entry, manifest), shards), strict=True
        ):
            bar.update(entry.bin.bytes + entry.idx.bytes)
            if problem:
                problems[entry.prefix] = problem
                with suppress(OSError):  # a folder that can only be read
                    if entry.last_task is None:
                        records.forget(output, entry.task)
                    else:
                        merging.forget(output, entry.task, entry.last_task)
    _check_totals(manifest)
    if problems:
        lines = "\n  ".join(f"{prefix}: {problem}" for prefix, problem in problems.items())
        raise DataError(
            f"{len(problems)} of {len(shards)} shards are damaged; the same command without "
            f"--verify makes these again:\n  {lines}"
        )
    for name, content in manifests.data_args(output, map(vars, shards)).items():
        if not (path := output / name).is_file() or path.read_bytes() != content.encode():
            raise DataError(
                f"{path} does not list the shards of {manifests.NAME} at {output.absolute()}; "
                f"{manifests.FIX}"
            )
    return "\n".join(
        [
            f"{len(shards)} shards, {manifest.train.tokens:,} training and "
            f"{manifest.valid.tokens:,} validation tokens in "
            f"{manifest.train.documents + manifest.valid.documents:,} documents: all "
            "as in the manifest",
            *_samples(output, shards),
        ]
    )


def _check(output: Path, entry: Entry, manifest: Manifest) -> str | None:
    """What is wrong with a shard, in words."""
    for kind in ("bin", "idx"):
        path, stored = output / f"{entry.prefix}.{kind}", getattr(entry, kind)
        if not path.is_file():
            return f".{kind} is missing"
        size = path.stat().st_size
        if size != stored.bytes:
            return f".{kind} has {size:,} bytes instead of {stored.bytes:,}"
        if files.sha256(path) != stored.sha256:
            return f".{kind} has another checksum than in the manifest"
    return _check_content(output / entry.prefix, entry, manifest)


def _check_content(prefix: Path, entry: Entry, manifest: Manifest) -> str | None:
    dataset = _open(prefix)
    lengths = dataset.sequence_lengths
    found = (int(lengths.sum()), len(dataset.document_indices) - 1, len(lengths))
    expected = (entry.tokens, entry.documents, entry.sequences)
    if found != expected:
        return f"tokens, documents and sequences are {found} and not {expected}"
    tokenizer = manifest.tokenizer
    dtype = dataset.index.dtype
    if np.dtype(dtype).name != tokenizer.dtype:
        return f"tokens are {np.dtype(dtype).name} and not {tokenizer.dtype}"
    tokens = np.memmap(prefix.with_suffix(".bin"), dtype=dtype, mode="r")
    ends = np.cumsum(lengths, dtype=np.int64)[dataset.document_indices[1:] - 1] - 1
    if not (tokens[ends] == tokenizer.eod_id).all():
        return f"a document does not end with {tokenizer.eod_token}"
    for start in range(0, len(tokens), _BLOCK):
        block = tokens[start : start + _BLOCK]
        if block.min() < 0 or block.max() >= tokenizer.vocab_size:
            return f"tokens beyond the vocabulary of {tokenizer.vocab_size}"
    return None


def _open(prefix: Path) -> Any:
    with warnings.catch_warnings(action="ignore"):  # of packages that reading needs nothing of
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    logging.getLogger("megatron.core.datasets.indexed_dataset").setLevel(logging.WARNING)
    return IndexedDataset(str(prefix))


def _check_tokenizer(output: Path, manifest: Manifest) -> None:
    path = output / "tokenizer" / "tokenizer.json"
    if not path.is_file() or files.sha256(path) != manifest.tokenizer.sha256:
        raise DataError(
            f"{path} is not the tokeniser of {manifests.NAME} ({manifest.tokenizer.name!r}, sha256 "
            f"{manifest.tokenizer.sha256[:12]!r}); copy that one back, or {manifests.FIX}"
        )


def _check_totals(manifest: Manifest) -> None:
    for split in records.SPLITS:
        for name in ("tokens", "documents", "sequences", "text_bytes"):
            said = getattr(getattr(manifest, split), name)
            total = sum(getattr(e, name) for e in manifest.shards if e.split == split)
            if total != said:
                raise DataError(
                    f"{manifests.NAME}: {name} of {split} are {said:,}, and {total:,} summed over "
                    f"its shards; {manifests.FIX}"
                )


def _samples(output: Path, shards: list[Entry]) -> list[str]:
    """The first words of a few documents, decoded."""
    tokenizer = tokenizer_files.load(output / "tokenizer" / "tokenizer.json")
    lines = []
    for entry in shards[:: max(1, len(shards) // _SAMPLES)][:_SAMPLES]:
        dataset = _open(output / entry.prefix)
        middle = entry.documents // 2
        sequence = dataset[int(dataset.document_indices[middle])]
        text = tokenizer.decode(sequence[:_SAMPLE_TOKENS].tolist(), skip_special_tokens=False)
        lines.append(f"{entry.prefix}, document {middle}: {text!r}")
    return lines
