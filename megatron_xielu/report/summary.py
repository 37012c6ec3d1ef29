"""The numbers of a report as text, a row for a run or a layer: for the page and the terminal."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence

from megatron_xielu.report.run import Layer, Run

MISSING = "–"
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_SIZES = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")]

RUN_COLUMNS = (
    "run",
    "activation",
    "iterations",
    "parameters",
    "tokens",
    "FLOPs",
    "training loss",
    "validation loss",
    "validation PPL",
    "evaluate: loss",
    "evaluate: bits/byte",
    "tokens/s",
)

# Of columns, what they are.
ABOUT = {
    "training loss": "Mean over the last 1 % of logged iterations, at least 10; nats per token.",
    "validation loss": "The last of Megatron's validation during training; nats per token.",
    "validation PPL": "The exponential of the validation loss.",
    "evaluate: loss": "Of a checkpoint, by megatron_xielu.evaluate: another loss than the "
    "validation's, on its own data.",
    "evaluate: bits/byte": "Of the same evaluation.",
    "FLOPs": "Of training, forward and backward, as Megatron counts them: attention with a causal "
    "mask, no recomputation.",
    "tokens/s": "Of the whole run, all GPUs together, at the median step time.",
}


def run_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows; a column that no run has a text for is left out."""
    columns = [
        column
        for column in zip(RUN_COLUMNS, *map(_run_row, runs), strict=True)
        if set(column[1:]) != {MISSING}
    ]
    head, *rows = map(list, zip(*columns, strict=True))
    return head, rows


def _run_row(run: Run) -> list[str]:
    """The texts under `RUN_COLUMNS`. Each column has its losses from one place alone."""
    valid = run.final_validation_loss
    return [
        run.name,
        run.label,
        _progress(run),
        size(run.parameters),
        size(run.total_tokens),
        scientific(run.total_flops),
        decimal(run.final_train_loss, 4),
        decimal(valid, 4),
        decimal(math.exp(min(valid, 700.0)) if valid is not None else None, 3),
        decimal(run.evaluated_loss, 4),
        decimal(run.bits_per_byte, 4),
        size(run.tokens_per_second),
    ]


def evaluated(run: Run) -> str | None:
    """What ``megatron_xielu.evaluate`` found, in a line; None if it was not run."""
    found = run.evaluation
    if found is None or found.loss is None:
        return None
    text = f"evaluated after iteration {decimal(found.iteration, 0)}: loss {decimal(found.loss, 4)}"
    text += f", perplexity {decimal(math.exp(min(found.loss, 700.0)), 3)}"
    bits = found.bits_per_byte
    return text + (f", {decimal(bits, 4)} bits per byte" if bits is not None else "")


def layer_columns(run: Run) -> list[str]:
    """The heads of `layer_row`."""
    columns = ["layer", "αp", "αn", "nonlinearity"]
    return columns + (["on measured x", "negative x"] if run.measured else [])


def layer_row(run: Run, layer: Layer) -> list[str]:
    """The texts under `layer_columns`."""
    ends = (layer.shape.alpha_p, layer.shape.alpha_n)
    starts = layer.start or (None, None)
    row = [re.sub(r"^layer_0*(?=\d)", "", layer.name)]
    row += [
        decimal(end, 4) if start is None else f"{decimal(start, 2)} → {decimal(end, 4)}"
        for start, end in zip(starts, ends, strict=True)
    ]
    row.append(decimal(layer.by_normal, 3))
    if run.measured:
        measured = run.measured.get(layer.name)
        row += [
            decimal(layer.by_measured, 3),
            f"{100 * measured.negative_share:.1f} %" if measured else MISSING,
        ]
    return row


def size(number: float | None) -> str:
    """1.1 B, 350 M, 12.3 k."""
    if number is None:
        return MISSING
    for unit, letter in _SIZES:
        if abs(number) >= unit:
            return f"{number / unit:.4g} {letter}"
    return f"{number:.4g}"


def scientific(number: float | None) -> str:
    """8.10·10²⁰."""
    if not number or not math.isfinite(number):
        return str(number) if number else MISSING
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def decimal(number: float | None, places: int) -> str:
    """With a fixed number of places; large ones without, tiny ones in powers of ten."""
    if number is None:
        return MISSING
    if not math.isfinite(number):
        return str(number)
    if number and abs(number) < 0.5 * 10**-places:
        return scientific(number)
    return f"{number:,.{places}f}" if abs(number) < 1e6 else scientific(number)


def _progress(run: Run) -> str:
    if not run.iterations:
        return MISSING
    planned, text = run.planned_iterations, f"{run.iterations:,}"
    if planned and planned != run.iterations:
        text += f" of {planned:,}"
    return text if run.diverged is None else f"{text}, diverged at {run.diverged:,}"


def missing_statistics(runs: Sequence[Run]) -> str | None:
    """How to get what the runs lack; None if they lack nothing."""
    lacking = [run for run in runs if not run.measured]
    if not lacking:
        return None
    return (
        f"python -m megatron_xielu.evaluate --load {shlex.quote(str(lacking[0].folder))} "
        "--data-path DATA --activation-statistics"
    )
