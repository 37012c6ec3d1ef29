"""What is finished: one file a task, written last, so that it vouches for the task's shards.

    work/unfinished/00012-HOST-PID/   an attempt at a task: its shards and progress.json
    train/00012.bin, .idx, valid/…    renamed from there when they are complete
    work/records/00012.json           written after that

A killed attempt leaves only its own folder behind. Two attempts at a task never write to the same
file, and what they rename is the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_xielu.common import files, processes, schema
from megatron_xielu.common.schema import Count, Malformed

SPLITS = ("train", "valid")
_PROGRESS_INTERVAL = 1.0  # seconds


@dataclass(frozen=True)
class Shard:
    """One ``.bin``/``.idx`` pair; without documents there are no files."""

    tokens: Count
    documents: Count
    sequences: Count
    text_bytes: Count  # UTF-8, without the end-of-document tokens
    sizes: tuple[Count, Count]  # bytes of .bin and .idx
    sha256: tuple[str, str]


@dataclass(frozen=True)
class Record:
    """A finished task."""

    shards: dict[str, Shard]  # by split
    empty_rows: Count
    bad_rows: Count
    limit: Count | None  # training tokens at which it stopped before its input ended
    # How often documents hold each special token; None: written when nobody counted.
    special_tokens: dict[str, Count] | None = None

    def __post_init__(self) -> None:
        if set(self.shards) != set(SPLITS):
            raise ValueError(f"shards are not of {' and '.join(SPLITS)}")

    @property
    def tokens(self) -> int:
        """Training tokens, which a budget counts."""
        return self.shards["train"].tokens


def name(first: int, last: int | None = None) -> str:
    """Of a task's shard, or of the one that those of several tasks were merged into."""
    return f"{first:05d}" if last is None else f"{first:05d}-{last:05d}"


def prefix(output: Path, split: str, first: int, last: int | None = None) -> Path:
    """A shard's files without their endings, as Megatron's flags want it."""
    return output / split / name(first, last)


def shard_files(output: Path, split: str, first: int, last: int | None = None) -> tuple[Path, Path]:
    """A shard's .bin and .idx."""
    path = prefix(output, split, first, last)
    return path.with_suffix(".bin"), path.with_suffix(".idx")


def path_of(output: Path, task: int) -> Path:
    """The record's file."""
    return output / "work" / "records" / f"{task:05d}.json"


def save(output: Path, task: int, record: Record) -> None:
    """Mark the task as finished."""
    files.write(path_of(output, task), json.dumps(asdict(record)) + "\n")


def load(output: Path, task: int) -> Record | None:
    """The task's record, None if it is not finished; so it is not where the record is damaged."""
    try:
        return schema.load(Record, path_of(output, task))
    except (FileNotFoundError, Malformed):
        return None


def load_all(output: Path, tasks: int) -> dict[int, Record]:
    """The records of all finished tasks."""
    return {task: found for task in range(tasks) if (found := load(output, task))}


def forget(output: Path, task: int) -> None:
    """Have the task done again."""
    path_of(output, task).unlink(missing_ok=True)


def damage(output: Path, task: int, *, merged: bool = False) -> str | None:
    """What is wrong with a finished task's record or the sizes of its files, in words.

    Args:
        merged: its shards are not there any more, but in others.
    """
    try:
        record = schema.load(Record, path_of(output, task))
    except FileNotFoundError:
        return None
    except Malformed as error:
        return str(error)
    for split, shard in record.shards.items():
        if shard.documents and not merged:
            for path, size in zip(shard_files(output, split, task), shard.sizes, strict=True):
                if not path.is_file():
                    return f"{path} is missing"
                if path.stat().st_size != size:
                    return f"{path} has {path.stat().st_size:,} bytes instead of {size:,}"
    return None


class Attempt:
    """A try at a task: a folder of its own, which other processes see it is alive by."""

    def __init__(self, output: Path, task: int) -> None:
        self.task = task
        name = f"{task:05d}-{socket.gethostname()}-{os.getpid()}"
        self.folder = output / "work" / "unfinished" / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._reported = 0.0

    def report(self, tokens: int) -> None:
        """Say how far it is, at most once a second."""
        if time.monotonic() - self._reported >= _PROGRESS_INTERVAL:
            files.write(self.folder / "progress.json", str(tokens))
            self._reported = time.monotonic()


@contextmanager
def attempt(output: Path, task: int) -> Iterator[Attempt]:
    """An attempt whose folder goes away with it, unless its process is killed."""
    this = Attempt(output, task)
    try:
        yield this
    finally:
        shutil.rmtree(this.folder, ignore_errors=True)


@dataclass(frozen=True)
class Seen:
    """An attempt, as others see it."""

    folder: Path
    task: int
    alive: bool  # always so on another host
    tokens: int


def attempts(output: Path) -> list[Seen]:
    """All attempts that have left a folder."""
    seen = []
    for folder in sorted((output / "work" / "unfinished").glob("*-*-*")):
        if not (name := re.fullmatch(r"(\d{5,9})-(.+)-(\d{1,9})", folder.name)):
            continue
        task, host, pid = name.groups()
        try:
            tokens = schema.check(Count, schema.read_json(folder / "progress.json"), folder)
        except (OSError, Malformed):
            tokens = 0
        alive = host != socket.gethostname() or processes.is_alive(int(pid))
        seen.append(Seen(folder, int(task), alive, tokens))
    return seen


def remove_dead_attempts(output: Path, *, all_of_them: bool = False) -> None:
    """Free the space of killed attempts, or of all once nothing is left to do."""
    for seen in attempts(output):
        if all_of_them or not seen.alive:
            shutil.rmtree(seen.folder, ignore_errors=True)
