"""What all pictures share: their look, colours for runs and for depth, thinned and smoothed curves.

Colours are Okabe and Ito's for runs, and viridis, light to dark, for depth: colour-blind readers
can tell both apart.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]

_RUN_COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000".split()
_DASHES = ["-", "--", "-.", ":"]
# The yellow end of viridis is too pale on white.
DEPTHS: Colormap = ListedColormap(matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1, 256)))
# Of nonlinearity, 0 to 1: pale yellow to dark blue.
SHARES: Colormap = matplotlib.colormaps["YlGnBu"]

_SIZE, _DPI = (6.4, 4.3), 160
_STYLE: Any = {
    "font.size": 11.5,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": "0.25",
    "axes.edgecolor": "0.55",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.91",
    "xtick.color": "0.35",
    "ytick.color": "0.35",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.linewidth": 1.7,
    "mathtext.default": "regular",
}
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

    @property
    def width(self) -> int:
        """Pixels."""
        return round(_SIZE[0] * _DPI)

    @property
    def height(self) -> int:
        """Pixels."""
        return round(_SIZE[1] * _DPI)


class Drawing:
    """One pair of axes, in the common look.

    Args:
        title: above the axes; the page shows it too.
        x_label, y_label: with units.
    """

    def __init__(self, title: str, x_label: str, y_label: str) -> None:
        with matplotlib.rc_context(_STYLE):
            self.figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained", facecolor="white")
            self.axes: Axes = self.figure.add_subplot()
            self.axes.set(title=title, xlabel=x_label, ylabel=y_label)

    def legend(self, **options: Any) -> None:
        """Inside for a few entries, below for many."""
        with matplotlib.rc_context(_STYLE):
            handles, labels = self.axes.get_legend_handles_labels()
            if len(handles) <= 4 and all(len(label) <= 32 for label in labels):
                self.axes.legend(**options)
            else:
                columns = 2 if max(map(len, labels)) <= 32 else 1
                self.figure.legend(handles, labels, loc="outside lower left", ncols=columns)

    def layers_below(self) -> None:
        """The horizontal axis counts layers."""
        self.axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    def depth_bar(self, deepest: int) -> None:
        """The key of `depth_colour`."""
        with matplotlib.rc_context(_STYLE):
            key = ScalarMappable(Normalize(0, max(1, deepest)), DEPTHS)
            bar = self.figure.colorbar(key, ax=self.axes, label="layer", pad=0.02, aspect=30)
            bar.outline.set_visible(False)  # type: ignore[operator]
            bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
            bar.ax.invert_yaxis()  # the first layer on top, as it stands in a table

    def finish(self, file: str, caption: str, alt: str) -> Picture:
        """Draw it."""
        with matplotlib.rc_context(_STYLE):
            buffer = io.BytesIO()
            self.figure.savefig(buffer, format="png")
        return Picture(file, caption, alt, _fewer_colours(buffer.getvalue()))


def run_style(number: int) -> dict[str, Any]:
    """Colour and dashes of the ``number``-th run."""
    return {
        "color": _RUN_COLOURS[number % len(_RUN_COLOURS)],
        "linestyle": _DASHES[number // len(_RUN_COLOURS) % len(_DASHES)],
    }


def depth_colour(depth: int, deepest: int) -> Any:
    """Of a layer; light to dark."""
    return DEPTHS(depth / max(1, deepest))


def shortened(name: str, length: int = 44) -> str:
    """A name for a legend: the middle of a long one is left out."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-length // 2 :]}"


def plain(text: str) -> str:
    """Text that Matplotlib shall show as it is: a pair of ``$`` would start a formula."""
    return text.replace("$", r"\$")


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


def share_colour(share: float) -> tuple[float, float, float]:
    """Red, green and blue, 0 to 1, of a share."""
    return SHARES(share)[:3]


def readable_on(share: float) -> str:
    """black or white: what has more contrast on `share_colour` (WCAG 2's relative luminance)."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in share_colour(share)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


def _fewer_colours(png: bytes) -> bytes:
    """The same picture with a palette: a third of the size, in a page that holds many."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "png")
    return buffer.getvalue()
