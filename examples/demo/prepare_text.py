"""The demo's text: the Python standard library's source, one token per byte, in Megatron's format.

Every installation of Python carries it, so nothing is downloaded. A document is one ``.py`` file:
its bytes (tokens 0 to 255), then one end-of-document token (256). Whole files are held out for
validation, chosen by a hash of their path, so the split does not depend on the order or the
presence of other files.

``python examples/demo/prepare_text.py --out FOLDER`` writes ``train.{bin,idx}``,
``valid.{bin,idx}``, ``tokenizer/`` (see ``byte_tokenizer.py``) and ``manifest.json``; the demo does
this by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import byte_tokenizer
from byte_tokenizer import END_OF_DOCUMENT

VOCAB_SIZE = 257  # the bytes and the token above; Megatron's NullTokenizer ends with its last token

SPLITS = ("train", "valid")
_HELD_OUT_PERCENT = 4

# Not the library itself: its tests, installed packages, whole applications. The last two are
# generated tables, on which a loss says nothing.
_EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
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
    """Relative paths (with ``/``) of the Python files to use, sorted.

    Raises:
        SystemExit: there are none.
    """
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _EXCLUDED_FOLDERS]
        found += [
            (Path(parent) / name).relative_to(folder).as_posix()
            for name in files
            if name.endswith(".py")
        ]
    if not found:
        raise SystemExit(
            f"prepare_text: no .py files in {folder}; this Python has no standard library source, "
            "run the demo with another (make demo PYTHON=…)"
        )
    return sorted(found)


def split_of(path: str) -> str:
    """``"train"`` or ``"valid"`` for a document's relative path."""
    digest = hashlib.sha256(path.encode()).digest()
    return "valid" if int.from_bytes(digest[:8], "big") % 100 < _HELD_OUT_PERCENT else "train"


def describe(folder: Path) -> TextManifest:
    """The manifest of the text in ``folder``; reads every document, writes nothing."""
    digest = hashlib.sha256()
    documents, tokens = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    for path in find_documents(folder):
        content = (folder / path).read_bytes()
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
        documents[split_of(path)] += 1
        tokens[split_of(path)] += len(content) + 1
    return TextManifest(
        source=f"standard library of Python {platform.python_version()}",
        sha256=digest.hexdigest(),
        documents=documents,
        tokens=tokens,
    )


def prepare(folder: Path, out: Path) -> TextManifest:
    """Write the text of ``folder`` to ``out``, unless exactly that is there already.

    Args:
        folder: where the ``.py`` files are.
        out: gets ``train.{bin,idx}``, ``valid.{bin,idx}``, ``tokenizer/`` and, last,
            ``manifest.json``.

    Raises:
        SystemExit: a split would be empty.
    """
    manifest = describe(folder)
    for split in SPLITS:
        if not manifest.documents[split]:
            raise SystemExit(f"prepare_text: no document of {folder} falls into the {split} split")
    byte_tokenizer.write(out / "tokenizer")
    written = out / "manifest.json"
    if written.exists() and json.loads(written.read_text()) == manifest.to_json():
        return manifest
    written.unlink(missing_ok=True)
    shutil.rmtree(out / "cache", ignore_errors=True)  # Megatron's indices into the old text
    out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        _write_split(folder, split, out / split)
    write_json(written, manifest.to_json())
    return manifest


def _write_split(folder: Path, split: str, prefix: Path) -> None:
    import numpy as np
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    unfinished = {suffix: f"{prefix}.{suffix}.unfinished" for suffix in ("bin", "idx")}
    builder = IndexedDatasetBuilder(unfinished["bin"], dtype=DType.optimal_dtype(VOCAB_SIZE))
    for path in find_documents(folder):
        if split_of(path) == split:
            content = np.frombuffer((folder / path).read_bytes(), dtype=np.uint8)
            document = np.append(content.astype(np.int32), END_OF_DOCUMENT)
            builder.add_document(document, [len(document)])
    builder.finalize(unfinished["idx"])
    for suffix, name in unfinished.items():
        os.replace(name, f"{prefix}.{suffix}")


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` beside ``path`` and rename, so that a reader never sees half a file."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--source", type=Path, default=stdlib_folder(), help="folder of .py files")
    arguments = parser.parse_args()
    print(json.dumps(prepare(arguments.source, arguments.out).to_json(), indent=2))
