"""The benchmark's picture: a panel for each operation or block, shape and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_providers import LABELS, MODES
from bench_report import Row, groups

# Okabe and Ito's palette, which colour-blind readers can tell apart; the hatches do it in grey.
_STYLES = {
    "forward": {"facecolor": "#56B4E9", "hatch": ""},
    "backward": {"facecolor": "#E69F00", "hatch": "//"},
    "both": {"facecolor": "#009E73", "hatch": ".."},
}
_PANEL_INCHES = (6.8, 4.6)
_TOP_INCHES = 0.9


@dataclass(frozen=True)
class _Metric:
    """What a panel shows; 1 is the copy, or the peer in the title.

    On a logarithmic axis bars start at 1 and go to both sides.
    """

    title: str
    value: Callable[[Row], float]
    log: bool = False
    line_at_1: bool = True


def _metric(what: str, device: str, providers: set[str]) -> _Metric:
    if what == "block" and "swiglu" in providers:
        return _Metric("time / time of SwiGLU (shorter is better)", lambda r: r.time_over_swiglu)
    if what == "op" and device == "cpu" and "hf" in providers:
        title = "times faster than Hugging Face (logarithmic)"
        return _Metric(title, lambda r: r.faster_than_hf, log=True)
    if what == "op" and "copy" in providers:
        return _Metric("fraction of copy bandwidth", lambda r: r.of_copy)
    return _Metric("median ms (shorter is better)", lambda r: r.median_ms, line_at_1=False)


def draw(rows: list[Row], header: dict[str, str], device: str, path: Path) -> None:
    """A group of bars for each provider that was measured, a bar for each mode.

    Raises:
        ValueError: none was.
        ImportError: there is no matplotlib.
    """
    panels = list(groups(r for r in rows if r.status == "ok"))
    if not panels:
        raise ValueError("nothing was measured")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    width, height = _PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines + _TOP_INCHES
    figure, grid = pyplot.subplots(lines, columns, figsize=(width, height), squeeze=False)
    for axes, ((what, shape, dtype), group) in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, group, _metric(what, device, {r.provider for r in group}))
        axes.set_title(f"{what} {shape.replace('x', '×')}, {dtype}", fontsize=11)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    shown = [mode for mode in MODES if any(r.mode == mode for r in rows)]
    figure.text(
        0.02,
        1 - 0.15 / height,
        f"{header['activation']} on {header['hardware']}\n{header['date']}, {header['versions']}",
        fontsize=10,
        va="top",
    )
    figure.legend(
        handles=[Patch(label=mode, edgecolor="white", **_STYLES[mode]) for mode in shown],
        loc="upper left",
        bbox_to_anchor=(0.01, 1 - 0.5 / height),
        ncols=len(shown),
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - _TOP_INCHES / height))
    figure.savefig(path, format="png", dpi=130)
    pyplot.close(figure)


def _draw_panel(axes: Any, rows: list[Row], metric: _Metric) -> None:
    # The copy is the line at 1, or has nothing to do with what is shown.
    providers = list(dict.fromkeys(r.provider for r in rows if r.provider != "copy"))
    modes = [mode for mode in MODES if any(r.mode == mode for r in rows)]
    thickness = 0.8 / len(modes)
    start = 1.0 if metric.log else 0.0
    for row in (r for r in rows if r.provider in providers):
        value = metric.value(row)
        position = providers.index(row.provider) - 0.4
        position += (modes.index(row.mode) + 0.5) * thickness
        axes.barh(
            position,
            value - start,
            thickness * 0.92,
            left=start,
            edgecolor="white",
            linewidth=0,
            **_STYLES[row.mode],
        )
        axes.annotate(
            f"{value:.2f}" if value < 10 else f"{value:.1f}",
            (max(value, start), position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # over the line at 1
        )
    axes.margins(x=0.12)
    if metric.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    if metric.line_at_1:
        axes.axvline(1.0, color="black", linewidth=1.0, linestyle="--")
    axes.set_xlabel(metric.title)
    axes.set_yticks(range(len(providers)), [LABELS[p] for p in providers])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
