"""The report's tables for a terminal: a row a run, and how far each layer is from linear."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from megatron_xielu.report import summary
from megatron_xielu.report.drawing import ink_on, share_colour, shortened
from megatron_xielu.report.run import Run

_PER_LINE = 12


def render(runs: Sequence[Run], *, colours: bool) -> str:
    """The tables as text, without a line end.

    Args:
        runs: in order.
        colours: a block of colour behind each layer's number.
    """
    rows = ([shortened(run.name), *summary.run_row(run)[1:]] for run in runs)
    parts = [_table(summary.RUN_COLUMNS, list(rows))]
    for run in runs:
        if run.layers:
            parts.append(_layers(run, colours))
    return "\n\n".join(parts)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [list(columns), *map(list, rows)]
    # A column that no run has a number for says nothing.
    shown = [
        place
        for place in range(len(columns))
        if any(row[place] != summary.MISSING for row in cells[1:])
    ]
    widths = {place: max(_width(row[place]) for row in cells) for place in shown}
    lines = [
        "  ".join(_padded(row[place], widths[place], left=place < 2) for place in shown).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("─" * widths[place] for place in shown))
    return "\n".join(lines)


def _layers(run: Run, colours: bool) -> str:
    cells = []
    for layer in run.layers:
        cell = f" {layer.by_normal:.2f} "
        if colours:
            red, green, blue = bytes.fromhex(share_colour(layer.by_normal)[1:])
            ink = "30" if ink_on(layer.by_normal) == "black" else "97"
            cell = f"\x1b[48;2;{red};{green};{blue};{ink}m{cell}\x1b[0m"
        cells.append(cell)
    lines = ["".join(cells[at : at + _PER_LINE]) for at in range(0, len(cells), _PER_LINE)]
    title = f"{shortened(run.name)}: nonlinearity by layer, from the first (0: a straight line)"
    return "\n".join([title, *lines])


def _width(text: str) -> int:
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _padded(text: str, width: int, *, left: bool) -> str:
    space = " " * (width - _width(text))
    return text + space if left else space + text
