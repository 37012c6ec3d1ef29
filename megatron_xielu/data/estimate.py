"""How much it will be: tokens and disk space, from a sample of the files, before the start."""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from operator import ge, mul
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_xielu.common import text
from megatron_xielu.data import sentences, tokenizer_files
from megatron_xielu.data.errors import DataError
from megatron_xielu.data.readers import make_reader
from megatron_xielu.data.recipe import Recipe
from megatron_xielu.data.sources import File, Group, Part

_PLACES = 8  # of all bytes of a group: the files in which these are are read in part
# Documents, characters and stored bytes read of a file; gzip's reader may be 128 kB ahead of them.
_LEAST = (1000, 4_000_000, 1 << 19)
_MOST = 1 << 26  # characters read of a file, but for the last document
_PIECES = 16  # of a file's text that are tokenised, for each of its places
_PIECE = 8000  # characters
_INDEX_BYTES = 20  # of a sequence in .idx: length, pointer, document
_MARGIN = 1.05


@dataclass(frozen=True)
class Estimate:
    """Of all input files, whatever the budget."""

    train_tokens: float
    output_bytes: float


@dataclass
class _Amount:
    """What there is in some text; tokens without those that end documents."""

    tokens: float = 0.0
    documents: float = 0.0
    sequences: float = 0.0


def estimate(recipe: Recipe, tokenizer: Tokenizer) -> Estimate:
    """Tokenise a little of a few files.

    Raises:
        BadInputError: what was read of them cannot be used.
    """
    splitter = sentences.load(recipe.sentences) if recipe.sentences else None
    every = [_estimate_group(recipe, group, tokenizer, splitter) for group in recipe.groups]
    tokens = sum(amount.tokens + amount.documents for amount in every)
    token_bytes = 4 if recipe.tokenizer.dtype == "int32" else 2
    return Estimate(
        train_tokens=tokens * (1 - recipe.valid_fraction),
        output_bytes=tokens * token_bytes
        + sum(amount.sequences for amount in every) * _INDEX_BYTES,
    )


def _estimate_group(recipe: Recipe, group: Group, tokenizer: Tokenizer, splitter: Any) -> _Amount:
    """Of all files: the mean, a stored byte, of files taken by their size, times their bytes."""
    reader = make_reader(
        group,
        tasks=recipe.tasks,
        text_key=recipe.text_key,
        skip_bad_rows=recipe.skip_bad_rows,
    )
    ends = list(accumulate(file.size for file in group.files))
    places = [ends[-1] * (2 * i + 1) // (2 * _PLACES) for i in range(_PLACES)]
    total = _Amount()
    for index, times in Counter(bisect_right(ends, place) for place in places).items():
        file = group.files[index]
        share = times / _PLACES * ends[-1] / file.size
        texts, weights = _read(reader, file)
        amount = _measure(texts, weights, times * _PIECES, tokenizer, splitter)
        total.tokens += share * amount.tokens
        total.documents += share * amount.documents
        total.sequences += share * amount.sequences
    if group.format == "text":
        total.documents = len(group.files)
    if not splitter:
        total.sequences = total.documents
    return total


def _read(reader: Any, file: File) -> tuple[list[str], list[float]]:
    """The first documents of a file, and of how many in it each is an example.

    What is not read is like the second half of what is: the first document may be like no other.
    """
    texts: list[str] = []
    characters = 0
    place = 0.0
    marks: list[tuple[float, int]] = []  # parts of the file, and how many texts are in them
    for document in reader.checked(Part(file), reader.read_file(file.path)):
        if (part := reader.part(file)) > place:
            marks.append((place, len(texts)))
            if characters > _MOST or all(
                map(ge, (len(texts), characters, place * file.size), _LEAST)
            ):
                break
            place = part
        texts.append(document.text)
        characters += len(document.text)
    else:
        return texts, [1.0] * len(texts)
    end, count = marks[-1]
    start, first = next(mark for mark in marks if mark[0] >= end / 2)
    if start == end:
        start, first = 0.0, 0
    weight = 1 + (1 - end) / (end - start)
    return texts[:count], [1.0] * first + [weight] * (count - first)


def _measure(
    texts: list[str], weights: list[float], pieces: int, tokenizer: Tokenizer, splitter: Any
) -> _Amount:
    """Tokenise pieces from everywhere; the longer a document, the likelier it is taken."""
    ends = list(accumulate(map(mul, weights, map(len, texts))))
    if not ends:
        return _Amount()
    cut = []
    for i in range(pieces):
        place = ends[-1] * (i + 0.5) / pieces
        index = bisect_right(ends, place)
        text = texts[index]
        before_end = (ends[index] - place) / weights[index]
        start = min(len(text) - int(before_end), len(text) - _PIECE)
        cut.append(text[max(0, start) :][:_PIECE])
    each = ends[-1] / pieces  # characters for which a piece stands
    found = _Amount(documents=sum(weights))
    for piece, ids in zip(cut, tokenizer_files.encode(tokenizer, cut), strict=True):
        found.tokens += each / len(piece) * len(ids)
        if splitter:
            found.sequences += each / len(piece) * len(sentences.split(splitter, piece))
    return found


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
    # Shards and what they are merged into are there together for a while, one span at a time.
    twice = 1 / recipe.shards if recipe.shards and recipe.tasks > recipe.shards else 0.0
    needed = max(0.0, expected.output_bytes * (share + twice) * _MARGIN - there)
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
