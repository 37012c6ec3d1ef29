"""The pictures of a comparison, drawn as the report draws: losses, paired differences, alphas, and
of one at several sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.transforms import offset_copy

from compare import scaling_fit
from compare.paired import DIFFERENCE, Comparison, Spread
from compare.records import Records, with_alphas
from compare.sweep import SEED, Sweep
from compare.variants import Variant
from megatron_xielu.common import files
from megatron_xielu.report import depth_plots
from megatron_xielu.report.depth import Adaptation
from megatron_xielu.report.drawing import Drawing, depth_colour, run_styles
from megatron_xielu.report.events import Curve

_MARKERS = "os^DvP*X<>"  # tell variants and layers apart in grey too
_SMOOTHED = 10  # logged losses: a single batch's loss is too noisy to compare
_SHOWN_FROM = 15  # the first 1/15 falls so far that it would flatten all the rest; it is cut off


def plot_losses(
    records: Records, variants: Sequence[Variant], path: Path, *, caption: str, unit: str
) -> None:
    """Training loss (running mean) and held-out loss, mean over seeds with the seeds' range."""
    drawing = Drawing(
        f"Loss by activation\n{caption}",
        "training iteration",
        f"loss [nats per {unit}]",
        columns=2,
        size=(11, 4.8),
        shared=False,  # the first validation comes late, when much of the loss has gone
    )
    left, right = drawing.panels[0]
    top = 0.0
    styles = _styles(variants)
    for number, variant in enumerate(variants):
        of_seed, style = records[variant.name].values(), styles[variant.name]
        train = over_seeds([running_mean(record.train, _SMOOTHED) for record in of_seed])
        valid = over_seeds([record.valid for record in of_seed])
        top = max(top, train[len(train) // _SHOWN_FROM][1])
        final = Spread.of([record.valid_loss for record in of_seed]).show(".3f")
        _band(left, train, label=f"{variant.label}: {final}", **style)
        _band(right, valid, marker=_MARKERS[number % len(_MARKERS)], **style)
    seeds = max(map(len, records.values()))
    band = f";\nbands: lowest to highest of {seeds} seeds" if seeds > 1 else ""
    left.set_title(f"training text (mean of {_SMOOTHED} logged losses{band})")
    right.set_title("held-out text (other axes)")
    left.set_ylim(top=top)
    drawing.legend(title="held-out loss after the last iteration")
    files.write(path, drawing.png())


def plot_scaling(
    flops: Mapping[str, float],
    losses: Mapping[str, scaling_fit.Line],
    gaps: Mapping[str, scaling_fit.Line],
    variants: Sequence[Variant],
    path: Path,
    *,
    baseline: str,
    caption: str,
    unit: str,
) -> None:
    """Held-out loss, and its gap to ``baseline``, against FLOPs: means, 95 % intervals, lines.

    ``flops``: of a run, by what its size is called.
    """
    drawing = Drawing(
        f"Loss and compute, by activation\n{caption}",
        "FLOPs of a run",
        f"held-out loss [nats per {unit}]",
        columns=2,
        size=(11, 5),
        shared=False,
    )
    left, right = drawing.panels[0]
    styles = _styles(variants)
    for number, variant in enumerate(variants):
        # A little apart, since intervals at the same FLOPs would hide each other.
        x = [one * 1.06 ** (number - (len(variants) - 1) / 2) for one in flops.values()]
        for axes, lines in ((left, losses), (right, gaps)):
            if (line := lines.get(variant.name)) is None:
                continue
            axes.plot(x, line.fitted, **styles[variant.name])
            axes.errorbar(
                x,
                [mean.value for mean in line.means],
                [mean.interval[1] - mean.value if mean.interval else 0 for mean in line.means],
                fmt=_MARKERS[number % len(_MARKERS)],
                color=styles[variant.name]["color"],
                capsize=3,
                label=f"{variant.label}: {line.slope.value:+.3f}",
            )
    several = any(mean.interval for line in losses.values() for mean in line.means)
    bars = ", 95 % intervals" if several else ", one seed"
    left.set_title(f"means{bars}; lines: a − b·log10 C")
    right.set_title(f"gap to {baseline}; below 0 is better")
    right.axhline(0, color="0.35", linewidth=1)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks([*flops.values()], [f"{one:.1e}\n{size}" for size, one in flops.items()])
        axes.minorticks_off()
    drawing.legend(title="per ×10 FLOPs")
    files.write(path, drawing.png())


def plot_differences(
    comparisons: Sequence[Comparison],
    variants: Sequence[Variant],
    path: Path,
    *,
    caption: str,
    unit: str,
) -> None:
    """Every seed's difference to the baseline, the mean, and its 95 % interval."""
    styles = _styles(variants)
    labels = {variant.name: variant.label for variant in variants}
    baseline = labels[comparisons[0].baseline]
    several = any(comparison.interval for comparison in comparisons)
    key = "dots: seeds, diamond: mean, bar: 95 % interval" if several else "one seed"
    drawing = Drawing(
        f"Paired differences to {baseline}\n{caption}",
        f"held-out loss minus that of {baseline} with the same seed [nats per {unit}]\n"
        f"← better        {key}        worse →",
        "",
        size=(8.5, 1.9 + 0.62 * len(comparisons)),
    )
    axes = drawing.axes
    axes.margins(x=0.08)
    axes.axvline(0, color="0.35", linewidth=1)
    for place, comparison in enumerate(comparisons):
        colour = styles[comparison.variant]["color"]
        if comparison.interval:
            low, high = comparison.interval
            axes.errorbar(
                (low + high) / 2, place, xerr=(high - low) / 2, color=colour, capsize=5, fmt="none"
            )
        differences = list(comparison.differences.values())
        if not several:
            axes.plot(differences, [place], "o", color=colour, ms=8)
            continue
        axes.plot(differences, [place] * len(differences), "o", color=colour, alpha=0.45, ms=5)
        filled = colour if comparison.verdict == DIFFERENCE else "white"
        axes.plot(comparison.mean, place, "D", color=colour, markerfacecolor=filled, ms=9)
    axes.set_yticks(
        range(len(comparisons)),
        [labels[c.variant] + (f"\n{c.verdict}" if several else "") for c in comparisons],
    )
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    files.write(path, drawing.png())


def plot_alphas(records: Records, variants: Sequence[Variant], path: Path, *, caption: str) -> None:
    """Effective αp and αn of every layer over time, mean over seeds; a column per variant."""
    trained = with_alphas(records, variants)
    drawing = Drawing(
        f"Alphas by layer\n{caption}",
        "training iteration",
        "effective alpha",
        rows=2,
        columns=len(trained),
        size=(5.0 * len(trained) + 1, 7),
    )
    deepest = 0
    for column, variant in zip(drawing.panels.T, trained, strict=True):
        alphas = [r.alphas for r in records[variant.name].values() if r.alphas]
        deepest = len(alphas[0].positive[0]) - 1
        for axes, side, symbol in zip(
            column, ("positive", "negative"), ("αp, x > 0", "αn, x ≤ 0"), strict=True
        ):
            for layer in range(deepest + 1):
                curves = [
                    [
                        (step, values[layer])
                        for step, values in zip(a.iterations, getattr(a, side), strict=True)
                    ]
                    for a in alphas
                ]
                marker = _MARKERS[layer % len(_MARKERS)]
                _band(axes, over_seeds(curves), color=depth_colour(layer, deepest), marker=marker)
            axes.set_title(f"{variant.label}: {symbol}")
    drawing.depth_bar(deepest)
    files.write(path, drawing.png())


def plot_sweep(
    sweep: Sweep, variants: Sequence[Variant], path: Path, *, caption: str, unit: str
) -> None:
    """Held-out loss by learning rate; the best of each variant is filled, and one that diverged is
    at the upper edge."""
    some = any(None in losses.values() for losses in sweep.losses.values())
    drawing = Drawing(
        f"Held-out loss by learning rate\n{caption}",
        f"learning rate (one run at each, seed {SEED};\nfilled: the best"
        f"{'; at the upper edge: diverged' * some})",
        f"held-out loss [nats per {unit}]",
    )
    axes, styles = drawing.axes, _styles(variants)
    for number, variant in enumerate(variants):
        losses = sweep.losses[variant.name]
        points = [(rate, loss) for rate, loss in losses.items() if loss is not None]
        diverged = [rate for rate, loss in losses.items() if loss is None]
        marker, style = _MARKERS[number % len(_MARKERS)], styles[variant.name]
        best = sweep.best(variant.name)
        axes.plot(*zip(*points, strict=True), marker=marker, mfc="white", **style)
        axes.plot(best, losses[best], marker=marker, color=style["color"], label=variant.label)
        # A little apart, since several may diverge at one rate.
        aside = 7 * (number - (len(variants) - 1) / 2)
        edge = offset_copy(axes.get_xaxis_transform(), drawing.figure, aside, units="points")
        look = {"color": style["color"], "marker": marker, "mfc": "white", "linestyle": "none"}
        at = {"transform": edge, "clip_on": False, "in_layout": False}
        axes.plot(diverged, [1] * len(diverged), **look, **at)
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.set_xticks([*sweep.losses[variants[0].name]], minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    drawing.legend()
    files.write(path, drawing.png())


def plot_depth(adapted: Sequence[Adaptation], path: Path, *, caption: str) -> None:
    """Nonlinearity of every layer over time, and over depth at the end; a column per variant."""
    drawing = Drawing(
        f"Nonlinearity by depth\n{caption}",
        "layer",
        depth_plots.NONLINEARITY,
        rows=2,
        columns=len(adapted),
        size=(5.0 * len(adapted) + 1, 7),
        shared=False,
    )
    for (above, below), one in zip(drawing.panels.T, adapted, strict=True):
        above.set_title(one.label)
        above.set_xlabel("training iteration")
        depth_plots.over_time(above, one)
        depth_plots.by_depth(below, one)
        below.legend(frameon=False)
    drawing.depth_bar(int(adapted[0].layers[-1]))
    files.write(path, drawing.png())


def _styles(variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
    styles = run_styles([variant.name.partition("-")[0] for variant in variants])
    return dict(zip((variant.name for variant in variants), styles, strict=True))


def _band(axes: Any, points: Sequence[tuple[int, float, float, float]], **style: Any) -> None:
    """The mean over seeds as a line, and from their lowest to their highest."""
    steps, means, lows, highs = zip(*points, strict=True)
    axes.plot(steps, means, markersize=4, **style)
    axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.18, linewidth=0)


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
