"""What one output folder is made from. It is saved first, and a restart must agree with it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_xielu.common import files, schema
from megatron_xielu.common.schema import Malformed, Positive
from megatron_xielu.data.errors import DataError
from megatron_xielu.data.sources import Group, Part, parts
from megatron_xielu.data.tokenizer_files import TokenizerInfo

# What a restart must agree with, in the order in which a difference is reported. Another budget is
# no problem: finished tasks are used as far as they go.
_FLAGS = {
    "sources": "--source",
    "subset": "--subset",
    "tasks": "--tasks",
    "text_key": "--text-key",
    "valid_fraction": "--valid-fraction",
    "train_tokenizer": "--train-tokenizer",
    "shards": "--shards",
    "sentences": "--split-sentences and --language",
    "punkt_sha256": "the Punkt data",
    "special_tokens_as_text": "--special-tokens-as-text",
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of the output, and in which task a file is read."""

    sources: tuple[str, ...]
    subset: str | None
    groups: tuple[Group, ...]
    tasks: Positive
    text_key: str
    tokenizer: TokenizerInfo
    valid_fraction: float
    max_tokens: Positive | None
    sentences: str | None  # Punkt's language
    punkt_sha256: str | None = None
    skip_bad_rows: bool = False
    special_tokens_as_text: bool = False
    train_tokenizer: Positive | None = None  # entries of one that was trained for this
    part_bytes: Positive | None = None  # of parts of large files; None: all are read whole
    shards: Positive | None = None  # of each split at most, merged from tasks'; None: a task's own

    @property
    def input_bytes(self) -> int:
        """Of all files, as they are stored."""
        return sum(file.size for group in self.groups for file in group.files)

    @cached_property
    def _parts(self) -> list[tuple[str, list[Part]]]:
        return [(group.folder, parts(group, self.part_bytes)) for group in self.groups]

    def parts_of(self, task: int) -> list[tuple[str, Part]]:
        """What a task reads, with its folder: of each group every ``tasks``-th file or part."""
        return [
            (folder, part) for folder, every in self._parts for part in every[task :: self.tasks]
        ]

    def save(self, output: Path) -> None:
        """Write the recipe."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        files.write(_path(output), text + "\n")


def _path(output: Path) -> Path:
    return output / "work" / "plan.json"


def load(output: Path) -> Recipe:
    """The recipe that the folder was started with.

    Raises:
        DataError: it is damaged or lost, so that nobody knows what finished tasks are made from.
    """
    fix = f"bring it back, choose another --output, or start over without {output / 'work'}"
    try:
        return schema.load(Recipe, _path(output))
    except Malformed as error:
        raise DataError(f"{error}; {fix}") from None
    except FileNotFoundError:
        raise DataError(f"{_path(output)} is lost, and tasks were begun; {fix}") from None


def changed_tasks(old: Recipe, new: Recipe) -> list[int]:
    """Tasks whose input files were replaced since.

    Raises:
        DataError: the two differ in more than that.
    """
    for name, flag in _FLAGS.items():
        before, now = getattr(old, name), getattr(new, name)
        if before != now and not (name == "shards" and before is None):  # of an earlier release
            raise DataError(
                f"{flag}: the output folder was started with {_say(before)}, this is {_say(now)}; "
                "go on with that, or choose another --output"
            )
    if old.tokenizer != new.tokenizer:
        raise DataError(
            f"--tokenizer: the output folder was started with {old.tokenizer.name} (sha256 "
            f"{old.tokenizer.sha256[:12]}, end of document {old.tokenizer.eod_token!r}), this is "
            f"{new.tokenizer.name} ({new.tokenizer.sha256[:12]}, {new.tokenizer.eod_token!r}); "
            "go on with that, or choose another --output"
        )
    formats, others = _formats(old), _formats(new)
    if formats.keys() != others.keys():
        different = sorted(formats.keys() ^ others.keys())
        raise DataError(
            f"--source: {len(different)} files were added or removed since the start, "
            f"{'/'.join(different[0])} for one; bring them back, or choose another --output"
        )
    for place, format in others.items():
        if formats[place] != format:
            raise DataError(
                f"--format: the output folder was started with {'/'.join(place)} as "
                f"{formats[place]}, this is {format}; go on with that, or choose another --output"
            )
    return [task for task in range(new.tasks) if old.parts_of(task) != new.parts_of(task)]


def _formats(recipe: Recipe) -> dict[tuple[str, str], str]:
    """How each file is read, by folder and path."""
    return {(g.folder, file.path): g.format for g in recipe.groups for file in g.files}


def _say(value: object) -> str:
    if value is None:
        return "none"
    return " ".join(value) if isinstance(value, tuple) else str(value)


def make_folder(output: Path) -> None:
    """The folders that all parts write to."""
    try:
        for name in ("train", "valid", "tokenizer", "work/records", "work/failures", "work/logs"):
            files.make_folder(output / name)
    except OSError as error:
        raise DataError(f"--output {output}: {error}") from error
