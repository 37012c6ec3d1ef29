"""``--train-tokenizer``: a byte-level BPE tokeniser for text that has none.

It has a token for every byte, so that no text is lost, then merges, then the token that ends a
document. The same text gives the same file, whatever the number of threads.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_xielu.common import files
from megatron_xielu.data.errors import DataError
from megatron_xielu.data.readers import make_reader
from megatron_xielu.data.sources import Group, Part
from megatron_xielu.data.tokenise import is_held_out

END_OF_DOCUMENT = "<|endoftext|>"
_SAMPLE = 50_000_000  # characters: 14 s of two cores, for code
_FILES = 100  # so many of a group are read at least, where it has them
_PIECE = 100_000  # characters; the library takes a hundred times the memory of a text


def train(texts: Iterable[str], entries: int, eod_token: str) -> Tokenizer:
    """A tokeniser with so many entries, of which the last ends a document.

    Raises:
        DataError: the texts have too few different pairs for so many, or the end as a word.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.token_to_id(eod_token) is not None:
        raise DataError(
            f"--eod-token {eod_token!r}: the text has it as a word; choose one such as "
            f"{END_OF_DOCUMENT}"
        )
    tokenizer.add_special_tokens([AddedToken(eod_token, special=True)])
    if (found := tokenizer.get_vocab_size()) != entries:
        raise DataError(
            f"the text gives a tokeniser of {found:,} entries at most, not {entries:,}: give more "
            f"text, or say --train-tokenizer {found}"
        )
    return tokenizer


def make(
    folder: Path,
    groups: Sequence[Group],
    entries: int,
    eod_token: str,
    *,
    valid_fraction: float,
    **options: Any,
) -> None:
    """Train a tokeniser on a sample of the files.

    Args:
        folder: gets ``tokenizer.json`` and ``tokenizer_config.json``.
        groups: all input files.
        entries, eod_token: as of `train`.
        valid_fraction: documents that are held out, from the tokeniser as from the training.
        options: of `readers.make_reader`.

    Raises:
        DataError: as of `train`, or a file cannot be used.
    """
    print(
        f"training a tokeniser of {entries:,} entries, on {_SAMPLE / 1e6:.0f} million characters "
        "of training documents at most",
        flush=True,
    )
    begin = time.monotonic()
    documents = characters = 0

    def pieces() -> Iterator[str]:
        nonlocal documents, characters
        for text in sample(groups, valid_fraction, **options):
            documents += 1
            characters += len(text)
            for start in range(0, len(text), _PIECE):
                yield text[start : start + _PIECE]

    tokenizer = train(pieces(), entries, eod_token)
    files.write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    files.write(folder / "tokenizer_config.json", json.dumps({"eos_token": eod_token}) + "\n")
    print(
        f"trained on {characters:,} characters of {documents:,} documents in "
        f"{time.monotonic() - begin:.0f} s",
        flush=True,
    )


def sample(groups: Sequence[Group], valid_fraction: float, **options: Any) -> Iterator[str]:
    """Training documents, the last of a file cut: from each group and large file by its size."""
    total = sum(file.size for group in groups for file in group.files)
    for group in groups:
        left = _SAMPLE * sum(file.size for file in group.files) // total
        least = left // _FILES
        reader = make_reader(group, tasks=1, **options)
        for file in group.files:
            of_file = min(left, max(least, _SAMPLE * file.size // total))
            left -= of_file
            for document in reader.checked(Part(file), reader.read_file(file.path)):
                if of_file <= 0:
                    break
                if not is_held_out(document.text.encode(), valid_fraction):
                    yield (text := document.text[:of_file])
                    of_file -= len(text)
            left += of_file
            if left <= 0:
                break
