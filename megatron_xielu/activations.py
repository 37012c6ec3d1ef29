"""XIELU and XIPReLU as modules: fp32 trainable alphas whose gradients are whole on every rank.

The formulas are in `megatron_xielu.functional`. This file owns what a module adds to them:

* **Parameters.** ``alpha_p`` and ``alpha_n`` are raw (before softplus) and have shape ``(1,)``:
  Megatron leaves 1-D parameters out of weight decay, a 0-d one it would decay.
* **Precision.** They stay fp32 when the model is cast to bf16 or fp16. A trained alpha reaches 166,
  where neighbouring bf16 numbers are 1.0 apart and no optimizer step would ever change it.
* **Tensor parallelism.** A rank computes the activation of its own slice of the ffn columns, so its
  alpha gradient is a partial sum. `_SumGradientOverGroup` adds the partial sums of the group in
  backward, before anything else sees the gradient. Why there and not in Megatron's gradient
  finalization: see ``docs/tensor-parallelism.md``.
* **Experts.** Each expert has a pair of its own. The columns of a routed expert are split over the
  expert-tensor-parallel ranks, and its copies are elsewhere than those of the other layers; see
  ``docs/moe.md``.
* **Ablations.** Frozen alphas need no gradient: DDP and the optimizer pass them over, checkpoints
  hold them as ever. One pair for all layers: `megatron_xielu.features.shared_alphas`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_xielu import catalog, functional
from megatron_xielu.catalog import DEFAULT_ALPHA_INIT, DEFAULT_BETA
from megatron_xielu.kernels import reference


class _SumGradientOverGroup(torch.autograd.Function):
    """Identity on the stacked alpha pair whose gradient is summed over a process group."""

    @staticmethod
    def forward(ctx: Any, alphas: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return alphas.view_as(alphas)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()  # autograd may share this buffer
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


def _check_setting(name: str, value: Any, *, above: float) -> None:
    """Raise ValueError unless it is a number above that, within float32's range."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and above < value <= torch.finfo(torch.float32).max):
        raise ValueError(f"{name} must be a finite number above {above}, got {value!r}")


def _has_expert_groups(config: Any) -> bool:
    """Whether experts are replicated over other ranks than the rest of the model.

    Megatron's linear layers ask the same. The ``allreduce`` mark then tells its DDP, optimizer and
    gradient norm to use the expert groups.
    """
    return (
        config.expert_model_parallel_size > 1
        or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
    )


@dataclass
class Handover:
    """What an activation and the linear layers beside it hand to one another in a forward pass.

    Between fc1, the activation and fc2 nothing else of the model runs, so one place per MLP is
    enough, whatever the schedule of micro-batches and pipeline stages.
    """

    bias: Tensor | None = None  # of fc1, for the activation to add (`features.bias_fusion`)
    # Of the activation's output, which fc2 frees after use (`features.recompute`).
    checkpoint: random.CheckpointWithoutOutput | None = None


class TrainableActivation(MegatronModule):
    """What `XIELU` and `XIPReLU` share: two raw alphas in fp32, complete gradients, a fixed β.

    Args:
        config: Megatron's ``TransformerConfig`` (what the MLP's activation slot passes), or None.
        alpha_p_init: effective (after softplus) initial alpha of the positive side, above 0.
        alpha_n_init: effective initial alpha of the negative side, above `alpha_n_floor`.
        beta: slope at 0, a constant above 0.
        tp_group: the ranks that hold the other slices of the ffn columns. Default: Megatron's
            tensor-parallel group (for an expert its expert-tensor-parallel group) if Megatron is
            initialised, else none.
        is_expert: for a routed expert: the alphas are marked as Megatron marks its weights.
        frozen_alphas: the alphas are not trained.

    Raises:
        ValueError: an initial value or beta is out of range.
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
        tp_group: ProcessGroup | None = None,
        is_expert: bool = False,
        frozen_alphas: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.check_settings(alpha_p_init=alpha_p_init, alpha_n_init=alpha_n_init, beta=beta)
        # Numbers of NumPy's are none to the operators.
        self.alpha_p_init, self.alpha_n_init = float(alpha_p_init), float(alpha_n_init)
        self.beta = float(beta)
        megatron_group = (
            parallel_state.get_expert_tensor_parallel_group
            if is_expert
            else parallel_state.get_tensor_model_parallel_group
        )
        self.tp_group = megatron_group(check_initialized=False) if tp_group is None else tp_group
        self.alpha_p, self.alpha_n = (
            torch.nn.Parameter(torch.empty(1, dtype=torch.float32), not frozen_alphas)
            for _ in range(2)
        )
        if is_expert:
            for alpha in (self.alpha_p, self.alpha_n):
                alpha.allreduce = not _has_expert_groups(config)  # type: ignore[attr-defined]
        self.handover = Handover()
        self.recompute_output = False
        self.reset_parameters()

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

    def effective_alphas(self) -> tuple[Tensor, Tensor]:
        """``(αp, αn)`` as they stand in the formula: detached, float64, shape (1,)."""
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
            if torch.finfo(result.dtype).bits >= min(32, torch.finfo(tensor.dtype).bits):
                return result
            return tensor.to(result.device, torch.float32)

        return super()._apply(keep_precision, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """With ``assign=True`` the alphas are those of the file, which may have 16 bits."""
        super()._load_from_state_dict(*args, **kwargs)
        if min(self.alpha_p.dtype.itemsize, self.alpha_n.dtype.itemsize) < 4:
            self.float()

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainableActivation:
        """A copy in the same process group: groups cannot be copied."""
        memo[id(self.tp_group)] = self.tp_group
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _complete_alphas(self) -> tuple[Tensor, Tensor]:
        """The raw alphas, wired so that their gradients are summed over the TP group."""
        if self.tp_group is None or self.tp_group.size() == 1:
            return self.alpha_p, self.alpha_n
        pair = torch.cat((self.alpha_p, self.alpha_n))  # [2]: one collective for both
        alpha_p, alpha_n = _SumGradientOverGroup.apply(pair, self.tp_group).split(1)
        return alpha_p, alpha_n

    def forward(self, input_: Tensor) -> Tensor:
        """Apply the activation elementwise; any shape, the result has the same shape and dtype."""
        alpha_p, alpha_n = self._complete_alphas()
        bias, self.handover.bias = self.handover.bias, None
        if self.recompute_output and self.training and torch.is_grad_enabled():
            # fp8=None: to Megatron's class, False too would mean FP8.
            checkpoint = random.CheckpointWithoutOutput(fp8=None)
            self.handover.checkpoint = checkpoint
            return checkpoint.checkpoint(self._formula, input_, alpha_p, alpha_n, bias)
        self.handover.checkpoint = None  # of a forward pass that did not come to fc2
        return self._formula(input_, alpha_p, alpha_n, bias)

    def _formula(self, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, bias: Tensor | None) -> Tensor:
        return self.function(x, alpha_p, alpha_n, beta=self.beta, bias=bias)

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


def mlps_of(model: list) -> list[Any]:
    """The MLPs of these model chunks, experts among them, that have one of our activations."""
    return [
        module
        for chunk in model
        for module in chunk.modules()
        if isinstance(getattr(module, "activation_func", None), TrainableActivation)
    ]


@dataclass(frozen=True)
class ActivationBuilder:
    """An activation with its settings, in the form that Megatron's activation slot calls.

    Raises:
        ValueError: the settings are out of range (see `TrainableActivation`).
    """

    activation: type[TrainableActivation]
    alpha_p_init: float = DEFAULT_ALPHA_INIT
    alpha_n_init: float = DEFAULT_ALPHA_INIT
    beta: float = DEFAULT_BETA
    is_expert: bool = False
    frozen_alphas: bool = False

    def __post_init__(self) -> None:
        self.activation.check_settings(**self._settings())

    def __call__(self, *, config: Any) -> TrainableActivation:
        """Build the module for one MLP."""
        return self.activation(
            config=config,
            is_expert=self.is_expert,
            frozen_alphas=self.frozen_alphas,
            **self._settings(),
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "alpha_p_init": self.alpha_p_init,
            "alpha_n_init": self.alpha_n_init,
            "beta": self.beta,
        }
