"""``--straggler-ratio``: tells of ranks whose own work takes longer than others'.

All ranks wait for the slowest, so their steps take equally long. What differs is a part in which
nobody is waited for but tensor- and context-parallel neighbours: the loss and the backward pass of
a step's last micro-batch, up to where gradients are waited for. With pipeline stages, whose
backward pass waits for the next stage, it is that micro-batch's forward pass, compared within a
stage. It costs two CUDA events a step, read when the loss is logged, and then one all-gather of 8
bytes a rank. Megatron's own ``--log-straggler`` synchronises the GPU, compares over all stages and
listens on a port; this package's entry does not serve it.
"""

from __future__ import annotations

import functools
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from statistics import median_low
from typing import Any

import torch

from megatron_xielu.common import event_log
from megatron_xielu.features.after_log import call_after_training_log

FLAG = "--straggler-ratio"
_TOLD_AGAIN_AFTER = 600.0  # seconds
_MOST_TOLD = 8  # ranks at a time, the slowest: a node's


def watched(args: Namespace, forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """The forward step, timed where that is asked for; before Megatron's ``pretrain``.

    Where gradients are made whole ``megatron.training.training`` has a function that is wrapped in
    this process.
    """
    # An event in a graph of a whole iteration would be part of the graph.
    if not args.straggler_ratio or args.cuda_graph_impl == "full_iteration":
        return forward_step
    from megatron.training import training

    finalize = training.finalize_model_grads
    work = OwnWork(args.straggler_ratio)
    forward_only = args.pipeline_model_parallel_size > 1

    @functools.wraps(forward_step)
    def timed_step(*given: Any, **named: Any) -> Any:
        training_now = torch.is_grad_enabled()
        if training_now and forward_only:
            work.begin()
        result = forward_step(*given, **named)
        if training_now:
            work.end() if forward_only else work.begin()
        return result

    @functools.wraps(finalize)
    def finalize_and_keep(*given: Any, **named: Any) -> Any:
        if not forward_only:
            work.end()
        work.keep()
        return finalize(*given, **named)

    def compare_if_due(iteration: int) -> None:
        if iteration % args.log_interval == 0:
            work.compare()

    training.finalize_model_grads = finalize_and_keep
    call_after_training_log(compare_if_due)
    return timed_step


class OwnWork:
    """The times of this rank since the last comparison, and what was found before.

    Args:
        ratio: how many times the median of its stage a rank may take.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._begin = self._end = _now()
        self._steps: list[tuple[Any, Any]] = []
        self._nodes: list[Any] = []
        self._slow_before: set[int] = set()
        self._told: dict[int, float] = {}

    def begin(self) -> None:
        """The last micro-batch begins, as far as is known."""
        self._begin = _now()

    def end(self) -> None:
        """It has ended, as far as is known."""
        self._end = _now()

    def keep(self) -> None:
        """It was the last."""
        self._steps.append((self._begin, self._end))

    def compare(self) -> None:
        """Tell of those that were too slow twice in a row; collective over all ranks."""
        from megatron.core import mpu

        for _, end in self._steps[-1:]:
            end.synchronize()  # long past: the loss that is logged came after it
        own = median_low([begin.elapsed_time(end) for begin, end in self._steps] or [0.0])
        self._steps.clear()
        mine = torch.tensor([own, mpu.get_pipeline_model_parallel_rank()], dtype=torch.float32)
        ranks = torch.distributed.get_world_size()
        table = torch.empty(2 * ranks, device="cuda")
        torch.distributed.all_gather_into_tensor(table, mine.cuda())
        if not self._nodes:
            self._nodes = [None] * ranks
            torch.distributed.all_gather_object(self._nodes, event_log.node())
        if torch.distributed.get_rank() == 0:
            times, stages = table.view(ranks, 2).t().tolist()
            self._tell(slow_ranks(times, stages, self._ratio), times)

    def _tell(self, found: dict[int, float], times: Sequence[float]) -> None:
        now = time.monotonic()
        due = [
            rank
            for rank in sorted(found, key=lambda rank: -found[rank])
            if rank in self._slow_before
            and now >= self._told.get(rank, -_TOLD_AGAIN_AFTER) + _TOLD_AGAIN_AFTER
        ]
        for rank in due[:_MOST_TOLD]:
            self._told[rank] = now
            event_log.write(
                "straggler",
                f"{times[rank]:.1f} ms for its own part of a step, {found[rank]:.2f} times the "
                "median of its pipeline stage, twice in a row",
                node=self._nodes[rank],
                rank=rank,
            )
        self._slow_before = set(found)


def slow_ranks(times: Sequence[float], stages: Sequence[float], ratio: float) -> dict[int, float]:
    """Ranks that take more than ``ratio`` times the median of their stage, and how many times.

    Args:
        times: by rank, in any unit.
        stages: by rank, its pipeline stage.
        ratio: above 1.
    """
    usual = {
        stage: median_low([t for t, s in zip(times, stages, strict=True) if s == stage])
        for stage in set(stages)
    }
    found = {
        rank: taken / usual[stage]
        for rank, (taken, stage) in enumerate(zip(times, stages, strict=True))
        if usual[stage]
    }
    return {rank: times_usual for rank, times_usual in found.items() if times_usual > ratio}


def _now() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
