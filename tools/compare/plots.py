"""The pictures of a comparison: losses, paired differences, alphas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compare.paired import DIFFERENCE, Comparison, Spread
from compare.records import Record
from compare.variants import Variant
from megatron_xielu.common import files
from megatron_xielu.report.events import Curve

# Okabe and Ito's palette, which colour-blind readers can tell apart; the dashes do it in grey.
_STYLES: dict[str, dict[str, Any]] = {
    "xielu": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "xiprelu": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "relu2": {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    "swiglu": {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
    "gelu": {"color": "#555555", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
}
_FURTHER_COLOURS = ("#E69F00", "#56B4E9", "#000000", "#882255", "#44AA99", "#999933")
_FURTHER_DASHES = ((0, (1, 1)), (0, (3, 1, 1, 1)), (0, (6, 2)))
_SMOOTHED_ITERATIONS = 10  # a single batch's loss is too noisy to compare
_SHOWN_FROM = 15  # the first 1/15 falls so far that it would flatten all the rest; it is cut off

Records = dict[str, dict[int, Record]]  # by variant and seed


def plot_losses(
    records: Records, variants: Sequence[Variant], path: Path, *, caption: str, unit: str
) -> None:
    """Training loss (running mean) and held-out loss, mean over seeds with the seeds' range."""
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(11, 4.8), sharey=True)
    top, styles = 0.0, _styles(variants)
    for variant in variants:
        of_seed, style = records[variant.name].values(), styles[variant.name]
        line = {key: style[key] for key in ("color", "linestyle")}
        train = over_seeds([running_mean(record.train, _SMOOTHED_ITERATIONS) for record in of_seed])
        valid = over_seeds([record.valid for record in of_seed])
        top = max(top, train[len(train) // _SHOWN_FROM][1])
        final = Spread.of([record.valid_loss for record in of_seed]).show(".3f")
        for axes, points, more in (
            (left, train, {**line, "label": variant.label}),
            (right, valid, {**style, "markersize": 6, "label": f"{variant.label}: {final}"}),
        ):
            steps, means, lows, highs = zip(*points, strict=True)
            axes.plot(steps, means, linewidth=1.8, **more)
            if len(of_seed) > 1:
                axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.18, linewidth=0)
    seeds = max(map(len, records.values()))
    band = f"; bands: lowest to highest of {seeds} seeds" if seeds > 1 else ""
    left.set_title(f"training text (mean of {_SMOOTHED_ITERATIONS} iterations{band})", fontsize=10)
    right.set_title("held-out text", fontsize=10)
    left.set_ylabel(f"loss [nats per {unit}]")
    left.set_ylim(top=top)
    right.legend(title="after the last iteration", frameon=False, fontsize=9)
    left.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.set_xlim(left=0)
        _dress(axes)
    _finish(figure, "Loss by activation", caption, path)


def plot_differences(
    comparisons: Sequence[Comparison],
    variants: Sequence[Variant],
    path: Path,
    *,
    caption: str,
    unit: str,
) -> None:
    """Every seed's difference to the baseline, the mean, and its 95 % interval."""
    labels = {variant.name: variant.label for variant in variants}
    styles = _styles(variants)
    figure, axes = _pyplot().subplots(figsize=(8.5, 1.9 + 0.62 * len(comparisons)))
    axes.axvline(0, color="0.35", linewidth=1)
    for place, comparison in enumerate(comparisons):
        colour = styles[comparison.variant]["color"]
        if comparison.interval:
            axes.plot(comparison.interval, [place, place], color=colour, linewidth=2.2)
            for end in comparison.interval:
                axes.plot([end, end], [place - 0.13, place + 0.13], color=colour, linewidth=2.2)
        differences = list(comparison.differences.values())
        axes.plot(differences, [place] * len(differences), "o", color=colour, alpha=0.45, ms=5)
        filled = comparison.verdict == DIFFERENCE
        axes.plot(
            [comparison.mean],
            [place],
            marker="D",
            color=colour,
            markerfacecolor=colour if filled else "white",
            markersize=9,
        )
    axes.set_yticks(
        range(len(comparisons)),
        [f"{labels[c.variant]}\n{c.verdict}" for c in comparisons],
        fontsize=9,
    )
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    baseline = labels[comparisons[0].baseline]
    axes.set_xlabel(
        f"held-out loss minus that of {baseline} with the same seed [nats per {unit}]\n"
        "← better        dots: seeds, diamond: mean, bar: 95 % interval        worse →",
        fontsize=9,
    )
    axes.grid(color="0.9", axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)
    _finish(figure, f"Paired differences to {baseline}", caption, path)


def plot_alphas(records: Records, variants: Sequence[Variant], path: Path, *, caption: str) -> None:
    """Effective αp and αn of every layer over time, mean over seeds; a column per variant."""
    import matplotlib

    trained = [variant for variant in variants if variant.has_alphas]
    figure, grid = _pyplot().subplots(
        2, len(trained), figsize=(5.0 * len(trained), 7), sharex=True, sharey="row", squeeze=False
    )
    # Light to dark with depth; the yellow end of the map is too pale on white.
    colours = matplotlib.colormaps["viridis_r"].resampled(256)
    for column, variant in zip(grid.T, trained, strict=True):
        alphas = [r.alphas for r in records[variant.name].values() if r.alphas]
        for axes, side, symbol in zip(column, ("positive", "negative"), ("αp", "αn"), strict=True):
            layers = len(getattr(alphas[0], side)[0])
            for layer in range(layers):
                curves = [
                    [
                        (step, values[layer])
                        for step, values in zip(a.iterations, getattr(a, side), strict=True)
                    ]
                    for a in alphas
                ]
                steps, means, lows, highs = zip(*over_seeds(curves), strict=True)
                colour = colours(0.2 + 0.8 * layer / max(1, layers - 1))
                axes.plot(
                    steps,
                    means,
                    color=colour,
                    marker="os^Dv<>p"[layer % 8],
                    markersize=4,
                    linewidth=1.5,
                    label=f"layer {layer + 1}",
                )
                axes.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)
            axes.set_title(f"{variant.label}: {symbol}", fontsize=10)
            _dress(axes, x_label=axes is column[-1])
    for axes, side in zip(grid[:, 0], ("x > 0", "x ≤ 0"), strict=True):
        axes.set_ylabel(f"effective alpha for {side} [no unit]")
    grid[0, -1].legend(frameon=False, fontsize=8)
    _finish(figure, "Alphas by layer", caption, path)


def over_seeds(curves: Sequence[Curve]) -> list[tuple[int, float, float, float]]:
    """(iteration, mean, lowest, highest) at every iteration that all curves have."""
    by_step = [dict(curve) for curve in curves]
    shared = set.intersection(*map(set, by_step))
    found = []
    for step in sorted(shared):
        values = [curve[step] for curve in by_step]
        found.append((step, sum(values) / len(values), min(values), max(values)))
    return found


def running_mean(curve: Curve, length: int) -> Curve:
    """Mean over the last ``length`` points at every point that has as many before it."""
    length = min(length, len(curve))
    losses = [loss for _, loss in curve]
    return [
        (curve[end - 1][0], sum(losses[end - length : end]) / length)
        for end in range(length, len(curve) + 1)
    ]


def _styles(variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
    further = _further_styles()
    return {v.name: _STYLES[v.name] if v.name in _STYLES else next(further) for v in variants}


def _further_styles() -> Iterator[dict[str, Any]]:
    """For ablations: as many as there are."""
    for number in range(10_000):
        yield {
            "color": _FURTHER_COLOURS[number % len(_FURTHER_COLOURS)],
            "linestyle": _FURTHER_DASHES[number % len(_FURTHER_DASHES)],
            "marker": "PX*<>h"[number % 6],
        }


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


def _finish(figure: Any, title: str, caption: str, path: Path) -> None:
    figure.suptitle(f"{title}\n{caption}", fontsize=11)
    figure.tight_layout()
    with files.whole(path) as beside:
        figure.savefig(beside, format="png", dpi=110, facecolor="white")
    _pyplot().close(figure)
