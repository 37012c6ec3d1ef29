"""Many shards into few: Megatron opens every prefix on every rank, and caches an index of each.

    train/00000-00015.bin, .idx    the shards of tasks 0 to 15, one after the other
    work/merged/00000-00015.json   written after those, it vouches for them; then theirs are removed

A shard is removed when what takes its place was read back from the disk with the shard's checksum.
Where a merged shard is not what its tasks' records say any more, those tasks are done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_xielu.common import files, indexed_dataset, schema, text
from megatron_xielu.common.schema import Count, Malformed
from megatron_xielu.data import records
from megatron_xielu.data.errors import DataError
from megatron_xielu.data.recipe import Recipe
from megatron_xielu.data.records import SPLITS, Record, Shard

_TOGETHER = 4  # spans at a time, where the disk has room for so many twice
_BLOCK = 1 << 22  # bytes copied at a time


@dataclass(frozen=True)
class Merged:
    """The shards of tasks ``first`` to ``last`` in one of each split."""

    first: Count
    last: Count
    shards: dict[str, Shard]
    sources: list[dict[str, tuple[str, str]]]  # of every task: by split, sha256 of its files

    def __post_init__(self) -> None:
        if set(self.shards) != set(SPLITS) or len(self.sources) != self.last - self.first + 1:
            raise ValueError("its shards or sources are not complete")

    @property
    def tasks(self) -> range:
        """The tasks whose shards they were."""
        return range(self.first, self.last + 1)

    def paths(self, output: Path) -> dict[Path, int]:
        """Its files, and the bytes of each."""
        places = {
            split: records.shard_files(output, split, self.first, self.last) for split in SPLITS
        }
        return {
            path: size
            for split, shard in self.shards.items()
            if shard.documents
            for path, size in zip(places[split], shard.sizes, strict=True)
        }


def spans(recipe: Recipe, used: int) -> list[range]:
    """Tasks to merge, of the first ``used`` ones. A budget ends the last span, and moves none."""
    if recipe.shards is None or recipe.tasks <= recipe.shards:
        return []
    ends = [recipe.tasks * i // recipe.shards for i in range(recipe.shards + 1)]
    every = [range(first, min(end, used)) for first, end in pairwise(ends)]
    return [span for span in every if len(span) > 1]


def load_all(output: Path) -> list[Merged]:
    """What is merged already. Where a record is damaged, it is as if there were none."""
    found = []
    for path in sorted((output / "work" / "merged").glob("*.json")):
        try:
            found.append(schema.load(Merged, path))
        except (OSError, Malformed) as error:
            print(f"{error}: its tasks are done again", file=sys.stderr)
            path.unlink(missing_ok=True)
    return found


def forget(output: Path, first: int, last: int) -> None:
    """Have the tasks of a merged shard done again."""
    _record(output, first, last).unlink(missing_ok=True)


def forget_damaged(output: Path) -> set[int]:
    """Forget what is merged and has lost bytes; returns the tasks of all the others."""
    whole: set[int] = set()
    for merged in load_all(output):
        damaged = [
            path
            for path, size in merged.paths(output).items()
            if not path.is_file() or path.stat().st_size != size
        ]
        if damaged:
            print(f"{damaged[0]} is missing or has another size", file=sys.stderr)
            _drop(output, merged)
        else:
            whole.update(merged.tasks)
    return whole


def forget_others(recipe: Recipe, output: Path, used: int) -> bool:
    """Forget what is merged otherwise than it would be now; returns whether there was any."""
    done = records.load_all(output, recipe.tasks)
    wanted = spans(recipe, used)
    others = [
        merged
        for merged in load_all(output)
        if merged.tasks not in wanted or merged.sources != [_sources(done[t]) for t in merged.tasks]
    ]
    for merged in others:
        _drop(output, merged)
    return bool(others)


def merge(recipe: Recipe, output: Path, used: int, workers: int) -> list[Merged]:
    """Merge what is not merged yet; returns all that is.

    Raises:
        DataError: the disk has no room for a span twice, or a shard is not what it was.
    """
    beside = output / "work" / "merging"
    shutil.rmtree(beside, ignore_errors=True)
    done = records.load_all(output, recipe.tasks)
    there = load_all(output)
    missing = [
        span for span in spans(recipe, used) if span not in [merged.tasks for merged in there]
    ]
    kept = {path for merged in there for path in merged.paths(output)}
    for split in SPLITS:
        for path in (output / split).glob("*-*.*"):
            if path not in kept:  # of a start that was killed
                path.unlink()
    for merged in there:
        _remove_sources(output, merged.tasks)
    if not missing:
        return there
    together = min(workers, _room(output, [_size(done, span) for span in missing]))
    with (
        tqdm(total=sum(map(len, missing)), unit="shard", desc="merging", dynamic_ncols=True) as bar,
        ThreadPoolExecutor(together) as pool,
    ):
        for merged in pool.map(lambda span: _merge(output, span, done, beside), missing):
            there.append(merged)
            bar.update(len(merged.tasks))
    shutil.rmtree(beside, ignore_errors=True)
    return there


def _record(output: Path, first: int, last: int) -> Path:
    return output / "work" / "merged" / f"{records.name(first, last)}.json"


def _sources(record: Record) -> dict[str, tuple[str, str]]:
    return {split: shard.sha256 for split, shard in record.shards.items()}


def _size(done: dict[int, Record], span: range) -> int:
    return sum(sum(shard.sizes) for task in span for shard in done[task].shards.values())


def _room(output: Path, sizes: list[int]) -> int:
    """How many spans can be there twice at a time."""
    free = shutil.disk_usage(output).free
    needed = list(accumulate(sorted(sizes, reverse=True)[:_TOGETHER]))
    if needed[0] > free:
        raise DataError(
            f"--shards: the disk is too small to merge shards: {text.size(needed[0])} are needed "
            f"for a while, {text.size(free)} free in {output}; free some, and start again"
        )
    return sum(size <= free for size in needed)


def _drop(output: Path, merged: Merged) -> None:
    forget(output, merged.first, merged.last)
    for path in merged.paths(output):
        path.unlink(missing_ok=True)


def _remove_sources(output: Path, tasks: range) -> None:
    for task in tasks:
        for split in SPLITS:
            for path in records.shard_files(output, split, task):
                path.unlink(missing_ok=True)


def _merge(output: Path, span: range, done: dict[int, Record], beside: Path) -> Merged:
    folder = beside / records.name(span[0], span[-1])
    folder.mkdir(parents=True)
    shards = {
        split: _join(
            folder / split,
            {
                records.prefix(output, split, task): shard
                for task in span
                if (shard := done[task].shards[split]).documents
            },
        )
        for split in SPLITS
    }
    merged = Merged(span[0], span[-1], shards, [_sources(done[task]) for task in span])
    for path in merged.paths(output):
        os.replace(folder / f"{path.parent.name}{path.suffix}", path)
    files.write(_record(output, span[0], span[-1]), json.dumps(asdict(merged)) + "\n")
    _remove_sources(output, span)
    return merged


def _join(target: Path, sources: dict[Path, Shard]) -> Shard:
    """Write one shard of several, and read it back."""
    paths = target.with_suffix(".bin"), target.with_suffix(".idx")
    if not sources:
        return Shard(0, 0, 0, 0, (0, 0), ("", ""))
    with paths[0].open("wb") as out:
        for prefix in sources:
            with prefix.with_suffix(".bin").open("rb") as source:
                shutil.copyfileobj(source, out, _BLOCK)
    join_indices(paths[1], list(sources))
    for path in paths:
        files.sync(path)
    whole = hashlib.sha256()
    with paths[0].open("rb", buffering=0) as written:
        for prefix, shard in sources.items():
            own, left = hashlib.sha256(), shard.sizes[0]
            while left and (block := written.read(min(left, _BLOCK))):
                own.update(block)
                whole.update(block)
                left -= len(block)
            if own.hexdigest() != shard.sha256[0]:
                raise _changed(prefix.with_suffix(".bin"))
            if files.sha256(prefix.with_suffix(".idx")) != shard.sha256[1]:
                raise _changed(prefix.with_suffix(".idx"))
    total = {
        name: sum(getattr(shard, name) for shard in sources.values())
        for name in ("tokens", "documents", "sequences", "text_bytes")
    }
    index = indexed_dataset.read(target)
    if (index.sequences, index.documents) != (total["sequences"], total["documents"] + 1):
        raise DataError(f"{paths[1]}: its counts are not the sum of its shards'; start again")
    return Shard(
        **total,
        sizes=(paths[0].stat().st_size, paths[1].stat().st_size),
        sha256=(whole.hexdigest(), files.sha256(paths[1])),
    )


def _changed(path: Path) -> DataError:
    return DataError(
        f"{path} has another checksum than when it was written; remove it, and the same command "
        "makes it again"
    )


def join_indices(path: Path, prefixes: Sequence[Path]) -> None:
    """Write the ``.idx`` of shards whose ``.bin`` are put one after the other.

    Raises:
        DataError: tokens of two types.
    """
    heads = [indexed_dataset.read(prefix) for prefix in prefixes]
    if len({head.dtype for head in heads}) != 1:
        raise DataError(f"{prefixes[0]} and others have tokens of different types")
    lengths, offsets, documents = [], [], [np.zeros(1, np.int64)]
    sequences = size = 0
    for prefix, head in zip(prefixes, heads, strict=True):
        source, start = prefix.with_suffix(".idx"), indexed_dataset.LENGTHS_AT
        n, m = head.sequences, head.documents
        lengths.append(np.fromfile(source, "<i4", n, offset=start))
        offsets.append(np.fromfile(source, "<i8", n, offset=start + 4 * n) + size)
        ends = np.fromfile(source, "<i8", m, offset=start + 12 * n)
        documents.append(ends[1:] + sequences)
        sequences += n
        size += prefix.with_suffix(".bin").stat().st_size
    count = sum(map(len, documents))
    with path.open("wb") as out, prefixes[0].with_suffix(".idx").open("rb") as first:
        out.write(
            first.read(indexed_dataset.LENGTHS_AT - 16) + struct.pack("<QQ", sequences, count)
        )
        for array in (*lengths, *offsets, *documents):
            array.tofile(out)
