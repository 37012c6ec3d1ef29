"""Preflight check of the data: every file of every prefix, and the tokenizer, on every node.

See `megatron_xielu.cluster.preflight`.
"""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_xielu.cluster.preflight.exchange import MIB, Board, Problem, most_common
from megatron_xielu.common import (
    data_lists,
    indexed_dataset,
    prepared_data,
    pretrained_tokenizer,
    text,
)


def prefixes(args: Namespace) -> list[str]:
    """The data prefixes of Megatron's arguments, without weights, each once.

    Raises:
        Problem: a file of arguments cannot be read, or says nothing of use.
    """
    words = []
    try:
        for argument in data_lists.ARGUMENTS:
            if value := getattr(args, argument):
                words += data_lists.words(argument, value)
    except ValueError as error:
        raise Problem(str(error)) from error
    return [word for word in dict.fromkeys(words) if not text.is_number(word)]


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
        except (OSError, ValueError) as error:
            why = str(error)
            if isinstance(error, FileNotFoundError) and (other := data_lists.what_takes(prefix)):
                why = f"{prefix} {other}"
            result["problems"].append(why if prefix in why else f"{prefix!a}: {why}")
    whole = dict.fromkeys(result["sizes"], "data")
    faults, doubts = prepared_data.look(whole, args, args.padded_vocab_size)
    result["problems"] += faults
    result["warnings"] += doubts
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
        ValueError: one is damaged.
    """
    data_file, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    with data_file.open("rb") as file:
        file.read(MIB)
    indexed_dataset.read(Path(prefix))
    return data_file.stat().st_size, index.stat().st_size


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
    if pretrained_tokenizer.is_path(name):
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
