"""Pictures of all runs together: losses against tokens and FLOPs, perplexity, speed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_xielu.report.description import names, tokenizers
from megatron_xielu.report.drawing import (
    Array,
    Drawing,
    Picture,
    envelope,
    plain,
    run_styles,
    smoothed,
    unit,
)
from megatron_xielu.report.events import Series
from megatron_xielu.report.ranking import FEW
from megatron_xielu.report.run import Run
from megatron_xielu.report.summary import decimal, scientific

_OUTLIER = 2.0  # times the median
_FEW = 40  # points
_STRETCHES = 20  # of a run, each with its median step time
_CUT_OFF = 0.05  # of the steepest part of a loss curve, which would flatten all the rest


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """Those that the runs have curves for."""
    made = []
    for losses in _comparable(runs):
        made += [
            _train_loss(runs, losses),
            _train_loss_by_flops(runs, losses),
            _validation(runs, losses, "loss"),
            _validation(runs, losses, "perplexity") if losses.per_token else None,
        ]
    made += [
        _gradient_norm(runs),
        _speed(runs),
        _nonlinearity(runs),
        _negative_shares(runs),
    ]
    return [picture for picture in made if picture is not None]


@dataclass(frozen=True)
class _Losses:
    """Of runs that can stand in one picture: nats per token of one tokenizer, or bits per byte.

    ``suffix`` and ``note`` tell pictures of several tokenizers apart.
    """

    runs: Sequence[Run]
    per_token: bool = True
    suffix: str = ""
    note: str = ""

    def __contains__(self, run: Run) -> bool:
        return any(run is one for one in self.runs)

    @property
    def unit(self) -> str:
        return "nats per token" if self.per_token else "bits per byte"

    def of(self, run: Run, series: Series) -> Array:
        """In that unit; what is not credible is left out."""
        return np.where(run.credible(series.values), series.values, np.nan) / self._nats(run)

    def final(self, run: Run, loss: float | None) -> float | None:
        """A loss at the end in that unit; None if the run diverged."""
        return None if loss is None or run.diverged is not None else loss / self._nats(run)

    def _nats(self, run: Run) -> float:
        """Per token in a unit."""
        return 1.0 if self.per_token else math.log(2) * (run.bytes_per_token or math.nan)


def _comparable(runs: Sequence[Run]) -> list[_Losses]:
    by_tokenizer = tokenizers(runs)
    if len(by_tokenizer) == 1:
        return [_Losses(runs)]
    if all(run.bytes_per_token for run in runs if run.train or run.validation):
        of_each = _by_text(runs, lambda run: f"{run.bytes_per_token or math.nan:.3f}")
        note = f" Of other tokenizers, so by the bytes of their text; bytes per token: {of_each}."
        return [_Losses(runs, per_token=False, note=note)]
    return [
        _Losses(
            of,
            suffix=f"-{number}",
            note=f" Of {tokenizer} alone: losses of other tokenizers are no measure for these.",
        )
        for number, (tokenizer, of) in enumerate(by_tokenizer.items(), 1)
    ]


def _by_text(runs: Sequence[Run], text: Callable[[Run], str]) -> str:
    """What is to be said of each, once for all of whom it is the same."""
    found: dict[str, list[str]] = {}
    for run in runs:
        found.setdefault(text(run), []).append(run.short)
    parts = [f"{names(of)} {text}" for text, of in found.items()]
    return "; ".join(parts[:FEW]) + (f"; {len(parts) - FEW} more" if len(parts) > FEW else "")


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
    """Those that have the curve, each with the style and label that it has in all pictures.

    More than can be named one by one have those of their activation.
    """
    styles = run_styles([run.activation for run in runs])
    shown = [(style, run) for style, run in zip(styles, runs, strict=True) if curve(run)]
    of_each = Counter(run.label for _, run in shown)
    places: Counter[str] = Counter()
    for style, run in shown:
        style["label"] = plain(run.short) + (" (diverged)" if run.diverged is not None else "")
        if len(runs) > FEW:
            place = places[run.label]
            style["label"] = "_" if place else f"{run.label} ({of_each[run.label]} runs)"
            # In turn, so that no activation lies on top of all others.
            style |= {"linestyle": "-", "linewidth": 0.7, "alpha": 0.7, "zorder": 2 + place / 1e4}
            places[run.label] += 1
    return shown


def _where(runs: Sequence[Run]) -> str:
    """Where curves end early."""
    ends = [run for run in runs if run.diverged is not None]
    if not ends:
        return ""
    return f" Up to where they diverged: {_by_text(ends, lambda run: f'at {run.diverged:,}')}."


def _line(drawing: Drawing, style: Style, x: Array, y: Array) -> int:
    """Raw behind smoothed; the smoothing window."""
    mean_x, mean_y, window = smoothed(x, y)
    if window > 1:
        drawing.axes.plot(*envelope(x, y), color=style["color"], alpha=0.25, linewidth=0.7)
    marker = "o" if len(mean_x) == 1 else None
    drawing.axes.plot(*envelope(mean_x, mean_y), marker=marker, **style)
    return window


def _smoothing(windows: Sequence[int]) -> str:
    if max(windows) == 1:
        return "Every logged iteration."
    return f"Dark: mean of up to {max(windows):,} logged iterations; pale: every one."


def _finals(runs: Sequence[tuple[Style, Run]], value: Callable[[Run], float | None]) -> str:
    return _by_text([run for _, run in runs], lambda run: decimal(value(run), 3))


def _train_loss(runs: Sequence[Run], losses: _Losses) -> Picture | None:
    shown = _with(runs, lambda run: run.train is not None and run in losses)
    if not shown:
        return None
    axis = TimeAxis([run for _, run in shown])
    title = f"Training loss against {axis.noun}"
    drawing = Drawing(title, axis.label, f"training loss [{losses.unit}]")
    windows, later = [], []
    for style, run in shown:
        assert run.train is not None
        series = run.believed(run.train)
        x, y = axis(run, series.steps), losses.of(run, series)
        windows.append(_line(drawing, style, x, y))
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
        f"train-loss-tokens{losses.suffix}.png",
        f"{_smoothing(windows)}{cut}{_where([run for _, run in shown])}{losses.note}",
        f"{title}, at the end: "
        + _finals(shown, lambda run: losses.final(run, run.final_train_loss)),
    )


def _train_loss_by_flops(runs: Sequence[Run], losses: _Losses) -> Picture | None:
    shown = _with(runs, lambda run: run.train is not None and run.total_flops and run in losses)
    if not shown:
        return None
    title = "Training loss against FLOPs"
    drawing = Drawing(title, "training FLOPs", f"training loss [{losses.unit}]")
    windows, per_token = [], {}
    for style, run in shown:
        assert run.train is not None and run.model is not None
        per_token[run.short] = scientific(run.model.flops_per_token())
        series = run.believed(run.train)
        tokens = run.tokens(series.steps)
        assert tokens is not None
        x = tokens * run.model.flops_per_token()
        windows.append(_line(drawing, style, x, losses.of(run, series)))
    drawing.axes.set_xscale("log")
    drawing.legend()
    alike = len(set(per_token.values())) == 1
    of_each = _by_text([run for _, run in shown], lambda run: f"with {per_token[run.short]}")
    return drawing.finish(
        f"train-loss-flops{losses.suffix}.png",
        "FLOPs as Megatron counts them (forward and backward, no recomputation), "
        + (f"{min(per_token.values())} per token. " if alike else f"per token: {of_each}. ")
        + f"{_smoothing(windows)}{losses.note}",
        f"{title} on a logarithmic axis; at the end "
        f"{_finals(shown, lambda run: run.total_flops)} FLOPs",
    )


def _validation(runs: Sequence[Run], losses: _Losses, word: str) -> Picture | None:
    """Of the ``loss``, or of the ``perplexity``."""
    shown = _with(runs, lambda run: run.validation and run in losses)
    if not shown:
        return None
    axis = TimeAxis([run for _, run in shown])
    title = f"Validation {word} against {axis.noun}"
    of_loss = word == "loss"
    drawing = Drawing(title, axis.label, f"validation {word}" + f" [{losses.unit}]" * of_loss)

    def transform(loss: Array) -> Array:
        return loss if of_loss else np.exp(np.minimum(loss, 700))

    for style, run in shown:
        for index, (name, series) in enumerate(run.validation.items()):
            x, y = axis(run, series.steps), transform(losses.of(run, series))
            marker = "osD^v"[index % 5] if len(x) <= 60 and len(runs) <= FEW else None
            label = style["label"] + (f", {plain(name)}" if name else "")
            look = style | {"label": label, "marker": marker, "markersize": 4}
            drawing.axes.plot(*envelope(x, y), **look)
    low, high = drawing.axes.dataLim.intervaly
    if word == "perplexity" and low > 0 and high > 10 * low:
        drawing.axes.set_yscale("log")
    drawing.legend()

    def final(run: Run) -> float | None:
        loss = losses.final(run, run.final_validation_loss)
        return None if loss is None else float(transform(np.array(loss)))

    return drawing.finish(
        f"validation-{word}{losses.suffix}.png",
        "Megatron's own validation during training."
        + ("" if of_loss else " Perplexity is exp(loss).")
        + losses.note,
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
        lambda run: run.step_time and _medians(run.step_time),
        "Step time",
        "seconds per iteration",
        "step-time.png",
        f"Medians of {_STRETCHES} stretches of each run, by Megatron's timers where they are "
        "logged (--log-timers-to-tensorboard), else by the time between two written losses.",
    )


def _medians(series: Series) -> Series:
    """Of each stretch: single steps wait for a disk or a validation, and hide all others."""
    parts = np.array_split(np.arange(len(series.steps)), min(_STRETCHES, len(series.steps)))
    middle = [part[len(part) // 2] for part in parts]
    values = np.array([np.median(series.values[part]) for part in parts])
    return Series(series.steps[middle], values, series.times[middle])


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
        series = run.believed(series)
        windows.append(_line(drawing, style, axis(run, series.steps), series.values))
        finite = series.values[np.isfinite(series.values)]
        medians.append(float(np.median(finite)) if len(finite) else 0.0)
    # A few outliers (a first step, a wait for a disk) shall not flatten all the rest.
    top, cut = _OUTLIER * max(medians, default=0.0), ""
    if 0 < top < drawing.axes.get_ylim()[1]:
        drawing.axes.set_ylim(0, top)
        cut = f" The axis ends at {_OUTLIER:g} times the greatest median."
    elif drawing.axes.get_ylim()[0] < drawing.axes.get_ylim()[1] / 2:
        drawing.axes.set_ylim(bottom=0)
    drawing.legend()
    of_runs = dict(zip((run.name for _, run in shown), medians, strict=True))
    return drawing.finish(
        file,
        f"{more} {_smoothing(windows)}{cut}",
        f"{title}, {y_label}; medians: " + _finals(shown, lambda run: of_runs[run.name]),
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
        drawing.axes.plot(depths, values, marker="o", markersize=4, **style)
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
