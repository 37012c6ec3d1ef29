"""Native fp32 parameters (the alphas) in a bf16 or fp16 model, as Megatron's optimizers save them.

Megatron trains such a model correctly and writes wrong checkpoints of it, in 0.17.1, 0.18.2 and
0.19.2. `install` mends four faults; where all parameters have 16 bits it changes nothing.

**Order** (`DistributedOptimizer`; also main of 2026-08-22). It keeps two orders of a parameter
group: the one it looks state up by follows the gradient buffers, of which the 16-bit one may come
first; the one it steps through has fp32 parameters first. Where they differ, a checkpoint holds the
moments of other parameters. Both get fp32 parameters first. No upstream change is known.

**Loading** (`DistributedOptimizer`; also main). It writes into its shards, and the shard of an fp32
parameter is a view of the parameter itself, which autograd does not let it write. This loads
without autograd. No upstream change is known.

**Numbers** (`Float16OptimizerWithFloat16Params`: without the distributed optimizer, and Muon and
others with it). It numbers only 16-bit parameters, so that an fp32 one shifts the state of all that
follow: "Optimizer shape … does not match model shape", "Param id … does not match". Ended by
NVIDIA/Megatron-LM #5929 (86e928a97f, main of 2026-08-11), whose checkpoints this writes too.

**Groups** (`Float16OptimizerWithFloat16Params`). The master weights are saved as a list for each
parameter group. One that has none, as that of the alphas (`features.alpha_group`), has an empty
list, with which loading ends: "Cannot merge two lists with different lengths". This leaves it out
of checkpoints, and puts it back as it loads. No upstream change is known.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

_MASTERS = "fp32_from_fp16_params"


def install() -> None:
    """Mend the optimizers of this process's Megatron. Idempotent."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    build_groups = DistributedOptimizer._build_optimizer_group_ranges
    if not hasattr(build_groups, "__wrapped__"):
        DistributedOptimizer._build_optimizer_group_ranges = _fp32_first(build_groups)
        DistributedOptimizer._set_main_param_and_optimizer_states = torch.no_grad()(
            DistributedOptimizer._set_main_param_and_optimizer_states
        )
    if _misnumbers():
        Float16OptimizerWithFloat16Params.sharded_state_dict = _all_numbered(
            Float16OptimizerWithFloat16Params.sharded_state_dict
        )
    if not hasattr(Float16OptimizerWithFloat16Params.load_state_dict, "__wrapped__"):
        Float16OptimizerWithFloat16Params.sharded_state_dict = _without_empty_groups(
            Float16OptimizerWithFloat16Params.sharded_state_dict
        )
        Float16OptimizerWithFloat16Params.load_state_dict = _with_empty_groups(
            Float16OptimizerWithFloat16Params.load_state_dict
        )


def _fp32_first(build_groups: Any) -> Any:
    def mended(cls: type, *args: Any, **kwargs: Any) -> tuple[dict, list[dict]]:
        _, groups = build_groups(*args, **kwargs)
        positions = {}
        for group_index, group in enumerate(groups):
            group["params"].sort(key=lambda parameter: parameter.dtype != torch.float32)
            for order, parameter in enumerate(group["params"]):
                positions[parameter] = (group_index, order)
        return positions, groups

    mended.__wrapped__ = build_groups  # type: ignore[attr-defined]
    return classmethod(mended)


def _all_numbered(sharded_state_dict: Any) -> Any:
    """While it looks for the model's parameters, let it meet all that the inner optimizer has."""

    @functools.wraps(sharded_state_dict)
    def mended(self: Any, *args: Any, **kwargs: Any) -> dict:
        if getattr(self, "is_stub_optimizer", False) or not any(self.fp32_from_fp32_groups):
            return sharded_state_dict(self, *args, **kwargs)
        float16, masters = self.float16_groups, self.fp32_from_float16_groups
        model_parameters = {
            id(master): parameter
            for parameters, group in zip(float16, masters, strict=True)
            for parameter, master in zip(parameters, group, strict=True)
        }
        inner = [list(group["params"]) for group in self.optimizer.param_groups]
        self.fp32_from_float16_groups = inner
        self.float16_groups = [[model_parameters.get(id(p), p) for p in group] for group in inner]
        try:
            state = sharded_state_dict(self, *args, **kwargs)
        finally:
            self.float16_groups, self.fp32_from_float16_groups = float16, masters
        # The master copy of a native fp32 parameter is the parameter.
        state["fp32_from_fp16_params"] = [
            [tensor for tensor, p in zip(tensors, group, strict=True) if id(p) in model_parameters]
            for tensors, group in zip(state["fp32_from_fp16_params"], inner, strict=True)
        ]
        return state

    return mended


def _without_empty_groups(sharded_state_dict: Any) -> Any:
    @functools.wraps(sharded_state_dict)
    def mended(self: Any, *args: Any, **kwargs: Any) -> dict:
        state = sharded_state_dict(self, *args, **kwargs)
        if _MASTERS in state:
            state[_MASTERS] = [group for group in state[_MASTERS] if group]
        return state

    return mended


def _with_empty_groups(load_state_dict: Any) -> Any:
    @functools.wraps(load_state_dict)
    def mended(self: Any, state_dict: dict) -> None:
        saved = [group for group in state_dict.get(_MASTERS, ()) if group]
        if saved:
            groups = iter(saved)
            state_dict[_MASTERS] = [
                next(groups, []) if group else [] for group in self.fp32_from_float16_groups
            ]
        load_state_dict(self, state_dict)

    return mended


def _misnumbers() -> bool:
    """Whether a 16-bit parameter after an fp32 one is saved with its own state."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    native, parameter = torch.zeros(1), torch.zeros(2, dtype=torch.bfloat16)
    master = parameter.float()
    optimizer: Any = object.__new__(Float16OptimizerWithFloat16Params)
    optimizer.optimizer = torch.optim.SGD([native, master], momentum=0.9)
    for tensor in (native, master):
        optimizer.optimizer.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)
    optimizer.grad_scaler, optimizer.is_stub_optimizer = None, False
    optimizer.float16_groups, optimizer.fp32_from_float16_groups = [[parameter]], [[master]]
    optimizer.fp32_from_fp32_groups = [[native]]
    model = {
        key: ShardedTensor.from_rank_offsets(key, tensor)
        for key, tensor in {"native": native, "parameter": parameter}.items()
    }
    try:
        state = optimizer.sharded_state_dict(model)
    except Exception:  # of another shape, or of no parameter at all
        return True
    saved = state["optimizer"]["state"][1]["momentum_buffer"]
    return saved.key != "optimizer.state.momentum_buffer.parameter"
