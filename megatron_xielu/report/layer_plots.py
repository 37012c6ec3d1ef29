"""Pictures of one run's trained activations, layer by layer: alphas, curves, pre-activations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_xielu.report import expert_plots
from megatron_xielu.report.drawing import (
    RUN_COLOURS,
    SHARES,
    Array,
    Drawing,
    Picture,
    depth_colour,
    envelope,
    not_of_rounding,
    smoothed,
    wants_log,
)
from megatron_xielu.report.experts import has_experts
from megatron_xielu.report.run import History, Run, depth
from megatron_xielu.report.run_plots import TimeAxis

_SIDES = {"p": ("αp", "x > 0"), "n": ("αn", "x ≤ 0")}
_X_RANGE = 4.0


def pictures(run: Run, prefix: str) -> list[Picture]:
    """Those that the run has numbers for.

    Args:
        run: with alphas.
        prefix: of the file names.
    """
    assert run.alpha_p is not None and run.alpha_n is not None
    made = [_by_depth(run)]
    made += [_over_time(run, side) for side in _SIDES]
    if run.layers:
        made += [_curves(run, slope=False), _curves(run, slope=True), _nonlinearity(run)]
    if run.alpha_grad_norm is not None and len(run.alpha_grad_norm.iterations):
        made.append(_gradient_norms(run, run.alpha_grad_norm))
    if run.experts is not None:
        made += expert_plots.pictures(run.experts)
    return [replace(picture, file=prefix + picture.file) for picture in made]


def _depths(run: Run) -> list[int]:
    return [depth(name, _count(run)) for name in run.alpha_names]


def _count(run: Run) -> int:
    """Of layers, which those of prediction follow."""
    return getattr(run.arguments, "num_layers", 0)


def _by_depth(run: Run) -> Picture:
    title = "Alphas by depth"
    drawing = Drawing(title, "layer", "effective alpha")
    assert run.alpha_p is not None and run.alpha_n is not None
    everything = []
    depths = _depths(run)
    for history, (symbol, where), colour, marker in (
        (run.alpha_p, _SIDES["p"], RUN_COLOURS[0], "o"),
        (run.alpha_n, _SIDES["n"], RUN_COLOURS[1], "s"),
    ):
        first, last = history.values[0], history.values[-1]
        line = "-" if len(set(depths)) == len(depths) else "none"
        drawing.axes.plot(
            depths,
            last,
            linestyle=line,
            color=colour,
            marker=marker,
            markersize=5,
            label=f"{symbol} ({where})",
        )
        drawing.axes.plot(
            depths, first, "--" if line == "-" else "_", color=colour, alpha=0.5, linewidth=1.2
        )
        everything += [first, last]
        if run.experts is not None:
            values = run.experts.alpha_p if history is run.alpha_p else run.experts.alpha_n
            ends = np.nanmin(values, axis=1), np.nanmax(values, axis=1)
            beside = -0.15 if history is run.alpha_p else 0.15  # not over one another
            layers = [depth(name, _count(run)) + beside for name in run.experts.layers]
            drawing.axes.vlines(layers, *ends, color=colour, alpha=0.35, linewidth=4)
            everything += ends
    _alpha_scale(drawing, np.concatenate(everything))
    drawing.layers_below()
    drawing.legend()
    start, end = run.alpha_p.iterations[0], run.alpha_p.iterations[-1]
    bars = "" if run.experts is None else ", bars from the least to the greatest"
    return drawing.finish(
        "alphas-by-depth.png",
        f"After iteration {end:,}; dashed: {_moment(int(start))}{_of_experts(run)}{bars}.",
        f"{title}: αp from {run.alpha_p.values[-1][0]:.4g} in the first to "
        f"{run.alpha_p.values[-1][-1]:.4g} in the last layer, αn from "
        f"{run.alpha_n.values[-1][0]:.4g} to {run.alpha_n.values[-1][-1]:.4g}",
    )


def _of_experts(run: Run) -> str:
    return "; of a layer's routed experts their mean" if has_experts(run.alpha_names) else ""


def _moment(iteration: int) -> str:
    return "at the start" if iteration == 0 else f"after iteration {iteration:,}"


def _lines(run: Run, drawing: Drawing, x: Array, columns: Array) -> None:
    """A curve for each column, coloured by depth; single points where there is just one."""
    depths = _depths(run)
    marker = "o" if len(x) <= 25 else None
    for column, layer in zip(columns.T, depths, strict=True):
        drawing.axes.plot(
            *envelope(x, column),
            color=depth_colour(layer, max(depths)),
            linewidth=1.4,
            marker=marker,
            markersize=3,
        )
    drawing.depth_bar(max(depths))


def _alpha_scale(drawing: Drawing, values: Array) -> None:
    if wants_log(values):
        drawing.axes.set_yscale("log")
    else:
        not_of_rounding(drawing.axes)


def _over_time(run: Run, side: str) -> Picture:
    history = run.alpha_p if side == "p" else run.alpha_n
    assert history is not None
    symbol, where = _SIDES[side]
    title = f"{symbol} over time"
    axis = TimeAxis([run])
    x = axis(run, history.iterations)
    drawing = Drawing(title, axis.label, f"effective {symbol} ({where})")
    _lines(run, drawing, x, history.values)
    _alpha_scale(drawing, history.values)
    return drawing.finish(
        f"alpha-{side}-over-time.png",
        f"A line for each layer, light to dark with depth{_of_experts(run)}.",
        f"{title}: from {history.values[0].min():.4g}–{history.values[0].max():.4g} "
        f"{_moment(int(history.iterations[0]))} to "
        f"{history.values[-1].min():.4g}–{history.values[-1].max():.4g} at the end",
    )


def _curves(run: Run, *, slope: bool) -> Picture:
    title, y_label = ("Gradient", "f′(x)") if slope else ("Activation", "f(x)")
    drawing = Drawing(f"{title} {y_label} by depth", "pre-activation x", y_label)
    x = np.linspace(-_X_RANGE, _X_RANGE, 401)
    shapes = [layer.shape for layer in run.layers]
    columns = np.stack([s.slope(x) if slope else s.value(x) for s in shapes], axis=1)
    _lines(run, drawing, x, columns)
    drawing.axes.axhline(0, color="0.55", linewidth=0.8, zorder=1)
    drawing.axes.axvline(0, color="0.55", linewidth=0.8, zorder=1)
    reach = np.abs(columns).max(axis=0)
    scale = ""
    if wants_log(reach):
        drawing.axes.set_yscale("symlog", linthresh=1.0)
        drawing.axes.set_ylim(min(1.5 * columns.min(), -0.5), 1.5 * columns.max())
        scale = " The vertical axis is linear between −1 and 1 and logarithmic outside."
    return drawing.finish(
        "gradient.png" if slope else "activation.png",
        f"Of every layer, with its final alphas.{scale}",
        f"{y_label} of {len(shapes)} activations for x from −{_X_RANGE:g} to {_X_RANGE:g}; "
        f"at x = {_X_RANGE:g} from {columns[-1].min():.4g} to {columns[-1].max():.4g}",
    )


def _nonlinearity(run: Run) -> Picture:
    title = "How far from linear"
    drawing = Drawing(title, "layer", "1 − R² of the best straight line")
    depths = [layer.depth for layer in run.layers]
    values = [layer.by_normal for layer in run.layers]
    single = len(set(depths)) == len(depths)
    if single:
        drawing.axes.bar(
            depths,
            values,
            color=[SHARES(v) for v in values],
            edgecolor="0.4",
            linewidth=0.5,
            label="standard normal x",
        )
    else:
        drawing.axes.scatter(
            depths,
            values,
            c=values,
            cmap=SHARES,
            vmin=0,
            vmax=1,
            edgecolors="0.4",
            label="standard normal x",
        )
    measured = [
        (layer.depth, layer.by_measured) for layer in run.layers if layer.by_measured is not None
    ]
    if measured:
        drawing.axes.plot(
            *zip(*measured, strict=True),
            "D",
            color=RUN_COLOURS[1],
            markersize=6,
            label="measured pre-activations",
        )
        drawing.legend()
    drawing.shares()
    drawing.layers_below()
    return drawing.finish(
        "nonlinearity.png",
        "Of each layer's activation: the share of its variance that no straight line explains, on "
        "standard normal inputs" + (" and on the measured pre-activations." if measured else "."),
        f"{title}: from {min(values):.3f} to {max(values):.3f}, "
        f"{values[0]:.3f} in the first and {values[-1]:.3f} in the last layer",
    )


def _gradient_norms(run: Run, history: History) -> Picture:
    title = "Gradient norm of the alphas"
    axis = TimeAxis([run])
    x = axis(run, history.iterations)
    drawing = Drawing(title, axis.label, "norm of (∂L/∂a_p, ∂L/∂a_n)")
    finite = np.isfinite(history.values).all(axis=1)
    rows = history.values[finite]
    columns = np.stack([smoothed(x[finite], column)[1] for column in rows.T], axis=1)
    _lines(run, drawing, x[finite], np.where(columns > 0, columns, np.nan))
    if wants_log(columns[columns > 0]):
        drawing.axes.set_yscale("log")
    return drawing.finish(
        "alpha-gradient-norm.png",
        "Of each layer's pair of raw alphas, or of all pairs of its routed experts, as the "
        "optimizer applied it; means over 1 % of the points."
        if has_experts(run.alpha_names)
        else "Of each layer's pair of raw alphas, as the optimizer applied it; means over 1 % of "
        "the points.",
        f"{title}; median of all: {np.median(history.values):.3g}",
    )
