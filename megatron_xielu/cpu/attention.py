"""Attention for CPU runs of what Megatron leaves to Transformer Engine; exact, not fast.

Megatron's torch attention refuses context parallelism and documents in one sequence, so that a CPU
run could not test what they do to gradients.

* Context parallelism: gather keys and values, mask by global position. Megatron's data layout: rank
  r holds chunks ``r`` and ``2·cp − 1 − r`` of the sequence.
* Documents (``packed_seq_params``): each by itself.

Legend: s local sequence, S = s·cp, b batch, n local heads, d head size, t tokens of all documents.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention


class CPUAttention(DotProductAttention):
    """Megatron's torch attention, also with ``--context-parallel-size`` above 1 or with
    ``--dataloader-inter-document-masking`` (both causal only)."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        cp_size, config.context_parallel_size = config.context_parallel_size, 1
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.context_parallel_size = cp_size

    def forward(
        self,
        query: torch.Tensor,  # [s, b, n, d]; of documents [t, n, d]
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of the local queries over the whole sequence: ``[s, b, n·d]``.

        Of documents each over itself: ``[t, 1, n·d]``.
        """
        attend = super().forward
        if packed_seq_params is not None:
            return torch.cat(
                [
                    # [t, n, d] -> [s, 1, n, d]; without a mask it is causal
                    attend(*(x[begin:end, None] for x in (query, key, value)), None)
                    for begin, end in pairwise(packed_seq_params.cu_seqlens_q.tolist())
                    if begin < end
                ]
            )
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
        return attend(query, key, value, attention_mask, *args, **kwargs)
