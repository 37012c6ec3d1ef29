"""The activation where rows belong to experts, by a backend for one pair of alphas at a time.

For CPUs and float64, whoever computes there: a loop over the experts. It reads on the host where
their rows are, so on a GPU it waits for what was queued, once a pass. Weights are multiplied in
float32 (float64 for float64), before the one rounding at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _experts(ranges: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and its real ones."""
    for expert, (start, end) in enumerate(ranges.t().tolist()):
        if end > start:
            yield expert, slice(start, end)


class Loop:
    """An implementation by `dense`, a module of this room."""

    def __init__(self, dense: ModuleType, ranges: Tensor) -> None:
        self.dense, self.ranges = dense, ranges

    def forward(
        self,
        name: str,
        x: Tensor,
        alpha_p: Tensor,
        alpha_n: Tensor,
        beta: float,
        row_weights: Tensor | None,
    ) -> Tensor:
        """``w f(x)`` in real rows, 0 in others; contiguous, in x's dtype. See `grouped`."""
        y = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        for expert, rows in _experts(self.ranges):
            alphas = alpha_p[expert], alpha_n[expert]
            if row_weights is None:
                y[rows] = self.dense.forward(name, x[rows], *alphas, beta, None)
            else:
                value = self.dense.forward(name, _wide(x[rows]), *alphas, beta, None)
                y[rows] = value.mul_(row_weights[rows].view(-1, 1))
        return y

    def backward(
        self,
        name: str,
        dy: Tensor,
        x: Tensor,
        alpha_p: Tensor,
        alpha_n: Tensor,
        beta: float,
        row_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients by x (contiguous), alphas and weights, each in the dtype of its input."""
        dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        d_alpha_p, d_alpha_n = torch.zeros_like(alpha_p), torch.zeros_like(alpha_n)
        d_weights = None if row_weights is None else torch.zeros_like(row_weights)
        for expert, rows in _experts(self.ranges):
            alphas = alpha_p[expert], alpha_n[expert]
            upstream, inputs = dy[rows], x[rows]
            if row_weights is not None and d_weights is not None:
                upstream, inputs = _wide(upstream), _wide(inputs)
                value = self.dense.forward(name, inputs, *alphas, beta, None)
                sums = value.mul_(upstream).sum(1, dtype=torch.float64)
                d_weights[rows] = sums.view(d_weights[rows].shape).to(d_weights.dtype)
                upstream = upstream * row_weights[rows].view(-1, 1)
            dx[rows], d_alpha_p[expert], d_alpha_n[expert], _ = self.dense.backward(
                name, upstream, inputs, *alphas, beta, None
            )
        return dx, d_alpha_p, d_alpha_n, d_weights
