"""Both checkpoint formats of Megatron's distributed optimizer, where gradient buffers are padded.

A gradient buffer is cut into buckets, each padded at its end to a multiple of the data-parallel
size, and every rank owns one equal part of each bucket. Parameters start at multiples of 64.

``fully_reshardable`` (``--dist-ckpt-optim-fully-reshardable``; 0.17.1, 0.18.2, 0.19.2)
    The state of a buffer is gathered without the padding of its buckets, and then cut up at offsets
    that contain it. From the second bucket on, weights and moments are written shifted, and the
    last ones as zeros. Ended by NVIDIA/Megatron-LM #5077 (32a03b77c5, main of 2026-08-21).

``dp_reshardable`` (the default; 0.17.1, 0.18.2, 0.19.2 and main of 2026-08-22)
    A rank that owns nothing of a bucket fails with "empty bucket encountered": its part is padding
    alone, between parameters (fp32 alphas are few, and lie in a buffer of their own) or at the end.
    And padding that starts before the end of what is saved of a bucket is saved past it. And a rank
    that has a part of some buckets of a buffer, and nothing of others, could save and not load: its
    buckets are a list, from which loading drops what is empty. #6191 and #5898, both open, concern
    the second and a part of the first.

`install` tries each format on a buffer of a few elements, and mends it if the fault is there.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch


def install() -> None:
    """Mend those formats of this process's Megatron that have the fault. Idempotent."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if _saves_shifted():
        DistributedOptimizer.sharded_param_state_fully_reshardable = _at_unpadded_offsets(
            DistributedOptimizer.sharded_param_state_fully_reshardable
        )
    if _fails_at_padding():
        DistributedOptimizer.get_parameter_state_dp_reshardable = _with_padding(
            DistributedOptimizer.get_parameter_state_dp_reshardable
        )
        DistributedOptimizer.sharded_param_state_dp_reshardable = _by_number(
            DistributedOptimizer.sharded_param_state_dp_reshardable
        )


def _at_unpadded_offsets(sharded_param_state: Any) -> Any:
    """Where parameters lie in a buffer, as the gathered state has them: without bucket ends."""

    @functools.wraps(sharded_param_state)
    def mended(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            before = [0]  # padding of all buckets before each
            for bucket in buffer.buckets:
                before.append(before[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
            buffer.param_index_map = {
                parameter: (start - before[bucket], end - before[bucket], bucket)
                for parameter, (start, end, bucket) in buffer.param_index_map.items()
            }
        try:
            return sharded_param_state(self, *args, **kwargs)
        finally:
            for buffer, index_map in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = index_map

    return mended


def _with_padding(get_parameter_state: Any) -> Any:
    """A rank's part of every bucket with all its padding, as zeros, up to the end of what is saved.

    Megatron then has none to add: it would not where a rank has no parameter, would regardless of
    where the saved part of a bucket ends, and would save memory as it finds it.
    """

    @functools.wraps(get_parameter_state)
    def mended(self: Any) -> Any:
        state = get_parameter_state(self)
        dtypes = _state_dtypes(self, state)
        rank, ranks = self.data_parallel_group.rank(), self.data_parallel_group.size()
        for index, buffer in enumerate(self.buffers):
            ((_, buckets),) = state[index].items()
            for bucket, entries in zip(buffer.buckets, buckets, strict=True):
                numel = bucket.grad_data.numel() // ranks
                saved = max(0, min(numel, bucket.numel_unpadded - rank * numel))
                starts = [entry["gbuf_local_start"] for entry in entries] + [saved]
                ends = [0] + [entry["gbuf_local_end"] for entry in entries]
                gaps = [
                    {
                        **{
                            key: torch.zeros(
                                start - end, dtype=dtype, device=bucket.grad_data.device
                            )
                            for key, dtype in dtypes.items()
                        },
                        "gbuf_local_start": end,
                        "gbuf_local_end": start,
                        "padding": True,
                    }
                    for end, start in zip(ends, starts, strict=True)
                    if end < start
                ]
                if not saved:  # nothing of this part is; but it must not be empty
                    place = {"gbuf_local_start": 0, "gbuf_local_end": numel}
                    gaps = [{**place, "padding": True}]
                entries[:] = sorted(entries + gaps, key=lambda entry: entry["gbuf_local_start"])
        return state

    return mended


def _by_number(sharded_param_state: Any) -> Any:
    """Buckets in a dict: of a list, loading drops those without a tensor, and the rest move up."""

    @functools.wraps(sharded_param_state)
    def mended(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = sharded_param_state(self, *args, **kwargs)
        for index in range(len(self.buffers)):
            state[index] = {dtype: dict(enumerate(b)) for dtype, b in state[index].items()}
        return state

    return mended


def _state_dtypes(optimizer: Any, state: dict) -> dict[str, torch.dtype]:
    """The tensors that a parameter's state consists of: key, dtype."""
    for index in range(len(optimizer.buffers)):
        ((_, buckets),) = state[index].items()
        for entry in (entry for owned in buckets for entry in owned if "padding" not in entry):
            tensors = {key: v for key, v in entry.items() if isinstance(v, torch.Tensor)}
            return {key: tensor.dtype for key, tensor in tensors.items() if key != "step"}
    # A rank that owns nothing at all. Before 0.19 there was Adam alone.
    moments = getattr(optimizer, "optimizer_state_keys", ("exp_avg", "exp_avg_sq"))
    return dict.fromkeys(("param", *moments), torch.float32)


def _saves_shifted() -> bool:
    """Whether ``fully_reshardable`` takes the second bucket's parameter from the wrong place."""
    from megatron.core.dist_checkpointing import ShardedTensor

    first, second = torch.zeros(5), torch.zeros(2)
    optimizer = _second_of_two_ranks(first, second)
    gathered = torch.arange(10.0)  # seven of the first bucket, two of the second, and one more
    world = {("fp32", "fp32"): {"param": gathered, "numel_unpadded": 9}}
    optimizer.get_parameter_state_dp_zero = lambda **kwargs: {0: world}
    model = {
        key: ShardedTensor.from_rank_offsets(key, parameter)
        for key, parameter in {"first": first, "second": second}.items()
    }
    saved = optimizer.sharded_param_state_fully_reshardable(model, False, {})
    return not torch.equal(saved[1]["param"].data, gathered[7:9])


def _fails_at_padding() -> bool:
    """Whether ``dp_reshardable`` fails at a bucket of padding, or saves padding past its end."""
    optimizer = _second_of_two_ranks(torch.zeros(5), torch.zeros(2))
    optimizer._get_main_param_and_optimizer_states = lambda parameter: {"param": torch.zeros(1)}
    try:
        state = optimizer.sharded_param_state_dp_reshardable({})
    except AssertionError:
        return True
    first_bucket = state[0]["fp32", "fp32"][0]
    return sum(entry["param"].data.numel() for entry in first_bucket) != 7 - 4


def _second_of_two_ranks(first: torch.Tensor, second: torch.Tensor) -> Any:
    """An optimizer with two buckets: 5 elements and 2 to be saved, of 8; 2 elements, of 4.

    This rank owns the last element of ``first``, and nothing of ``second``.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range

    optimizer: Any = object.__new__(DistributedOptimizer)
    optimizer.data_parallel_group = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    optimizer.data_parallel_group_idx = optimizer.distributed_optimizer_instance_id = 0
    optimizer.per_bucket_numel = optimizer.per_bucket_numel_unpadded = []
    buffer = SimpleNamespace(
        numel_unpadded=9,
        param_index_map={first: (0, 5, 0), second: (8, 10, 1)},
        buckets=[
            SimpleNamespace(grad_data=torch.zeros(8), numel_unpadded=7),
            SimpleNamespace(grad_data=torch.zeros(4), numel_unpadded=2),
        ],
    )
    optimizer.buffers = [buffer]
    owned = {first: {"gbuf_local": Range(0, 1)}}
    optimizer.gbuf_ranges = [{("fp32", "fp32"): [{"param_map": owned}, {"param_map": {}}]}]
    return optimizer
