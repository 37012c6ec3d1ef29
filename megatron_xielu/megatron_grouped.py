"""XIELU and XIPReLU of grouped experts: one module for all experts of a rank, a pair for each.

Megatron's `TEGroupedMLP` (``--moe-grouped-gemm``) has its rows sorted by expert, and calls

    fc1(rows, [rows of each expert])  ->  activation_func(rows)  ->  · probs  ->  fc2

Its activation slot gets the rows alone. Two things are missing there, and no class of Megatron is
patched for them:

* **Whose a row is.** A forward hook on fc1 notes it (`connect`), and one on what FP8 pads the rows
  of an expert with, for padding is uninitialised memory and must not reach a gradient.
* **The router's probabilities**, which Megatron multiplies in as its next step, in two passes over
  fp32 copies. The module returns `Unweighted`, whose product with them is one pass of the kernel.

In a checkpoint they are what experts with MLPs of their own have (`SequentialMLP`): the same keys,
shapes and pieces, for the optimizer's state too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory
from torch import Tensor

from megatron_xielu import grouped
from megatron_xielu.activations import TrainableActivation
from megatron_xielu.megatron_activations import (
    MegatronActivation,
    MegatronXIELU,
    MegatronXIPReLU,
    of_megatron,
    recompute_output_of,
)


class Unweighted:
    """The activation of rows whose router probabilities come next.

    Args:
        dtype: of the rows, and of the product.
        product: called with the probabilities, [rows, 1].
    """

    def __init__(self, dtype: torch.dtype, product: Callable[[Tensor], Tensor]) -> None:
        self.dtype = dtype
        self._product = product

    def __mul__(self, probs: Tensor) -> Tensor:
        return self._product(probs)


class MegatronGroupedActivation(MegatronActivation):
    """What `MegatronGroupedXIELU` and `MegatronGroupedXIPReLU` share.

    ``alpha_p`` and ``alpha_n`` have shape (local experts,): Megatron would decay a 2-D parameter,
    and Muon would orthogonalise it.

    Args:
        config: Megatron's ``TransformerConfig``, which says how many experts a rank has.
        settings: of `MegatronActivation`.
    """

    grouped_function: Callable[..., Tensor]  # of `grouped`

    def _alphas_of_each(self, config: Any) -> int:
        return config.num_moe_experts // config.expert_model_parallel_size

    def forward(self, input_: Tensor) -> Unweighted:  # type: ignore[override]
        """The activation of fc1's rows, to be multiplied by the router's probabilities.

        Args:
            input_: [rows, ffn], sorted by expert, as fc1 has given them.

        Raises:
            RuntimeError: fc1 has not told whose they are.
        """
        rows, tokens = self.handover.take_rows()
        if rows is None:
            raise RuntimeError(
                f"{type(self).__name__} was not told whose a row is: build the experts from a spec "
                "that with_activation has filled, or call megatron_xielu.megatron_grouped.connect"
            )
        alpha_p, alpha_n = self._complete_alphas()
        formula = (
            partial(self._of_experts, rows, None)
            if tokens is None
            else partial(self._of_experts, tokens, rows)
        )
        return Unweighted(
            input_.dtype,
            lambda probs: self._recomputable(formula, input_, alpha_p, alpha_n, probs),
        )

    def _of_experts(
        self,
        tokens: list[int],
        rows: list[int] | None,
        x: Tensor,
        alpha_p: Tensor,
        alpha_n: Tensor,
        probs: Tensor,
    ) -> Tensor:
        return self.grouped_function(
            x,
            alpha_p,
            alpha_n,
            tokens,
            beta=self.beta,
            # fp64 ones, of --moe-router-dtype fp64, no kernel takes.
            row_weights=probs if probs.dtype == x.dtype else probs.float(),
            rows_per_expert=rows,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensorFactory]:
        """For Megatron's checkpoints: each alpha as the piece that its expert would save itself."""
        experts = self.alpha_p.numel()
        first = parallel_state.get_expert_model_parallel_rank() * experts
        total = parallel_state.get_expert_model_parallel_world_size() * experts
        replica = (
            0,
            0 if self.tp_group is None else self.tp_group.rank(),
            parallel_state.get_expert_data_parallel_rank(),
        )
        build = partial(_pieces, sharded_offsets, first, total)
        state: dict[str, Tensor] = {}
        self._save_to_state_dict(state, "", keep_vars=True)
        return {
            f"{prefix}{name}": ShardedTensorFactory(
                f"{prefix}{name}", alpha, build, torch.cat, replica
            )
            for name, alpha in state.items()
        }


@torch.no_grad()
def _pieces(
    offsets: tuple,
    first: int,
    experts: int,
    key: str,
    alphas: Tensor,
    replica_id: ReplicaId,
    flattened_range: slice | None,
) -> list[ShardedTensor]:
    """A tensor of shape (1,) for each expert, at its number of ``experts``."""
    return [
        ShardedTensor.from_rank_offsets(
            key,
            alpha,
            *offsets,
            (len(offsets), first + number, experts),
            replica_id=replica_id,
            prepend_axis_num=len(offsets) + 1,
        )
        for number, alpha in enumerate(alphas.split(1))
    ]


class MegatronGroupedXIELU(MegatronGroupedActivation, MegatronXIELU):
    """`XIELU` in Megatron's grouped experts. See `MegatronGroupedActivation` for the arguments."""

    grouped_function = staticmethod(grouped.grouped_xielu)


class MegatronGroupedXIPReLU(MegatronGroupedActivation, MegatronXIPReLU):
    """`XIPReLU` in Megatron's grouped experts. See `MegatronGroupedActivation`."""

    grouped_function = staticmethod(grouped.grouped_xiprelu)


_GROUPED: dict[type[TrainableActivation], type[MegatronGroupedActivation]] = {
    MegatronXIELU: MegatronGroupedXIELU,
    MegatronXIPReLU: MegatronGroupedXIPReLU,
}


def of_grouped_experts(activation: type[TrainableActivation]) -> type[MegatronGroupedActivation]:
    """The class that Megatron's grouped experts have of an activation.

    Raises:
        ValueError: there is none.
    """
    of_mlp = of_megatron(activation)
    if of_mlp not in _GROUPED:
        raise ValueError(
            f"{of_mlp.__name__} has no form for grouped experts; drop --moe-grouped-gemm"
        )
    return _GROUPED[of_mlp]


def build(experts: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Grouped experts of Megatron's class, whose activation is told whose a row is."""
    return connect(experts(*args, **kwargs))


def connect(experts: Any) -> Any:
    """Let the activation of these grouped experts know whose a row is.

    ``--recompute-modules moe_act`` becomes our own way to the same (`features.recompute`):
    Megatron's would call the activation once more in the backward pass, when fc1 has told of the
    rows of a later micro-batch.

    Args:
        experts: a `TEGroupedMLP` with our activation in its slot.

    Returns:
        ``experts``.

    Raises:
        ValueError: it has another number of experts than its activation has alphas.
    """
    activation = experts.activation_func
    if activation.alpha_p.numel() != experts.num_local_experts:
        raise ValueError(
            f"{experts.num_local_experts} grouped experts on this rank, and alphas for "
            f"{activation.alpha_p.numel()}: num_moe_experts and expert_model_parallel_size of the "
            "configuration say how many there are"
        )
    experts.linear_fc1.register_forward_hook(partial(_note_rows, activation.handover))
    if hasattr(experts, "quantization_padding"):
        experts.quantization_padding.register_forward_hook(
            partial(_note_tokens, activation.handover)
        )
    if experts.activation_recompute:
        experts.activation_recompute = False
        recompute_output_of(experts)
    return experts


def _note_rows(handover: Any, fc1: torch.nn.Module, args: tuple, outputs: Any) -> None:
    handover.rows = args[1]


def _note_tokens(handover: Any, padding: torch.nn.Module, args: tuple, outputs: Any) -> None:
    """Before it, fc1 gets the rows with padding."""
    handover.tokens = args[1]
