"""What describes the finished data, the same bytes for the same data.

manifest.json               what it was made from, what is in it, its checksums
data_args.txt               the training shards, weighted by their tokens, for --data-args-path
per_split_data_args.json    training and validation shards, for --per-split-data-args-path
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_xielu.common import files, prepared_data, schema
from megatron_xielu.common.schema import Count, Malformed, Positive
from megatron_xielu.data import records
from megatron_xielu.data.errors import DataError
from megatron_xielu.data.merging import Merged
from megatron_xielu.data.recipe import Recipe
from megatron_xielu.data.records import SPLITS, Record, Shard
from megatron_xielu.data.tokenizer_files import TokenizerInfo

NAME = prepared_data.MANIFEST
FIX = "the command without --verify writes it again"
VERSION = 1


@dataclass(frozen=True)
class Total:
    """What is in all shards of a split, or in one."""

    tokens: Count
    documents: Count
    sequences: Count
    text_bytes: Count


@dataclass(frozen=True)
class Stored:
    """One file of a shard."""

    bytes: Count
    sha256: str


@dataclass(frozen=True)
class Entry(Total):
    """A shard."""

    documents: Positive
    prefix: str
    task: Count
    split: Literal["train", "valid"]
    bin: Stored
    idx: Stored
    last_task: Count | None = None  # of those that were merged into it

    def __post_init__(self) -> None:
        if self.prefix != f"{self.split}/{records.name(self.task, self.last_task)}":
            raise ValueError(f"prefix {self.prefix!a} is not of {self.split}, task {self.task}")


@dataclass(frozen=True)
class Manifest:
    """What --verify needs of it."""

    tokenizer: TokenizerInfo
    train: Total
    valid: Total
    shards: list[Entry]

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("it has no shards")


def finish(recipe: Recipe, output: Path, used: int, merged: Iterable[Merged]) -> dict[str, Any]:
    """Write the three files and remove what is not part of the data; returns the manifest."""
    done = records.load_all(output, recipe.tasks)
    for task in range(used, recipe.tasks):  # tasks that the budget turned out not to need
        records.forget(output, task)
        for split in SPLITS:
            for path in records.shard_files(output, split, task):
                path.unlink(missing_ok=True)
    records.remove_dead_attempts(output, all_of_them=True)
    done = {task: done[task] for task in range(used)}
    totals = {split: _total(done, split) for split in SPLITS}
    if not totals["train"]["documents"]:
        held_out = totals["valid"]["documents"]
        fix = "choose a smaller --valid-fraction" if held_out else "--source has no text"
        raise DataError(f"no document is left for training of {held_out} in all; {fix}")
    spans = {task: of for of in merged for task in of.tasks}
    every = [
        _entry(task, of.last if of else None, split, (of or done[task]).shards[split])
        for split in SPLITS
        for task in done
        if not (of := spans.get(task)) or of.first == task
    ]
    manifest: dict[str, Any] = {
        "version": VERSION,
        "sources": list(recipe.sources),
        "subset": recipe.subset,
        "input": {"files": sum(len(g.files) for g in recipe.groups), "bytes": recipe.input_bytes},
        "text_key": recipe.text_key,
        "tokenizer": asdict(recipe.tokenizer),
        "sentences": recipe.sentences,
        "punkt_sha256": recipe.punkt_sha256,
        "valid_fraction": recipe.valid_fraction,
        "max_tokens": recipe.max_tokens,
        "tasks": recipe.tasks,
        "empty_rows": sum(record.empty_rows for record in done.values()),
        "bad_rows": sum(record.bad_rows for record in done.values()),
        "special_tokens_as_text": recipe.special_tokens_as_text,
        "special_tokens": _special_tokens(done),
        **totals,
        "shards": [entry for entry in every if entry["documents"]],
    }
    for name, content in data_args(output, manifest["shards"]).items():
        files.write(output / name, content)
    files.write(output / NAME, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def load(output: Path) -> Manifest:
    """The manifest of finished data.

    Raises:
        DataError: there is none, or it is damaged.
    """
    try:
        return schema.load(Manifest, output / NAME)
    except FileNotFoundError as error:
        raise DataError(f"--output {output}: no {NAME}, so the data is not finished") from error
    except Malformed as error:
        raise DataError(f"{error}; {FIX}") from None


def _total(done: dict[int, Record], split: str) -> dict[str, int]:
    shards = [record.shards[split] for record in done.values()]
    return {
        name: sum(getattr(shard, name) for shard in shards)
        for name in ("tokens", "documents", "sequences", "text_bytes")
    }


def _special_tokens(done: dict[int, Record]) -> dict[str, int] | None:
    """How often documents hold each special token; None if an older record does not say."""
    total: Counter[str] = Counter()
    for record in done.values():
        if record.special_tokens is None:
            return None
        total.update(record.special_tokens)
    return dict(sorted(total.items()))


def _entry(task: int, last: int | None, split: str, shard: Shard) -> dict[str, Any]:
    return {
        "prefix": f"{split}/{records.name(task, last)}",
        "task": task,
        **({} if last is None else {"last_task": last}),
        "split": split,
        "tokens": shard.tokens,
        "documents": shard.documents,
        "sequences": shard.sequences,
        "text_bytes": shard.text_bytes,
        "bin": {"bytes": shard.sizes[0], "sha256": shard.sha256[0]},
        "idx": {"bytes": shard.sizes[1], "sha256": shard.sha256[1]},
    }


def data_args(output: Path, shards: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What the files for Megatron's flags hold, by name."""
    words: dict[str, list[str]] = {split: [] for split in SPLITS}
    for entry in shards:
        weight = entry.get("weight", entry["tokens"])  # a blend's own
        words[entry["split"]] += [str(weight), str(output.absolute() / entry["prefix"])]
    train = words["train"]
    lines = [f"{weight} {path}\n" for weight, path in zip(train[::2], train[1::2], strict=True)]
    per_split = {"train": train, "valid": words["valid"] or None, "test": None}
    return {
        "data_args.txt": "".join(lines),
        prepared_data.BY_SPLIT: json.dumps(per_split, indent=1) + "\n",
    }
