"""Pictures of `depth`: each layer's nonlinearity over training, and over depth at the end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from megatron_xielu.report.depth import Adaptation, over_seeds
from megatron_xielu.report.drawing import (
    ACTIVATION_COLOURS,
    LEAST_HEIGHT,
    Drawing,
    Picture,
    depth_colour,
)

_COLOUR = ACTIVATION_COLOURS["xielu"]
NONLINEARITY = "1 − R² of the best straight line"


def pictures(found: Sequence[Adaptation]) -> list[Picture]:
    """Two of each."""
    made = []
    for number, one in enumerate(found, 1):
        several = one.seeds > 1
        bands = "; bands and bars: 95 % interval over seeds, dots: seeds" if several else ""
        (axis,) = limits([one])
        drawing = Drawing("Nonlinearity over time", "training iteration", NONLINEARITY)
        over_time(drawing.axes, one)
        drawing.axes.set_ylim(axis)
        drawing.depth_bar(int(one.layers[-1]))
        made.append(
            drawing.finish(
                f"depth-{number}-over-time.png",
                f"{one.label}: a line for each layer, light to dark with depth{bands}.",
                f"Nonlinearity of each layer over time. {one.sentence}",
            )
        )
        drawing = Drawing("Nonlinearity by depth, at the end", "layer", NONLINEARITY)
        by_depth(drawing.axes, one)
        drawing.axes.set_ylim(axis)
        drawing.legend()
        made.append(
            drawing.finish(
                f"depth-{number}.png",
                f"{one.label}, on standard normal inputs{bands}.",
                f"Nonlinearity by depth. {one.sentence}",
            )
        )
    return made


def limits(found: Sequence[Adaptation]) -> list[tuple[float, float]]:
    """Of the vertical axis of each, with its intervals and seeds; all are equally high.

    It is one axis for all, unless they lie so far apart that it would flatten them.
    """
    spans = []
    for one in found:
        mean, half = over_seeds(one.nonlinearity)
        half = np.nan_to_num(half)
        shown = np.stack([mean - half, mean + half, *one.nonlinearity])
        spans.append((shown.min(), shown.max()))
    low, high = np.array(spans).T
    height = max(LEAST_HEIGHT, (high - low).max())
    if (whole := high.max() - low.min()) < 2 * height:
        low, high, height = np.full_like(low, low.min()), np.full_like(high, high.max()), whole
    middle, half_height = (low + high) / 2, 0.55 * max(LEAST_HEIGHT, height)
    ends = zip(middle - half_height, middle + half_height, strict=True)
    return [(float(bottom), float(top)) for bottom, top in ends]


def over_time(axes: Axes, one: Adaptation) -> None:
    """A line for each layer, mean over seeds, in its interval."""
    mean, half = over_seeds(one.nonlinearity)
    marker = "o" if len(one.iterations) <= 25 else None
    for layer, middle, width in zip(one.layers, mean.T, half.T, strict=True):
        colour = depth_colour(int(layer), int(one.layers[-1]))
        axes.plot(one.iterations, middle, color=colour, marker=marker, markersize=3, linewidth=1.4)
        if one.seeds > 1:
            low, high = middle - width, middle + width
            axes.fill_between(one.iterations, low, high, color=colour, alpha=0.12, linewidth=0)


def by_depth(axes: Axes, one: Adaptation) -> None:
    """At the end, with intervals and each seed's points; the start dashed."""
    mean, half = over_seeds(one.nonlinearity[:, -1])
    start = one.nonlinearity[:, 0].mean(axis=0)
    axes.plot(one.layers, start, "--", color="0.6", label=f"iteration {one.iterations[0]:,}")
    if one.seeds > 1:
        for seed in one.nonlinearity[:, -1]:
            axes.plot(one.layers, seed, ".", color=_COLOUR, alpha=0.35, markersize=5)
    label = f"iteration {one.iterations[-1]:,}"
    error = half if one.seeds > 1 else None
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.errorbar(
        one.layers, mean, error, fmt="-o", color=_COLOUR, capsize=3, markersize=4, label=label
    )
