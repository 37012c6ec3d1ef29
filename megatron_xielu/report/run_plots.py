"""Pictures of all runs together: losses against tokens and FLOPs, perplexity, speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_xielu.report.drawing import (
    Array,
    Drawing,
    Picture,
    envelope,
    plain,
    run_styles,
    shortened,
    smoothed,
    unit,
)
from megatron_xielu.report.events import Series
from megatron_xielu.report.run import Run
from megatron_xielu.report.summary import decimal, scientific

_OUTLIER = 2.0  # times the median
_FEW = 40  # points
_CUT_OFF = 0.05  # of the steepest part of a loss curve, which would flatten all the rest


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """Those that the runs have curves for."""
    made = [
        _train_loss(runs),
        _train_loss_by_flops(runs),
        _validation(runs, "loss", "validation loss [nats per token]", lambda loss: loss),
        _validation(runs, "perplexity", "validation perplexity", _perplexity),
        _gradient_norm(runs),
        _speed(runs),
        _nonlinearity(runs),
        _negative_shares(runs),
    ]
    return [picture for picture in made if picture is not None]


def _perplexity(loss: Array) -> Array:
    return np.exp(np.minimum(loss, 700))


class TimeAxis:
    """Tokens where all of the runs know theirs, else iterations; in a unit that suits."""

    def __init__(self, runs: Sequence[Run]) -> None:
        ends = [run.total_tokens for run in runs]
        self.tokens = all(ends)
        largest = max(
            (end for end in ends if end) if self.tokens else (run.iterations for run in runs),
            default=0,
        )
        self.divisor, word = unit(largest)
        what = "tokens" if self.tokens else "iteration"
        self.label = f"training {what} [{word}]" if word else f"training {what}"
        self.noun = "tokens" if self.tokens else "iterations"

    def __call__(self, run: Run, steps: np.ndarray) -> Array:
        tokens = run.tokens(steps) if self.tokens else None
        return (steps if tokens is None else tokens) / self.divisor


Style = dict[str, Any]


def _with(runs: Sequence[Run], curve: Callable[[Run], object]) -> list[tuple[Style, Run]]:
    """Those that have the curve, each with the style that it has in all pictures."""
    styles = run_styles([run.activation for run in runs])
    return [(style, run) for style, run in zip(styles, runs, strict=True) if curve(run)]


def _name(run: Run) -> str:
    return plain(shortened(run.name))


def _line(drawing: Drawing, style: Style, x: Array, y: Array, label: str) -> int:
    """Raw behind smoothed; the smoothing window."""
    mean_x, mean_y, window = smoothed(x, y)
    if window > 1:
        drawing.axes.plot(*envelope(x, y), color=style["color"], alpha=0.25, linewidth=0.7)
    drawing.axes.plot(*envelope(mean_x, mean_y), label=label, **style)
    return window


def _smoothing(windows: Sequence[int]) -> str:
    if max(windows) == 1:
        return "Every logged iteration."
    return f"Dark: mean of up to {max(windows):,} logged iterations; pale: every one."


def _finals(runs: Sequence[tuple[Style, Run]], value: Callable[[Run], float | None]) -> str:
    finals = ((run.name, value(run)) for _, run in runs)
    return "; ".join(f"{name} {decimal(final, 3)}" for name, final in finals if final is not None)


def _train_loss(runs: Sequence[Run]) -> Picture | None:
    shown = _with(runs, lambda run: run.train is not None)
    if not shown:
        return None
    axis = TimeAxis([run for _, run in shown])
    title = f"Training loss against {axis.noun}"
    drawing = Drawing(title, axis.label, "training loss [nats per token]")
    windows, later = [], []
    for style, run in shown:
        assert run.train is not None
        x, y = axis(run, run.train.steps), run.train.values
        windows.append(_line(drawing, style, x, y, _name(run)))
        later.append(y[int(len(y) * _CUT_OFF) :])
    everything = np.concatenate(later)
    everything = everything[np.isfinite(everything)]
    cut = ""
    if len(everything) > _FEW:
        low, high = np.quantile(everything, (0.0005, 0.9995))
        margin = 0.05 * (high - low) or 0.1
        if high + margin < drawing.axes.get_ylim()[1]:
            drawing.axes.set_ylim(low - margin, high + margin)
            cut = f" The first {100 * _CUT_OFF:.0f} % may lie above the axis."
    drawing.legend()
    return drawing.finish(
        "train-loss-tokens.png",
        f"{_smoothing(windows)}{cut}",
        f"{title}, at the end: {_finals(shown, lambda run: run.final_train_loss)}",
    )


def _train_loss_by_flops(runs: Sequence[Run]) -> Picture | None:
    shown = _with(runs, lambda run: run.train is not None and run.total_flops)
    if not shown:
        return None
    title = "Training loss against FLOPs"
    drawing = Drawing(title, "training FLOPs", "training loss [nats per token]")
    windows = []
    for style, run in shown:
        assert run.train is not None and run.model is not None
        tokens = run.tokens(run.train.steps)
        assert tokens is not None
        x = tokens * run.model.flops_per_token()
        windows.append(_line(drawing, style, x, run.train.values, _name(run)))
    drawing.axes.set_xscale("log")
    drawing.legend()
    per_token = "; ".join(
        f"{run.name} {scientific(run.model.flops_per_token())}" for _, run in shown if run.model
    )
    return drawing.finish(
        "train-loss-flops.png",
        f"FLOPs as Megatron counts them (forward and backward, no recomputation); per token: "
        f"{per_token}. {_smoothing(windows)}",
        f"{title} on a logarithmic axis; at the end "
        f"{_finals(shown, lambda run: run.total_flops)} FLOPs",
    )


def _validation(
    runs: Sequence[Run], word: str, y_label: str, transform: Callable[[Array], Array]
) -> Picture | None:
    shown = _with(runs, lambda run: run.validation)
    if not shown:
        return None
    axis = TimeAxis([run for _, run in shown])
    title = f"Validation {word} against {axis.noun}"
    drawing = Drawing(title, axis.label, y_label)
    for style, run in shown:
        for index, (name, series) in enumerate(run.validation.items()):
            x, y = axis(run, series.steps), transform(series.values)
            marker = "osD^v"[index % 5] if len(x) <= 60 else None
            label = f"{_name(run)}, {plain(name)}" if name else _name(run)
            drawing.axes.plot(*envelope(x, y), label=label, marker=marker, markersize=4, **style)
    low, high = drawing.axes.dataLim.intervaly
    if word == "perplexity" and low > 0 and high > 10 * low:
        drawing.axes.set_yscale("log")
    drawing.legend()

    def final(run: Run) -> float | None:
        loss = run.final_validation_loss
        return None if loss is None else float(transform(np.array(loss)))

    return drawing.finish(
        f"validation-{word}.png",
        "Megatron's own validation during training."
        + (" Perplexity is exp(loss)." if word == "perplexity" else ""),
        f"{title}, at the end: {_finals(shown, final)}",
    )


def _gradient_norm(runs: Sequence[Run]) -> Picture | None:
    return _curve(
        runs,
        lambda run: run.scalars.get("grad-norm"),
        "Gradient norm",
        "norm of all gradients",
        "gradient-norm.png",
        "Before clipping.",
    )


def _speed(runs: Sequence[Run]) -> Picture | None:
    return _curve(
        runs,
        lambda run: run.step_time,
        "Step time",
        "seconds per iteration",
        "step-time.png",
        "By Megatron's timers where they are logged (--log-timers-to-tensorboard), else the time "
        "between two written losses.",
    )


def _curve(
    runs: Sequence[Run],
    curve: Callable[[Run], Series | None],
    title: str,
    y_label: str,
    file: str,
    more: str,
) -> Picture | None:
    shown = _with(runs, lambda run: curve(run) is not None)
    if not shown:
        return None
    axis = TimeAxis([run for _, run in shown])
    drawing = Drawing(title, axis.label, y_label)
    windows, medians = [], []
    for style, run in shown:
        series = curve(run)
        assert series is not None
        windows.append(_line(drawing, style, axis(run, series.steps), series.values, _name(run)))
        finite = series.values[np.isfinite(series.values)]
        medians.append(float(np.median(finite)) if len(finite) else 0.0)
    # A few outliers (a first step, a wait for a disk) shall not flatten all the rest.
    top, cut = _OUTLIER * max(medians), ""
    if 0 < top < drawing.axes.get_ylim()[1]:
        drawing.axes.set_ylim(0, top)
        cut = f" The axis ends at {_OUTLIER:g} times the greatest median."
    elif drawing.axes.get_ylim()[0] < drawing.axes.get_ylim()[1] / 2:
        drawing.axes.set_ylim(bottom=0)
    drawing.legend()
    named = [(run.name, median) for (_, run), median in zip(shown, medians, strict=True)]
    return drawing.finish(
        file,
        f"{more} {_smoothing(windows)}{cut}",
        f"{title}, {y_label}; medians: "
        + "; ".join(f"{name} {decimal(median, 3)}" for name, median in named),
    )


def _nonlinearity(runs: Sequence[Run]) -> Picture | None:
    shown = _with(runs, lambda run: run.layers)
    if len(shown) < 2:
        return None
    title = "Nonlinearity by depth"
    drawing = Drawing(title, "layer", "1 − R² of the best straight line")
    for style, run in shown:
        depths = [layer.depth for layer in run.layers]
        values = [layer.by_normal for layer in run.layers]
        drawing.axes.plot(depths, values, label=_name(run), marker="o", markersize=4, **style)
    drawing.shares()
    drawing.layers_below()
    drawing.legend()
    return drawing.finish(
        "nonlinearity.png",
        "On standard normal inputs; 0: a straight line.",
        f"{title}; means over the layers: "
        + _finals(shown, lambda run: float(np.mean([x.by_normal for x in run.layers]))),
    )


def _negative_shares(runs: Sequence[Run]) -> Picture | None:
    shown = _with(runs, lambda run: run.measured)
    if not shown:
        return None
    title = "Negative pre-activations"
    drawing = Drawing(title, "layer", "share below 0 [%]")
    for style, run in shown:
        layers = sorted(run.measured.values(), key=lambda layer: layer.layer)
        drawing.axes.plot(
            [layer.layer for layer in layers],
            [100 * layer.negative_share for layer in layers],
            label=_name(run),
            marker="o",
            markersize=4,
            **style,
        )
    drawing.shares(percent=True)
    drawing.layers_below()
    drawing.legend()
    return drawing.finish(
        "negative-share.png",
        "Of what goes into each layer's activation, by megatron_xielu.evaluate.",
        f"{title}, means over the layers in %: "
        + _finals(
            shown,
            lambda run: float(np.mean([100 * x.negative_share for x in run.measured.values()])),
        ),
    )
