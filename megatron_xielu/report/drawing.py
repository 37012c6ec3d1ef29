"""What all pictures share: their look, colours for runs and for depth, thinned and smoothed curves.

Each activation has its colour in all pictures; runs of one activation have Petroff's, and depth has
viridis, light to dark: colour-blind readers can tell them apart.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

Array = NDArray[np.float64]

MADE_BY = "made by megatron_xielu.report"  # in every picture and page: others are not replaced

if "petroff10" not in matplotlib.color_sequences:
    raise ModuleNotFoundError("matplotlib 3.10 or newer is needed", name="matplotlib")
RUN_COLOURS = matplotlib.color_sequences["petroff10"]
# By the names of `catalog.ACTIVATIONS`. Any two are told apart by their hue, and where the eye has
# not all three kinds of cones by their lightness.
ACTIVATION_COLOURS = {
    "xielu": "#0057b0",
    "xiprelu": "#62c4f0",
    "swiglu": "#222222",
    "relu2": "#1f9e6f",
    "quick_geglu": "#f0c808",
    "gelu": "#d55e00",
}
_UNKNOWN = "#8a8a8a"
_DASHES = ["-", "--", "-.", ":"]  # for as many runs each
# The yellow end of viridis is too pale on white.
DEPTHS: Colormap = ListedColormap(matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1, 256)))
# Of nonlinearity, 0 to 1: pale yellow to dark blue. Up to a share of 0.68 black has more contrast
# (as WCAG 2 counts), beyond it white.
SHARES: Colormap = matplotlib.colormaps["YlGnBu"]
_WHITE_FROM = 0.68

_SIZE, _DPI = (5.6, 3.9), 180  # no larger: on a phone it is 8 cm wide, letters and all
_STYLE: Any = {
    "font.size": 11.5,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "figure.titlesize": 12.5,
    "figure.titleweight": "bold",
    "axes.labelcolor": "0.25",
    "axes.edgecolor": "0.55",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.91",
    "xtick.color": "0.35",
    "ytick.color": "0.35",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.linewidth": 1.7,
    "mathtext.default": "regular",
}
_LEGEND_ROW = 0.24  # inches
_TITLE_LETTERS, _LEGEND_LETTERS = 8.5, 10  # an inch
LEAST_HEIGHT = 0.01  # of an axis of alphas or nonlinearity: less is rounding, and no movement
_SHOWN_POINTS = 1500  # more are not to be told apart
_SMOOTHED_SHARE = 0.01
_LOG_FROM = 30.0  # ratio of the largest to the smallest number from which an axis is logarithmic
_UNITS = [(1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands")]


@dataclass(frozen=True)
class Picture:
    """A finished picture: ``file`` is its name, ``alt`` says in words what it shows."""

    file: str
    caption: str
    alt: str
    png: bytes
    width: int  # pixels
    height: int


class Drawing:
    """Axes in the common look: one pair, or a grid of panels.

    Args:
        title: above everything; the page shows it too. Lines that are too long are wrapped.
        x_label, y_label: with units; of the lowest row, and of the first column.
        rows, columns: of panels.
        size: of the whole, in inches.
    """

    def __init__(
        self,
        title: str,
        x_label: str,
        y_label: str,
        *,
        rows: int = 1,
        columns: int = 1,
        size: tuple[float, float] = _SIZE,
    ) -> None:
        with matplotlib.rc_context(_STYLE):
            self.figure = Figure(figsize=size, dpi=_DPI, layout="constrained", facecolor="white")
            self.panels = self.figure.subplots(rows, columns, squeeze=False)
            self.axes: Axes = self.panels[0, 0]
            for axes in self.panels[-1]:
                axes.set_xlabel(x_label)
            for axes in self.panels[:, 0]:
                axes.set_ylabel(y_label)
            if self.panels.size == 1 and "\n" not in title:
                self.axes.set_title(title)
            else:
                title = wrapped(title, _TITLE_LETTERS * size[0])
                self.figure.suptitle(title, x=0.01, horizontalalignment="left")

    def legend(self, **options: Any) -> None:
        """Inside for a few entries, below for many."""
        with matplotlib.rc_context(_STYLE):
            handles, labels = self.axes.get_legend_handles_labels()
            if len(handles) <= 4 and all(len(label) <= 32 for label in labels):
                self.axes.legend(**options)
            else:
                room = int(_LEGEND_LETTERS * self.figure.get_figwidth())
                columns = max(1, room // max(28, *map(len, labels)))
                labels = [wrapped(label, room - 6) for label in labels]
                lines = sum(label.count("\n") + 1 for label in labels)
                rows = -(-lines // columns) + ("title" in options)
                self.figure.set_figheight(self.figure.get_figheight() + _LEGEND_ROW * rows)
                options |= {"loc": "outside lower left", "ncols": columns, "alignment": "left"}
                self.figure.legend(handles, labels, **options)

    def layers_below(self) -> None:
        """The horizontal axis counts layers."""
        self.axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    def shares(self, *, percent: bool = False) -> None:
        """The vertical axis is of shares: from 0, and not far beyond the largest."""
        whole = 100 if percent else 1
        self.axes.set_ylim(0, min(1.02 * whole, 1.25 * self.axes.dataLim.ymax) or whole)

    def depth_bar(self, deepest: int) -> None:
        """The key of `depth_colour`; none of a single layer."""
        if not deepest:
            return
        with matplotlib.rc_context(_STYLE):
            key = ScalarMappable(Normalize(0, deepest), DEPTHS)
            slim = max(30, 5 * self.figure.get_figheight())
            bar = self.figure.colorbar(key, ax=self.panels, label="layer", pad=0.02, aspect=slim)
            bar.outline.set_visible(False)  # type: ignore[operator]
            bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
            bar.ax.invert_yaxis()  # the first layer on top, as it stands in a table

    def finish(self, file: str, caption: str, alt: str) -> Picture:
        """Draw it for the page."""
        width, height = (round(inches * _DPI) for inches in self.figure.get_size_inches())
        return Picture(file, caption, alt, self.png(), width, height)

    def png(self) -> bytes:
        """Draw it, with a palette of colours: a third of the size, in a page that holds many."""
        drawn, small, made_by = io.BytesIO(), io.BytesIO(), PngInfo()
        made_by.add_text("Software", MADE_BY)
        with matplotlib.rc_context(_STYLE):
            self.figure.savefig(drawn, format="png")
        with Image.open(drawn) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
                small, "png", pnginfo=made_by
            )
        return small.getvalue()


def run_styles(activations: Sequence[str | None]) -> list[dict[str, Any]]:
    """Colour and dashes of each run, in order, from its activation.

    Runs of the same activation differ in their dashes; where all are of one, in their colours.
    """
    if len(set(activations)) == 1:
        return [
            _style(RUN_COLOURS[number % len(RUN_COLOURS)], number // len(RUN_COLOURS))
            for number in range(len(activations))
        ]
    return [
        _style(ACTIVATION_COLOURS.get(name or "", _UNKNOWN), activations[:number].count(name))
        for number, name in enumerate(activations)
    ]


def _style(colour: Any, dashes: int) -> dict[str, Any]:
    return {"color": colour, "linestyle": _DASHES[dashes % len(_DASHES)]}


def depth_colour(depth: int, deepest: int) -> Any:
    """Of a layer; light to dark."""
    return DEPTHS(depth / max(1, deepest))


def plain(text: str) -> str:
    """Text that Matplotlib shall show as it is, where ``$`` starts a formula, and ``_`` hides."""
    return text.replace("$", r"\$").replace("_", " _", text.startswith("_"))


def wrapped(text: str, letters: float) -> str:
    """Lines of ``letters`` at most; a number stays with the word before it."""
    text = re.sub(r" (?=[\d.]+(,|$))", "\u00a0", text, flags=re.M)
    lines = [textwrap.wrap(line, int(letters)) for line in text.split("\n")]
    return "\n".join("\n".join(line) for line in lines)


def not_of_rounding(axes: Axes) -> None:
    """Widen a vertical axis that is lower than `LEAST_HEIGHT`."""
    low, high = axes.get_ylim()
    if high - low < LEAST_HEIGHT:
        middle = (low + high) / 2
        axes.set_ylim(middle - LEAST_HEIGHT / 2, middle + LEAST_HEIGHT / 2)


def unit(largest: float) -> tuple[float, str]:
    """(divisor, word) for numbers up to ``largest``: (1e9, "billions"), …, (1, "")."""
    return next(((size, word) for size, word in _UNITS if largest >= size), (1.0, ""))


def envelope(x: Array, y: Array) -> tuple[Array, Array]:
    """The same curve with fewer points: of each stretch its least and its greatest value."""
    stretch = -(-len(x) * 2 // _SHOWN_POINTS)
    if stretch <= 2:
        return x, y
    whole = len(x) // stretch * stretch
    parts = y[:whole].reshape(-1, stretch)
    first = np.arange(len(parts))[:, None] * stretch
    chosen = first + np.sort(np.stack([parts.argmin(1), parts.argmax(1)], 1), 1)
    places = np.append(chosen.ravel(), len(x) - 1)
    return x[places], y[places]


def smoothed(x: Array, y: Array) -> tuple[Array, Array, int]:
    """Running mean over the 1 % of points around each, and how many those are; finite ones only.

    Fewer, in proportion, near the start, where a loss falls fast.
    """
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    window = max(1, round(len(y) * _SMOOTHED_SHARE))
    place = np.arange(len(y))
    half = np.minimum(window // 2, place // 20)
    start, end = place - half, np.minimum(place + half + 1, len(y))
    sums = np.cumsum(np.insert(y, 0, 0.0))
    return x, (sums[end] - sums[start]) / (end - start), window


def wants_log(values: Array) -> bool:
    """Whether positive ``values`` spread so far that a linear axis would hide the small ones."""
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > _LOG_FROM * values.min())


def share_colour(share: float) -> str:
    """#rrggbb of a share from 0 to 1."""
    return to_hex(SHARES(share))


def ink_on(share: float) -> str:
    """black or white: what is read on `share_colour`."""
    return "black" if share < _WHITE_FROM else "white"
