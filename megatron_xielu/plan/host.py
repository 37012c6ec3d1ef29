"""Host memory of a node: copies for a save, batches in data workers, index caches. Estimates.

Dimension legend: s sequence, b micro-batch; n documents, m samples of a data set; E epochs.

    save        of each rank, `checkpoints.optimizer_format`
    batches     workers × 2 batches ahead × b samples of 28·s bytes (tokens, labels and positions
                of int64, the loss mask of fp32), and s·s of an attention mask
    indices     4·n·E + 8·m + 4·m bytes, 10·m more for a blend; and the .idx files, 20·n

Indices are those of Megatron 0.19 (megatron/core/datasets/gpt_dataset.py, blended_dataset.py):
documents int32 in every epoch, samples pairs of int32, their order uint32, a blend's int16 and
int64. They are mapped, so that all processes of a node share them, and the kernel may let go of
what is not in use. Not counted: the ranks' own code and data, what the preparation of a save holds
for a moment, pinned buffers of NCCL.

A worker is forked and shares its rank's memory: 9 MiB were its own after 20 batches, of 481 MiB
(measured on a CPU, PyTorch 2.11, 2 workers), which is not counted either.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_xielu.common import data_lists, indexed_dataset
from megatron_xielu.common.text import is_number
from megatron_xielu.plan.run import Plan

_PREFETCHED = 2  # batches a worker is ahead: PyTorch's default, which Megatron keeps
# 60 shards × 125,000 documents in 2.6 s, on two CPU cores and a local disk.
SECONDS_PER_DOCUMENT = 2.6 / (60 * 125_000)


@dataclass(frozen=True)
class Indices:
    """The index caches of a run, in bytes.

    Attributes:
        samples: what belongs to samples: pairs, order, blend.
        documents: what belongs to documents: their order, and the ``.idx`` files; None where the
            files are not here to be read.
        seconds: that rank 0 builds the caches; as ``documents``.
        epochs: most often that a document is read.
    """

    samples: float
    documents: float | None = None
    seconds: float | None = None
    epochs: int = 1

    @property
    def total(self) -> float:
        """Of what is known."""
        return self.samples + (self.documents or 0)


@dataclass(frozen=True)
class Host:
    """Bytes on a node. ``save``: of the chosen optimizer format; 0 where none is saved."""

    save: float
    workers: int
    batches: float
    indices: Indices

    @property
    def total(self) -> float:
        """Their sum."""
        return self.save + self.batches + self.indices.total


def of(plan: Plan, *, read_files: bool = True) -> Host:
    """What a node's memory holds beside the processes themselves.

    Args:
        plan: the plan.
        read_files: whether the heads of ``.idx`` files are read.
    """
    args, ranks = plan.args, min(plan.cluster.gpus, plan.cluster.gpus_per_node)
    kind = plan.optimizer_format
    # The first rank of a tensor-parallel group reads for it; each data set has workers of its own.
    readers = max(1, ranks // plan.tensor)
    sets = 3 if args.eval_iters else 1
    workers = readers * sets * args.num_workers
    sample = 28.0 * plan.model.sequence
    if not args.no_create_attention_mask_in_dataloader:
        sample += plan.model.sequence**2
    return Host(
        save=ranks * plan.save(kind).host_memory if kind and args.save else 0.0,
        workers=workers,
        batches=workers * _PREFETCHED * plan.micro_batch * sample,
        indices=_indices(plan, read_files=read_files),
    )


def _indices(plan: Plan, *, read_files: bool) -> Indices:
    args, schedule = plan.args, plan.schedule()
    if args.mock_data:
        return Indices(0.0)
    evaluations = schedule.steps // args.eval_interval + 1 if args.eval_interval else 0
    evaluated = (evaluations + 1) * args.eval_iters * plan.global_batch
    samples = schedule.samples + evaluated
    found = list(_files(args)) if read_files else []
    listed = len(found)
    by_sample = (12 + 10 * (listed != 1)) * samples
    known = [index for index in found if index]
    if not known or len(known) < listed:
        return Indices(by_sample)
    documents = sum(index.sequences for index, _ in known)
    tokens = sum(number for _, number in known)
    needed = samples * plan.model.sequence
    epochs = max(1, math.ceil(needed / tokens)) if tokens else 1
    return Indices(
        by_sample,
        documents * (4 * epochs + 20),
        documents * epochs * SECONDS_PER_DOCUMENT,
        epochs,
    )


def _files(args: Namespace) -> Iterator[tuple[indexed_dataset.Index, int] | None]:
    """(head, tokens) of each ``.idx`` that the arguments list; None of one that cannot be read."""
    for argument in data_lists.ARGUMENTS:
        value = getattr(args, argument)
        if value is None:
            continue
        try:
            words = dict.fromkeys(data_lists.words(argument, value))
        except ValueError:  # which `checks` refuses
            yield None
            continue
        for prefix in words:
            if is_number(prefix):
                continue
            try:
                index = indexed_dataset.read(Path(prefix))
                yield index, Path(f"{prefix}.bin").stat().st_size // index.itemsize
            except (OSError, ValueError):
                yield None
