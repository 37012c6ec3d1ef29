"""Writes model tensors as a ``torch_dist`` checkpoint, one in memory at a time.

Megatron's own ``dist_checkpointing.save`` wants the whole model at once and a process group. What
it writes is PyTorch's distributed checkpoint with two files more; so is this, from tensors that are
only made when their turn comes.
"""

from __future__ import annotations

import io
import json
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)


@dataclass(frozen=True)
class Chunk:
    """A tensor, or one entry of a stacked one.

    Attributes:
        key: of the whole.
        layer: which entry; None for a tensor that is not stacked.
        layers: how many entries there are.
        shape: of this one.
        dtype: of this one.
        read: makes it.
    """

    key: str
    layer: int | None
    layers: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


# Megatron's layers ask for these; what Transformer Engine keeps in them is of FP8 only. More of
# them than a model asks for do no harm: local layers have none in norms and attention.
_EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


class _Lazy(DefaultSavePlanner):
    """Makes a chunk when the writer asks for its data."""

    def __init__(self, chunks: Sequence[Chunk], layers: int) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {_index(chunk): chunk for chunk in chunks}
        self._empty = [
            MetadataIndex(f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}")
            for module in _EXTRA_STATES
            for layer in range(layers)
        ]
        self._empty.append(MetadataIndex("decoder.final_layernorm._extra_state/shard_0_1"))

    def create_local_plan(self) -> SavePlan:
        items = [_item(chunk) for chunk in self._chunks.values()]
        items += [WriteItem(index=index, type=WriteItemType.BYTE_IO) for index in self._empty]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            record = io.BytesIO()
            torch.save([None], record)
            return record
        chunk = self._chunks[write_item.index]
        tensor = chunk.read()
        assert (tuple(tensor.shape), tensor.dtype) == (chunk.shape, chunk.dtype)
        return tensor if chunk.layer is None else tensor.unsqueeze(0)


def write(folder: Path, chunks: Sequence[Chunk], arguments: Namespace) -> None:
    """Write a checkpoint.

    Args:
        folder: to be made.
        chunks: its tensors. What reading one raises is passed on.
        arguments: what Megatron's ``--use-checkpoint-args`` shall find; ``num_layers`` among them.
    """
    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    planner = _Lazy(chunks, arguments.num_layers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:  # in it: what a chunk or the disk raised
            cause, _ = error.failures[0]
            raise cause from None
    # A file of its own: Megatron before 0.19 knows no other form, and later ones read this, too.
    common = {
        "args": arguments,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    torch.save(common, folder / "common.pt")
    backends = {
        f"{part}_backend{version}": value
        for part, name in (("sharded", "torch_dist"), ("common", "torch"))
        for version, value in (("", name), ("_version", 1))
    }
    (folder / "metadata.json").write_text(json.dumps(backends))


def _offset(chunk: Chunk) -> torch.Size:
    zeros = [0] * len(chunk.shape)
    return torch.Size(zeros if chunk.layer is None else [chunk.layer, *zeros])


def _index(chunk: Chunk) -> MetadataIndex:
    return MetadataIndex(chunk.key, _offset(chunk))


def _item(chunk: Chunk) -> WriteItem:
    stacked = chunk.layer is not None
    return WriteItem(
        index=_index(chunk),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(
                _offset(chunk), torch.Size([1, *chunk.shape] if stacked else chunk.shape)
            ),
            properties=TensorProperties(dtype=chunk.dtype),
            size=torch.Size([chunk.layers, *chunk.shape] if stacked else chunk.shape),
        ),
    )
