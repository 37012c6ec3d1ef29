"""Where the text is: local or remote folders and files, and datasets of the Hugging Face Hub.

A source becomes groups of files of one format below one folder, which one datatrove reader reads.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.io import DataFolder

from megatron_xielu.data.errors import BadInputError, DataError

FORMATS = ("parquet", "jsonl", "text")
_ENDINGS = {
    "parquet": (".parquet",),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst"),
    "text": (".txt", ".txt.gz", ".txt.zst"),
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class File:
    """One input file: path below its group's folder, bytes, and what changes when it changes."""

    path: str
    size: int
    stamp: str


@dataclass(frozen=True)
class Group:
    """Files of one format below one folder, in the order in which they are used."""

    folder: str
    format: str
    files: tuple[File, ...]


def is_local(source: str) -> bool:
    """Whether reading the source needs no network."""
    return Path(source).exists() or source.startswith("file://")


def find(source: str, *, subset: str | None, format: str | None, glob: str | None) -> list[Group]:
    """The groups of one ``--source``.

    Args:
        source: local path, fsspec URL, or ``owner/name`` of a Hub dataset.
        subset: the Hub dataset's configuration; by default its first.
        format: one of `FORMATS`; by default each file's, by how its name ends.
        glob: pattern that paths below the folder must match.

    Raises:
        DataError: there is no such source, or it has no files of a known format.
        BadInputError: a file is empty.
    """
    if is_local(source) or "://" in source:
        if subset:
            raise DataError(f"--subset belongs to Hub datasets, and {source} is none")
        locations = [(_absolute(source), glob)]
    elif _HUB_NAME.fullmatch(source):
        locations = _hub_locations(source, subset)
    else:
        raise DataError(f"--source {source}: no such file or folder")
    groups: list[Group] = []
    for url, pattern in locations:
        try:
            found = _list(url, pattern)
        except Exception as error:  # every file system has exceptions of its own
            raise DataError(f"--source {source}: {url}: {_say(error)}") from error
        groups += _group(*found, format)
    if not groups:
        endings = ", ".join(ending for known in _ENDINGS.values() for ending in known)
        raise DataError(
            f"--source {source}: no files {f'match {glob!r}' if glob else f'end in {endings}'}; "
            "for others say --format, and --glob '**/*.py' for example"
        )
    return groups


def pinned(source: str, groups: Iterable[Group]) -> list[Group]:
    """The groups that an earlier start found for a Hub dataset, at the revision of that time."""
    return [group for group in groups if group.folder.startswith(f"hf://datasets/{source}@")]


def _absolute(source: str) -> str:
    return str(Path(source).absolute()) if Path(source).exists() else source


def _hub_locations(name: str, subset: str | None) -> list[tuple[str, str | None]]:
    """Folder and pattern of every data file entry that the dataset's card has for the subset.

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
    configurations = {entry["config_name"]: entry for entry in card.get("configs") or []}
    if not any("data_files" in entry for entry in configurations.values()):
        pattern = f"{subset or 'default'}/train/*.parquet"
        revision = "refs%2Fconvert%2Fparquet"
        return [(f"hf://datasets/{name}@{revision}", pattern)]
    chosen = subset or ("default" if "default" in configurations else next(iter(configurations)))
    if chosen not in configurations:
        raise DataError(f"--subset {chosen}: {name} has {', '.join(configurations)}")
    return [
        (f"hf://datasets/{name}@{info.sha}", pattern)
        for pattern in _train_patterns(configurations[chosen]["data_files"])
    ]


def _train_patterns(data_files: Any) -> list[str]:
    """Patterns of the train split in a dataset card's ``data_files``, in any of its forms."""
    if isinstance(data_files, str):
        return [data_files]
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    patterns: list[str] = []
    for entry in data_files:
        if isinstance(entry, str):
            patterns.append(entry)
        elif entry.get("split", "train") == "train":
            path = entry["path"]
            patterns += [path] if isinstance(path, str) else path
    return patterns


def _list(url: str, pattern: str | None) -> tuple[str, dict[str, dict[str, Any]]]:
    folder = DataFolder(url)
    if folder.fs.isfile(folder.path):
        parent, _, name = url.rpartition("/")
        return parent, {name: folder.fs.info(folder.path)}
    found = folder.find("", detail=True)
    return url, {path: info for path, info in found.items() if _matches(path, pattern)}


def _matches(path: str, pattern: str | None) -> bool:
    """``**/`` also matches no folder at all, and ``*`` stays within one, as in a shell."""
    if pattern is None:
        return True
    expression = fnmatch.translate(pattern.removesuffix("/"))
    expression = expression.replace(".*.*/", "(?:.*/)?").replace("(?>.*?/)", "(?:.*/)?")
    return re.match(expression, path) is not None


def _group(folder: str, found: dict[str, dict[str, Any]], format: str | None) -> Iterable[Group]:
    for known in FORMATS:
        files = tuple(
            File(path, int(info["size"]), str(_stamp(info)))
            for path, info in sorted(found.items(), key=lambda item: _order(item[0]))
            if (format == known) or (format is None and path.endswith(_ENDINGS[known]))
        )
        for file in files:
            if file.size == 0:
                raise BadInputError(f"{folder}/{file.path}: row 1: the file is empty")
        if files:
            yield Group(folder, known, files)


def _stamp(info: dict[str, Any]) -> object:
    for name in ("mtime", "ETag", "etag", "blob_id"):
        if info.get(name):
            return info[name]
    return ""


def _order(path: str) -> bytes:
    """Files are used in this order, so that a token budget takes a fair sample of them."""
    return hashlib.sha256(path.encode()).digest()


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
