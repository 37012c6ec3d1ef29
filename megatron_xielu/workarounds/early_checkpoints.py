"""A checkpoint of an optimizer that has not stepped yet: of fp16, while the loss scale is found.

Megatron's Adam has no moments before its first step, and saves none; loading, it asks for them, and
fails ("… exp_avg … not in state dict"). With fp16 the first steps are skipped until the loss scale
fits, so that a run that is stopped or saved then could not go on. In 0.17.1, 0.18.2, 0.19.2 and
main of 2026-08-22; no upstream change that ends it is known. Moments that are zero are what the
first step would begin with.
"""

from __future__ import annotations

import functools
from typing import Any


def install() -> None:
    """Have the optimizers of this process's Megatron save moments from the start. Idempotent."""
    from megatron.core.optimizer import distrib_optimizer, optimizer

    for owner in (
        distrib_optimizer.DistributedOptimizer,
        optimizer.Float16OptimizerWithFloat16Params,
        optimizer.FP32Optimizer,
    ):
        sharded_state_dict = owner.__dict__["sharded_state_dict"]
        if not hasattr(sharded_state_dict, "_early"):
            owner.sharded_state_dict = _with_moments(sharded_state_dict)


def _with_moments(sharded_state_dict: Any) -> Any:
    @functools.wraps(sharded_state_dict)
    def mended(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = getattr(self, "optimizer", None)
        if inner is not None and not inner.state and getattr(self, "init_state_fn", None):
            self.init_state_fn(inner, self.config)
        return sharded_state_dict(self, *args, **kwargs)

    mended._early = True  # type: ignore[attr-defined]
    return mended
