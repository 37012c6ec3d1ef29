"""The text of the small presets: a token per byte, of a folder of files, in Megatron's format.

By default the source of Python's standard library, which every installation carries, so that
nothing is downloaded. A document is one file: its bytes (tokens 0 to 255), then one
end-of-document token (256). Whole files are held out, chosen by a hash of their path.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compare import byte_tokenizer
from compare.byte_tokenizer import END_OF_DOCUMENT
from compare.text import SPLITS, SUFFIXES, Text, files_below, holds, read, split_of, write_json
from megatron_xielu.common import indexed_dataset

VOCAB_SIZE = 257  # the bytes and the token above; Megatron's NullTokenizer ends with its last token
_PADDED_VOCAB_SIZE = 264  # the same for one and for two tensor-parallel ranks

# Not the library itself: its tests, installed packages, whole applications. The last two are
# generated tables, on which a loss says nothing.
_NOT_THE_LIBRARY = frozenset(
    {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
    | {"encodings", "pydoc_data"}
)


@dataclass(frozen=True)
class TextManifest:
    """What was written, so that a later run can tell whether it is the same text."""

    source: str
    sha256: str
    documents: dict[str, int]
    tokens: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """As written to ``manifest.json``."""
        return asdict(self)


def stdlib_folder() -> Path:
    """The standard library of the running interpreter."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_documents(folder: Path) -> list[str]:
    """Relative paths of the files to use, sorted: of the standard library its Python sources.

    Raises:
        SystemExit: there are none.
    """
    if folder == stdlib_folder():
        files = files_below(folder, suffixes=frozenset({".py"}))
        found = [path for path in files if not _NOT_THE_LIBRARY & set(path.split("/"))]
        hint = "this Python has no sources of its library; give a folder of text with --text"
    else:
        found = list(files_below(folder))
        hint = f"--text takes a folder with files in {' '.join(sorted(SUFFIXES))}"
    if not found:
        raise SystemExit(f"compare: no text in {folder}: {hint}")
    return found


def describe(folder: Path) -> TextManifest:
    """The manifest of the text in ``folder``; reads every document, writes nothing."""
    digest = hashlib.sha256()
    documents, tokens = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    for path in find_documents(folder):
        content = read(folder, path)
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
        split = split_of(path.encode())
        documents[split] += 1
        tokens[split] += len(content) + 1
    of_python = folder == stdlib_folder()
    return TextManifest(
        source=f"standard library of Python {platform.python_version()}" if of_python else "--text",
        sha256=digest.hexdigest(),
        documents=documents,
        tokens=tokens,
    )


def prepare(folder: Path, out: Path) -> Text:
    """Write the text of ``folder`` to ``out``, unless exactly that is there already.

    Args:
        folder: where the files are.
        out: gets ``train.{bin,idx}``, ``valid.{bin,idx}``, ``tokenizer/`` and, last,
            ``manifest.json``.

    Raises:
        SystemExit: a split would be empty.
    """
    manifest = describe(folder)
    for split in SPLITS:
        if not manifest.documents[split]:
            raise SystemExit(
                f"compare: no file of {folder} falls into the {split} split; it has too few"
            )
    byte_tokenizer.write(out / "tokenizer")
    written = out / "manifest.json"
    if not (holds(written, manifest.to_json()) and _are_whole(out)):
        written.unlink(missing_ok=True)
        shutil.rmtree(out / "cache", ignore_errors=True)  # Megatron's indices into the old text
        for split in SPLITS:
            _write_split(folder, split, out / split)
        write_json(written, manifest.to_json())
    return Text(
        train=out / "train",
        valid=out / "valid",
        cache=out / "cache",
        vocab_size=VOCAB_SIZE,
        padded_vocab_size=_PADDED_VOCAB_SIZE,
        unit="byte",
        tokens=manifest.tokens,
        documents=manifest.documents,
    )


def _are_whole(out: Path) -> bool:
    try:
        for split in SPLITS:
            indexed_dataset.read(out / split)
    except (OSError, indexed_dataset.Damaged):
        return False
    return True


def _write_split(folder: Path, split: str, prefix: Path) -> None:
    import numpy as np
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    unfinished = {suffix: f"{prefix}.{suffix}.unfinished" for suffix in ("bin", "idx")}
    builder = IndexedDatasetBuilder(unfinished["bin"], dtype=DType.optimal_dtype(VOCAB_SIZE))
    for path in find_documents(folder):
        if split_of(path.encode()) == split:
            content = np.frombuffer(read(folder, path), dtype=np.uint8)
            document = np.append(content.astype(np.int32), END_OF_DOCUMENT)
            builder.add_document(document, [len(document)])
    builder.finalize(unfinished["idx"])
    for suffix, name in unfinished.items():
        os.replace(name, f"{prefix}.{suffix}")
