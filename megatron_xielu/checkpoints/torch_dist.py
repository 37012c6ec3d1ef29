"""Reads ``torch_dist`` checkpoints: slices of tensors, and the arguments; executes nothing.

Of ``.metadata`` only PyTorch's own classes are looked up. In Megatron's state beside the tensors
its classes (enumerations among the arguments) become `inert` objects. A name that no checkpoint
needs (`pickled_names`) is refused in both.
"""

from __future__ import annotations

import contextlib
import io
import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_xielu.checkpoints import inert, saved_arguments
from megatron_xielu.checkpoints.check import OPTIMIZER
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common import pickled_names
from megatron_xielu.common.text import reason

# Of the state that ranks share: a record since Megatron 0.19, a file before.
_COMMON_KEY, _COMMON_FILE = "common_state/shard_0_1", "common.pt"


class _Slices(DefaultLoadPlanner):
    """Puts what is read of one tensor into ``target``, which holds the chunk at ``offsets``."""

    def __init__(self, target: torch.Tensor | io.BytesIO) -> None:
        super().__init__()
        self.target = target

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        assert isinstance(self.target, io.BytesIO)
        self.target.write(value.getbuffer())

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert isinstance(self.target, torch.Tensor)
        view = self.target
        for dimension, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dimension, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...


class TorchDist:
    """A ``torch_dist`` checkpoint (a `megatron_xielu.checkpoints.source.Source`).

    Args:
        folder: ``iter_…`` or ``release``.

    Raises:
        Refused: it cannot be read, or has something in it that would have to be trusted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder / ".metadata")
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._tensors = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not OPTIMIZER.match(key)
        }
        self.arguments = self._read_arguments()

    def keys(self) -> set[str]:
        """Keys of the model's tensors."""
        return set(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape; a stacked tensor's begins with the number of layers."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """As stored."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """The tensor, or entry ``layer`` of a stacked one; reads no other chunks from the disk.

        Raises:
            Refused: a file is missing or damaged.
        """
        entry = self._tensors[key]
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        with self._reading(key):
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            items = create_read_items_for_chunk_list(key, entry, [chunk])
            if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
                raise Refused(f"{self.folder}: parts of {key} are missing")
            target = torch.empty(sizes, dtype=entry.properties.dtype)
            self._reader.read_data(LoadPlan(items), _Slices(target)).wait()
        return target if layer is None else target[0]

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except Refused:
            raise
        except Exception as error:  # whatever wrong bytes make torch.load raise
            raise Refused(f"{self.folder}: {key} cannot be read: {reason(error)}") from error

    def _read_arguments(self) -> Namespace:
        common = self.folder / _COMMON_FILE
        data = io.BytesIO()
        if common.is_file():
            where = _COMMON_FILE
            data.write(common.read_bytes())
        elif isinstance(self._metadata.state_dict_metadata.get(_COMMON_KEY), BytesStorageMetadata):
            where = _COMMON_KEY
            from torch.distributed.checkpoint.planner_helpers import _create_read_items

            entry = self._metadata.state_dict_metadata[_COMMON_KEY]
            with self._reading(_COMMON_KEY):
                items = _create_read_items(_COMMON_KEY, entry, None)
                self._reader.read_data(LoadPlan(items), _Slices(data)).wait()
        else:
            raise Refused(f"{self.folder}: neither {_COMMON_FILE} nor {_COMMON_KEY} is there")
        state = inert.load(data, f"{self.folder}: {where}")
        state = state[0] if isinstance(state, list) and state else state
        arguments = state.get("args") if isinstance(state, dict) else None
        if not isinstance(arguments, Namespace):
            raise Refused(f"{self.folder}: {where} has no Megatron arguments (args)")
        return saved_arguments.check(arguments, f"{self.folder}: {where}")


def read_metadata(path: Path) -> Metadata:
    """What ``.metadata`` says is in a checkpoint, and where.

    Raises:
        Refused: it cannot be read, or names something else than PyTorch's classes for this.
    """
    try:
        content = inert.unpickle(path, pickled_names.metadata_class)
    except Exception as error:  # whatever wrong bytes make a pickle raise
        raise Refused(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(content, Metadata) or not _is_sound(content):
        raise Refused(f"{path} is not that of a checkpoint")
    return content


def _is_sound(content: Metadata) -> bool:
    """Whether it has what is used outside `TorchDist.read`: unpickled, it may lack anything."""
    try:
        entries = content.state_dict_metadata.items()
        return isinstance(content.storage_data, dict) and all(
            isinstance(key, str) and (isinstance(entry, BytesStorageMetadata) or _is_tensor(entry))
            for key, entry in entries
        )
    except (AttributeError, TypeError):
        return False


def _is_tensor(entry: TensorStorageMetadata) -> bool:
    return isinstance(entry.properties.dtype, torch.dtype) and all(
        isinstance(length, int) and length >= 0 for length in entry.size
    )
