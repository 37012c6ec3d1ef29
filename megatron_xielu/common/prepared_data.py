"""Whether data fit the model's vocabulary and tokenizer: by the manifest of tools/prepare_data.py,
or, of other data, by some of their tokens.

Standard library of Python 3.9 only: the plan asks on a login node.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xielu.common import files, indexed_dataset, schema
from megatron_xielu.common.schema import Count, Malformed, Positive

MANIFEST = "manifest.json"  # what tools/prepare_data.py writes last
BY_SPLIT = "per_split_data_args.json"


@dataclass(frozen=True)
class Tokenizer:
    """What the data were encoded with."""

    name: str  # on the Hub, or of its file
    sha256: str  # of its tokenizer.json
    vocab_size: Positive  # one more than the largest id


@dataclass(frozen=True)
class Shard:
    """A ``.bin`` and its ``.idx``; their prefix is below the folder."""

    prefix: str
    split: str
    text_bytes: Count


@dataclass(frozen=True)
class Manifest:
    """What others than --verify need of it."""

    shards: list[Shard]
    tokenizer: Tokenizer


def find(path: Path) -> Path | None:
    """The manifest that this names, itself or by its folder."""
    path = path / MANIFEST if path.is_dir() else path
    return path if path.name == MANIFEST and path.is_file() else None


def read(path: Path) -> Manifest:
    """A manifest.

    Raises:
        ValueError: it is none, or damaged; names the file.
    """
    try:
        return schema.load(Manifest, path)
    except Malformed as error:
        raise ValueError(f"{error}; is it of tools/prepare_data.py?") from None


def by_folder(prefixes: Iterable[str]) -> dict[Path, tuple[Manifest, dict[str, Shard]]]:
    """The prefixes that manifests describe, and what they say of each, by the manifest's folder."""
    manifests: dict[Path, tuple[Manifest, dict[str, Shard]] | None] = {}
    found: dict[Path, tuple[Manifest, dict[str, Shard]]] = {}
    for prefix in prefixes:
        folder, name = Path(prefix).parent.parent, "/".join(Path(prefix).parts[-2:])
        if folder not in manifests:
            try:
                manifest = read(folder / MANIFEST)
                manifests[folder] = manifest, {shard.prefix: shard for shard in manifest.shards}
            except (OSError, ValueError):  # none, or some other file of this name
                manifests[folder] = None
        if (known := manifests[folder]) and name in known[1]:
            found.setdefault(folder, (known[0], {}))[1][prefix] = known[1][name]
    return found


def look(
    prefixes: Mapping[str, str], args: Namespace, vocabulary: int | None
) -> tuple[list[str], list[str]]:
    """What is wrong between data and model, and what may be: lines that name flag and fix.

    Args:
        prefixes: of ``.bin``/``.idx`` files, with the flag of each.
        args: ``tokenizer_type`` and ``tokenizer_model`` of Megatron's.
        vocabulary: entries of the model's, with those that pad it; None if that is not known.
    """
    faults: list[str] = []
    doubts: list[str] = []
    described = by_folder(prefixes)
    for folder, (manifest, some) in described.items():
        first = next(iter(some))
        where, size = f"{prefixes[first]} {first}", manifest.tokenizer.vocab_size
        if vocabulary is not None and size > vocabulary:
            faults.append(
                f"{where}: its tokens go up to {size - 1} ({folder / MANIFEST}), the model's "
                f"vocabulary has {vocabulary} entries; {_fix(folder, size)}"
            )
        else:
            fault, doubt = compare_tokenizers(where, folder, manifest.tokenizer, args)
            faults += filter(None, [fault])
            doubts += filter(None, [doubt])
    if vocabulary is None:
        return faults, doubts
    known = {prefix for _, some in described.values() for prefix in some}
    for prefix in (prefix for prefix in prefixes if prefix not in known):
        try:
            least, largest = indexed_dataset.sample(Path(prefix))
        except (OSError, indexed_dataset.Damaged):  # which others look for
            continue
        where = f"{prefixes[prefix]} {prefix}: {prefix}.bin"
        if fault := fault_of_tokens(where, least, largest, vocabulary, _fix()):
            return [*faults, fault], doubts  # of hundreds, one will do
    return faults, doubts


def fault_of_tokens(where: str, least: float, largest: float, vocabulary: int, fix: str) -> str:
    """What is wrong with data that have tokens from one to the other; "" if nothing."""
    if least >= 0 and largest < vocabulary:
        return ""
    return (
        f"{where} has token {least if least < 0 else largest}, the model's vocabulary only "
        f"{vocabulary} entries; {fix}"
    )


def compare_tokenizers(
    where: str, folder: Path, made_with: Tokenizer, args: Namespace
) -> tuple[str, str]:
    """What is wrong, and what is doubtful, about a run with another tokenizer than its data's.

    Args:
        where: the flag and the prefix.
        folder: of the manifest.
        made_with: of the manifest.
        args: ``tokenizer_type`` and ``tokenizer_model`` of Megatron's.
    """
    kind, name = (
        getattr(args, argument, None) for argument in ("tokenizer_type", "tokenizer_model")
    )
    if (kind or "").startswith("Null") or (kind is None and name is None):
        return "", ""  # names none
    if name is not None and (name == made_with.name and not os.path.exists(name)):
        return "", ""
    kept = folder / "tokenizer" / "tokenizer.json"
    if name is not None and os.path.exists(name):
        given = Path(name, "tokenizer.json") if os.path.isdir(name) else Path(name)
        try:
            if files.sha256(given) == made_with.sha256:
                return "", ""
        except OSError:
            pass
        here, there = _meanings(given), _meanings(kept)
        other = next((i for i, token in there.items() if here.get(i) != token), None)
        if other is not None and here:
            means = ascii(here[other]) if other in here else "none"
            return (
                f"{where}: token {other} is {there[other]!a} in these data, and {means} in "
                f"--tokenizer-model {name}; {_fix(folder)}"
            ), ""
        if here and there:
            return "", ""
    return "", (
        f"{where}: made with the tokenizer {made_with.name!r}, and trained with "
        f"{name or kind}; if that gives other tokens, {_fix(folder)}"
    )


def _fix(folder: Path | None = None, size: int | None = None) -> str:
    """What to change, in words of Megatron's flags and of the launcher's variables."""
    tokenizer = f"--tokenizer-model {folder}/tokenizer" if folder else "the data's tokenizer"
    if folder and not size:
        return f"give {tokenizer} (TOKENIZER of pretrain.sh)"
    entries = f"{size} or more" if size else "more"
    return (
        f"give {tokenizer} and --padded-vocab-size {entries} (TOKENIZER and PADDED_VOCAB_SIZE of "
        "pretrain.sh)"
    )


def _meanings(path: Path) -> dict[int, str]:
    """Which token each id of a tokenizer.json is; none of what cannot be read as one."""
    try:
        found: Any = schema.read_json(path)
        vocabulary = found["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram's, with scores
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        meanings = {int(i): str(token) for token, i in vocabulary.items()}
        return {**meanings, **{int(t["id"]): str(t["content"]) for t in found["added_tokens"]}}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
