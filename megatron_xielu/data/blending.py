"""``--blend 0.7:A 0.3:B``: one data list of several prepared folders, by the tokens that are seen.

Megatron draws samples by the weights of prefixes, and all samples have the same length: so a folder
of weight w has the share w / sum of weights of the tokens of a run, and a prefix of it has as much
of that as it has of the folder's tokens. No data is copied; prefixes are absolute.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_xielu.common import files, prepared_data, schema, text
from megatron_xielu.common.schema import Malformed
from megatron_xielu.data import manifest as manifests
from megatron_xielu.data.errors import DataError
from megatron_xielu.data.manifest import Manifest
from megatron_xielu.data.records import SPLITS

# Up to about four times the same text is nearly as good as other text (arXiv 2305.16264).
_EPOCHS = 4
_LEAST, _MOST = 1e-6, 1e6  # weights


@dataclass(frozen=True)
class _Folder:
    """Of a blend's manifest."""

    folder: str
    weight: float


@dataclass(frozen=True)
class _Blend:
    blend: list[_Folder]


def folders_of(output: Path) -> list[str]:
    """The folders of the blend that this one is; none where it is no blend."""
    try:
        return [of.folder for of in schema.load(_Blend, output / manifests.NAME).blend]
    except (OSError, Malformed):
        return []


def blend(output: Path, words: Sequence[str], train_tokens: float | None) -> str:
    """Write the folder; returns the lines to print.

    Args:
        output: the folder, absolute.
        words: weight and prepared folder, ``0.7:A``.
        train_tokens: of the run.

    Raises:
        DataError: the folders do not go together, or cannot be used.
    """
    given = [_read(word) for word in words]
    _refuse(output, [folder for _, folder in given])
    made = [manifests.load(folder) for _, folder in given]
    for (_, folder), manifest in zip(given, made, strict=True):
        _check(folder, manifest, given[0][1], made[0])
    total = sum(weight for weight, _ in given)
    shards = [
        {
            "prefix": str(folder / entry.prefix),
            "split": entry.split,
            "weight": f"{weight / total * entry.tokens / getattr(manifest, split).tokens:.12g}",
            **{name: getattr(entry, name) for name in asdict(manifest.train)},
        }
        for split in SPLITS
        for (weight, folder), manifest in zip(given, made, strict=True)
        for entry in manifest.shards
        if entry.split == split
    ]
    result = {
        "version": manifests.VERSION,
        "blend": [
            {
                "folder": str(folder),
                "weight": weight,
                "manifest_sha256": files.sha256(folder / manifests.NAME),
            }
            for weight, folder in given
        ],
        "tokenizer": asdict(made[0].tokenizer),
        "shards": shards,
    }
    manifest_text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if folders_of(output) and (output / manifests.NAME).read_text() != manifest_text:
        raise DataError(
            f"--output {output}: by its {manifests.NAME} it is a blend of other folders, weights "
            "or data, and a run on it would go on with other samples; choose another --output"
        )
    _keep_tokenizer(given[0][1], output)
    for name, content in manifests.data_args(output, shards).items():
        files.write(output / name, content)
    files.write(output / manifests.NAME, manifest_text)
    parts = [(f, w / total, m) for (w, f), m in zip(given, made, strict=True)]
    return "\n".join(_report(parts, train_tokens))


def _report(parts: list[tuple[Path, float, Manifest]], train_tokens: float | None) -> Iterator[str]:
    """How often each folder is read. What is doubtful goes to standard error."""
    for folder, share, manifest in parts:
        tokens = manifest.train.tokens
        line = f"{folder}: {share:.1%}, {tokens:,} training tokens"
        if train_tokens:
            epochs = train_tokens * share / tokens
            line += f", read {epochs:.3g} times in {train_tokens:,.0f}"
            if epochs > _EPOCHS:
                print(
                    f"{folder} is read {epochs:.3g} times; more than about {_EPOCHS} times the "
                    "same text teaches little: give it a smaller weight, or add text",
                    file=sys.stderr,
                )
        yield line
        if not manifest.valid.tokens:
            print(f"{folder} has no validation documents for that list", file=sys.stderr)
    once = min(manifest.train.tokens / share for _, share, manifest in parts)
    yield f"a run of at most {once:,.0f} tokens reads nothing twice"


def _read(word: str) -> tuple[float, Path]:
    weight, _, name = word.partition(":")
    try:
        number = float(weight)
    except ValueError:
        number = 0.0
    if not (_LEAST <= number <= _MOST and name):
        raise DataError(f"--blend {word}: not WEIGHT:FOLDER, such as 0.7:data/web")
    if not (found := prepared_data.find(Path(name))):
        raise DataError(
            f"--blend {word}: no {manifests.NAME} in {name}; give a folder that prepare_data.py "
            "has finished"
        )
    folder = found.parent.absolute()
    if folders_of(folder):
        raise DataError(f"--blend {word}: it is a blend itself; give the folders that it is of")
    if str(folder).split() != [str(folder)]:
        raise DataError(
            f"--blend {word}: Megatron cuts data_args.txt at white space; rename the folder"
        )
    return number, folder


def _refuse(output: Path, folders: list[Path]) -> None:
    seen: set[str] = set()
    for folder in folders:
        if (place := os.path.realpath(folder)) in seen:
            raise DataError(f"--blend: {folder} is given twice; give it once, with both weights")
        seen.add(place)
    parts = [output / name for name in (*SPLITS, "work", manifests.NAME)]
    if not folders_of(output) and any(map(os.path.lexists, parts)):
        raise DataError(f"--output {output}: it holds data of its own; choose another --output")


def _check(folder: Path, manifest: Manifest, first: Path, other: Manifest) -> None:
    if replace(manifest.tokenizer, name="") != replace(other.tokenizer, name=""):
        raise DataError(
            f"--blend: {first} and {folder} were made with two tokenizers ({other.tokenizer.name}, "
            f"{manifest.tokenizer.name}); prepare one of them again, by the other's "
            f"--tokenizer {first}/tokenizer"
        )
    for split in SPLITS:
        each = [entry.tokens for entry in manifest.shards if entry.split == split]
        if 0 in each or sum(each) != getattr(manifest, split).tokens:
            raise DataError(
                f"--blend: {folder / manifests.NAME} is damaged: tokens of {split} are not those "
                "of its shards; start the command that made it again"
            )
    if not manifest.train.tokens:
        raise DataError(f"--blend: by its {manifests.NAME} {folder} has no training tokens")
    for entry in manifest.shards:
        for kind in ("bin", "idx"):
            path, size = folder / f"{entry.prefix}.{kind}", getattr(entry, kind).bytes
            if not path.is_file() or path.stat().st_size != size:
                raise DataError(
                    f"--blend: {path} is missing or has not the {text.size(size)} of "
                    f"{manifests.NAME}; start the command that made it again"
                )


def _keep_tokenizer(folder: Path, output: Path) -> None:
    files.make_folder(output / "tokenizer")
    for path in sorted((folder / "tokenizer").iterdir()):
        files.write(output / "tokenizer" / path.name, path.read_bytes())
