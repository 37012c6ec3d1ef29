"""XIELU and XIPReLU as plain PyTorch modules, whose trainable alphas stay fp32 in a 16-bit model.

The formulas are in `megatron_xielu.functional`. This file owns what a module adds to them:

* **Parameters.** ``alpha_p`` and ``alpha_n`` are raw (before softplus) and have shape ``(1,)``.
  They want no weight decay: it would pull an effective alpha towards softplus(0) = 0.69.
* **Precision.** They stay fp32 when the model is cast to bf16 or fp16. A trained alpha reaches 166,
  where neighbouring bf16 numbers are 1.0 apart and no optimizer step would ever change it.
* **Ablations.** Frozen alphas need no gradient: DDP and the optimizer pass them over, checkpoints
  hold them as ever.

Nothing here knows Megatron; `megatron_xielu.megatron_activations` has what its models need besides.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from megatron_xielu import catalog, functional
from megatron_xielu.catalog import (
    DEFAULT_ALPHA_INIT,
    DEFAULT_BETA,
    FLOAT32_LEAST,
    FLOAT32_MOST,
)
from megatron_xielu.kernels import reference


def _check_setting(name: str, value: Any, *, above: float) -> None:
    """Raise ValueError unless it is a number above that, within float32's range."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and above < value <= FLOAT32_MOST):
        raise ValueError(f"{name} must be a finite number above {above}, got {value!r}")
    if value - above < FLOAT32_LEAST:
        raise ValueError(
            f"{name} must be above {above} by {FLOAT32_LEAST} or more (float32), got {value!r}"
        )


def _megatron_splits_tensors() -> bool:
    """Whether this process has set up tensor parallelism with Megatron; imports nothing of it."""
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is None:
        return False
    group = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
    return group is not None and group.size() > 1


class TrainableActivation(torch.nn.Module):
    """What `XIELU` and `XIPReLU` share: two raw alphas in fp32, and a fixed β.

    Args:
        config: None; Megatron gives its own to a module in its activation slot, where this has no
            place.
        alpha_p_init: effective (after softplus) initial alpha of the positive side, above 0.
        alpha_n_init: effective initial alpha of the negative side, above `alpha_n_floor`.
        beta: slope at 0, a constant above 0.
        frozen_alphas: the alphas are not trained.

    Raises:
        ValueError: an initial value or beta is out of range, or the module is made for a model of
            Megatron's.
    """

    alpha_p: torch.nn.Parameter
    alpha_n: torch.nn.Parameter
    name: str  # of `catalog`
    function: Callable[..., Tensor]  # of `functional`

    def __init__(
        self,
        config: Any = None,
        *,
        alpha_p_init: float = DEFAULT_ALPHA_INIT,
        alpha_n_init: float = DEFAULT_ALPHA_INIT,
        beta: float = DEFAULT_BETA,
        frozen_alphas: bool = False,
    ) -> None:
        super().__init__(**self._base_arguments(config))
        self.check_settings(alpha_p_init=alpha_p_init, alpha_n_init=alpha_n_init, beta=beta)
        # Numbers of NumPy's are none to the operators.
        self.alpha_p_init, self.alpha_n_init = float(alpha_p_init), float(alpha_n_init)
        self.beta = float(beta)
        self.alpha_p, self.alpha_n = (
            torch.nn.Parameter(
                torch.empty(self._alphas_of_each(config), dtype=torch.float32), not frozen_alphas
            )
            for _ in range(2)
        )
        self.reset_parameters()

    def _base_arguments(self, config: Any) -> dict[str, Any]:
        """What the next class in line is made with: `torch.nn.Module` with nothing."""
        if config is not None or _megatron_splits_tensors():
            raise ValueError(
                f"{type(self).__name__} is a plain PyTorch module: in a model of Megatron's its "
                "copies would drift apart under tensor parallelism; use MegatronXIELU or "
                "MegatronXIPReLU of megatron_xielu"
            )
        return {}

    def _alphas_of_each(self, config: Any) -> int:
        """How many of alpha_p, and as many of alpha_n, there are."""
        return 1

    @classmethod
    def alpha_n_floor(cls, beta: float) -> float:
        """The value that the effective alpha_n always stays above."""
        return catalog.alpha_n_floor(cls.name, beta)

    @classmethod
    def check_settings(cls, *, alpha_p_init: float, alpha_n_init: float, beta: float) -> None:
        """Raise ValueError unless the settings give an activation with finite raw alphas."""
        _check_setting("beta", beta, above=0)
        _check_setting("alpha_p_init", alpha_p_init, above=0)
        floor = cls.alpha_n_floor(beta)
        _check_setting(f"alpha_n_init of {cls.__name__}", alpha_n_init, above=floor)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set both raw alphas to their initial values."""
        effective = (self.alpha_p_init, self.alpha_n_init - self.alpha_n_floor(self.beta))
        for alpha, value in zip((self.alpha_p, self.alpha_n), effective, strict=True):
            alpha.copy_(
                reference.inverse_softplus(torch.full_like(alpha, value, dtype=torch.double))
            )

    @torch.no_grad()
    def effective_alphas(self) -> tuple[Tensor, Tensor]:
        """``(αp, αn)`` as they stand in the formula: detached, float64, in their shape."""
        return (
            reference.softplus(self.alpha_p),
            reference.softplus(self.alpha_n) + self.alpha_n_floor(self.beta),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainableActivation:
        """Apply casts and moves, but keep alphas out of 16 bits (see the top of this file).

        As `hf.modeling_xiprelu.Float32Module`, which may import nothing of this package.
        """

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

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Refuse what no training gets over, NaN say. With ``assign=True`` the alphas are those of
        the file, which may have 16 bits."""
        found = []
        for key in (f"{prefix}alpha_p", f"{prefix}alpha_n"):
            alpha = state_dict.get(key)
            # Shards, and what has no values, are not looked into.
            if type(alpha) not in (Tensor, torch.nn.Parameter) or alpha.is_meta:
                continue
            if not alpha.is_floating_point() or alpha.layout is not torch.strided:
                found.append(f"{key} must be a dense tensor of real numbers, not {alpha.dtype}")
            elif not alpha.float().isfinite().all():
                found.append(f"{key} is {alpha.tolist()}: take an earlier checkpoint")
        if found:  # PyTorch raises them all in the end
            lists[-1].extend(found)
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        if min(self.alpha_p.dtype.itemsize, self.alpha_n.dtype.itemsize) < 4:
            self.float()

    def forward(self, input_: Tensor) -> Tensor:
        """Apply the activation elementwise; any shape, the result has the same shape and dtype."""
        return self.function(input_, self.alpha_p, self.alpha_n, beta=self.beta)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return (
            f"alpha_p_init={self.alpha_p_init}, alpha_n_init={self.alpha_n_init}, beta={self.beta}"
        )


class XIELU(TrainableActivation):
    """``αp·x² + β·x`` for x > 0, ``αn·(expm1(x) − x) + β·x`` else; αn = β + softplus(alpha_n).

    Source: "Deriving Activation Functions Using Integration", arXiv 2411.13010.
    See `TrainableActivation` for the arguments.
    """

    name = "xielu"
    function = staticmethod(functional.xielu)


class XIPReLU(TrainableActivation):
    """``αp·x² + β·x`` for x > 0, ``αn·x² + β·x`` else; both alphas are softplus of their raw ones.

    Source: "Deriving Activation Functions Using Integration", arXiv 2411.13010.
    See `TrainableActivation` for the arguments.
    """

    name = "xiprelu"
    function = staticmethod(functional.xiprelu)


# What a flag, a checkpoint argument or a configuration calls an activation.
ACTIVATIONS: dict[str, type[TrainableActivation]] = {a.name: a for a in (XIELU, XIPReLU)}
