"""Refuses an optimizer state that does not belong to the weights it was saved with.

Megatron's ``--dist-ckpt-optim-fully-reshardable`` writes such states (see
`distributed_optimizer_checkpoints`), and the files look whole. Resumed from, they do no harm that
one could see in the first step, which uses the 16-bit weights: after it, weights are overwritten
by those of other parameters. Checkpoints that were written before the mend are still about, so
this looks whenever one is loaded: an fp32 master weight, rounded, is the weight. The two come from
different places of the checkpoint, and a shifted state has hardly an element where they agree.

0.17.1, 0.18.2 and 0.19.2 write them; NVIDIA/Megatron-LM #5077 (32a03b77c5, main of 2026-08-21) ends
the writing. This stays for as long as such checkpoints are about.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

# Of bfloat16, the coarsest; a run may go on in another precision than it was saved in.
_RELATIVE, _ABSOLUTE = 2.0**-7, 2.0**-24


def install() -> None:
    """Look at what the distributed optimizer of this process loads. Idempotent."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_state = DistributedOptimizer._set_main_param_and_optimizer_states
    if not hasattr(set_state, "_checked"):
        checked: Any = _checked(set_state)
        checked._checked = True
        DistributedOptimizer._set_main_param_and_optimizer_states = checked


def _checked(set_state: Any) -> Any:
    @functools.wraps(set_state)
    def set_and_check(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        master = tensors.get("param")
        # Quantised weights are subclasses of Tensor, and no rounding of the master weight.
        if type(model_param.data) is torch.Tensor and getattr(master, "dtype", None) in _FLOATS:
            owned = self._get_model_param_range_map(model_param)["param"]
            weight = model_param.detach().view(-1)[owned.start : owned.end]
            _check(self, model_param, weight, master)
        set_state(self, model_param, tensors)

    return set_and_check


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _check(optimizer: Any, model_param: Any, weight: Any, master: Any) -> None:
    master = master.detach().to(weight.device, torch.float32)
    strange = ~torch.isclose(master, weight.float(), rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True)
    if not strange.any():
        return
    name = next(
        name
        for chunk in optimizer.model_chunks
        for name, parameter in chunk.named_parameters()
        if parameter is model_param
    )
    raise SystemExit(
        f"megatron_xielu: error: the optimizer state of this checkpoint is not that of its weights "
        f"({int(strange.sum())} of {strange.numel()} master weights of {name} differ). Megatron "
        "writes such states with --dist-ckpt-optim-fully-reshardable and several gradient buckets: "
        "then the weights are right; add --no-load-optim (the moments start anew), or load a step "
        "that was saved otherwise (--ckpt-step); see docs/checkpoints.md"
    )
