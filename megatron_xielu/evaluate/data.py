"""All tokens of prepared data, once, in their order; and the bytes of their text.

Dimensions: s sequence, b micro-batch.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_xielu.common import data_lists, indexed_dataset, prepared_data
from megatron_xielu.common.text import is_number


def find(request: Namespace) -> list[Path]:
    """The prefixes of the ``.bin``/``.idx`` files that the data flags name, each once.

    Weights, which say how often training draws from a file, mean nothing here.

    Raises:
        ValueError: none is named, or a file is missing or damaged; names the flag.
    """
    given = {
        "--data-path": request.data_path,
        "--data-args-path": request.data_args_path,
        "--per-split-data-args-path": request.per_split_data_args_path,
    }
    flags = [flag for flag, value in given.items() if value is not None]
    if not flags:
        raise ValueError(
            "say what to evaluate on with --data-path, or --eval-iters N for the validation "
            "samples of the training"
        )
    if len(flags) > 1:
        raise ValueError(f"give one of {' and '.join(flags)}")
    split = request.data_split or "valid"
    if request.per_split_data_args_path is not None:
        splits = data_lists.of_splits(str(request.per_split_data_args_path))
        words = [
            word for name, listed in splits.items() if split in ("all", name) for word in listed
        ]
    elif request.data_args_path is not None:
        words = data_lists.words("data_args_path", str(request.data_args_path))
    else:
        words = request.data_path
    one = request.data_path is not None and len(words) == 1
    whole = prepared_data.find(Path(words[0])) if one else None
    if whole:
        words = _of_manifest(whole, split)
    elif request.data_split and request.per_split_data_args_path is None:
        raise ValueError("--data-split needs data that has parts; name the prefixes of one instead")
    prefixes = [Path(word) for word in words if not is_number(word)]
    for prefix in prefixes:
        for suffix in (".idx", ".bin"):
            if not Path(f"{prefix}{suffix}").is_file():
                other = data_lists.what_takes(str(prefix))
                raise ValueError(
                    f"{flags[0]} {prefix} {other}" if other else f"{flags[0]}: no {prefix}{suffix}"
                )
        try:
            indexed_dataset.read(prefix)
        except indexed_dataset.Damaged as error:
            raise ValueError(f"{flags[0]}: {error}") from None
    if not prefixes:
        raise ValueError(f"{flags[0]}: no data in it, or not in this --data-split")
    return list(dict.fromkeys(prefixes))


def _of_manifest(manifest: Path, split: str) -> list[str]:
    try:
        shards = prepared_data.read(manifest).shards
    except ValueError as error:
        raise ValueError(f"--data-path: {error}") from None
    return [str(manifest.parent / s.prefix) for s in shards if split in ("all", s.split)]


def described_text_bytes(prefixes: list[Path]) -> int | None:
    """Bytes of text, by the manifests that the files were written with; None if one has none."""
    described = prepared_data.by_folder(map(str, prefixes)).values()
    shards = {prefix: shard for _, some in described for prefix, shard in some.items()}
    if len(shards) < len(prefixes):
        return None
    return sum(shard.text_bytes for shard in shards.values())


class Tokens:
    """The tokens of ``.bin`` files end to end, cut into sequences without overlap.

    Args:
        prefixes: of the files.
        sequence_length: s.
        documents: samples say where their documents begin and end.

    Raises:
        ValueError: a file is damaged or there is no token; names the file.
    """

    def __init__(
        self, prefixes: list[Path], sequence_length: int, *, documents: bool = False
    ) -> None:
        self.sequence_length, self._documents = sequence_length, documents
        self._lengths, self._tokens = [], []
        for prefix in prefixes:
            index = indexed_dataset.read(prefix)
            path, idx = (Path(f"{prefix}.{kind}") for kind in ("bin", "idx"))
            start = indexed_dataset.LENGTHS_AT
            lengths = np.fromfile(idx, np.int32, index.sequences, offset=start)
            if (lengths < 0).any():
                raise ValueError(f"{idx} is damaged: a sequence has {lengths.min()} tokens")
            expected = int(lengths.sum(dtype=np.int64)) * index.itemsize
            if path.stat().st_size != expected:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes where its .idx says {expected}; one "
                    "of them is damaged"
                )
            if expected:  # an empty file cannot be mapped
                self._lengths.append(lengths)
                self._tokens.append(np.memmap(path, dtype=index.dtype, mode="r"))
        # Of documents, all files end to end.
        self._begins = np.cumsum(np.concatenate([[0], *self._lengths]), dtype=np.int64)
        self._starts = np.cumsum([0, *(len(tokens) for tokens in self._tokens)])
        if not len(self):
            raise ValueError(f"no token in {', '.join(map(str, prefixes))}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def sequences(self) -> int:
        """How many there are; the last may be a part of one."""
        return -(-len(self) // self.sequence_length)

    def valid_tokens(self, sequence: int) -> int:
        """How many tokens a sequence predicts: s, less in the last one, none after it."""
        return min(max(len(self) - sequence * self.sequence_length, 0), self.sequence_length)

    def least_and_largest(self, part: int, parts: int) -> tuple[int, int]:
        """Of the tokens in one of several parts of the data; 0 counts among them."""
        bounds = np.linspace(0, len(self), parts + 1).astype(np.int64)[part : part + 2]
        step, least, largest = 1 << 24, 0, 0
        for start in range(int(bounds[0]), int(bounds[1]), step):
            tokens = self._read(start, min(start + step, int(bounds[1])))
            least, largest = min(least, int(tokens.min())), max(largest, int(tokens.max()))
        return least, largest

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Tokens from start to before stop, of int64."""
        parts = [
            tokens[max(start - begin, 0) : max(stop - begin, 0)]
            for tokens, begin in zip(self._tokens, self._starts[:-1], strict=True)
            if begin < stop and begin + len(tokens) > start
        ]
        return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)

    def sample(self, sequence: int, masks: Callable[[torch.Tensor], tuple]) -> dict[str, Any]:
        """A sequence as Megatron's data sets give it: each tensor of shape [s].

        Args:
            sequence: its number; after the last one, all padding.
            masks: makes attention mask and position ids of tokens.
        """
        length = self.valid_tokens(sequence)
        start = sequence * self.sequence_length
        padded = torch.zeros(self.sequence_length + 1, dtype=torch.int64)
        if length:
            before = start - 1 if start else len(self) - 1
            text = [self._read(before, before + 1), self._read(start, start + length)]
            padded[: length + 1] = torch.from_numpy(np.concatenate(text))
        tokens, labels = padded[:-1].contiguous(), padded[1:].contiguous()
        attention_mask, position_ids = masks(tokens)
        loss_mask = (torch.arange(self.sequence_length) < length).float()
        sample = {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": position_ids,
        }
        if self._documents:
            return {**sample, **self._ends(start - 1)}
        return sample if attention_mask is None else {**sample, "attention_mask": attention_mask}

    def _ends(self, first: int) -> dict[str, torch.Tensor]:
        """Of the documents of a sample whose first token is that one of the data: what Megatron's
        data sets say of them (``--dataloader-inter-document-masking``)."""
        inside = slice(*np.searchsorted(self._begins, [first + 1, first + self.sequence_length]))
        begins = np.unique(self._begins[inside]) - first
        ends = torch.tensor([0, *begins.tolist(), self.sequence_length], dtype=torch.int32)
        lengths = ends.diff()
        return {
            "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()]),
            # One more than there can be documents, so that samples of one shape can be stacked.
            "cu_seqlens": torch.nn.functional.pad(
                ends, (0, self.sequence_length + 1 - len(ends)), value=self.sequence_length
            ),
            "max_seqlen": lengths.max(),
        }

    def micro_batch(self, number: int, *, size: int, dp_rank: int, dp_size: int) -> range:
        """The sequences of a data-parallel rank's micro-batch, as Megatron's sampler deals them."""
        first = (number * dp_size + dp_rank) * size
        return range(first, first + size)

    def micro_batches(
        self, masks: Callable[[torch.Tensor], tuple], *, size: int, dp_rank: int, dp_size: int
    ) -> Iterator[dict[str, Any]]:
        """One after the other, without end; tensors of shape [b, s]."""
        number = 0
        while True:
            chosen = self.micro_batch(number, size=size, dp_rank=dp_rank, dp_size=dp_size)
            yield torch.utils.data.default_collate([self.sample(i, masks) for i in chosen])
            number += 1

    def decoded_bytes(self, tokenizer: Any, part: int, parts: int) -> int:
        """UTF-8 bytes of the text of every ``parts``-th sequence of the files, from ``part`` on.

        End-of-document tokens are not text.
        """
        total = 0
        for tokens, lengths in zip(self._tokens, self._lengths, strict=True):
            ends = np.cumsum(lengths, dtype=np.int64)
            for index in range(part, len(ends), parts):
                text = tokens[ends[index] - lengths[index] : ends[index]]
                total += len(tokenizer.detokenize(text[text != tokenizer.eod].tolist()).encode())
        return total
