"""Grouped linear layers for CPU runs of ``--moe-grouped-gemm``: one layer after the other.

Megatron's `TEGroupedMLP` is built from two of Transformer Engine's, which need a GPU. These follow
their interface, with a layer of Megatron's own for each expert inside: initial weights, the marks
of its parameters and the keys in a checkpoint are those of experts with MLPs of their own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules
from torch import Tensor


class CPUGroupedLinear(torch.nn.Module):
    """The linear layers of all experts of a rank.

    Args:
        linear: Megatron's class of one of them.
        settings: of each of them; the other arguments are those of `TEGroupedLinear`.
    """

    def __init__(
        self,
        linear: type,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        pg_collection: Any,
        tp_comm_buffer_name: str | None = None,
        name: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._groups = pg_collection
        self._has_gate = linear is ColumnParallelLinear and settings["config"].gated_linear_unit
        self.experts: Any = torch.nn.ModuleList(
            linear(
                input_size,
                output_size,
                tp_group=pg_collection.expt_tp,
                tp_comm_buffer_name=tp_comm_buffer_name,
                **settings,
            )
            for _ in range(num_gemms)
        )

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, list[Tensor] | None]:
        """Rows [tokens, in] that are sorted by expert, to [tokens, out]; and the biases that are
        left to be added, if any."""
        outputs, biases = zip(
            *(expert(rows) for expert, rows in zip(self.experts, x.split(m_splits), strict=True)),
            strict=True,
        )
        return torch.cat(outputs), None if biases[0] is None else list(biases)

    def backward_dw(self) -> None:
        """Nothing: weight gradients are never delayed here."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """For Megatron's checkpoints, as `SequentialMLP` has it."""
        ep, count = self._groups.ep, len(self.experts)
        pieces: dict[str, Any] = {}
        for number, expert in enumerate(self.experts):
            place = (len(sharded_offsets), ep.rank() * count + number, ep.size() * count)
            own = f"{prefix}experts.{number}."
            offsets = (*sharded_offsets, place)
            piece = expert.sharded_state_dict(own, offsets, metadata)
            if self._has_gate:
                self._split_gate(piece, own, offsets)
            replace_prefix_for_sharding(piece, own, prefix)
            for tensor in piece.values():
                tensor.replica_id = (*tensor.replica_id[:2], self._groups.expt_dp.rank())
            pieces |= piece
        return pieces

    def _split_gate(self, piece: dict[str, Any], own: str, offsets: tuple) -> None:
        """As Megatron's MLP does: a tensor-parallel rank has a slice of the gate, and one of the
        rest. `TEGroupedMLP` looks for Transformer Engine's names."""
        for name in (f"{own}weight", f"{own}bias"):
            if name in piece:
                piece[name] = apply_swiglu_sharded_factory(
                    piece[name], offsets, tp_group=self._groups.expt_tp
                )


CPU_GROUPED_LINEARS = GroupedMLPSubmodules(
    linear_fc1=partial(CPUGroupedLinear, ColumnParallelLinear, gather_output=False),
    linear_fc2=partial(CPUGroupedLinear, RowParallelLinear, input_is_parallel=True),
)
