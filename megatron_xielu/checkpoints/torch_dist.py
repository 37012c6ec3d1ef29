"""Reads ``torch_dist`` checkpoints: slices of tensors, and the arguments; executes nothing.

PyTorch itself unpickles ``.metadata`` without any restriction, so it is not asked to: here only the
classes that belong there are looked up. Megatron's state beside the tensors is loaded with
``weights_only=True``, where Megatron's own classes (enumerations among the arguments) become inert
objects: Megatron need not be installed, and a name that no checkpoint needs is refused.
"""

from __future__ import annotations

import io
import pickle
import re
from argparse import Namespace
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, metadata, planner
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_xielu.convert.source import Refused, reason

# Data classes and enumerations; Megatron keeps the plans of the save there, too.
_METADATA_CLASSES = {
    *((cls.__module__, name) for name, cls in vars(metadata).items() if is_dataclass(cls)),
    *((cls.__module__, name) for name, cls in vars(planner).items() if is_dataclass(cls)),
    (planner.__name__, "WriteItemType"),
    (metadata.__name__, "_MEM_FORMAT_ENCODING"),
    *((cls.__module__, cls.__name__) for cls in (_StorageInfo, _StoragePrefix)),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "Path")),
}
# Whose classes may stand among the arguments; no code of theirs runs.
_ARGUMENT_MODULES = ("megatron", "transformer_engine", "signal", "pathlib", "types", "numpy")
# Of the state that ranks share: a record since Megatron 0.19, a file before.
# Of several optimizers, as with Muon or experts, each has a number before it.
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")

_COMMON_KEY, _COMMON_FILE = "common_state/shard_0_1", "common.pt"


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong there")


def _inert(name: str) -> Any:
    """A class that stands in for another: takes its state, runs none of its code."""

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        instance: Any = object.__new__(cls)
        instance.value = args[0] if args else None  # of an enumeration
        return instance

    def setstate(self: Any, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    return type(name, (), {"__new__": new, "__setstate__": setstate})


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
    """A ``torch_dist`` checkpoint (a `megatron_xielu.convert.source.Source`).

    Args:
        folder: ``iter_…`` or ``release``.

    Raises:
        Refused: it cannot be read, or has something in it that would have to be trusted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = _read_metadata(folder / ".metadata")
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._tensors = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not _OPTIMIZER.match(key)
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
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise Refused(f"{self.folder}: parts of {key} are missing")
        self._read(key, items, target)
        return target if layer is None else target[0]

    def _read(self, key: str, items: list[ReadItem], target: torch.Tensor | io.BytesIO) -> None:
        try:
            self._reader.read_data(LoadPlan(items), _Slices(target)).wait()
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
            self._read(_COMMON_KEY, _create_read_items(_COMMON_KEY, entry, None), data)
        else:
            raise Refused(f"{self.folder}: neither {_COMMON_FILE} nor {_COMMON_KEY} is there")
        state = load_inert(data, f"{self.folder}: {where}")
        state = state[0] if isinstance(state, list) and state else state
        arguments = state.get("args") if isinstance(state, dict) else None
        if not isinstance(arguments, Namespace):
            raise Refused(f"{self.folder}: {where} has no Megatron arguments (args)")
        return arguments


def load_inert(data: io.BytesIO | Path, what: str) -> Any:
    """``torch.load`` without running code: Megatron's classes become inert objects.

    Args:
        data: a file by ``torch.save``; its tensors stay on the disk (mapped) where it is a path.
        what: its name, for messages.

    Raises:
        Refused: it names something that no checkpoint needs, or cannot be read.
    """
    mapped = isinstance(data, Path)
    try:
        if isinstance(data, io.BytesIO):
            data.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(data)
        for name in names:
            if name != "argparse.Namespace" and name.partition(".")[0] not in _ARGUMENT_MODULES:
                raise Refused(
                    f"{what} names {name}, which does not belong into a checkpoint; nothing of it "
                    "was executed"
                )
        inert: list[Any] = [
            (Namespace if name == "argparse.Namespace" else _inert(name), name) for name in names
        ]
        if isinstance(data, io.BytesIO):
            data.seek(0)
        with torch.serialization.safe_globals(inert):
            return torch.load(data, map_location="cpu", weights_only=True, mmap=mapped)
    except Refused:
        raise
    except Exception as error:  # whatever wrong bytes make torch.load raise
        raise Refused(f"{what} cannot be read: {reason(error)}") from error


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            content = _MetadataUnpickler(file).load()
    except Exception as error:  # whatever wrong bytes make a pickle raise
        raise Refused(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(content, Metadata):
        raise Refused(f"{path} is not that of a checkpoint")
    return content
