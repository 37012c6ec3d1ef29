"""``make bench``, ``make bench-gpu``: the activation against its peers, alone and in an MLP block.

    python tools/bench/bench_activation.py --op --shapes 2048x9216 --dtypes bfloat16 --modes both

Each provider's result is first compared with the float64 oracle, on the shape that is then timed.
One whose result is wrong is not timed but REFUSED, with the reason; if it is one of ours the exit
status is 1. Providers then take turns, A B C A B C, so that a machine that slows down does so for
all, and ratios are formed within a round. `bench_providers` has the providers, `bench_measure`
how time, memory and error are measured, `bench_report` the table, the CSV and the targets,
`bench_picture` the picture.

All files are written anew after every case: a run that is killed leaves those that it finished.

The block is fc1 → activation → fc2 without biases, ``torch.nn.functional.linear`` in the dtype,
its gradients those of the input, both weights and the alphas. Its weights stay where they are;
only inputs rotate.
"""

from __future__ import annotations

import argparse
import logging
import math
import platform
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import bench_measure as measure
import bench_report as report
import torch
from bench_measure import Errors, RefusedError, Step
from bench_picture import draw
from bench_providers import (
    DEFAULT_PROVIDERS,
    FORMULAS,
    LABELS,
    MODES,
    PROVIDERS,
    Candidate,
    NotThereError,
    Request,
    bytes_moved,
    widths,
)
from bench_report import Row
from torch import Tensor

from megatron_xielu.common import files
from megatron_xielu.common.text import describe as describe_error

REPOSITORY = Path(__file__).resolve().parents[2]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The paper's 1.1B model and one like Apertus-70B; the former on a CPU, with fewer tokens.
SHAPES = {
    ("op", "cpu"): ["2048x9216"],
    ("op", "cuda"): ["8192x9216", "16384x43008"],
    ("block", "cpu"): ["128x1536x9216"],
    ("block", "cuda"): ["8192x1536x9216", "16384x8192x43008"],
}
QUICK_SHAPES = {"op": ["64x768"], "block": ["32x96x576"]}
# A block in float32 takes a GPU half a minute per round, and nobody trains so. There, where minutes
# are counted, what models are trained in comes first.
DEFAULT_DTYPES = {
    ("op", "cpu"): ["float32", "bfloat16"],
    ("op", "cuda"): ["bfloat16", "float32"],
    ("block", "cpu"): ["float32", "bfloat16"],
    ("block", "cuda"): ["bfloat16"],
}
ROUNDS = {("op", "cpu"): 5, ("block", "cpu"): 5, ("op", "cuda"): 50, ("block", "cuda"): 20}
QUICK_ROUNDS = 2


@dataclass(frozen=True)
class Case:
    """One section of the table: an operation or a block, its shape and dtype."""

    what: str
    shape: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.what} {self.shape} {self.dtype}"

    @property
    def rows(self) -> int:
        return int(self.shape.split("x")[0])

    @property
    def ffn(self) -> int:
        return int(self.shape.split("x")[-1])

    @property
    def hidden(self) -> int:
        return int(self.shape.split("x")[1])


@dataclass(frozen=True)
class Contender:
    """A candidate that passed its check, as it is timed in one case."""

    candidate: Candidate
    errors: Errors
    call: Callable[[Tensor], Tensor]
    weights: tuple[Tensor, ...]  # whose gradients are wanted beside x's
    buffers: Iterator[tuple[Tensor, ...]]  # endless sets of x and dy

    def next_step(self) -> Step:
        x, dy = next(self.buffers)
        return Step(self.call, (x, *self.weights), dy)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was asked for; 1 if a result of ours was wrong."""
    begin = time.monotonic()
    options = parse(argv)
    header = describe(options, sys.argv[1:] if argv is None else argv)
    print("\n".join(f"{name}: {value}" for name, value in header.items()), flush=True)
    # Megatron and PyTorch tell what is not installed, in the middle of the progress.
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    torch.manual_seed(0)
    rows: list[Row] = []
    not_there: list[str] = []
    for case in options.cases:
        rows += run_case(case, options, not_there)
        text, written = save(rows, not_there, header, options)
    print(text)
    print(f"\n{time.monotonic() - begin:.0f} s; written to {written}")
    ours_refused = [r for r in rows if r.status == "refused" and r.provider.startswith("ours")]
    return 1 if ours_refused else 0


def save(
    rows: list[Row], not_there: list[str], header: dict[str, str], options: argparse.Namespace
) -> tuple[str, str]:
    """Write the tables and the picture of all cases so far.

    Returns the table, and in one line which files there are.
    """
    targets = report.targets(rows, options.device)
    notes = dict.fromkeys(not_there)
    parts = [report.table(rows), "", *notes, report.LEGEND, "", *map(str, targets)]
    text = "\n".join(parts)
    stem = options.output / options.device
    heading = "".join(f"{name}: {value}\n" for name, value in header.items())
    files.write(stem.with_suffix(".txt"), f"{heading}{text}\n")
    with files.whole(stem.with_suffix(".csv")) as path:
        report.write_csv(rows, header, path)
    picture = stem.with_suffix(".png")
    try:
        with files.whole(picture) as path:
            draw(rows, header, options.device, path)
    except Exception as error:
        # The tables do without, but not with the picture of an earlier run.
        picture.unlink(missing_ok=True)
        return text, f"{stem}.csv, .txt; no picture: {describe_error(error)}"
    return text, f"{stem}.csv, .png, .txt"


def run_case(case: Case, options: argparse.Namespace, not_there: list[str]) -> list[Row]:
    """All rows of a case. Why a provider is not among them goes into `not_there`."""
    begin = time.monotonic()
    print(f"\n{case}\n  checking", end="", flush=True)
    # Compiled anew in every case, for this shape alone: no result depends on the order of cases.
    torch._dynamo.reset()
    dtype = DTYPES[case.dtype]
    bytes_per_set = 2 * case.rows * case.ffn * dtype.itemsize
    sets = 2 if options.quick else measure.sets_needed(options.device, bytes_per_set)
    request = Request(options.device, dtype, case.rows, case.ffn, options.activation, sets)
    contenders, rows, pools = [], [], {}
    for name in options.providers:
        if case.what == "block" and name == "copy":
            continue
        print(f" {name}", end="", flush=True)
        try:
            candidate = PROVIDERS[name](request)
            contenders.append(enter(candidate, case, request, pools))
        except NotThereError as error:
            not_there.append(f"{LABELS[name]} is not there in {case.dtype}: {error}")
            print(" (not there)", end="", flush=True)
        except Exception as error:
            # A provider that raises has no result to agree with; the others still have.
            reason = str(error) if isinstance(error, RefusedError) else f"it raised {error!r}"
            rows.append(Row(case.what, case.shape, case.dtype, "", name, "refused", reason))
            print(" (REFUSED)", end="", flush=True)
    print()
    peaks, times = run_rounds(case, contenders, options)
    for mode in options.modes:
        rows += (row(mode, case, c, times[mode], peaks[c.candidate.name]) for c in contenders)
    print(f"  {time.monotonic() - begin:.0f} s", flush=True)
    return rows


def enter(
    candidate: Candidate,
    case: Case,
    request: Request,
    pools: dict[int, Iterator[tuple[Tensor, ...]]],
) -> Contender:
    """Check a candidate, and give it the inputs that it shares with those of the same width.

    Raises:
        RefusedError: a result is wrong.
    """
    x_width, y_width = widths(case.ffn, candidate.gated)
    with candidate.selected():
        errors = measure.check(candidate, (case.rows, x_width), request.dtype, request.device)
    call, weights = candidate.call, candidate.alphas
    shapes = ((case.rows, x_width), (case.rows, y_width))
    if case.what == "block":
        shapes = ((case.rows, case.hidden),) * 2
        fc1, fc2 = (
            (torch.randn(out, into, device=request.device) / math.sqrt(into))
            .to(request.dtype)
            .requires_grad_()
            for out, into in ((x_width, case.hidden), (case.hidden, y_width))
        )
        call, weights = in_block(candidate.call, fc1, fc2), (fc1, fc2, *candidate.alphas)
    if shapes[0][1] not in pools:
        pools[shapes[0][1]] = measure.rotating(request.sets, shapes, request.dtype, request.device)
    return Contender(candidate, errors, call, weights, pools[shapes[0][1]])


def in_block(
    activation: Callable[[Tensor], Tensor], fc1: Tensor, fc2: Tensor
) -> Callable[[Tensor], Tensor]:
    """fc1 → activation → fc2; weights are (out, in)."""
    linear = torch.nn.functional.linear
    return lambda x: linear(activation(linear(x, fc1)), fc2)


def run_rounds(
    case: Case, contenders: list[Contender], options: argparse.Namespace
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, list[float]]]]:
    """Peak bytes by provider and mode; seconds by mode and provider, one for each round.

    All have one turn in a round. The one for the peaks comes first, and warms up.
    """
    if options.device == "cuda":
        take_peak, take_time = measure.peak_on_cuda, measure.CudaTimer()
    else:
        take_peak, take_time = measure.peak_on_cpu, measure.time_on_cpu
    default = QUICK_ROUNDS if options.quick else ROUNDS[case.what, options.device]
    peaks: dict[str, dict[str, int]] = {}
    times: dict[str, dict[str, list[float]]] = {
        mode: {c.candidate.name: [] for c in contenders} for mode in options.modes
    }

    def turn(contender: Contender, take: Callable[[Step, bool], dict]) -> dict:
        candidate = contender.candidate
        backward = candidate.differentiable and options.modes != ["forward"]
        with candidate.selected():
            found = take(contender.next_step(), backward)
        # A copy has one time, to compare with in every mode.
        return found if candidate.differentiable else dict.fromkeys(MODES, found["forward"])

    print("  measuring ", end="", flush=True)
    for contender in contenders:
        peaks[contender.candidate.name] = turn(contender, take_peak)
    for _ in range(options.rounds or default):
        print(".", end="", flush=True)
        for contender in contenders:
            found = turn(contender, take_time)
            for mode in options.modes:
                times[mode][contender.candidate.name].append(found[mode])
    print(flush=True)
    return peaks, times


def row(
    mode: str,
    case: Case,
    contender: Contender,
    times: dict[str, list[float]],
    peaks: dict[str, int],
) -> Row:
    """One contender's row, from all times in this mode and its own peaks."""
    candidate = contender.candidate
    name, itemsize = candidate.name, DTYPES[case.dtype].itemsize
    timing = report.timing(times[name])
    if case.what == "op":
        moved_by_copy = bytes_moved("forward", case.rows, case.ffn, itemsize, gated=False)
        moved = (
            bytes_moved(mode, case.rows, case.ffn, itemsize, gated=candidate.gated)
            if candidate.differentiable
            else moved_by_copy
        )
        bandwidth = {
            "bytes_moved": moved,
            "gb_per_s": moved / timing["median_ms"] / 1e6,
            "of_copy": moved / moved_by_copy * report.ratio(times, "copy", name),
        }
    else:
        bandwidth = {}
    return Row(
        case.what,
        case.shape,
        case.dtype,
        mode,
        name,
        **timing,
        **bandwidth,
        faster_than_hf=report.ratio(times, "hf", name),
        faster_than_compile=report.ratio(times, "compile", name),
        faster_than_public_cuda=report.ratio(times, "public-cuda", name),
        time_over_relu2=report.ratio(times, name, "relu2"),
        time_over_swiglu=report.ratio(times, name, "swiglu"),
        peak_extra_bytes=peaks[mode],
        peak_extra_buffers=peaks[mode] / (case.rows * case.ffn * itemsize),
        errors=contender.errors,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options, checked against each other and this machine; `cases` says what will be run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].replace("``", ""))
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    add("--op", action="store_true", help="the activation alone (without --block: nothing else)")
    add("--block", action="store_true", help="an MLP block (neither: both)")
    add("--activation", choices=list(FORMULAS), default="xielu")
    add("--shapes", nargs="+", metavar="TxF", help="of --op: tokens, columns")
    add("--block-shapes", nargs="+", metavar="TxHxF", help="of --block: tokens, hidden, columns")
    add("--dtypes", nargs="+", choices=list(DTYPES), help="default: by device, op and block")
    add("--providers", nargs="+", choices=list(PROVIDERS), help="default: all that run there")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    add("--rounds", type=int, help="turns of every provider, at least 2 (default: by device)")
    add("--quick", action="store_true", help="tiny shapes that fit in caches: a test of this tool")
    output = REPOSITORY / "runs" / "bench"
    add("--output", type=Path, default=output, metavar="DIR", help="default: runs/bench")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.rounds is not None and options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: a spread needs at least 2")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output}: {error.strerror}")
    # In the order of the table, each once.
    asked = options.providers or DEFAULT_PROVIDERS[options.device]
    options.providers = [name for name in PROVIDERS if name in asked]
    options.modes = [mode for mode in MODES if mode in options.modes]
    options.cases = []
    for what, wanted, given, flag, dimensions in (
        ("op", options.op, options.shapes, "--shapes", 2),
        ("block", options.block, options.block_shapes, "--block-shapes", 3),
    ):
        for shape in given or ():
            if not re.fullmatch("x".join(["[1-9][0-9]*"] * dimensions), shape):
                parser.error(f"{flag} {shape}: give {dimensions} positive sizes joined by x")
        if not wanted and (options.op or options.block):
            if given:
                parser.error(f"{flag} has no effect without --{what}")
            continue
        by_default = QUICK_SHAPES[what] if options.quick else SHAPES[what, options.device]
        dtypes = options.dtypes or DEFAULT_DTYPES[what, options.device]
        options.cases += [
            Case(what, shape, dtype) for dtype in dtypes for shape in given or by_default
        ]
    return options


def describe(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, str]:
    """What a reader needs to judge the numbers, or to get them again."""
    if options.device == "cuda":
        hardware = f"{torch.cuda.get_device_name(0)} (CUDA {torch.version.cuda})"
    else:
        hardware = f"{cpu_model()}, {torch.get_num_threads()} threads"
    packages = ("torch", "triton", "megatron-core", "transformers", "megatron_xielu")
    cache = measure.last_level_cache(options.device) / 2**20
    return {
        "activation": options.activation,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "hardware": hardware,
        "last-level cache": f"{cache:.0f} MiB",
        "versions": ", ".join(f"{name} {version_of(name)}" for name in packages),
        "command": shlex.join(["python", "tools/bench/bench_activation.py", *argv]),
    }


def version_of(package: str) -> str:
    """The version that is installed, or a dash."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "–"


def cpu_model() -> str:
    """The CPU's name where Linux tells it."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
