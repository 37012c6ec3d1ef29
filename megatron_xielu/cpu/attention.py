"""Context-parallel attention for CPU runs: gather keys and values, mask by global position.

Megatron's own context parallelism lives in Transformer Engine. Its torch attention refuses it, so
that a CPU run could not test what context parallelism does to gradients. This one keeps Megatron's
data layout (rank r holds chunks ``r`` and ``2·cp − 1 − r`` of the sequence); it is exact, not fast.

Legend: s local sequence, S = s·cp, b batch, n local heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention


class ContextParallelAttention(DotProductAttention):
    """Megatron's torch attention, also with ``--context-parallel-size`` above 1 (causal only)."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        cp_size, config.context_parallel_size = config.context_parallel_size, 1
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.context_parallel_size = cp_size

    def forward(
        self,
        query: torch.Tensor,  # [s, b, n, d]
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of the local queries over the whole sequence: ``[s, b, n·d]``."""
        cp_size = self.config.context_parallel_size
        if cp_size > 1:
            group = parallel_state.get_context_parallel_group()
            # [s, b, n, d] -> [S, b, n, d]; the gradient is summed over ranks and scattered back.
            key, value = (
                gather_from_sequence_parallel_region(t.contiguous(), group=group)
                for t in (key, value)
            )
            chunk = query.size(0) // 2
            positions = [
                torch.cat(
                    [torch.arange(c * chunk, (c + 1) * chunk) for c in (r, 2 * cp_size - 1 - r)]
                )
                for r in range(cp_size)
            ]
            mine = positions[torch.distributed.get_rank(group)]
            attention_mask = (torch.cat(positions) > mine[:, None])[None, None]  # [1, 1, s, S]
        return super().forward(query, key, value, attention_mask, *args, **kwargs)
