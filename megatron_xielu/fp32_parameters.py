"""What Megatron's optimizers need before they can carry fp32 parameters in a 16-bit model.

Alphas stay fp32 in a bf16 or fp16 model. Megatron 0.19 trains such a model correctly, and writes
wrong checkpoints of it: one optimizer is mended here, the other refused.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch


def check_optimizer(args: Namespace) -> None:
    """Refuse Megatron's non-distributed optimizer for a 16-bit model that is saved or loaded.

    It numbers only its 16-bit parameters when it writes a checkpoint, so that a native fp32
    parameter shifts the state of all that follow.

    Raises:
        ValueError: naming the flag to add.
    """
    half = args.bf16 or args.fp16
    if half and not args.use_distributed_optimizer and (args.save or args.load):
        raise ValueError(
            "alphas are fp32 parameters, and Megatron's non-distributed optimizer mixes up its "
            "checkpointed state when a bf16 or fp16 model has any; add --use-distributed-optimizer "
            "(it also works with one data-parallel rank)"
        )


def mend_distributed_optimizer() -> None:
    """Let the distributed optimizer save and load the state of fp32 parameters of a 16-bit model.

    * It keeps two orders of a parameter group: the one it looks state up by follows the gradient
      buffers, of which the 16-bit one may come first; the one it steps through has fp32 parameters
      first. Where the two differ, a checkpoint holds the moments of other parameters. This puts
      fp32 parameters first in both.
    * It loads by writing into its shards, and the shard of an fp32 parameter is a view of the
      parameter itself, which autograd does not let it write. This loads without autograd.

    Groups of 16-bit parameters alone are treated as before. Idempotent; call it before the
    optimizer is built.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    build_groups = DistributedOptimizer._build_optimizer_group_ranges
    if hasattr(build_groups, "__wrapped__"):
        return

    def fp32_first(cls: type, *args: Any, **kwargs: Any) -> tuple[dict, list[dict]]:
        _, groups = build_groups(*args, **kwargs)
        positions = {}
        for group_index, group in enumerate(groups):
            group["params"].sort(key=lambda parameter: parameter.dtype != torch.float32)
            for order, parameter in enumerate(group["params"]):
                positions[parameter] = (group_index, order)
        return positions, groups

    fp32_first.__wrapped__ = build_groups  # type: ignore[attr-defined]
    DistributedOptimizer._build_optimizer_group_ranges = classmethod(fp32_first)
    DistributedOptimizer._set_main_param_and_optimizer_states = torch.no_grad()(
        DistributedOptimizer._set_main_param_and_optimizer_states
    )
