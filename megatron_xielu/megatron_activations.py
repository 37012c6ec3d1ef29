"""XIELU and XIPReLU in a model of Megatron's: alphas whose gradients are whole on every rank.

What they add to the plain modules of `megatron_xielu.activations`:

* **Tensor parallelism.** A rank computes the activation of its own slice of the ffn columns, so its
  alpha gradient is a partial sum. `_SumGradientOverGroup` adds the partial sums of the group in
  backward, before anything else sees the gradient. Why there and not in Megatron's gradient
  finalization: see ``docs/tensor-parallelism.md``.
* **Experts.** Each expert has a pair of its own. The columns of a routed expert are split over the
  expert-tensor-parallel ranks, and its copies are elsewhere than those of the other layers; see
  ``docs/moe.md``.
* **Weight decay.** Megatron leaves 1-D parameters out of it; a 0-d alpha it would decay.
* **What flags ask for.** A bias of fc1 and a recomputed output (`Handover`); one pair for all
  layers is `megatron_xielu.features.shared_alphas`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_xielu.activations import XIELU, TrainableActivation, XIPReLU
from megatron_xielu.catalog import DEFAULT_ALPHA_INIT, DEFAULT_BETA


class _SumGradientOverGroup(torch.autograd.Function):
    """Identity on the stacked alpha pair whose gradient is summed over a process group."""

    @staticmethod
    def forward(ctx: Any, alphas: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return alphas.view_as(alphas)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()  # autograd may share this buffer
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


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
    # Of grouped experts (`megatron_grouped`), a number for each: its rows, and how many of them are
    # tokens where the others are padding.
    rows: list[int] | None = None
    tokens: list[int] | None = None

    def take_rows(self) -> tuple[list[int] | None, list[int] | None]:
        """``rows`` and ``tokens``, of this forward pass and of no other."""
        taken = self.rows, self.tokens
        self.rows = self.tokens = None
        return taken


class MegatronActivation(TrainableActivation, MegatronModule):
    """What `MegatronXIELU` and `MegatronXIPReLU` add to the plain modules.

    Args:
        config: Megatron's ``TransformerConfig`` (what the MLP's activation slot passes), or None.
        tp_group: the ranks that hold the other slices of the ffn columns. Default: Megatron's
            tensor-parallel group (for an expert its expert-tensor-parallel group) if Megatron is
            initialised, else none.
        is_expert: for a routed expert: the alphas are marked as Megatron marks its weights.
        settings: of `TrainableActivation`.

    Raises:
        ValueError: an initial value or beta is out of range.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        tp_group: ProcessGroup | None = None,
        is_expert: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(config, **settings)
        megatron_group = (
            parallel_state.get_expert_tensor_parallel_group
            if is_expert
            else parallel_state.get_tensor_model_parallel_group
        )
        self.tp_group = megatron_group(check_initialized=False) if tp_group is None else tp_group
        if is_expert:
            for alpha in (self.alpha_p, self.alpha_n):
                alpha.allreduce = not _has_expert_groups(config)  # type: ignore[attr-defined]
        self.handover = Handover()
        self.recompute_output = False

    def _base_arguments(self, config: Any) -> dict[str, Any]:
        return {"config": config}

    def __deepcopy__(self, memo: dict[int, Any]) -> MegatronActivation:
        """A copy in the same process group: groups cannot be copied."""
        memo[id(self.tp_group)] = self.tp_group
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _complete_alphas(self) -> tuple[Tensor, Tensor]:
        """The raw alphas, wired so that their gradients are summed over the TP group."""
        if self.tp_group is None or self.tp_group.size() == 1:
            return self.alpha_p, self.alpha_n
        pair = torch.cat((self.alpha_p, self.alpha_n))  # one collective for both
        alpha_p, alpha_n = _SumGradientOverGroup.apply(pair, self.tp_group).chunk(2)
        return alpha_p, alpha_n

    def forward(self, input_: Tensor) -> Tensor:
        """Apply the activation elementwise; any shape, the result has the same shape and dtype."""
        alpha_p, alpha_n = self._complete_alphas()
        bias, self.handover.bias = self.handover.bias, None
        return self._recomputable(self._formula, input_, alpha_p, alpha_n, bias)

    def _recomputable(self, formula: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """``formula(*inputs)``, which fc2 frees after use if it is to be computed again."""
        if self.recompute_output and self.training and torch.is_grad_enabled():
            # fp8=None: to Megatron's class, False too would mean FP8.
            checkpoint = random.CheckpointWithoutOutput(fp8=None)
            self.handover.checkpoint = checkpoint
            return checkpoint.checkpoint(formula, *inputs)
        self.handover.checkpoint = None  # of a forward pass that did not come to fc2
        return formula(*inputs)

    def _formula(self, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, bias: Tensor | None) -> Tensor:
        return self.function(x, alpha_p, alpha_n, beta=self.beta, bias=bias)


class MegatronXIELU(MegatronActivation, XIELU):
    """`XIELU` in Megatron's MLP. See `MegatronActivation` for the arguments."""


class MegatronXIPReLU(MegatronActivation, XIPReLU):
    """`XIPReLU` in Megatron's MLP. See `MegatronActivation` for the arguments."""


_OF_MEGATRON: dict[type[TrainableActivation], type[MegatronActivation]] = {
    XIELU: MegatronXIELU,
    XIPReLU: MegatronXIPReLU,
}


def of_megatron(activation: type[TrainableActivation]) -> type[MegatronActivation]:
    """The class that Megatron's MLPs have of an activation, of which this may be the plain one.

    Raises:
        ValueError: it is another plain one.
    """
    if issubclass(activation, MegatronActivation):
        return activation
    if activation not in _OF_MEGATRON:
        raise ValueError(f"{activation.__name__} is not for Megatron: derive a MegatronActivation")
    return _OF_MEGATRON[activation]


def recompute_output_of(mlp: Any) -> None:
    """Have the activation's output of an MLP, or of grouped experts, freed and computed again."""
    mlp.activation_func.recompute_output = True
    mlp.linear_fc2.register_forward_hook(partial(_free_output, mlp.activation_func.handover))


def _free_output(handover: Handover, fc2: torch.nn.Module, args: tuple, outputs: tuple) -> None:
    """Forward hook of fc2, local or Transformer Engine's; both return (output, bias).

    From here on the checkpoint lives in the autograd graph alone.
    """
    checkpoint, handover.checkpoint = handover.checkpoint, None
    if checkpoint is not None:
        checkpoint.discard_output_and_register_recompute(outputs[0])


def mlps_of(model: list) -> list[Any]:
    """The MLPs of these model chunks, experts among them, that have one of our activations."""
    return [
        module
        for chunk in model
        for module in chunk.modules()
        if isinstance(getattr(module, "activation_func", None), MegatronActivation)
    ]


@dataclass(frozen=True)
class ActivationBuilder:
    """An activation with its settings, in the form that Megatron's activation slot calls.

    Attributes:
        activation: the plain class does as well as Megatron's, which is built either way.

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

    def __call__(self, *, config: Any) -> MegatronActivation:
        """Build the module for one MLP."""
        return of_megatron(self.activation)(
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
