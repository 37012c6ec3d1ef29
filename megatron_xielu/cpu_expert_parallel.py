"""The collectives of Megatron's MoE token dispatchers, on a CPU over gloo.

Ranks of an expert exchange as many tokens as their routers chose: parts of other sizes from every
rank, which NCCL takes and gloo does not.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist


def redirect() -> None:
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

    dist.all_gather = gather_parts  # type: ignore[assignment]
    dist.reduce_scatter = scatter_parts  # type: ignore[assignment]
    dist.all_to_all_single = exchange_parts
