"""Maps of a run's routed experts: the alphas of each, and how far from linear each is."""

from __future__ import annotations

import math
import re

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator

from megatron_xielu.report.drawing import LEAST_HEIGHT, Array, Drawing, Picture, wants_log
from megatron_xielu.report.experts import Experts

# Yellow to dark blue, for all kinds of sight; what depth and shares have is taken.
_COLOURS = matplotlib.colormaps["cividis_r"].with_extremes(bad="0.9")
_WIDTH, _LEAST, _MOST = 5.6, 2.4, 7.5  # inches, as wide as other pictures; the height is between
_FRAME, _ROW = 1.3, 0.19  # inches: what is around a map, and a layer of it, with its label


def pictures(experts: Experts) -> list[Picture]:
    """A map of layers and experts for αp, αn and nonlinearity."""
    return [
        _map(experts, "αp of each expert", "αp", experts.alpha_p, "expert-alpha-p.png"),
        _map(experts, "αn of each expert", "αn", experts.alpha_n, "expert-alpha-n.png"),
        _map(
            experts,
            "How far from linear each expert is",
            "1 − R²",
            experts.nonlinearity,
            "expert-nonlinearity.png",
        ),
    ]


def _map(experts: Experts, title: str, symbol: str, values: Array, file: str) -> Picture:
    layers, count = values.shape
    height = min(max(_FRAME + _ROW * layers, _LEAST), _MOST)
    drawing = Drawing(title, "expert", "layer", size=(_WIDTH, height))
    axes = drawing.axes
    image = axes.imshow(
        values, cmap=_COLOURS, norm=_scale(values), aspect="auto", interpolation="nearest"
    )
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    shown = range(0, layers, math.ceil(round(layers * _ROW / (height - _FRAME), 3)))
    axes.set_yticks([*shown], [_number(experts.layers[layer]) for layer in shown])
    bar = drawing.figure.colorbar(image, ax=axes, label=symbol, pad=0.02, aspect=5 * height)
    bar.outline.set_visible(False)  # type: ignore[operator]
    spreads = np.nanmax(values, axis=1) - np.nanmin(values, axis=1)
    widest = int(np.nanargmax(spreads))
    return drawing.finish(
        file,
        f"Each routed expert after iteration {experts.iteration:,}, the last checkpoint.",
        f"{title}: {count} experts in {layers} layers, from {np.nanmin(values):.4g} to "
        f"{np.nanmax(values):.4g}; they differ most in layer {_number(experts.layers[widest])}, "
        f"by {spreads[widest]:.4g}",
    )


def _scale(values: Array) -> Normalize:
    """Of colours: logarithmic where a linear one would hide small numbers; rounding has none."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if wants_log(values):
        return LogNorm(low, high)
    if high - low < LEAST_HEIGHT:
        middle = (low + high) / 2
        low, high = middle - LEAST_HEIGHT / 2, middle + LEAST_HEIGHT / 2
    return Normalize(low, high)


def _number(layer: str) -> str:
    """7 of ``layer_07``, mtp 0 of ``mtp_0``."""
    return re.sub(r"^layer_0*(?=\d)", "", layer).replace("_", " ")
