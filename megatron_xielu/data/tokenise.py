"""The step that tokenises: datatrove's, with a split by document, sentences, budget and record.

A document belongs to the validation split by the hash of its text. So the split is the same
whatever the order, the number of tasks and the tokeniser, and copies of a text are on one side.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.tokens.megatron_tokenizer import (
    MegatronDocumentTokenizer,
    MegatronTokenizedFile,
)
from datatrove.utils.batching import batched
from datatrove.utils.logging import logger

from megatron_xielu.common import files, processes
from megatron_xielu.common.pretrained_tokenizer import panics_as_errors
from megatron_xielu.common.text import without_secrets
from megatron_xielu.data import credentials, records, sentences
from megatron_xielu.data.errors import DataError
from megatron_xielu.data.records import Attempt, Record, Shard

OWNER = "MEGATRON_XIELU_DATA_OWNER"  # process whose end ends the local tasks
_BATCH = 100  # documents: the library's results take about 100 times their text's memory


class SplitTokenizer(MegatronDocumentTokenizer):
    """Writes a task's documents into its train and valid shard.

    Args:
        output: the output folder.
        eod_token: appended to every document.
        valid_fraction: share of documents for validation.
        language: write a sequence a sentence, found by Punkt's model of that language.
        limits: by task, training tokens after which it stops; none for the others.
        readers: the readers before it, for what they left out.
        special_as_text: a text's own special tokens, ``<|endoftext|>`` for one, are words.
        raise_errors: an error ends the process; otherwise it is only written down.
    """

    def __init__(
        self,
        output: Path,
        *,
        eod_token: str,
        valid_fraction: float,
        language: str | None,
        limits: dict[int, int],
        readers: Sequence[Any],
        special_as_text: bool = False,
        raise_errors: bool,
    ) -> None:
        super().__init__(
            str(output), None, str(output / "tokenizer" / "tokenizer.json"), eod_token, _BATCH
        )
        self.output = output
        self.valid_fraction = valid_fraction
        self.language = language
        self.limits = limits
        self.readers = readers
        self.special_as_text = special_as_text
        self.raise_errors = raise_errors

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = MegatronDocumentTokenizer.tokenizer.func(self)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = self.special_as_text
        return tokenizer

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """Text by id of what a document is not to hold: tokens marked as special, its end, and what
        the model has for unknown words."""
        added = self.tokenizer.get_added_tokens_decoder()
        special = {id_: token.content for id_, token in added.items() if token.special}
        others = {self.eos_token, getattr(self.tokenizer.model, "unk_token", None)} - {None}
        return {**special, **{self.tokenizer.token_to_id(token): token for token in others}}

    @cached_property
    def splitter(self) -> Any:
        """nltk's sentence splitter, or None."""
        return sentences.load(self.language) if self.language else None

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Do one task. What goes wrong stands in work/failures afterwards, in one line."""
        failure = self.output / "work" / "failures" / f"{rank:05d}"
        failure.unlink(missing_ok=True)
        try:
            credentials.load(self.output)
            with panics_as_errors(), records.attempt(self.output, rank) as attempt:
                record = self._write(data, attempt, self.limits.get(rank))
                self._publish(attempt, record)
        except Exception as error:
            name = "" if "Error: " in str(error)[:40] else f"{type(error).__name__}: "
            said = without_secrets(f"{name}{error}")
            files.write(failure, said + "\n")
            if self.raise_errors:  # without what it comes from, which datatrove would log
                raise (error if isinstance(error, DataError) else DataError(said)) from None
            logger.error(f"task {rank} failed: {said}")

    def _write(self, data: Any, attempt: Attempt, limit: int | None) -> Record:
        out = {
            split: MegatronTokenizedFile(
                self.output_folder,
                str((attempt.folder / split).relative_to(self.output)),
                token_size=self.token_size,
            )
            for split in records.SPLITS
        }
        counts = {split: [0, 0, 0] for split in records.SPLITS}  # tokens, documents, text bytes
        owner = int(os.environ.get(OWNER, "0"))
        special: Counter[str] = Counter()
        left_out, stopped = 0, False
        for batch in batched(data, self.batch_size):
            if owner and not processes.is_alive(owner):
                raise SystemExit("the process that started this task has ended")
            with self.track_time(unit="batch"):
                for document, sequences in zip(batch, self._encode(batch), strict=True):
                    if not sequences:
                        left_out += 1
                        continue
                    text = document.text.encode()
                    split = "valid" if is_held_out(text, self.valid_fraction) else "train"
                    write_document(out[split], sequences)
                    tokens = sum(map(len, sequences))
                    count = counts[split]
                    count[0] += tokens
                    count[1] += 1
                    count[2] += len(text)
                    special.update(self._special_in(sequences))
                    self.stat_update("tokens", value=tokens)
                    if limit is not None and counts["train"][0] >= limit:
                        stopped = True
                        break
            attempt.report(counts["train"][0])
            if stopped:
                break
        for file in out.values():
            file.close()
        return Record(
            {
                split: _finish(attempt.folder / split, file, *counts[split])
                for split, file in out.items()
            },
            empty_rows=left_out + sum(reader.empty_rows for reader in self.readers),
            bad_rows=sum(reader.bad_rows for reader in self.readers),
            limit=limit if stopped else None,
            special_tokens=dict(sorted(special.items())),
        )

    def _encode(self, documents: list[Document]) -> list[list[list[int]]]:
        """Sequences of every document, the last with its end-of-document token."""
        if self.splitter is None:
            encoded = self.tokenizer.encode_batch_fast([document.text for document in documents])
            return [[ids] if len(ids := one.ids) > 1 else [] for one in encoded]
        eod = self.tokenizer.token_to_id(self.eos_token)
        result = []
        for document in documents:
            parts = sentences.split(self.splitter, document.text)
            encoded = self.tokenizer.encode_batch_fast(parts, add_special_tokens=False)
            sequences = [ids for one in encoded if (ids := one.ids)]
            if sequences:
                sequences[-1].append(eod)
            result.append(sequences)
        return result

    def _special_in(self, sequences: list[list[int]]) -> list[str]:
        """Special tokens of a document, its last one left out."""
        end = sequences[-1].pop()  # for the time being
        names = self.special_tokens
        found = [
            names[token]
            for sequence in sequences
            if not names.keys().isdisjoint(sequence)  # of nearly every text
            for token in sequence
            if token in names
        ]
        sequences[-1].append(end)
        return found

    def _publish(self, attempt: Attempt, record: Record) -> None:
        """Rename the shards to their place, then write the record that vouches for them."""
        for split, shard in record.shards.items():
            places = records.shard_files(self.output, split, attempt.task)
            for place in places:
                written = attempt.folder / f"{split}{place.suffix}"
                if shard.documents:
                    place.parent.mkdir(exist_ok=True)
                    os.replace(written, place)
                else:  # Megatron cannot map an empty file
                    place.unlink(missing_ok=True)
        records.save(self.output, attempt.task, record)


def is_held_out(text: bytes, fraction: float) -> bool:
    """Whether a document is of the validation split."""
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") < int(fraction * 2**64)


def write_document(file: MegatronTokenizedFile, sequences: list[list[int]]) -> None:
    """Write a document of one or more sequences; datatrove's file makes each a document."""
    for sequence in sequences:
        file.write(sequence)
    if len(sequences) > 1:
        del file.document_indices[-len(sequences) : -1]


def _finish(
    prefix: Path, file: MegatronTokenizedFile, tokens: int, documents: int, text_bytes: int
) -> Shard:
    paths = (prefix.with_suffix(".bin"), prefix.with_suffix(".idx"))
    for path in paths:
        files.sync(path)
    return Shard(
        tokens=tokens,
        documents=documents,
        sequences=len(file.sequence_lengths),
        text_bytes=text_bytes,
        sizes=(paths[0].stat().st_size, paths[1].stat().st_size),
        sha256=(files.sha256(paths[0]), files.sha256(paths[1])),
    )
