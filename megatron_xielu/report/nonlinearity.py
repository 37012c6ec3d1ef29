"""How far an activation is from linear, as one number.

For inputs x of a given distribution, the share of the variance of f(x) that no straight line
explains: with the best affine fit ``c·x + d``,

    nonlinearity = 1 − R² = 1 − Cov(x, f(x))² / (Var x · Var f(x))

0 is a straight line; 1 an even function such as x² at a symmetric distribution. It depends on the
inputs: on a standard normal it compares activations alone, on the pre-activations that a layer
really gets it says what the layer does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_xielu.catalog import alpha_n_floor
from megatron_xielu.kernels import reference

Array = NDArray[np.float64]

_RANGE = 10.0  # standard deviations to either side; beyond, x⁴ has no weight left
_POINTS = 4000  # even, with none at 0, where the second derivative jumps
_PER_BIN = 8


@dataclass(frozen=True)
class Inputs:
    """A distribution as points ``x`` [n] with ``weights`` [n] that sum to 1."""

    x: Array
    weights: Array

    @classmethod
    def standard_normal(cls) -> Inputs:
        """Mean 0, standard deviation 1."""
        half = _RANGE / _POINTS
        x = np.linspace(half - _RANGE, _RANGE - half, _POINTS, dtype=np.float64)
        weights = np.exp(-(x**2) / 2)
        return cls(x, weights / weights.sum())

    @classmethod
    def histogram(cls, edges: Sequence[float], counts: Sequence[float]) -> Inputs:
        """Measured inputs, spread evenly over each bin.

        Args:
            edges: n + 1 of them, rising.
            counts: n.

        Raises:
            ValueError: the histogram is empty, or no histogram.
        """
        borders, heights = np.asarray(edges, float), np.asarray(counts, float)
        if (
            len(borders) != len(heights) + 1
            or not np.isfinite(borders).all()
            or (np.diff(borders) <= 0).any()
            or not heights.sum() > 0
        ):
            raise ValueError("a histogram needs n + 1 rising edges and n counts, not all 0")
        inside = (np.arange(_PER_BIN) + 0.5) / _PER_BIN
        x = (borders[:-1, None] + np.diff(borders)[:, None] * inside).ravel()
        return cls(x, np.repeat(heights / heights.sum() / _PER_BIN, _PER_BIN))


def nonlinearity(function: Callable[[Array], Array], inputs: Inputs) -> float:
    """1 − R² of the best affine fit to ``function`` on ``inputs``; 0 for a constant."""
    y = function(inputs.x)
    dx = inputs.x - (inputs.weights * inputs.x).sum()
    dy = y - (inputs.weights * y).sum()
    variance = (inputs.weights * dx**2).sum() * (inputs.weights * dy**2).sum()
    if variance == 0:
        return 0.0
    covariance = (inputs.weights * dx * dy).sum()
    return float(np.clip(1 - covariance**2 / variance, 0.0, 1.0))


@dataclass(frozen=True)
class Shape:
    """The trained activation of one MLP: ``name`` is xielu or xiprelu, alphas are effective."""

    name: str
    alpha_p: float
    alpha_n: float
    beta: float

    def _raw(self) -> tuple[torch.Tensor, torch.Tensor]:
        floor = alpha_n_floor(self.name, self.beta)
        return (
            reference.inverse_softplus(self.alpha_p),
            reference.inverse_softplus(max(self.alpha_n - floor, 0.0)),
        )

    def value(self, x: Array) -> Array:
        """f(x), any shape."""
        function = reference.FORWARD[self.name]
        return function(torch.from_numpy(x), *self._raw(), beta=self.beta).numpy()

    def slope(self, x: Array) -> Array:
        """f′(x), any shape."""
        gradient, at = reference.BACKWARD[self.name], torch.from_numpy(x)
        return gradient(torch.ones_like(at), at, *self._raw(), beta=self.beta)[0].numpy()


def trained(name: str, alpha_p: Array, alpha_n: Array, beta: float) -> Array:
    """`nonlinearity` of many activations on a standard normal, any shape.

    f is αp · f₁ + αn · f₂ + β · x, so that variances and covariances of f₁, f₂ and x give it.

    Args:
        name: xielu or xiprelu.
        alpha_p: effective αp.
        alpha_n: effective αn, of the same shape.
        beta: β.
    """
    inputs = Inputs.standard_normal()
    one, two, three = (Shape(name, *pair, 0.0).value(inputs.x) for pair in ((1, 1), (2, 1), (1, 2)))
    parts = np.stack([two - one, three - one, inputs.x])
    covariance = np.cov(parts, aweights=inputs.weights, ddof=0)
    of = np.stack([alpha_p, alpha_n, np.full_like(alpha_p, beta)], axis=-1)
    with_x = of @ covariance
    variance = covariance[2, 2] * (with_x * of).sum(axis=-1)
    explained = np.divide(with_x[..., 2] ** 2, variance, np.ones_like(variance), where=variance > 0)
    return np.clip(1 - explained, 0.0, 1.0)


def _gelu(x: Array) -> Array:
    return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()


# For comparison, on a standard normal.
FIXED: dict[str, Callable[[Array], Array]] = {
    "ReLU": lambda x: np.maximum(x, 0.0),
    "GELU": _gelu,
    "ReLU²": lambda x: np.maximum(x, 0.0) ** 2,
}
