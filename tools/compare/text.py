"""The text of a comparison, ready for Megatron: which files, which vocabulary.

One token per byte of Python's standard library (`byte_text`), or a BPE tokenizer trained on a
corpus (`bpe_text`), which comes from pinned packages of the usual registries (`package_text`);
or either on a folder of the user's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xielu.common import files, schema
from megatron_xielu.common.schema import Malformed
from megatron_xielu.common.text import is_utf8

SPLITS = ("train", "valid")
_HELD_OUT_PERCENT = 4

SUFFIXES = frozenset(
    {".py", ".txt", ".md", ".rst", ".js", ".ts", ".c", ".h", ".cc", ".cpp", ".cu", ".java"}
    | {".kt", ".m", ".mm", ".go", ".rs", ".sh", ".tex", ".html"}
)


@dataclass(frozen=True)
class Text:
    """Prefixes of Megatron's data files, and the tokens in them.

    ``unit``: what a token is, in words; ``tokens`` and ``documents`` by split.
    """

    train: Path
    valid: Path
    cache: Path
    vocab_size: int  # Megatron's NullTokenizer takes the last token for the end of a document
    padded_vocab_size: int
    unit: str
    tokens: dict[str, int]
    documents: dict[str, int]


def split_of(key: bytes) -> str:
    """``"train"`` or ``"valid"`` for a document's path or text.

    It does not depend on the order or the presence of other documents.
    """
    digest = hashlib.sha256(key).digest()
    return "valid" if int.from_bytes(digest[:8], "big") % 100 < _HELD_OUT_PERCENT else "train"


def files_below(folder: Path, *, suffixes: frozenset[str] = SUFFIXES) -> Iterator[str]:
    """Relative paths (with ``/``) of the text files in ``folder``, sorted."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__" and name[0] != "."]
        found += [
            (Path(parent) / name).relative_to(folder).as_posix()
            for name in names
            if Path(name).suffix.lower() in suffixes
        ]
    return iter(sorted(found))


def read(folder: Path, path: str) -> bytes:
    """A file of `files_below`.

    Raises:
        SystemExit: it cannot be read to its end, or named in a manifest.
    """
    if not is_utf8(path):
        raise SystemExit(f"compare: {folder}: the name {path!a} is not UTF-8: rename that file")
    if not (folder / path).is_file():
        raise SystemExit(f"compare: {folder / path} is no file: remove it, or what leads to it")
    return (folder / path).read_bytes()


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` whole, so that a reader never sees half a file."""
    files.write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def holds(path: Path, content: Any) -> bool:
    """Whether a JSON file holds exactly this; one that is missing or damaged does not."""
    try:
        return bool(schema.read_json(path) == content)
    except (FileNotFoundError, Malformed):
        return False
