"""The report's tables for a terminal: a row a run, and how far each layer is from linear."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_xielu.common.text import table, visible
from megatron_xielu.report import summary
from megatron_xielu.report.description import differences
from megatron_xielu.report.drawing import ink_on, share_colour
from megatron_xielu.report.ranking import rank, shown_closely
from megatron_xielu.report.run import Run

_PER_LINE = 12


def render(runs: Sequence[Run], *, colours: bool) -> str:
    """The tables as text, without a line end.

    Args:
        runs: in order.
        colours: a block of colour behind each layer's number.
    """
    layers = [_layers(run, colours) for run in shown_closely(runs) if run.layers]
    return "\n\n".join([*map(visible, [_table(runs), *_compared(runs)]), *layers])


def _table(runs: Sequence[Run]) -> str:
    names, rows = summary.run_table(runs)
    rows = [[run.short, *rest] for run, (_, *rest) in zip(runs, rows, strict=True)]
    head, *lines = table([names, *rows], left=(0, 1)).split("\n")
    return "\n".join([head, "─" * len(head), *lines])


def _compared(runs: Sequence[Run]) -> list[str]:
    """What stands between the runs, a line each; and their order."""
    parts = ["\n".join(f"note: {line}" for line in differences(runs).values())]
    if found := rank(runs):
        rows = [f"  {place}. {row}" for place, row in enumerate(found.rows, 1)]
        parts.append("\n".join([found.title, *rows, found.certainty]))
    return [part for part in parts if part]


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
    name = visible(run.short)
    title = f"{name}: nonlinearity by layer, from layer 0 (0.00 is a straight line)"
    return "\n".join([title, *lines])
