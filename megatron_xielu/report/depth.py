"""Whether activations come to be more linear, or less, the deeper their layer: by numbers.

The trend of a run is the slope of the least squares line through its layers' nonlinearity (on
standard normal inputs, `nonlinearity`) over their relative depth, 0 in the first layer and 1 in the
last. A rank correlation would not do: with few layers it is ±1 by chance, it does not say how much,
and at the start, where all layers are alike, there is none.

What is repeated is the training, so an interval is over seeds: mean ± t₀.₉₇₅,ₙ₋₁ · s/√n of each
seed's number, for one number alone. Of 4,000 samples of 3, 4 and 5 normal numbers that of 95 %
holds the mean in 95, 95 and 94 %, the percentile bootstrap in 75, 80 and 84 %; of lognormal ones,
as skewed as seeds hardly are, 84, 83 and 82 % and 65, 69 and 72 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_xielu.catalog import TRAINABLE
from megatron_xielu.checkpoints.alphas import beta as beta_of
from megatron_xielu.report.experts import has_experts
from megatron_xielu.report.nonlinearity import trained
from megatron_xielu.report.ranking import groups
from megatron_xielu.report.run import Run

Array = NDArray[np.float64]

RISES, FALLS, CANNOT_SAY = "rises with depth", "falls with depth", "cannot say"
COLUMNS = ("layer", "nonlinearity at the start", "at the end", "change", "95 % interval")
_ROUNDING = 1e-6  # alphas in float32 that are alike, or do not move, differ by less
_NORMAL = 1.959964
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


@dataclass(frozen=True)
class Adaptation:
    """Trainings that differ in their seed alone.

    Attributes:
        label: what they are called.
        iterations: [t], rising.
        layers: [l], rising, two or more.
        nonlinearity: [seed, t, l].
    """

    label: str
    iterations: NDArray[np.int64]
    layers: NDArray[np.int64]
    nonlinearity: Array

    @property
    def seeds(self) -> int:
        """How many."""
        return len(self.nonlinearity)

    @property
    def trends(self) -> Array:
        """[seed, t]: see the file."""
        depth = (self.layers - self.layers[0]) / (self.layers[-1] - self.layers[0])
        depth = depth - depth.mean()
        slopes = self.nonlinearity @ depth / (depth @ depth)
        return np.round(slopes, 9) + 0.0  # layers that are all alike have none

    @property
    def changes(self) -> Array:
        """[seed, l]: of each layer, from the start to the end."""
        return self.nonlinearity[:, -1] - self.nonlinearity[:, 0]

    @property
    def verdict(self) -> str:
        """`RISES`, `FALLS` or `CANNOT_SAY`, of the trend at the end."""
        mean, half = over_seeds(self.trends[:, -1])
        if not abs(mean) > half:  # also of one seed, where it is NaN
            return CANNOT_SAY
        return RISES if mean > 0 else FALLS

    @property
    def sentence(self) -> str:
        """The verdict and what it rests on."""
        verdict = self.verdict
        said = {
            RISES: f"nonlinearity {RISES}: deeper layers are less linear",
            FALLS: f"nonlinearity {FALLS}: deeper layers are more linear",
            CANNOT_SAY: "whether nonlinearity rises or falls with depth: cannot say",
        }[verdict]
        start, end = self.trends[:, 0], self.trends[:, -1]
        count = "one seed" if self.seeds == 1 else f"{self.seeds} seeds"
        return (
            f"{self.label}, {count}: {said}. Trend from the first to the last layer "
            f"{_with_interval(start)} after iteration {self.iterations[0]:,}, "
            f"{_with_interval(end)} after iteration {self.iterations[-1]:,}."
        )

    def rows(self) -> list[list[str]]:
        """A row a layer under `COLUMNS`."""
        start, end = (self.nonlinearity[:, at].mean(axis=0) for at in (0, -1))
        change, half = over_seeds(self.changes)
        return [
            [f"{layer}", f"{a:.4f}", f"{b:.4f}", f"{c:+.4f}", _interval(c, h)]
            for layer, a, b, c, h in zip(self.layers, start, end, change, half, strict=True)
        ]


def of_seeds(
    label: str,
    activation: str,
    beta: float,
    iterations: Sequence[ArrayLike],
    positive: Sequence[ArrayLike],
    negative: Sequence[ArrayLike],
    layers: ArrayLike | None = None,
) -> Adaptation | None:
    """Of effective alphas; None of fewer than two layers, or where seeds share no iteration.

    None, too, where there is no trend to find: of alphas that did not train, or are one pair for
    all layers.

    Args:
        label: what the trainings are called.
        activation: ``xielu`` or ``xiprelu``.
        beta: β.
        iterations: of each seed, [t], rising.
        positive: αp of each seed, [t, l], of the same layers.
        negative: αn.
        layers: their numbers, [l]; 0, 1, … if not given.
    """
    steps = [np.asarray(one, np.int64) for one in iterations]
    shared = reduce(np.intersect1d, steps)
    p, n = (
        np.stack(
            [
                np.asarray(of_seed, np.float64)[np.isin(own, shared)]
                for own, of_seed in zip(steps, side, strict=True)
            ]
        )
        for side in (positive, negative)
    )
    values = trained(activation, p, n, beta)
    numbers = np.arange(values.shape[-1]) if layers is None else np.asarray(layers, np.int64)
    if len(numbers) < 2 or not len(shared):
        return None
    moved = len(shared) == 1 or np.ptp(values, axis=1).max() > _ROUNDING
    if not moved or np.ptp(values, axis=2).max() <= _ROUNDING:
        return None
    return Adaptation(label, shared, numbers, values)


def of_runs(runs: Sequence[Run]) -> list[Adaptation]:
    """Of each entry of the ranking that has one trained activation a layer; who diverged is out."""
    found = []
    for label, members in groups(runs):
        of = [run for run in members if run.layers and run.diverged is None]
        if not of or of[0].activation not in TRAINABLE:
            continue
        if getattr(of[0].arguments, "xielu_frozen_alphas", False):
            continue
        layers = [layer.depth for layer in of[0].layers]
        names = of[0].alpha_names
        if len(set(layers)) < len(layers) or has_experts(names):
            continue
        if any(run.alpha_names != names for run in of):
            continue
        p, n = ([getattr(run, f"alpha_{side}") for run in of] for side in "pn")
        found.append(
            of_seeds(
                label,
                str(of[0].activation),
                beta_of(of[0].arguments),
                [history.iterations for history in p],
                [history.values for history in p],
                [history.values for history in n],
                layers,
            )
        )
    return [one for one in found if one is not None]


def over_seeds(values: Array) -> tuple[Array, Array]:
    """Mean over the first axis, and half of its 95 % interval: NaN of one seed."""
    n = len(values)
    mean = values.mean(axis=0)
    if n < 2:
        return mean, np.full_like(mean, np.nan)
    return mean, student(n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)


def student(degrees: int) -> float:
    """t₀.₉₇₅; beyond a table by its expansion (Abramowitz and Stegun 26.7.5), to 3 decimals."""
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    z, v = _NORMAL, degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / v**power for power, term in enumerate(terms, 1))


def _with_interval(values: Array) -> str:
    mean, half = map(float, over_seeds(values))
    return f"{mean:+.4f}" + (f" ({_interval(mean, half)})" if half > 0 else "")


def _interval(mean: float, half: float) -> str:
    return "–" if np.isnan(half) else f"{mean - half:+.4f} to {mean + half:+.4f}"
