"""Where the text is: local or remote folders and files, and datasets of the Hugging Face Hub.

A source becomes groups of files of one format below one folder, which one datatrove reader reads.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datatrove.io import DataFolder
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

from megatron_xielu.common import prepared_data, schema, text
from megatron_xielu.common.schema import Count, Malformed
from megatron_xielu.data import credentials
from megatron_xielu.data.errors import BadInputError, DataError

FORMATS = ("parquet", "jsonl", "text")
_ENDINGS = {
    "parquet": (".parquet",),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst"),
    "text": (".txt", ".txt.gz", ".txt.zst"),
}
_COMPRESSED = (".gz", ".zst")
_LARGE = 5  # parts; files up to that many stay whole
_SHOWN = 5  # endings of files that are left out
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class File:
    """One input file: path below its group's folder, bytes, and what changes when it changes."""

    path: str
    size: Count
    stamp: str


@dataclass(frozen=True)
class Group:
    """Files of one format below one folder, in the order in which they are used."""

    folder: str
    format: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class Part:
    """Of a file, the rows that begin from byte ``start`` on and before ``end``, or its own end."""

    file: File
    start: int = 0
    end: int | None = None


def is_large(file: File, part_bytes: int) -> bool:
    """Whether a file is cut, where that can be."""
    return file.size > _LARGE * part_bytes


def can_be_cut(group: Group, file: File) -> bool:
    """Whether rows are found from the middle of the file: of plain .jsonl and of .parquet. A server
    of http may send a file from its beginning only."""
    rows = group.format == "parquet" or (
        group.format == "jsonl" and infer_compression(file.path) is None
    )
    return rows and not group.folder.startswith("http")


def parts(group: Group, part_bytes: int | None) -> list[Part]:
    """What tasks read, in the order in which it is used.

    Args:
        group: the files.
        part_bytes: where a file is large, its parts are of at most so many bytes; None: no parts.
    """
    found = []
    for file in group.files:
        count = 1
        if part_bytes and is_large(file, part_bytes) and can_be_cut(group, file):
            count = math.ceil(file.size / part_bytes)
        cuts = [file.size * i // count for i in range(1, count)]
        found += [Part(file, *span) for span in zip([0, *cuts], [*cuts, None], strict=True)]
    # Parts, too, so that a token budget takes some of every large file.
    return sorted(
        found, key=lambda p: _order(f"{p.file.path} {p.start}" if p.start else p.file.path)
    )


@dataclass(frozen=True)
class _DataFiles:
    """Of a dataset card: files of a split."""

    path: str | list[str]
    split: str = "train"


@dataclass(frozen=True)
class _Configuration:
    """Of a dataset card: a subset, with its files in one of the forms that the Hub knows."""

    config_name: str
    data_files: str | dict[str, str | list[str]] | list[str | _DataFiles] | None = None


def is_local(source: str) -> bool:
    """Whether reading the source needs no network."""
    return os.path.lexists(source) or source.startswith("file://")


def open_folder(folder: str) -> DataFolder:
    """A group's folder. In a local one's name ``::`` is no chain of file systems, as in a URL."""
    fs = LocalFileSystem() if folder.startswith("/") else None
    return DataFolder(credentials.real(folder), fs=fs)


def find(
    source: str, *, subset: str | None, format: str | None, glob: Sequence[str] | None
) -> list[Group]:
    """The groups of one ``--source``; says which of its files are left out.

    Args:
        source: local path, fsspec URL, or ``owner/name`` of a Hub dataset.
        subset: the Hub dataset's configuration; by default its first.
        format: one of `FORMATS`; by default each file's, by how its name ends.
        glob: patterns, of which paths below the folder must match one.

    Raises:
        DataError: there is no such source, or it has no files of a known format.
        BadInputError: a file is empty, or none, or its name cannot be used.
    """
    source = credentials.hide(source)
    if is_local(source) or "://" in source:
        if whole := prepared_data.whole_of(Path(source)):
            raise DataError(f"--source {source} is a part of the prepared data in {whole}")
        if subset:
            raise DataError(f"--subset belongs to Hub datasets, and {source} is none")
        locations: list[tuple[str, Sequence[str] | None]] = [(_absolute(source), glob)]
    elif _HUB_NAME.fullmatch(source):
        locations = _hub_locations(source, subset)
    else:
        raise DataError(f"--source {source}: no such file or folder")
    groups: list[Group] = []
    there: set[str] = set()
    matching: set[str] = set()
    for url, patterns in locations:
        try:
            folder, every = _list(url)
            # A file is named itself, whatever the patterns for folders are.
            wanted = patterns if folder == url else None
            found = {path: info for path, info in every.items() if _matches(path, wanted)}
            there |= every.keys()
            matching |= found.keys()
            for group in groups:  # patterns of a dataset's card may overlap
                found = {path: found[path] for path in found.keys() - {f.path for f in group.files}}
            groups += _group(folder, found, format)
        except DataError:
            raise
        except Exception as error:  # every file system has exceptions of its own
            raise DataError(f"--source {source}: {url}: {_say(error)}") from error
    taken = {file.path: group.format for group in groups for file in group.files}
    if not there:
        raise DataError(f"--source {source}: it has no files")
    if groups and not any(file.size for group in groups for file in group.files):
        raise DataError(f"--source {source}: its files are empty")
    if not groups:
        words = ["no files"]
        if asked := " ".join(pattern for _, patterns in locations for pattern in patterns or ()):
            words.append(f"that match {asked}" if matching else f"match {asked}")
        if matching:
            endings = (ending for known in _ENDINGS.values() for ending in known)
            words.append(f"end in {', '.join(endings)}")
        raise DataError(
            f"--source {source}: {' '.join(words)}; there are "
            f"{_say_left_out(matching or there, {}, format)}"
        )
    # Of a dataset the card says which files are data.
    candidates = there if locations[0][1] is glob else matching
    if left_out := candidates - taken.keys():
        print(
            f"{source}: {len(taken)} of {len(candidates)} files are taken, not "
            f"{_say_left_out(left_out, taken, format)}",
            file=sys.stderr,
        )
    return groups


def _say_left_out(paths: Iterable[str], taken: dict[str, str], format: str | None) -> str:
    """How many files of each ending, and the flags that take them beside those ``taken``."""
    endings = Counter(map(_ending, sorted(paths))).most_common()
    shown = [f"{number} {ending or 'without an ending'}" for ending, number in endings[:_SHOWN]]
    if more := sum(number for _, number in endings[_SHOWN:]):
        shown.append(f"{more} others")
    said = ", ".join(shown)
    if format:
        return f"{said}; --glob says which"
    together = set(taken.values()) <= {"text"}
    apart = "into an --output of their own by this one's --tokenizer"
    wanted = dict.fromkeys([*(map(_ending, taken) if together else ()), *dict(endings[:_SHOWN])])
    patterns = [f"'**/*{ending}'" for ending in wanted if ending]
    return (
        f"{said}; as plain text{'' if together else f', {apart}'}: "
        + " ".join(["--format text", *(["--glob", *patterns] if patterns else [])])
        + (" (without --glob every file)" if "" in wanted and patterns else "")
    )


def _ending(path: str) -> str:
    """Of a file's name, with that of its compression: ``.md.gz``."""
    endings = Path(path).suffixes
    return "".join(endings[-2 if endings[-1:] and endings[-1] in _COMPRESSED else -1 :])


def pinned(source: str, groups: Iterable[Group]) -> list[Group]:
    """The groups that an earlier start found for a Hub dataset, at the revision of that time."""
    return [group for group in groups if group.folder.startswith(f"hf://datasets/{source}@")]


def refuse_twice(groups: Iterable[Group]) -> None:
    """Raise a DataError that names a file which is given twice, by whatever names."""
    seen: dict[str, str] = {}
    for group in groups:
        folder = open_folder(group.folder)
        for file in group.files:
            name = f"{folder.path if folder.is_local() else group.folder}/{file.path}"
            same = os.path.realpath(name) if folder.is_local() else name
            if same in seen:
                other = "" if seen[same] == name else f", also as {seen[same]}"
                raise DataError(f"--source: {name} is given twice{other}; leave one out")
            seen[same] = name


def _absolute(source: str) -> str:
    return str(Path(source).absolute()) if os.path.lexists(source) else source


def _hub_locations(name: str, subset: str | None) -> list[tuple[str, Sequence[str] | None]]:
    """Folder and patterns of every data file entry that the dataset's card has for the subset.

    Datasets without such entries have the Hub's own conversion to parquet.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(name)
    except Exception as error:
        raise DataError(
            f"--source {name}: no such local file or folder, and the Hub says: {_say(error)}"
        ) from error
    card: Any = info.card_data or {}
    try:
        entries = schema.check(list[_Configuration], card.get("configs") or [], "configs")
    except Malformed as error:
        raise DataError(f"--source {name}: its card cannot be used: {error}") from None
    configurations = {entry.config_name: entry.data_files for entry in entries}
    if not any(data_files is not None for data_files in configurations.values()):
        pattern = f"{subset or 'default'}/train/*.parquet"
        revision = "refs%2Fconvert%2Fparquet"
        return [(f"hf://datasets/{name}@{revision}", [pattern])]
    chosen = subset or ("default" if "default" in configurations else next(iter(configurations)))
    if chosen not in configurations:
        raise DataError(f"--subset {chosen}: {name} has {', '.join(configurations)}")
    return [
        (f"hf://datasets/{name}@{info.sha}", [pattern])
        for pattern in _train_patterns(configurations[chosen] or [])
    ]


def _train_patterns(data_files: str | dict | list) -> list[str]:
    """Patterns of the train split in a dataset card's ``data_files``, in any of its forms."""
    if isinstance(data_files, str):
        return [data_files]
    if isinstance(data_files, dict):
        data_files = [_DataFiles(path, split) for split, path in data_files.items()]
    patterns: list[str] = []
    for entry in data_files:
        if isinstance(entry, str):
            patterns.append(entry)
        elif entry.split == "train":
            patterns += [entry.path] if isinstance(entry.path, str) else entry.path
    return patterns


def _list(url: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The folder, and all that is below it; of a file, that file."""
    folder = open_folder(url)
    if folder.fs.isfile(folder.path):
        parent, name = credentials.hide_parent(url)
        return parent or "/", {name: folder.fs.info(folder.path)}
    if folder.is_local():
        found = _list_local(folder.path)
    else:
        found = folder.find("", detail=True)
        if not found:
            folder.info("")  # says so where there is nothing at all
    return url, found


def _list_local(folder: str) -> dict[str, dict[str, Any]]:
    """All that is below a folder. fsspec passes over what cannot be listed; here it is an error."""

    def stop(error: OSError) -> None:
        raise error

    if not os.path.isdir(folder):
        raise DataError(f"--source {folder}: it is {_kind(folder)}, and neither file nor folder")
    found = {}
    for place, folders, names in os.walk(folder, onerror=stop):
        for name in folders:
            if os.path.islink(linked := os.path.join(place, name)):
                print(
                    f"{linked}: a linked folder is not read; give it to --source", file=sys.stderr
                )
        for name in names:
            path = os.path.join(place, name)
            info = os.lstat(path)
            # A link is as new as itself or what it leads to.
            target = os.stat(path) if os.path.exists(path) else info
            found[os.path.relpath(path, folder)] = {
                "size": target.st_size,
                "mtime": max(info.st_mtime, target.st_mtime),
                "type": "file" if os.path.isfile(path) else _kind(path),
            }
    return found


def _kind(path: str) -> str:
    return "a pipe, socket or device" if os.path.exists(path) else "a link to nothing"


def _matches(path: str, patterns: Sequence[str] | None) -> bool:
    """Whether it matches one of them. ``**/`` also matches no folder at all, as in a shell."""
    return patterns is None or any(_expression(pattern).match(path) for pattern in patterns)


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    expression = fnmatch.translate(pattern.removesuffix("/"))
    expression = expression.replace(".*.*/", "(?:.*/)?").replace("(?>.*?/)", "(?:.*/)?")
    return re.compile(expression)


def _group(folder: str, found: dict[str, dict[str, Any]], format: str | None) -> Iterable[Group]:
    for known in FORMATS:
        files = tuple(
            File(path, -1 if info["size"] is None else int(info["size"]), str(_stamp(info)))
            for path, info in sorted(found.items(), key=lambda item: _order(item[0]))
            if (format == known) or (format is None and path.endswith(_ENDINGS[known]))
        )
        for file in files:
            name = f"{folder}/{file.path}"
            if name.splitlines() != [name] or not text.is_utf8(name):
                raise BadInputError(
                    f"{name!a}: the name has line breaks or is not UTF-8: rename it"
                )
            kind = found[file.path].get("type", "file")
            if kind != "file":
                raise BadInputError(f"{name}: it is {kind}: replace it by a file, or leave it out")
            if file.size < 0:
                raise BadInputError(f"{name}: its server does not say its size: download it first")
            # An empty text is one; a table or a line of JSON is missing.
            if file.size == 0 and known != "text":
                raise BadInputError(f"{name}: row 1: the file is empty")
        if files:
            yield Group(folder, known, files)


def _stamp(info: dict[str, Any]) -> object:
    for name in ("mtime", "ETag", "etag", "blob_id"):
        if info.get(name):
            return info[name]
    return ""


def _order(path: str) -> bytes:
    """Files are used in this order, so that a token budget takes a fair sample of them."""
    return hashlib.sha256(path.encode(errors="surrogateescape")).digest()


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {text.one_line(error)}"[:300]
