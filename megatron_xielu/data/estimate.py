"""How much it will be: tokens and disk space, from a sample of the files, before the start."""

from __future__ import annotations

import math
import shutil
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_xielu.common import text
from megatron_xielu.data import recipe as recipes
from megatron_xielu.data import sentences, tokenizer_files
from megatron_xielu.data.errors import DataError
from megatron_xielu.data.readers import make_reader, zstd
from megatron_xielu.data.recipe import Recipe
from megatron_xielu.data.sources import File, Group

_FILES = 4  # of each group
_DOCUMENTS = 100  # of each
_TEXT = 200_000  # characters of each
_HEAD = 1 << 18  # compressed bytes that tell how far a file is compressed
_INDEX_BYTES = 20  # of a sequence in .idx: length, pointer, document
_MARGIN = 1.05


@dataclass(frozen=True)
class Estimate:
    """Of all input files, whatever the budget."""

    train_tokens: float
    output_bytes: float


def estimate(recipe: Recipe, output: Path, tokenizer: Tokenizer) -> Estimate:
    """Tokenise a little of a few files.

    Raises:
        BadInputError: what was read of them cannot be used.
    """
    splitter = sentences.load(recipe.sentences) if recipe.sentences else None
    every = [
        _estimate_group(recipe, output, i, tokenizer, splitter) for i in range(len(recipe.groups))
    ]
    tokens, sequences = (sum(column) for column in zip(*every, strict=True))
    token_bytes = 4 if recipe.tokenizer.dtype == "int32" else 2
    return Estimate(
        train_tokens=tokens * (1 - recipe.valid_fraction),
        output_bytes=tokens * token_bytes + sequences * _INDEX_BYTES,
    )


def _estimate_group(
    recipe: Recipe, output: Path, index: int, tokenizer: Tokenizer, splitter: Any
) -> tuple[float, float]:
    """Tokens and sequences of all files of a group."""
    group = recipe.groups[index]
    reader = make_reader(
        group,
        paths_file=str(recipes.paths_file(output, index)),
        tasks=recipe.tasks,
        text_key=recipe.text_key,
        skip_bad_rows=recipe.skip_bad_rows,
    )
    sampled = tokens = sequences = 0.0
    for file in group.files[:: math.ceil(len(group.files) / _FILES)]:
        texts, characters = [], 0
        for document in islice(reader.read_file(file.path), _DOCUMENTS):
            texts.append(document.text)
            characters += len(document.text)
            if characters > _TEXT:
                break
        cut = [text[:_TEXT] for text in texts]
        scale = characters / max(sum(map(len, cut)), 1) * _part(group, file, reader, len(texts))
        parts = sum(len(sentences.split(splitter, t)) for t in cut) if splitter else len(cut)
        tokens += scale * sum(len(ids) + 1 for ids in tokenizer_files.encode(tokenizer, cut))
        sequences += scale * parts
        sampled += file.size
    factor = sum(file.size for file in group.files) / sampled
    return tokens * factor, sequences * factor


def _part(group: Group, file: File, reader: Any, documents: int) -> float:
    """The whole file over the documents that were taken from it."""
    folder = reader.data_folder
    if group.format == "text":
        return 1.0
    if group.format == "parquet":
        import pyarrow.parquet

        with folder.open(file.path, "rb") as stream:
            return pyarrow.parquet.read_metadata(stream).num_rows / max(documents, 1)
    with folder.open(file.path, "rb") as stream:
        head = stream.read(_HEAD)
    plain = head
    if file.path.endswith(".gz"):
        plain = zlib.decompressobj(31).decompress(head)
    elif file.path.endswith(".zst"):
        plain = zstd.ZstdDecompressor().decompress(head)
    average = len(plain) / max(plain.count(b"\n"), 1)
    return max(1.0, file.size * len(plain) / len(head) / average / max(documents, 1))


def check_disk(recipe: Recipe, output: Path, expected: Estimate) -> str:
    """A line that says what is needed and what is free.

    Raises:
        DataError: that does not fit.
    """
    share = 1.0
    if recipe.max_tokens is not None:
        share = min(1.0, recipe.max_tokens / max(expected.train_tokens, 1))
    there = sum(
        path.stat().st_size for split in ("train", "valid") for path in (output / split).glob("*.*")
    )
    needed = max(0.0, expected.output_bytes * share * _MARGIN - there)
    free = shutil.disk_usage(output).free
    line = (
        f"about {expected.train_tokens * share:.3g} training tokens of {recipe.tokenizer.dtype}, "
        f"{text.size(needed)} to write, {text.size(free)} free in {output}"
    )
    if needed > free:
        raise DataError(
            f"--output: the disk is too small: {line}. Free {text.size(needed - free)}, choose "
            "another --output, or a smaller --max-tokens (--no-disk-check starts in spite of this "
            "estimate)"
        )
    return line
