"""The report as one HTML page: pictures and style inside, nothing from elsewhere, no script."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from html import escape

import numpy as np

from megatron_xielu import __version__
from megatron_xielu.report import summary
from megatron_xielu.report.drawing import Picture, readable_on, share_colour
from megatron_xielu.report.nonlinearity import FIXED, Inputs, nonlinearity
from megatron_xielu.report.run import Run

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: #1d2430;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
.quiet, figcaption { color: #566072; }
.quiet { margin: 0 0 1.5rem; }
.card, figure { background: #fff; border: 1px solid #e2e6ec; border-radius: 10px; }
.card { padding: .25rem 1rem; overflow-x: auto; }
.layers { display: inline-block; max-width: 100%; }
.layers td, .layers th { padding: .3rem 1.1rem; }
.notes { border-left: 4px solid #56b4e9; padding: .6rem 1rem; margin-top: 1rem; }
.notes p, .notes ul { margin: .2rem 0; padding-left: 0; overflow-wrap: anywhere; }
.notes ul { padding-left: 1.2rem; }
.pictures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
figure { margin: 0; padding: .75rem; }
figure img { display: block; width: 100%; max-width: 720px; height: auto; margin: 0 auto; }
figcaption { font-size: .85rem; padding: .5rem .25rem 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #edf0f4; }
tr:last-child td { border-bottom: 0; }
th { color: #566072; font-weight: 600; font-size: .85rem; }
th.text, td.text { text-align: left; }
td.name { font-weight: 600; white-space: normal; min-width: 8rem; overflow-wrap: anywhere; }
.scale { display: inline-block; width: 10rem; max-width: 100%; height: .8em; border-radius: 2px;
  vertical-align: middle; }
code { background: #eef1f5; border-radius: 4px; padding: .1rem .3rem; font-size: .88em;
  overflow-wrap: anywhere; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0 0 .4rem; }
@media print {
  @page { margin: 12mm; }
  body { background: #fff; font-size: 10pt; print-color-adjust: exact;
    -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  figure, tr, .notes { break-inside: avoid; }
  h2, h3, dt { break-after: avoid; }
  figcaption { font-size: 8pt; }
  .pictures { grid-template-columns: 1fr 1fr; }
  .card { overflow: visible; padding: 0 .5rem; }
  th, td { padding: .2rem .3rem; font-size: 8pt; white-space: normal; }
}
"""


def render(
    runs: Sequence[Run], together: Sequence[Picture], layers: Sequence[Sequence[Picture]]
) -> str:
    """The page.

    Args:
        runs: in order.
        together: pictures of all runs.
        layers: pictures of each run's trained activations; empty for a run without.
    """
    count = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    title = f"Training report: {runs[0].name}" if len(runs) == 1 else f"Training report: {count}"
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{written}, megatron_xielu {escape(__version__)}</p>',
        _summary(runs),
        _notes(runs),
        f"<h2>Training</h2>{_pictures(together)}" if together else "",
        _statistics(runs),
    ]
    parts += [_section(run, made) for run, made in zip(runs, layers, strict=True) if made]
    parts.append(_definitions())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _table(
    columns: Sequence[str], rows: Sequence[str], *, texts: int, classes: str = "card"
) -> str:
    head = "".join(
        f'<th scope="col"{_text_class(place < texts)}>{escape(name)}</th>'
        for place, name in enumerate(columns)
    )
    return (
        f'<div class="{classes}" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _text_class(text: bool) -> str:
    return ' class="text"' if text else ""


def _summary(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        name, activation, *numbers = (escape(text) for text in summary.run_row(run))
        rows.append(
            f'<tr><td class="text name">{name}</td><td class="text">{activation}</td>'
            + "".join(f"<td>{number}</td>" for number in numbers)
            + "</tr>"
        )
    return _table(summary.RUN_COLUMNS, rows, texts=2)


def _notes(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        evaluated = summary.evaluated(run)
        lines = [*([evaluated] if evaluated else []), *run.notes]
        if lines:
            items = "".join(f"<li>{escape(line)}</li>" for line in lines)
            parts.append(f"<p><strong>{escape(run.name)}</strong></p><ul>{items}</ul>")
    return f'<div class="card notes">{"".join(parts)}</div>' if parts else ""


def _statistics(runs: Sequence[Run]) -> str:
    command = summary.missing_statistics(runs)
    if command is None:
        return ""
    names = ", ".join(run.name for run in runs if not run.measured)
    return (
        f'<div class="card notes"><p>Not measured: the share of negative pre-activations of '
        f"{escape(names)}. This measures it, and loss, perplexity and bits per byte:</p>"
        f"<p><code>{escape(command)}</code></p></div>"
    )


def _pictures(pictures: Sequence[Picture]) -> str:
    figures = []
    for picture in pictures:
        data = base64.b64encode(picture.png).decode()
        figures.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}" '
            f'data-file="{escape(picture.file)}" width="{picture.width}" '
            f'height="{picture.height}">'
            f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        )
    return f'<div class="pictures">{"".join(figures)}</div>'


def _section(run: Run, pictures: Sequence[Picture]) -> str:
    parts = [f"<h2>{escape(run.name)}: {escape(run.label)}, layer by layer</h2>"]
    parts.append(_pictures(pictures))
    if run.layers:
        columns = summary.layer_columns(run)
        rows = []
        for layer in run.layers:
            cells = [escape(text) for text in summary.layer_row(run, layer)]
            shares = {3: layer.by_normal, 4: layer.by_measured}
            rows.append(
                "<tr>"
                + "".join(
                    f"<td{_text_class(place == 0)}{_colour(shares.get(place))}>{cell}</td>"
                    for place, cell in enumerate(cells)
                )
                + "</tr>"
            )
        parts.append(f"<h3>Layers</h3>{_table(columns, rows, texts=1, classes='card layers')}")
    return "".join(parts)


def _colour(share: float | None) -> str:
    if share is None:
        return ""
    return f' style="background:{_css(share)};color:{readable_on(share)}"'


def _css(share: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in share_colour(share))


def _definitions() -> str:
    normal = Inputs.standard_normal()
    known = ", ".join(f"{name} {nonlinearity(f, normal):.3f}" for name, f in FIXED.items())
    scale = ",".join(_css(share) for share in np.linspace(0, 1, 11))
    entries = {
        "Nonlinearity": "How far an activation f is from a straight line: 1 − R² of the best "
        "affine fit to f(x), that is 1 − Cov(x, f)² / (Var x · Var f), where x is standard normal "
        "or, where they were measured, a layer's real pre-activations. 0 is a straight line, 1 "
        f"a function of which no line explains anything, like x². On a standard normal: {known}.",
        "Alphas": "Effective ones, as they stand in the formula: αp x² + β x for x > 0; for x ≤ 0 "
        "αn (eˣ − 1 − x) + β x in xIELU and αn x² + β x in xIPReLU. Layers count from 0, as in "
        "TensorBoard.",
        "Train loss": "Mean over the last 1 % of logged iterations, at least 10; nats per token.",
        "Validation loss, PPL": "Megatron's last validation during training, and its exponential. "
        "Bits per byte are from megatron_xielu.evaluate.",
        "FLOPs": "Of training, forward and backward, as Megatron counts them: attention with a "
        "causal mask, no recomputation.",
        "Tokens/s": "Of the whole run, all GPUs together, at the median step time.",
    }
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items())
    return (
        f'<h2>What the numbers are</h2><div class="card"><dl>{items}</dl>'
        f'<p>Nonlinearity 0 <span class="scale" style="background:linear-gradient(90deg,{scale})">'
        "</span> 1</p></div>"
    )
