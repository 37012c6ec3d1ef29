"""The report as one HTML page: what `page.html.jinja` says of the runs."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megatron_xielu import __version__
from megatron_xielu.common.text import visible
from megatron_xielu.report import description, summary
from megatron_xielu.report.depth import COLUMNS, Adaptation
from megatron_xielu.report.drawing import MADE_BY, Picture, ink_on, share_colour
from megatron_xielu.report.nonlinearity import FIXED, Inputs, nonlinearity
from megatron_xielu.report.ranking import rank
from megatron_xielu.report.run import Run

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


def render(
    runs: Sequence[Run],
    together: Sequence[Picture],
    layers: Sequence[Sequence[Picture]],
    notes: Sequence[str] = (),
    by_depth: tuple[Sequence[Adaptation], Sequence[Picture]] = ((), ()),
) -> str:
    """The page.

    Args:
        runs: in order.
        together: pictures of all runs.
        layers: pictures of each run's trained activations; empty for a run without.
        notes: about all runs.
        by_depth: what seeds say of depth, and pictures of it.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "base64": _base64,
        "breakable": _breakable,
        "colour": share_colour,
        "ink": ink_on,
    }
    normal = Inputs.standard_normal()
    run_columns, run_rows = summary.run_table(runs)
    fact_columns, fact_rows = description.unlike(runs)
    return environment.get_template(_TEMPLATE.name).render(
        title=f"Training report: {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}",
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=__version__,
        made_by=MADE_BY,
        about=summary.ABOUT,
        run_columns=run_columns,
        run_rows=_uncoloured(run_rows),
        of_all=[*notes, *description.differences(runs).values()],
        ranking=rank(runs),
        facts=description.alike(runs),
        fact_columns=["run", *fact_columns],
        fact_rows=_uncoloured(
            [[run.name, *texts] for run, texts in zip(runs, fact_rows, strict=True)]
        ),
        evaluated=[(run.name, text) for run in runs if (text := summary.evaluated(run))],
        notes=description.notes(runs),
        together=together,
        by_depth=by_depth[1],
        sentences=[one.sentence for one in by_depth[0]],
        depth_columns=COLUMNS,
        depth_tables=[(one.label, _uncoloured(one.rows())) for one in by_depth[0]],
        command=summary.missing_statistics(runs),
        unmeasured=description.names([run.short for run in runs if not run.measured]),
        sections=[
            (run, made, summary.layer_columns(run), _layer_rows(run))
            for run, made in zip(runs, layers, strict=True)
            if made
        ],
        known=", ".join(f"{name} {nonlinearity(f, normal):.3f}" for name, f in FIXED.items()),
        scale=",".join(share_colour(share) for share in np.linspace(0, 1, 11)),
    )


def _uncoloured(rows: Sequence[Sequence[str]]) -> list[list[tuple[str, float | None]]]:
    return [[(text, None) for text in row] for row in rows]


def _breakable(name: str) -> Markup:
    """A run's name, which breaks behind a slash before it breaks elsewhere."""
    part = Markup('<span class="part">{}</span>').format
    return Markup().join(part(visible(text)) for text in re.findall("[^/]*/|[^/]+", name))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _layer_rows(run: Run) -> list[list[tuple[str, float | None]]]:
    """(text, share that colours the cell) of every cell."""
    rows = []
    for layer in run.layers:
        shares = (None, None, None, layer.by_normal, layer.by_measured, None)
        rows.append(list(zip(summary.layer_row(run, layer), shares, strict=False)))
    return rows
