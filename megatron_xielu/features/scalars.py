"""Scalars of a step to TensorBoard and Weights & Biases, on the rank that has the writers."""

from __future__ import annotations

from collections.abc import Callable


def write(scalars: Callable[[], dict[str, float]], iteration: int) -> None:
    """Write them by tag; elsewhere they are not asked for, and nobody waits for a device."""
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if writer is None:
        return
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = scalars()
    # One event with all values: add_scalar() for each takes 20 to 30 times as long.
    summary = Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in values.items()])
    writer._get_file_writer().add_summary(summary, iteration)
    if wandb:
        wandb.log(values, iteration)
