"""The demo's two pictures: losses by iteration, and alphas by layer over time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from records import Curve, Record
from settings import ACTIVATIONS

CAPTION = "demo on Python's standard library, no evidence for the paper's claim"

# Okabe and Ito's palette, which colour-blind readers can tell apart; the dashes do it in grey.
_STYLES: dict[str, dict[str, Any]] = {
    "xielu": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "xiprelu": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "squared_relu": {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    "swiglu": {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
}
_SMOOTHED_ITERATIONS = 10  # a single batch's loss is too noisy to compare
_SHOWN_FROM = 15  # the first 1/15 falls so far that it would flatten all the rest; it is cut off


def plot_losses(records: dict[str, Record], path: Path) -> None:
    """Training loss (running mean) and held-out loss of every activation."""
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(11, 4.8), sharey=True)
    top = 0.0
    for name, record in records.items():
        style, label = _STYLES[name], ACTIVATIONS[name].label
        curve = running_mean(record.train, _SMOOTHED_ITERATIONS)
        top = max(top, curve[len(curve) // _SHOWN_FROM][1])
        line = {key: style[key] for key in ("color", "linestyle")}
        left.plot(*zip(*curve, strict=True), label=label, linewidth=1.8, **line)
        right.plot(
            *zip(*record.valid, strict=True),
            label=f"{label}: {record.valid_loss:.3f}",
            linewidth=1.8,
            markersize=6,
            **style,
        )
    left.set_title(f"training text (mean of {_SMOOTHED_ITERATIONS} iterations)", fontsize=11)
    right.set_title("held-out files", fontsize=11)
    left.set_ylabel("loss [nats per byte]")
    left.set_ylim(top=top)
    right.legend(title="after the last iteration", frameon=False)
    left.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlim(left=0)
        _dress(axes)
    _finish(figure, "Loss by activation", path)


def plot_alphas(records: dict[str, Record], path: Path) -> None:
    """Effective αp and αn of every layer over time, a column for each trainable activation."""
    import matplotlib

    trained = {name: record.alphas for name, record in records.items() if record.alphas}
    figure, grid = _pyplot().subplots(
        2, len(trained), figsize=(5.5 * len(trained), 7), sharex=True, sharey="row", squeeze=False
    )
    for column, (name, alphas) in zip(grid.T, trained.items(), strict=True):
        layers = len(alphas.positive[0])
        # Light to dark with depth; the yellow end of the map is too pale on white.
        colours = matplotlib.colormaps["viridis_r"].resampled(256)
        for axes, history, symbol in zip(
            column, (alphas.positive, alphas.negative), ("αp", "αn"), strict=True
        ):
            for layer in range(layers):
                axes.plot(
                    alphas.iterations,
                    [values[layer] for values in history],
                    color=colours(0.2 + 0.8 * layer / max(1, layers - 1)),
                    marker="os^Dv<>p"[layer % 8],
                    markersize=5,
                    linewidth=1.6,
                    label=f"layer {layer + 1}",
                )
            axes.set_title(f"{ACTIVATIONS[name].label}: {symbol}", fontsize=11)
            _dress(axes, x_label=axes is column[-1])
    for axes, side in zip(grid[:, 0], ("x > 0", "x ≤ 0"), strict=True):
        axes.set_ylabel(f"effective alpha for {side} [no unit]")
    grid[0, -1].legend(frameon=False, fontsize=9)
    _finish(figure, "Alphas by layer", path)


def running_mean(curve: Curve, length: int) -> Curve:
    """Mean over the last ``length`` points at every point that has as many before it."""
    length = min(length, len(curve))
    losses = [loss for _, loss in curve]
    return [
        (curve[end - 1][0], sum(losses[end - length : end]) / length)
        for end in range(length, len(curve) + 1)
    ]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed
    import matplotlib.pyplot as plt

    return plt


def _dress(axes: Any, *, x_label: bool = True) -> None:
    if x_label:
        axes.set_xlabel("training iteration")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _finish(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(f"{title}\n{CAPTION}", fontsize=11)
    figure.tight_layout()
    unfinished = path.with_name(path.name + ".unfinished")
    figure.savefig(unfinished, format="png", dpi=150, facecolor="white")
    os.replace(unfinished, path)
    _pyplot().close(figure)
