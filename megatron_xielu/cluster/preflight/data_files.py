"""Preflight check of the data: every file of every prefix, and the tokenizer, on every node.

See `megatron_xielu.cluster.preflight`.
"""

from __future__ import annotations

import os
import struct
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xielu.cluster.preflight.exchange import MIB, Board, Problem, most_common
from megatron_xielu.common import schema, text

# Of Megatron's .idx files (megatron/core/datasets/indexed_dataset.py): after the magic, version,
# dtype code, sequences, documents; then int32 lengths and int64 offsets of all sequences, and int64
# document ends; a multimodal one has an int8 for each sequence, too.
_IDX_MAGIC, _IDX_HEADER = b"MMIDIDX\x00\x00", "<QBQQ"
_IDX_ELEMENT_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}


@dataclass(frozen=True)
class _Splits:
    """A file for ``--per-split-data-args-path``: prefixes of each split, weights may precede."""

    train: list[str | float] | str | None
    valid: list[str | float] | str | None
    test: list[str | float] | str | None


def prefixes(args: Namespace) -> list[str]:
    """The data prefixes of Megatron's arguments, without weights, each once.

    Raises:
        Problem: a file of arguments cannot be read.
    """
    words = [*args.data_path, *args.train_data_path, *args.valid_data_path, *args.test_data_path]
    try:
        if args.data_args_path:
            words += _text(Path(args.data_args_path)).split()
        if args.per_split_data_args_path:
            splits = schema.load(_Splits, Path(args.per_split_data_args_path))
            for value in (splits.train, splits.valid, splits.test):
                words += value.split() if isinstance(value, str) else map(str, value or [])
    except (OSError, ValueError) as error:
        raise Problem(
            f"cannot read the list of the data: {error}; write it as Megatron's --data-args-path "
            'or --per-split-data-args-path: "0.5 prefix 0.5 prefix", of train, valid and test'
        ) from error
    return [word for word in dict.fromkeys(words) if not text.is_number(word)]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text") from None


def data(board: Board, args: Namespace) -> None:
    """Every .bin and .idx readable, whole and of the same size on every node; so the tokenizer."""
    found = board.ask("data", lambda: _data_here(args), only=board.one_per_node())
    sizes = {
        (rank, prefix): size
        for rank, node in found.items()
        for prefix, size in node["sizes"].items()
    }
    for prefix in dict.fromkeys(prefix for _, prefix in sizes):
        values = {rank: sizes[rank, prefix] for rank in found if (rank, prefix) in sizes}
        usual = most_common(values)
        for rank, value in values.items():
            if value != usual:
                board.fail(
                    "data",
                    f"{prefix}: .bin and .idx have {value[0]} and {value[1]} bytes, elsewhere "
                    f"{usual[0]} and {usual[1]}; copy the data again",
                    rank=rank,
                )
    for rank, node in found.items():
        for line in node["problems"]:
            board.fail("data", line, rank=rank)
        for line in node["warnings"]:
            board.warn("data", line, rank=rank)
    if not found:
        return
    some = found[min(found)]
    total = sum(size[0] for size in some["sizes"].values())
    tokenizer = f", tokenizer {args.tokenizer_model}" if args.tokenizer_model else ""
    if some["sizes"] or tokenizer:
        files = f"{len(some['sizes'])} prefixes, {text.size(total)}{tokenizer}"
        board.done("data", f"{files}, readable on {len(found)} nodes")
    else:
        board.done("data", "skipped: no data arguments")


def _data_here(args: Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"sizes": {}, "problems": [], "warnings": []}
    for prefix in prefixes(args):
        if "://" in prefix:
            result["warnings"].append(f"{prefix}: object storage, not checked")
            continue
        try:
            result["sizes"][prefix] = dataset_sizes(prefix)
        except (OSError, ValueError, Problem) as error:  # ValueError: a NUL in the name
            why = str(error)
            result["problems"].append(why if prefix in why else f"{prefix!a}: {why}")
    if args.tokenizer_model:
        try:
            warning = tokenizer_warning(args.tokenizer_model)
        except (OSError, Problem) as error:
            result["problems"].append(f"tokenizer {args.tokenizer_model}: {error}")
        else:
            result["warnings"] += [warning] if warning else []
    return result


def dataset_sizes(prefix: str) -> tuple[int, int]:
    """Bytes of ``prefix``.bin and ``prefix``.idx, which must fit each other.

    Raises:
        OSError: one cannot be read.
        Problem: one is damaged.
    """
    data_file, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    data_size, index_size = data_file.stat().st_size, index.stat().st_size
    with data_file.open("rb") as file:
        file.read(MIB)
    again = "copy it again, or preprocess the data again"
    with index.open("rb") as file:
        magic = file.read(len(_IDX_MAGIC))
        if magic != _IDX_MAGIC:
            raise Problem(
                f"{index} is damaged: it starts with {magic!r}, not {_IDX_MAGIC!r}; {again}"
            )
        header = file.read(struct.calcsize(_IDX_HEADER))
        if len(header) < struct.calcsize(_IDX_HEADER):
            raise Problem(f"{index} is damaged: it ends in its header; {again}")
        version, code, sequences, documents = struct.unpack(_IDX_HEADER, header)
        if version != 1 or code not in _IDX_ELEMENT_SIZES:
            raise Problem(f"{index} is damaged: version {version}, type {code}; {again}")
        start = file.tell()
        expected = start + 12 * sequences + 8 * documents
        if index_size not in (expected, expected + sequences):
            raise Problem(f"{index} is damaged: {index_size} bytes instead of {expected}; {again}")
        if sequences:
            file.seek(start + 4 * (sequences - 1))
            (length,) = struct.unpack("<i", file.read(4))
            file.seek(start + 4 * sequences + 8 * (sequences - 1))
            (offset,) = struct.unpack("<q", file.read(8))
            if offset < 0 or length < 0:
                raise Problem(
                    f"{index} is damaged: it ends with {length} tokens at byte {offset}; {again}"
                )
            expected = offset + length * _IDX_ELEMENT_SIZES[code]
            if data_size < expected:
                raise Problem(f"{data_file} is damaged: {data_size} bytes of {expected}; {again}")
    return data_size, index_size


def tokenizer_warning(name: str) -> str:
    """Look for a tokenizer: a file, a folder or a Hugging Face name; "" or what is doubtful.

    Raises:
        OSError: it is there and cannot be read.
        Problem: it is not there, and this node may not download it.
    """
    path = Path(name)
    if path.is_file():
        with path.open("rb") as file:
            file.read(1)
        return ""
    if path.is_dir():
        if not _has_tokenizer(path):
            raise Problem("no tokenizer*.json or tokenizer.model in that folder")
        return ""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise Problem("no such file or folder")
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    snapshots = cache / f"models--{name.replace('/', '--')}" / "snapshots"
    if snapshots.is_dir() and any(_has_tokenizer(folder) for folder in snapshots.iterdir()):
        return ""
    fix = "download it into a shared HF_HOME before the run (hf download)"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise Problem(f"not in {cache}, and HF_HUB_OFFLINE is set; {fix}")
    return f"tokenizer {name} is not in {cache}: every node would download it; {fix}"


def _has_tokenizer(folder: Path) -> bool:
    for file in folder.glob("tokenizer*"):
        with file.open("rb") as stream:
            stream.read(1)
        return True
    return False
