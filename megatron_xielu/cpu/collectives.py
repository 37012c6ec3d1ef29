"""Megatron's collectives on a CPU: gloo for NCCL, and what gloo lacks.

Ranks of an expert exchange as many tokens as their routers chose: parts of other sizes from every
rank, which NCCL takes and gloo does not.
"""

# mypy: disable-error-code="assignment, method-assign"

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def redirect() -> None:
    """Make ``torch.distributed`` do over gloo what Megatron asks of NCCL."""

    def with_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if "nccl" in str(kwargs.get("backend")):
                kwargs["backend"] = "gloo"
            for name in ("device_id", "pg_options"):
                kwargs.pop(name, None)
            return function(*args, **kwargs)

        return wrapper

    dist.init_process_group = with_gloo(dist.init_process_group)
    dist.new_group = with_gloo(dist.new_group)

    barrier = dist.barrier

    @functools.wraps(barrier)
    def barrier_without_device(
        group: Any = None, async_op: bool = False, device_ids: Any = None
    ) -> Any:
        return barrier(group=group, async_op=async_op)

    dist.barrier = barrier_without_device

    def with_average(function: Callable[..., Any], source: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("op") == dist.ReduceOp.AVG:
                # Before the call: inside a coalescing manager it only records the operation.
                args[source].div_(dist.get_world_size(kwargs.get("group")))
                kwargs["op"] = dist.ReduceOp.SUM
            return function(*args, **kwargs)

        return wrapper

    coalescing_manager = dist._coalescing_manager

    @contextlib.contextmanager
    def coalesce_by_dtype(group: Any = None, device: Any = None, async_ops: bool = False) -> Any:
        # Of tensors of several types, gloo takes all to be of the first one's.
        c10d = dist.distributed_c10d
        group = group or c10d._get_default_group()
        recording = c10d._world.pg_coalesce_state
        recording[group] = []
        manager = c10d._CoalescingManager()
        yield manager
        operations = recording.pop(group)
        for dtype in dict.fromkeys(operation.tensor.dtype for operation in operations):
            with coalescing_manager(group, async_ops=async_ops) as of_one_type:
                recording[group] += [o for o in operations if o.tensor.dtype == dtype]
            for work in of_one_type.works:
                manager.append(work)

    dist._coalescing_manager = coalesce_by_dtype

    dist.all_reduce = with_average(dist.all_reduce, source=0)
    dist.reduce_scatter_tensor = with_average(dist.reduce_scatter_tensor, source=1)

    _exchange_unequal_parts()


def _exchange_unequal_parts() -> None:
    """Let ``torch.distributed`` gather, scatter and exchange parts of unequal sizes over gloo."""
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter
    all_to_all = dist.all_to_all_single

    @functools.wraps(all_gather)
    def gather_parts(
        parts: list, part: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if len({tensor.shape for tensor in parts}) == 1:
            return all_gather(parts, part, group, async_op)
        parts[dist.get_rank(group)].copy_(part)
        for rank, tensor in enumerate(parts):
            dist.broadcast(tensor, group=group, group_src=rank)
        return None

    @functools.wraps(reduce_scatter)
    def scatter_parts(part: torch.Tensor, parts: list, *args: Any, **kwargs: Any) -> Any:
        if len({tensor.shape for tensor in parts}) == 1:
            return reduce_scatter(part, parts, *args, **kwargs)
        group = kwargs.get("group")
        for rank, tensor in enumerate(parts):
            total = tensor.clone()
            dist.reduce(total, group=group, group_dst=rank)
            if rank == dist.get_rank(group):
                part.copy_(total)
        return None

    # The sizes are on the device. From a GPU Megatron copies them to the host, as an array; here
    # they are still tensors, which PyTorch does not take for lists.
    @functools.wraps(all_to_all)
    def exchange_parts(*args: Any, **kwargs: Any) -> Any:
        for name in ("output_split_sizes", "input_split_sizes"):
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].tolist()
        return all_to_all(*args, **kwargs)

    dist.all_gather = gather_parts
    dist.reduce_scatter = scatter_parts
    dist.all_to_all_single = exchange_parts
