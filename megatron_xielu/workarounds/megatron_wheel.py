"""Lets a Megatron that came from the package index train, and resume.

Megatron is developed in a checkout, beside NVIDIA Apex or Transformer Engine. Where it is the wheel
alone, two things stop it; `prepare` mends both and changes nothing where they work.

In 0.19.2, the release that this package's entry is for. No upstream change that ends either is
known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.optim.adam import adam


def prepare() -> None:
    """Apply both mends to the Megatron of this process. Idempotent."""
    skip_build_of_shipped_helpers()
    replace_torch_adam()


def skip_build_of_shipped_helpers() -> None:
    """Skip the build of the C++ index helpers where they came built with the wheel.

    At start Megatron runs ``make`` in ``megatron/core/datasets`` and exits when that fails. The
    wheel ships the built ``helpers_cpp`` but no Makefile, so every training would end there. A
    checkout has the Makefile and builds.
    """
    from megatron.core.datasets import utils

    if (Path(utils.__file__).parent / "Makefile").exists():
        return
    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return  # let Megatron report the missing helpers in its own words

    utils.compile_helpers = lambda: None


def replace_torch_adam() -> None:
    """Give Megatron an Adam with one step counter per group, as Apex and Transformer Engine have.

    PyTorch's has a counter per parameter. Megatron 0.19 falls back to it, but its distributed
    optimizer cannot resume with it: it asks for the counter of a state that is not there yet, and
    has no place for one among the tensors that it loads.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distrib_optimizer.Adam = AdamWithGroupStep
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


class AdamWithGroupStep(torch.optim.Optimizer):
    """PyTorch's Adam, to the bit, in the form of Apex's ``FusedAdam``: ``step`` is the group's.

    Args:
        params: parameters or groups, as for ``torch.optim.Adam``.
        adam_w_mode: decouple the weight decay from the gradient (AdamW).
        lr, betas, eps, weight_decay, capturable: as for ``torch.optim.Adam``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        self.adam_w_mode, self.capturable = adam_w_mode, capturable
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                state = self.state[parameter]
                for moment in ("exp_avg", "exp_avg_sq"):
                    if moment not in state:
                        state[moment] = torch.zeros_like(parameter)
            adam(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                # The function advances a counter of each parameter; the group's is kept below.
                [torch.tensor(float(group["step"])) for _ in parameters],
                capturable=self.capturable,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self.adam_w_mode,
            )
            group["step"] += 1
