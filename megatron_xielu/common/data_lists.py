"""Which data Megatron's arguments list, in the command line or in a file, and what is wrong there.

Standard library of Python 3.9 only: the plan reads them on a login node.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from shlex import quote
from typing import Any

from megatron_xielu.common import indexed_dataset, prepared_data, schema
from megatron_xielu.common.flags import flag_of
from megatron_xielu.common.schema import Count, Malformed
from megatron_xielu.common.text import is_number

FILES = ("data_args_path", "per_split_data_args_path")
ARGUMENTS = ("data_path", "train_data_path", "valid_data_path", "test_data_path", *FILES)

_FLAG = "--per-split-data-args-path"
_BY_SPLIT = ARGUMENTS[1:4]
SPLITS = ("train", "valid", "test")
_MEGATRONS_SHARES = "969,30,1"  # for SPLITS, where there is no --split


def look(
    args: Namespace, vocabulary: int | None, *, starts_here: bool = True
) -> tuple[list[str], list[str]]:
    """What is wrong with the data that the arguments list, and what may be: a line each.

    Args:
        args: of Megatron; of them `ARGUMENTS`, ``split``, ``eval_iters``, and the tokenizer's.
        vocabulary: as `prepared_data.look` takes it.
        starts_here: whether the run starts in this folder; else a relative path may be another's.
    """
    try:
        shares(args.split)
    except ValueError as error:
        return [str(error)], []
    faults: list[str] = []
    doubts: list[str] = []
    whole: dict[str, str] = {}  # flags by prefix

    def is_elsewhere(argument: str, path: str, *files: str) -> bool:
        elsewhere = not starts_here and not os.path.isabs(path)
        elsewhere = elsewhere and not any(map(os.path.exists, (path, *files)))
        if elsewhere:
            doubts.append(f"{flag_of(argument)} {path} is not here; does the run start elsewhere?")
        return elsewhere

    with contextlib.suppress(ValueError):  # of a file, which is said below
        faults += filter(None, [fault_of_validation(args)])
    for argument in ARGUMENTS:
        value = getattr(args, argument)
        # Megatron reads those of an object store itself.
        if value is None or (argument in FILES and "://" in value):
            continue
        if argument in FILES and is_elsewhere(argument, value):
            continue
        try:
            listed = words(argument, value)
        except ValueError as error:
            faults.append(str(error))
            continue
        for prefix in dict.fromkeys(listed):
            both = f"{prefix}.bin", f"{prefix}.idx"
            if is_number(prefix) or "://" in prefix or is_elsewhere(argument, prefix, *both):
                continue
            if fault := fault_of_files(argument, prefix, args.split):
                faults.append(fault)
            else:
                whole[prefix] = flag_of(argument)
    faults += filter(None, [fault_of_sources(args)])
    of_tokens = prepared_data.look(whole, args, vocabulary)
    return faults + of_tokens[0], doubts + of_tokens[1]


def words(argument: str, value: Any) -> list[str]:
    """Weights and prefixes.

    Args:
        argument: one of `ARGUMENTS`.
        value: its own: words, or the path of a file of `FILES`.

    Raises:
        ValueError: a file cannot be read, or a list makes no sense; one line that names the flag.
    """
    where = flag_of(argument)
    if argument not in FILES:
        return _blend(value, where)
    if argument == "data_args_path":
        where = f"{where} {value}"
        text = _read(value, where)
        if _is_by_split(text[:256].encode()):
            raise ValueError(f"{where} names data by split; give {_FLAG} {value}")
        return _blend(text.split(), where)
    splits = of_splits(value)
    for split in SPLITS:
        if split not in splits:  # which Megatron asks for
            raise ValueError(f"{where} {value} has no {split!r}; where there is none, write null")
    return [word for listed in splits.values() for word in listed]


def of_splits(path: str) -> dict[str, list[str]]:
    """Weights and prefixes by split, of those in a file for ``--per-split-data-args-path``.

    Raises:
        ValueError: as `words`.
    """
    where = f"{_FLAG} {path}"
    text = _read(path, where)
    try:
        splits = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers with too many digits
        raise ValueError(
            f"{where} is no JSON: {error}; --data-args-path takes a list of prefixes"
        ) from None
    if not isinstance(splits, dict):
        raise ValueError(f"{where} is not a JSON object of lists")
    return {
        split: [] if splits[split] is None else _blend(splits[split], f"{where}: {split!r}")
        for split in SPLITS
        if split in splits
    }


def prepared_with(
    data_args: str, prefixes: list[str]
) -> tuple[Path, list[prepared_data.Tokenizer]] | None:
    """The first folder that data were prepared in, and their tokenizer by all its names; None where
    there is not one only.

    Args:
        data_args: a path for one of `FILES`, or "".
        prefixes: for ``--data-path``, where there is no ``data_args``.
    """
    argument = FILES[data_args.endswith(".json")]
    try:
        listed = words(argument, data_args) if data_args else words("data_path", prefixes)
    except ValueError:  # which the run is refused for
        return None
    listed = [word for word in listed if not is_number(word)]
    described = prepared_data.by_folder(listed)
    made_with = [manifest.tokenizer for manifest, _ in described.values()]
    if len({(tokenizer.sha256, tokenizer.vocab_size) for tokenizer in made_with}) != 1:
        return None
    if sum(len(shards) for _, shards in described.values()) < len(set(listed)):
        return None
    return next(iter(described)), made_with


def sequences_per_dataset(path: str | None) -> dict[str, tuple[int, int]] | None:
    """How many sequences and documents each data prefix has, of ``--per-dataset-sequences-path``.

    Raises:
        ValueError: naming the flag and the file.
    """
    if path is None:
        return None
    try:
        return schema.load(dict[str, tuple[Count, Count]], Path(path))
    except OSError as error:
        why = f"{path}: {error.strerror}"
    except Malformed as error:
        why = str(error)
    raise ValueError(f"--per-dataset-sequences-path {why}")


def fault_of_sources(args: Namespace) -> str:
    """What to change where Megatron passes over a list of data, or fails at the shares of one when
    it builds the data sets; else "".
    """
    sources = [
        [flag_of(name) for name in names if getattr(args, name) is not None]
        for names in (("data_path",), ("data_args_path",), _BY_SPLIT, ("per_split_data_args_path",))
    ]
    given = [flags[0] for flags in sources if flags]
    if len(given) > 1:
        return f"give one of {' and '.join(given)}: Megatron takes its data from one of them only"
    if given == ["--data-args-path"] and args.split is None:
        return f"--data-args-path needs --split, such as {_MEGATRONS_SHARES}"
    if (sources[2] or sources[3]) and args.split is not None:
        return f"--split {args.split} does not go with {given[0]}; drop it"
    return ""


def fault_of_validation(args: Namespace) -> str:
    """What to change where nothing is left to validate on, at which Megatron 0.19 fails when it
    first does; else "".

    Raises:
        ValueError: as `of_splits` and `shares`.
    """
    if not (args.eval_iters or getattr(args, "full_validation", False)):
        return ""
    path = args.per_split_data_args_path
    if path is not None:
        there, flag = "://" in path or bool(of_splits(path).get("valid", True)), f"{_FLAG} {path}"
    elif args.train_data_path is not None:
        there, flag = bool(args.valid_data_path), "--train-data-path without --valid-data-path"
    else:
        there, flag = shares(args.split)[1] > 0, f"--split {args.split}"
    return "" if there else f"{flag}: there is nothing to validate on; add --eval-iters 0"


def has_test(args: Namespace) -> bool:
    """Whether Megatron builds a test set.

    Raises:
        ValueError: as `of_splits` and `shares`.
    """
    path = args.per_split_data_args_path
    if path is not None:
        return "://" not in path and bool(of_splits(path).get("test"))
    if args.train_data_path is not None:
        return args.test_data_path is not None
    return shares(args.split)[2] > 0


def shares(split: str | None) -> list[float]:
    """Which part of the data each of `SPLITS` gets, as Megatron reads ``--split``.

    Raises:
        ValueError: naming the flag.
    """
    try:
        found = [float(share) for share in re.findall("[.0-9]+", split or _MEGATRONS_SHARES)]
    except ValueError:
        found = []
    if len(found) > len(SPLITS) or not sum(found) > 0:
        raise ValueError(
            f"--split must be three shares, such as {_MEGATRONS_SHARES}, not {ascii(split)[:40]}"
        )
    return [share / sum(found) for share in (*found, 0.0, 0.0)[: len(SPLITS)]]


def fault_of_files(argument: str, prefix: str, split: str | None) -> str:
    """What is wrong with the files of a prefix, or with a part of them; else "".

    Args:
        argument: one of `ARGUMENTS`, which lists it.
        prefix: of ``.bin`` and ``.idx``.
        split: the argument of this name, which `shares` takes.
    """
    where = f"{flag_of(argument)} {prefix}"
    try:
        sequences = indexed_dataset.read(Path(prefix)).sequences
    except FileNotFoundError as error:
        other = what_takes(prefix)
        return f"{where} {other}" if other else f"{where}: {error.filename} does not exist"
    except OSError as error:
        return f"{where}: {error.filename} cannot be read: {error.strerror}"
    except indexed_dataset.Damaged as error:
        return f"{where}: {error}"
    if not sequences:
        return f"{where}: {prefix}.idx has no sequences"
    if argument not in ("data_path", "data_args_path"):
        return ""
    ends = [0.0, *accumulate(shares(split))]
    # Rounded as Megatron does, which looks for ever for a token in a part without a sequence.
    for i, part in enumerate(SPLITS):
        first, last = ends[i : i + 2]
        if first < last and round(first * sequences) == round(last * sequences):
            return (
                f"--split {split or _MEGATRONS_SHARES}: of the {sequences} sequences of {prefix} "
                f"none is left for {part}; give it a larger share, or 0"
            )
    return ""


def _blend(listed: Any, where: str) -> list[str]:
    """`get_blend_from_list` of Megatron (megatron/core/datasets/utils.py) takes it."""
    listed = listed.split() if isinstance(listed, str) else listed
    if not isinstance(listed, (list, tuple)) or not listed:
        raise ValueError(f"{where} is {ascii(listed)[:40]}, not a list of prefixes of files")
    weights: Sequence[Any] = listed[::2] if len(listed) % 2 == 0 else ()
    if not any(is_number(str(weight)) for weight in weights):
        weights = ()
    prefixes = listed[1::2] if weights else listed
    for weight in weights:
        # A weight may be a number of JSON, too.
        if not (is_number(str(weight)) and 0 < float(weight) < float("inf")):
            raise ValueError(
                f"{where}: {ascii(weight)[:40]} is no weight; one must stand before each prefix, "
                "or before none"
            )
    for prefix in prefixes:
        if not isinstance(prefix, str) or "\0" in prefix:
            raise ValueError(f"{where}: {ascii(prefix)[:40]} is no prefix of files")
    manifests = (prepared_data.find(Path(p)) for p in dict.fromkeys(prefixes) if not _is_prefix(p))
    whole = [manifest.parent for manifest in manifests if manifest]
    if len(whole) > 1:
        lists = " ".join(str(folder / "data_args.txt") for folder in whole)
        raise ValueError(
            f"{where}: {' and '.join(map(str, whole))} are folders of prepared data; make one list "
            f"of theirs, cat {lists} > list.txt, and give --data-args-path ./list.txt"
        )
    return [str(word) for word in listed]


def what_takes(path: str) -> str:
    """Which flag takes what is no prefix of files, in words; "" where nothing is known of it."""
    if (other := _no_list(path)) or not os.path.isfile(path):
        return other
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if _is_by_split(file.read(256)):
            return f"is no prefix of data; if it names some by split, give {_FLAG} {path}"
    return f"is no prefix of data; if it lists some, give --data-args-path {path}"


def _no_list(path: str) -> str:
    if _is_prefix(path):
        return f"is a prefix of data; give --data-path {path}"
    if whole := prepared_data.find(Path(path)):
        return (
            f"is prepared data; give {_FLAG} {quote(str(whole.with_name(prepared_data.BY_SPLIT)))}"
        )
    if whole := prepared_data.whole_of(Path(path)):
        return (
            f"is a part of prepared data; give {_FLAG} {quote(str(whole / prepared_data.BY_SPLIT))}"
        )
    if os.path.isdir(path):
        return (
            "is a folder, and no prefix of .bin and .idx; of a folder of texts, "
            f"tools/prepare_data.py --source {quote(path)} makes some"
        )
    prefix, suffix = os.path.splitext(path)
    if suffix in (".bin", ".idx"):
        return f"is a file of data; give its prefix, --data-path {prefix}"
    return ""


def _is_prefix(path: str) -> bool:
    """It may be a folder, too: Megatron's cache."""
    return all(os.path.isfile(path + suffix) for suffix in (".bin", ".idx"))


def _is_by_split(start: bytes) -> bool:
    return start.lstrip().startswith(b"{")


def _read(path: str, where: str) -> str:
    if other := _no_list(path):
        raise ValueError(f"{where} {other}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{where} is no text: not UTF-8") from None
    except FileNotFoundError:
        raise ValueError(f"{where} does not exist") from None
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
