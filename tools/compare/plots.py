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
from megatron_xielu.report.drawing import (
    Drawing,
    depth_colour,
    not_of_rounding,
    run_styles,
    wrapped,
)
from megatron_xielu.report.events import Curve

_MARKERS = "os^DvP*X<>"  # tell variants and layers apart in grey too
_SMOOTHED = 10  # logged losses: a single batch's loss is too noisy to compare
_IN_A_ROW = 3  # variants, where each has panels of its own
_LABEL = 28  # letters in a line, beside an axis
_SHOWN_FROM = 15  # the first 1/15 falls so far that it would flatten all the rest; it is cut off


def plot_losses(
    records: Records, variants: Sequence[Variant], path: Path, *, caption: str, unit: str
) -> None:
    """Training loss (running mean) and held-out loss, mean over seeds with the seeds' range."""
    drawing = Drawing(
        f"Loss by activation\n{caption}{_range(records, variants)}",
        "training iteration",
        f"loss [nats per {unit}]",
        columns=2,
        size=(11, 4.8),
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
    left.set_title(f"training text (mean of {_SMOOTHED} logged losses)")
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
    several = any(mean.interval for line in losses.values() for mean in line.means)
    bars = "; bars: 95 % interval" if several else ", one seed"
    drawing = Drawing(
        f"Loss and compute, by activation\n{caption}\ndots: means{bars}; lines: a − b·log10 C",
        "FLOPs of a run",
        f"held-out loss [nats per {unit}]",
        columns=2,
        size=(11, 5),
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
    left.set_title("held-out loss")
    right.set_title(wrapped(f"gap to {baseline}; below 0 is better", 50))
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
    names = {
        one.variant: wrapped(labels[one.variant], _LABEL) + (f"\n{one.verdict}" if several else "")
        for one in comparisons
    }
    lines = max(name.count("\n") + 1 for name in names.values())
    drawing = Drawing(
        f"Paired differences to {baseline}\n{caption}\n{key}",
        "held-out loss minus the baseline's, seed by seed\n"
        f"← better      [nats per {unit}]      worse →",
        "",
        size=(8.5, 2.2 + (0.2 + 0.21 * lines) * len(comparisons)),
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
    axes.set_yticks(range(len(comparisons)), [names[one.variant] for one in comparisons])
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    files.write(path, drawing.png())


def plot_alphas(records: Records, variants: Sequence[Variant], path: Path, *, caption: str) -> None:
    """Effective αp and αn of every layer over time, mean over seeds; two panels per variant."""
    trained = with_alphas(records, variants)
    drawing, pairs = _pairs(
        f"Alphas by layer\n{caption}{_range(records, trained)}", "effective alpha", len(trained)
    )
    deepest = 0
    for pair, variant in zip(pairs, trained, strict=True):
        alphas = [r.alphas for r in records[variant.name].values() if r.alphas]
        deepest = len(alphas[0].positive[0]) - 1
        for axes, first, side, symbol in zip(
            pair, pairs[0], ("positive", "negative"), ("αp, x > 0", "αn, x ≤ 0"), strict=True
        ):
            if axes is not first:
                axes.sharey(first)
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
            whole = symbol.replace(" ", "\u00a0")  # in one line
            axes.set_title(wrapped(f"{variant.label}: {whole}", _LABEL))
            axes.set_xlabel("training iteration")
    for axes in pairs[0]:
        not_of_rounding(axes)
    drawing.depth_bar(deepest)
    files.write(path, drawing.png())


def plot_sweep(
    sweep: Sweep, variants: Sequence[Variant], path: Path, *, caption: str, unit: str
) -> None:
    """Held-out loss by learning rate; the best of each variant is filled, and one that diverged is
    at the upper edge."""
    some = any(None in losses.values() for losses in sweep.losses.values())
    drawing = Drawing(
        f"Held-out loss by learning rate\n{caption}\nof one run, seed {SEED}; filled: the best"
        f"{'; at the upper edge: diverged' * some}",
        "learning rate",
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
    """Nonlinearity of every layer over time, and over depth at the end; two panels per variant."""
    seeds = _seeds([one.seeds for one in adapted])
    bands = f"\nbands and bars: 95 % interval over {seeds}; dots: seeds" if seeds else ""
    drawing, pairs = _pairs(
        f"Nonlinearity by depth\n{caption}{bands}", depth_plots.NONLINEARITY, len(adapted)
    )
    for (above, below), one, axis in zip(pairs, adapted, depth_plots.limits(adapted), strict=True):
        above.set_title(wrapped(one.label, _LABEL))
        above.set_xlabel("training iteration")
        below.set_xlabel("layer")
        depth_plots.over_time(above, one)
        depth_plots.by_depth(below, one)
        below.legend(frameon=False)
        for axes in (above, below):
            axes.set_ylim(axis)
    drawing.depth_bar(int(adapted[0].layers[-1]))
    files.write(path, drawing.png())


def _pairs(title: str, y_label: str, count: int) -> tuple[Drawing, Any]:
    """Two panels, one above the other, for each of ``count``, some in a row: [count, 2]."""
    rows = -(-count // _IN_A_ROW)
    columns = -(-count // rows)
    drawing = Drawing(
        title,
        "",
        y_label,
        rows=2 * rows,
        columns=columns,
        size=(11 if columns > 1 else 6, 1 + 3 * 2 * rows),
    )
    pairs = drawing.panels.reshape(rows, 2, columns).swapaxes(1, 2).reshape(-1, 2)
    for axes in pairs[count:].flat:
        axes.set_visible(False)
    return drawing, pairs[:count]


def _range(records: Records, variants: Sequence[Variant]) -> str:
    """A line of the caption: what the bands of `_band` are."""
    seeds = _seeds([len(records[variant.name]) for variant in variants])
    return f"\nbands: lowest to highest of {seeds}" if seeds else ""


def _seeds(counts: Sequence[int]) -> str:
    """How many each has; nothing where none has several."""
    if max(counts) == 1:
        return ""
    return " to ".join(map(str, sorted({min(counts), max(counts)}))) + " seeds"


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
