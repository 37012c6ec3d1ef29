"""What the benchmark hands out: rows, the table, the CSV file, the targets."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench_measure import REPEATS, Errors
from bench_providers import LABELS, MODES

from megatron_xielu.common.text import table as aligned


@dataclass(frozen=True)
class Row:
    """One provider in one mode. A number that was not measured is NaN, an empty cell in the CSV.

    `of_copy` and the ratios are medians over rounds, each of two times from the same round.
    `faster_than_…` is that one's time over this one's, `time_over_…` this one's over that one's.
    """

    what: str  # op or block
    shape: str  # TxF; block: TxHxF
    dtype: str
    mode: str
    provider: str
    status: str = "ok"  # or refused (a wrong result) or failed (it raised), with the reason
    reason: str = ""
    rounds: int = 0
    median_ms: float = math.nan
    p20_ms: float = math.nan
    p80_ms: float = math.nan
    min_ms: float = math.nan
    max_ms: float = math.nan
    bytes_moved: int = 0
    gb_per_s: float = math.nan
    of_copy: float = math.nan
    faster_than_hf: float = math.nan
    faster_than_compile: float = math.nan
    faster_than_public_cuda: float = math.nan
    time_over_relu2: float = math.nan
    time_over_swiglu: float = math.nan
    peak_extra_bytes: float = math.nan
    peak_extra_buffers: float = math.nan  # in units of T F elements of dtype
    errors: Errors = field(default_factory=Errors)


def timing(seconds: list[float]) -> dict[str, Any]:
    """Median and spread of the rounds of one row (at least two)."""
    ms = [1e3 * s for s in seconds]
    p20, *_, p80 = quantiles(ms, n=5, method="inclusive")
    return {
        "rounds": len(ms),
        "median_ms": median(ms),
        "p20_ms": p20,
        "p80_ms": p80,
        "min_ms": min(ms),
        "max_ms": max(ms),
    }


def ratio(times: dict[str, list[float]], numerator: str, denominator: str) -> float:
    """Median over rounds of one provider's time over another's; NaN if one was not measured."""
    if not times.get(numerator) or not times.get(denominator):
        return math.nan
    return median(a / b for a, b in zip(times[numerator], times[denominator], strict=True))


def _cell(value: float, style: str, unit: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:{style}}{unit}"


_OP_COLUMNS: dict[str, Callable[[Row], str]] = {
    "GB/s": lambda r: _cell(r.gb_per_s, ".1f"),
    "of copy": lambda r: _cell(r.of_copy, ".3f"),
    "vs HF": lambda r: _cell(r.faster_than_hf, ".2f", "×"),
    "vs compile": lambda r: _cell(r.faster_than_compile, ".2f", "×"),
}
_BLOCK_COLUMNS: dict[str, Callable[[Row], str]] = {
    "of ReLU²'s time": lambda r: _cell(r.time_over_relu2, ".3f"),
    "of SwiGLU's time": lambda r: _cell(r.time_over_swiglu, ".3f"),
}
_FIRST_COLUMNS: dict[str, Callable[[Row], str]] = {
    "provider": lambda r: LABELS[r.provider],
    "mode": lambda r: r.mode,
    "median ms": lambda r: _cell(r.median_ms, ".3f"),
    "p20–p80": lambda r: f"{_cell(r.p20_ms, '.3f')}–{_cell(r.p80_ms, '.3f')}",
}
_LAST_COLUMNS: dict[str, Callable[[Row], str]] = {
    "peak": lambda r: _cell(r.peak_extra_buffers, ".2f"),
    "error y": lambda r: _cell(r.errors.y, ".1e"),
    "dx": lambda r: _cell(r.errors.dx, ".1e"),
    "alpha": lambda r: _cell(r.errors.alpha, ".1e"),
}
LEGEND = """\
of copy: bytes that must move / time, as a fraction of what copy_ of x into memory that is already
there reaches in the same round; results are newly allocated, which costs a CPU page faults. vs: how
many times faster, round by round. peak: most memory beyond the inputs at any time, results
included, in T×F buffers. error: max |got - exact| / (|exact| + rms) against the float64 oracle;
alpha: relative error of the alpha gradients. In a block they are those of its activation. Hugging
Face's dx is wrong on (-1e-6, 0], where its slope is beta - alpha_n: that is its error near 1."""


def groups(rows: Iterable[Row]) -> Iterator[tuple[tuple[str, str, str], list[Row]]]:
    """Rows by (what, shape, dtype), in order."""
    for key, group in groupby(rows, key=lambda r: (r.what, r.shape, r.dtype)):
        yield key, list(group)


def table(rows: list[Row]) -> str:
    """All rows for a terminal, a section for each what, shape and dtype."""
    lines = []
    for (what, shape, dtype), group in groups(rows):
        lines += ["", f"{what} {shape} {dtype}"]
        middle = _OP_COLUMNS if what == "op" else _BLOCK_COLUMNS
        columns = {**_FIRST_COLUMNS, **middle, **_LAST_COLUMNS}
        measured = sorted((r for r in group if r.status == "ok"), key=lambda r: MODES.index(r.mode))
        cells = [list(columns), *([show(r) for show in columns.values()] for r in measured)]
        lines.append(aligned(cells, left=(0, 1)))
        lines += [
            f"{LABELS[r.provider]}: {r.status.upper()}, {r.reason}"
            for r in group
            if r.status != "ok"
        ]
    return "\n".join(lines)


def write_csv(rows: list[Row], header: dict[str, str], path: Path) -> None:
    """One line for each row; the run's description repeated in the last columns."""
    names = [f.name for f in fields(Row) if f.name != "errors"]
    error_names = [f"error_{f.name}" for f in fields(Errors) if f.name != "repeats"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *error_names, "alpha_repeats", *header])
        writer.writeheader()
        for row in rows:
            record = asdict(row)
            errors = record.pop("errors")
            record["alpha_repeats"] = errors.pop("repeats")
            record |= {f"error_{name}": value for name, value in errors.items()}
            empty = {k: "" for k, v in record.items() if isinstance(v, float) and math.isnan(v)}
            writer.writerow(record | empty | header)


@dataclass(frozen=True)
class Target:
    """One target with what was measured; NaN: nothing was."""

    text: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        if self.at_least is not None:
            met, goal = self.value >= self.at_least, f"≥ {self.at_least:g}"
        else:
            met, goal = self.value <= self.at_most, f"≤ {self.at_most:g}"
        verdict = "not measured" if math.isnan(self.value) else "met" if met else "NOT met"
        return f"{verdict:12}  {self.text}: {_cell(self.value, '.3g')} ({goal})"


def targets(rows: list[Row], device: str) -> list[Target]:
    """Those targets that belong to this device."""
    by_key = {(r.what, r.shape, r.dtype, r.mode, r.provider): r for r in rows if r.status == "ok"}

    def find(*key: str) -> Row:
        return by_key.get(key, Row(*key))

    return (_cpu_targets if device == "cpu" else _cuda_targets)(find)


def _cpu_targets(find: Callable[..., Row]) -> list[Target]:
    shape, found = "2048x9216", []
    for dtype in ("float32", "bfloat16"):
        for provider, goal in (("ours-compiled", 10.0), ("ours-eager", 2.0)):
            row = find("op", shape, dtype, "both", provider)
            text = f"{LABELS[provider]} vs HF, {shape} {dtype} forward+backward"
            found.append(Target(text, row.faster_than_hf, at_least=goal))
        text = f"{LABELS['ours-eager']}: peak extra memory, {shape} {dtype}, y + dx + one buffer"
        row = find("op", shape, dtype, "both", "ours-eager")
        found.append(Target(text, row.peak_extra_buffers, at_most=3.0))
    return found


def _cuda_targets(find: Callable[..., Row]) -> list[Target]:
    ours, found = "ours-triton", []
    for shape in ("8192x9216", "16384x43008"):
        for dtype in ("float32", "bfloat16"):
            for mode, of_copy, over_compile, over_public in (
                ("forward", 0.92, 1.0, 1.1),
                ("backward", 0.90, 1.5, 1.5),
            ):
                row = find("op", shape, dtype, mode, ours)
                name = f"{shape} {dtype} {mode}"
                found.append(Target(f"{name}, of copy bandwidth", row.of_copy, at_least=of_copy))
                found.append(
                    Target(f"{name} vs compile", row.faster_than_compile, at_least=over_compile)
                )
                if dtype == "bfloat16":
                    value = row.faster_than_public_cuda
                    text = f"{name} vs the public kernel"
                    found.append(Target(text, value, at_least=over_public))
            errors = find("op", shape, dtype, "both", ours).errors
            text = f"{shape} {dtype}, alpha gradients repeated with the same bits"
            repeats = errors.repeats or math.nan
            found.append(Target(text, repeats, at_least=REPEATS["triton"]))
        found += _error_targets(shape, find)
    for shape in ("8192x1536x9216", "16384x8192x43008"):
        row = find("block", shape, "bfloat16", "both", ours)
        name = f"block {shape} bfloat16 forward+backward, time over"
        found.append(Target(f"{name} SwiGLU's", row.time_over_swiglu, at_most=1.00))
        found.append(Target(f"{name} ReLU²'s", row.time_over_relu2, at_most=1.01))
    return found


def _error_targets(shape: str, find: Callable[..., Row]) -> list[Target]:
    """y and dx are compared beyond the rounding to bf16: with it, no kernel could win by 10."""
    ours, public = (
        find("op", shape, "bfloat16", "both", name).errors
        for name in ("ours-triton", "public-cuda")
    )
    return [
        Target(
            f"{shape} bfloat16, error over the public kernel's, {text}",
            getattr(ours, name) / getattr(public, name),
            at_most=0.1,
        )
        for name, text in (
            ("excess_y", "y beyond its rounding"),
            ("excess_dx", "dx beyond its rounding"),
            ("alpha", "alpha gradients"),
        )
    ]
