# SPDX-License-Identifier: Apache-2.0
"""xIPReLU for Hugging Face: Arcee (Llama without a gate) and Apertus (the same with QK-norm).

    x > 0     alpha_p x^2 + beta x        alpha_p = softplus(a_p)
    x <= 0    alpha_n x^2 + beta x        alpha_n = softplus(a_n)

Source: "Deriving Activation Functions Using Integration", arXiv 2411.13010. This file travels in
the folder of an exported model, for ``from_pretrained(folder, trust_remote_code=True)``, so it
needs nothing but torch and transformers (tested with 4.57 and 5.23). Where megatron_xielu is
installed, ``import megatron_xielu.hf`` registers the same classes.

a_p and a_n are the raw parameters ``act_fn.alpha_p`` and ``act_fn.alpha_n``, of shape (1,). They
stay float32 in a 16-bit model: a trained one can exceed 128, where bfloat16 is 1.0 apart. beta is
``config.xiprelu_beta``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ApertusConfig, ApertusForCausalLM, ArceeConfig, ArceeForCausalLM
from transformers.activations import ACT2FN

__all__ = [
    "ApertusXIPReLUConfig",
    "ApertusXIPReLUForCausalLM",
    "ArceeXIPReLUConfig",
    "ArceeXIPReLUForCausalLM",
    "XIPReLUActivation",
]

_ALPHA_INIT = 0.8  # effective, of both sides
_BETA = 0.5
# Modules that transformers keeps in float32 when it loads a model in 16 bits.
_FLOAT32 = ["act_fn"]


class Float32Module(nn.Module):
    """A module that casts like ``model.to(torch.bfloat16)`` never narrow below float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if not result.is_floating_point():
                raise TypeError(
                    f"{type(self).__name__} has real alphas: it cannot be cast to {result.dtype}"
                )
            if torch.finfo(result.dtype).bits >= min(32, torch.finfo(tensor.dtype).bits):
                return result
            return tensor.to(result.device, torch.float32)

        return super()._apply(keep_precision, recurse)


class XIPReLUActivation(Float32Module):
    """xIPReLU, elementwise; float32 inside for 16-bit x, and the result in x's dtype."""

    def __init__(self, beta: float = _BETA) -> None:
        super().__init__()
        self.beta = beta
        self.alpha_p = nn.Parameter(torch.empty(1, dtype=torch.float32))
        self.alpha_n = nn.Parameter(torch.empty(1, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Both effective alphas 0.8."""
        for alpha in (self.alpha_p, self.alpha_n):
            nn.init.constant_(alpha, math.log(math.expm1(_ALPHA_INIT)))

    def forward(self, input: Tensor) -> Tensor:
        """Any shape, floating point. The alpha is chosen before any arithmetic, so what the other
        side would have computed cannot reach a gradient."""
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        zero = x.new_zeros(1)
        # log(e^a + e^0): softplus without the cut-off of torch.nn.functional.softplus
        alpha_p = torch.logaddexp(self.alpha_p.to(x.dtype), zero)
        alpha_n = torch.logaddexp(self.alpha_n.to(x.dtype), zero)
        alpha = torch.where(x > 0, alpha_p, alpha_n)
        return ((alpha * x + self.beta) * x).to(input.dtype)


# The MLP looks its activation up by config.hidden_act.
ACT2FN["xiprelu"] = XIPReLUActivation


def _checked(beta: Any) -> float:
    """Raise ValueError unless a configuration has such a slope at 0."""
    is_number = isinstance(beta, (int, float)) and not isinstance(beta, bool)
    if not (is_number and 0.0 < beta < math.inf):
        raise ValueError(f"xiprelu_beta must be a positive number, not {beta!r}")
    return float(beta)


class ArceeXIPReLUConfig(ArceeConfig):
    """`ArceeConfig` with xIPReLU; ``xiprelu_beta`` is its slope at 0."""

    model_type = "arcee_xiprelu"

    def __init__(
        self, hidden_act: str = "xiprelu", xiprelu_beta: float = _BETA, **kwargs: Any
    ) -> None:
        self.xiprelu_beta = _checked(xiprelu_beta)
        super().__init__(hidden_act=hidden_act, **kwargs)


class ApertusXIPReLUConfig(ApertusConfig):
    """`ApertusConfig` with xIPReLU; ``xiprelu_beta`` is its slope at 0."""

    model_type = "apertus_xiprelu"

    def __init__(
        self, hidden_act: str = "xiprelu", xiprelu_beta: float = _BETA, **kwargs: Any
    ) -> None:
        self.xiprelu_beta = _checked(xiprelu_beta)
        super().__init__(hidden_act=hidden_act, **kwargs)


class _WithXIPReLU:
    """What both models add: beta, and initial alphas."""

    def __init__(self, config: ArceeXIPReLUConfig | ApertusXIPReLUConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, XIPReLUActivation):
                module.beta = config.xiprelu_beta

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, XIPReLUActivation):
            module.reset_parameters()


class ArceeXIPReLUForCausalLM(_WithXIPReLU, ArceeForCausalLM):
    """`ArceeForCausalLM` with xIPReLU."""

    config_class = ArceeXIPReLUConfig
    _keep_in_fp32_modules_strict = _FLOAT32


class ApertusXIPReLUForCausalLM(_WithXIPReLU, ApertusForCausalLM):
    """`ApertusForCausalLM` with xIPReLU."""

    config_class = ApertusXIPReLUConfig
    _keep_in_fp32_modules_strict = _FLOAT32
