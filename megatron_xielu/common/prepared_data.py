"""Whether data fit the model's vocabulary and tokenizer: by the manifest of tools/prepare_data.py,
or, of other data, by some of their tokens.

Standard library of Python 3.9 only: the plan asks on a login node.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from megatron_xielu.common import files, indexed_dataset, schema
from megatron_xielu.common.schema import Count, Malformed, Positive

MANIFEST = "manifest.json"  # what tools/prepare_data.py writes last
BY_SPLIT = "per_split_data_args.json"
PARTS = ("train", "valid", "tokenizer", "work")


@dataclass(frozen=True)
class Tokenizer:
    """What the data were encoded with."""

    name: str  # on the Hub, or of its file
    sha256: str  # of its tokenizer.json
    vocab_size: Positive  # one more than the largest id
    eod_id: Count


@dataclass(frozen=True)
class Shard:
    """A ``.bin`` and its ``.idx``; their prefix is below the folder."""

    prefix: str
    split: str
    text_bytes: Count
    tokens: Count = 0


@dataclass(frozen=True)
class Manifest:
    """What others than --verify need of it."""

    shards: list[Shard]
    tokenizer: Tokenizer


def find(path: Path) -> Path | None:
    """The manifest that this names, itself or by its folder."""
    path = path / MANIFEST if os.path.isdir(path) else path
    return path if path.name == MANIFEST and os.path.isfile(path) else None


def whole_of(path: Path) -> Path | None:
    """The prepared folder that this is a part of."""
    folder = path.absolute().parent
    is_part = path.name in PARTS and os.path.isdir(path)
    return folder if is_part and find(folder) else None


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
    made_with = [manifest.tokenizer for manifest, _ in described.values()]
    kinds: dict[str, tuple[str, Path]] = {}  # by sha256: a prefix and its folder
    for folder, (manifest, some) in described.items():
        kinds.setdefault(manifest.tokenizer.sha256, (next(iter(some)), folder))
    if kinds:
        (first, folder), *others = kinds.values()
        where, size = f"{prefixes[first]} {first}", made_with[0].vocab_size
        other = next((other for other in others if not _alike(folder, other[1])), None)
        if other:
            faults.append(
                f"{where} and {other[0]} were made with two tokenizers ({folder}/tokenizer and "
                f"{other[1]}/tokenizer); prepare one of them again"
            )
        elif vocabulary is not None and size > vocabulary:
            faults.append(
                f"{where}: its tokens go up to {size - 1} ({folder / MANIFEST}), the model's "
                f"vocabulary has {vocabulary} entries; {_fix(folder, size)}"
            )
        else:
            fault, doubt = compare_tokenizers(where, folder, made_with, args)
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


def is_one_of(name: str, tokenizers: Iterable[Tokenizer]) -> bool:
    """Whether ``--tokenizer-model`` names one of them: its file or folder, or it on the Hub."""
    if not os.path.exists(name):
        return any(name == tokenizer.name for tokenizer in tokenizers)
    try:
        digest = files.sha256(_file_of(Path(name)))
    except OSError:
        return False
    return any(digest == tokenizer.sha256 for tokenizer in tokenizers)


def padded(vocabulary: int) -> int:
    """Entries to train with; the same with TP up to 8, so that checkpoints fit."""
    return -(-vocabulary // 1024) * 1024


def compare_tokenizers(
    where: str, folder: Path, made_with: Sequence[Tokenizer], args: Namespace
) -> tuple[str, str]:
    """What is wrong, and what is doubtful, about a run with another tokenizer than its data's.

    Args:
        where: the flag and the prefix.
        folder: of the manifest.
        made_with: of the manifest, and of others that encode alike.
        args: ``tokenizer_type`` and ``tokenizer_model`` of Megatron's.
    """
    kind, name = (
        getattr(args, argument, None) for argument in ("tokenizer_type", "tokenizer_model")
    )
    if (kind or "").startswith("Null") or (kind is None and name is None):
        return "", ""  # names none
    if name is not None and is_one_of(name, made_with):
        return "", ""
    here = _parts(_file_of(Path(name))) if name is not None else {}
    there = _parts(_kept(folder))
    if not (here and there):
        return "", (
            f"{where}: made with the tokenizer {made_with[0].name!r}, and trained with "
            f"{name or kind}; if that gives other tokens, {_fix(folder)}"
        )
    known, meant = _meanings(here), _meanings(there)
    tokens = {*known.values()}
    for i, token in meant.items():
        # Data need not contain an added token, but for the one that ends their documents.
        needed = i not in there["added tokens"] or i == made_with[0].eod_id
        if known.get(i) != token and (needed or i in known or token in tokens):
            means = ascii(known[i]) if i in known else "none"
            return (
                f"{where}: token {i} is {token!a} in these data, and {means} in "
                f"--tokenizer-model {name}; {_fix(folder)}"
            ), ""
    differing = ", ".join(_differing(here, there))
    return "", differing and (
        f"{where}: {_kept(folder)} and --tokenizer-model {name} differ in {differing}; if that "
        f"gives other tokens, {_fix(folder)}"
    )


def _fix(folder: Path | None = None, size: int | None = None) -> str:
    """What to change, in words of Megatron's flags and of the launcher's variables."""
    if not folder:
        return (
            "give the data's tokenizer and --padded-vocab-size more (TOKENIZER and "
            "PADDED_VOCAB_SIZE of pretrain.sh)"
        )
    tokenizer = f"give --tokenizer-model {quote(f'{folder}/tokenizer')}"
    if not size:
        return f"{tokenizer} (pretrain.sh takes it from the data where TOKENIZER is not given)"
    return (
        f"{tokenizer} and --padded-vocab-size {padded(size)} (pretrain.sh takes both from the data "
        "where neither TOKENIZER nor PADDED_VOCAB_SIZE is given)"
    )


def _file_of(tokenizer: Path) -> Path:
    return tokenizer / "tokenizer.json" if os.path.isdir(tokenizer) else tokenizer


def _kept(folder: Path) -> Path:
    """The data's own, beside their manifest."""
    return folder / "tokenizer" / "tokenizer.json"


def _alike(folder: Path, other: Path) -> bool:
    """Whether the tokenizers kept with data are known to encode alike, in other bytes."""
    one, two = _parts(_kept(folder)), _parts(_kept(other))
    return bool(one and two) and not _differing(one, two)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _meanings(parts: Mapping[str, Any]) -> dict[int, str]:
    """Which token each id is."""
    added = {i: token["content"] for i, token in parts["added tokens"].items()}
    return {**parts["vocabulary"], **added}


def _parts(path: Path) -> dict[str, Any]:
    """What of a tokenizer.json decides about ids, by name; none of what cannot be read as one.

    The template of its post-processor does not: data have no tokens around a text.
    """
    try:
        found: Any = schema.read_json(path)
        model = dict(found["model"])
        vocabulary, merges = model.pop("vocab"), model.pop("merges", None) or []
        if isinstance(vocabulary, list):  # Unigram's
            model["scores"] = [score for _, score in vocabulary]
            meanings = {i: str(token) for i, (token, _) in enumerate(vocabulary)}
        else:
            meanings = {int(i): str(token) for token, i in vocabulary.items()}
        added = {
            int(token["id"]): {**token, "content": str(token["content"])}
            for token in found["added_tokens"]
        }
        rules = {
            "normalizer": found.get("normalizer"),
            "pre_tokenizer": found.get("pre_tokenizer"),
            "merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
            **model,
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {
        "vocabulary": {i: token for i, token in meanings.items() if i not in added},
        "added tokens": added,
        # Older files leave out what is off.
        **{name: x for name, x in rules.items() if x is not None and x is not False and x != ""},
    }
