"""``make bench``, ``make bench-gpu``: the activation against its peers, alone and in an MLP block.

    python tools/bench/bench_activation.py --op --shapes 2048x9216 --dtypes bfloat16 --modes both

Each provider's result is first compared with the float64 oracle, on the shape that is then timed.
One whose result is wrong is not timed but REFUSED, with the reason, and one that raises, then or
later, FAILED: the others go on without it. If it is one of ours the exit status is 1. Providers
take turns, A B C A B C, so that a machine that slows down does so for all, and ratios are formed
within a round. `bench_providers` has the providers, `bench_measure` how time, memory and error
are measured, `bench_report` the table, the CSV and the targets, `bench_picture` the picture.

A case whose inputs do not fit in memory is skipped. All files are written anew after every case:
a run that is killed leaves those that it finished.

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
from bench_flags import joined_sizes, need_cuda
from bench_measure import Errors, NoRoomError, RefusedError, Step
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
    bytes_held,
    bytes_moved,
    widths,
)
from bench_report import Row
from torch import Tensor

from megatron_xielu.common import files
from megatron_xielu.common.text import ready_output, size

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
    shapes: tuple[tuple[int, int], ...]  # of x and dy


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was asked for; 1 if one of ours was wrong or failed."""
    begin = time.monotonic()
    options = parse(argv)
    header = describe(options, sys.argv[1:] if argv is None else argv)
    print("\n".join(f"{name}: {value}" for name, value in header.items()), flush=True)
    # Megatron and PyTorch tell what is not installed, in the middle of the progress.
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    torch.manual_seed(0)
    rows: list[Row] = []
    notes: list[str] = []
    for case in options.cases:
        print(f"\n{case}", flush=True)
        try:
            run_case(case, options, rows, notes)
        except RuntimeError as error:
            notes.append(f"{case} is skipped: {measure.reason(error)}")
            print(f"  {notes[-1]}", flush=True)
        text = tables(rows, notes, options)
        failure, written = None, ""
        try:
            written = save(text, rows, header, options)
        except OSError as error:  # what is measured is printed all the same
            failure = error
    print(text)
    print(f"\n{time.monotonic() - begin:.0f} s; written to {written or 'no file'}", flush=True)
    if failure:
        raise SystemExit(f"error: {failure}; what it was to hold is printed above")
    return int(any(r.status != "ok" and r.provider.startswith("ours") for r in rows))


def tables(rows: list[Row], notes: list[str], options: argparse.Namespace) -> str:
    """All cases so far, in words."""
    targets = report.targets(rows, options.device)
    parts = [report.table(rows), "", *dict.fromkeys(notes), report.LEGEND, "", *map(str, targets)]
    return "\n".join(parts)


def save(text: str, rows: list[Row], header: dict[str, str], options: argparse.Namespace) -> str:
    """Write the tables and the picture of all cases so far; returns which files there are."""
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
        return f"{stem}.csv, .txt; no picture: {measure.reason(error)}"
    return f"{stem}.csv, .png, .txt"


def run_case(case: Case, options: argparse.Namespace, rows: list[Row], notes: list[str]) -> None:
    """Add the rows of a case. Why a provider has none goes into `notes`.

    Raises:
        RuntimeError: its inputs do not fit in memory.
    """
    begin = time.monotonic()
    # Compiled anew in every case, for this shape alone: no result depends on the order of cases.
    torch._dynamo.reset()
    measure.release(options.device)
    dtype = DTYPES[case.dtype]
    bytes_per_set = 2 * case.rows * case.ffn * dtype.itemsize
    sets = 2 if options.quick else measure.sets_needed(options.device, bytes_per_set)
    request = Request(options.device, dtype, case.rows, case.ffn, options.activation, sets)
    names = [name for name in options.providers if (case.what, name) != ("block", "copy")]
    needed, free = bytes_needed(case, request, names), measure.free_bytes(options.device)
    if needed > free:
        raise NoRoomError(f"it takes up to {size(needed)}, {size(free)} are free")

    print("  checking", end="", flush=True)
    contenders: dict[str, Contender] = {}
    for name in names:
        print(f" {name}", end="", flush=True)
        try:
            contenders[name] = enter(name, case, request)
        except NotThereError as error:
            notes.append(f"{LABELS[name]} is not there in {case.dtype}: {error}")
            print(" (not there)", end="", flush=True)
        except Exception as error:
            rows.append(lost(name, case, error))
            print(f" ({rows[-1].status.upper()})", end="", flush=True)
        # Not before the traceback, and with it what it refers to, is gone.
        if name not in contenders:
            measure.release(options.device)
    print()
    measure.release(options.device)
    shapes = dict.fromkeys(contender.shapes for contender in contenders.values())
    pools = {s: measure.rotating(sets, s, dtype, options.device) for s in shapes}
    found = run_rounds(case, contenders, pools, options, rows)
    for mode in options.modes:
        times = {name: [turn[mode] for turn in turns] for name, (_, *turns) in found.items()}
        rows += (
            row(mode, case, contender, times, found[name][0])
            for name, contender in contenders.items()
        )
    print(f"  {time.monotonic() - begin:.0f} s", flush=True)


def bytes_needed(case: Case, request: Request, names: Sequence[str]) -> int:
    """The most memory that a case holds at once, as an estimate: in a step of its timed rounds.

    Of an operation: all sets of x and dy, those of SwiGLU in shapes of their own; as many targets
    of the copy; what the hungriest provider holds. A block's inputs have H columns, each of its
    providers has two weights, and a step holds the gradients of two, fc1's output, and the
    gradient of that. A check has no sets, but an x and dy of its own.
    """
    elements, itemsize = case.rows * case.ffn, request.dtype.itemsize
    step = elements * max((bytes_held(name, itemsize) for name in names), default=0)
    if case.what == "op":
        kinds = len({name == "swiglu" for name in names})
        return step + request.sets * (2 * kinds + ("copy" in names)) * elements * itemsize
    inputs = request.sets * 2 * case.rows * case.hidden
    weights = 2 * case.hidden * case.ffn
    return step + (inputs + (len(names) + 1) * weights + 2 * elements) * itemsize


def lost(name: str, case: Case, error: Exception) -> Row:
    """The row of a provider that is wrong, or raised."""
    status = "refused" if isinstance(error, RefusedError) else "failed"
    return Row(case.what, case.shape, case.dtype, "", name, status, measure.reason(error))


def enter(name: str, case: Case, request: Request) -> Contender:
    """Build and check a provider.

    Raises:
        NotThereError: it cannot run here.
        RefusedError: a result is wrong.
    """
    candidate = PROVIDERS[name](request)
    x_width, y_width = widths(case.ffn, candidate.gated)
    with candidate.selected():
        errors = measure.check(candidate, (case.rows, x_width), request.dtype, request.device)
    if case.what == "op":
        shapes = ((case.rows, x_width), (case.rows, y_width))
        return Contender(candidate, errors, candidate.call, candidate.alphas, shapes)
    fc1, fc2 = (
        (torch.randn(out, into, device=request.device) / math.sqrt(into))
        .to(request.dtype)
        .requires_grad_()
        for out, into in ((x_width, case.hidden), (case.hidden, y_width))
    )
    weights = (fc1, fc2, *candidate.alphas)
    shapes = ((case.rows, case.hidden),) * 2
    return Contender(candidate, errors, in_block(candidate.call, fc1, fc2), weights, shapes)


def in_block(
    activation: Callable[[Tensor], Tensor], fc1: Tensor, fc2: Tensor
) -> Callable[[Tensor], Tensor]:
    """fc1 → activation → fc2; weights are (out, in)."""
    linear = torch.nn.functional.linear
    return lambda x: linear(activation(linear(x, fc1)), fc2)


def run_rounds(
    case: Case,
    contenders: dict[str, Contender],
    pools: dict[tuple[tuple[int, int], ...], Iterator[tuple[Tensor, ...]]],
    options: argparse.Namespace,
    rows: list[Row],
) -> dict[str, list[dict[str, float]]]:
    """By provider what each of its turns found by mode: peak bytes in the first, then seconds.

    All have one turn in a round. The one for the peaks comes first, and warms up. Who fails is
    no longer among the contenders, but has a row.
    """
    if options.device == "cuda":
        take_peak, take_time = measure.peak_on_cuda, measure.CudaTimer()
    else:
        take_peak, take_time = measure.peak_on_cpu, measure.time_on_cpu
    default = QUICK_ROUNDS if options.quick else ROUNDS[case.what, options.device]

    def turn(contender: Contender, take: Callable[[Step, bool], dict]) -> dict[str, float]:
        candidate = contender.candidate
        backward = candidate.differentiable and options.modes != ["forward"]
        x, dy = next(pools[contender.shapes])
        with candidate.selected():
            taken = take(Step(contender.call, (x, *contender.weights), dy), backward)
        # A copy has one time, to compare with in every mode.
        return taken if candidate.differentiable else dict.fromkeys(MODES, taken["forward"])

    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    print("  measuring ", end="", flush=True)
    for take in (take_peak, *[take_time] * (options.rounds or default)):
        if take is take_time:
            print(".", end="", flush=True)
        for name in list(contenders):
            try:
                found[name].append(turn(contenders[name], take))
            except Exception as error:
                rows.append(lost(name, case, error))
                print(f" {name} ({rows[-1].status.upper()})", end="", flush=True)
                del contenders[name], found[name]
            if name not in contenders:
                measure.release(options.device)
    print(flush=True)
    return found


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
    add("--shapes", nargs="+", type=joined_sizes(2), metavar="TxF", help="of --op: tokens, columns")
    block = "of --block: tokens, hidden, columns"
    add("--block-shapes", nargs="+", type=joined_sizes(3), metavar="TxHxF", help=block)
    add("--dtypes", nargs="+", choices=list(DTYPES), help="default: by device, op and block")
    add("--providers", nargs="+", choices=list(PROVIDERS), help="default: all that run there")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    add("--rounds", type=int, help="turns of every provider, at least 2 (default: by device)")
    add("--quick", action="store_true", help="tiny shapes that fit in caches: a test of this tool")
    output = REPOSITORY / "runs" / "bench"
    add("--output", type=Path, default=output, metavar="DIR", help="default: runs/bench")
    options = parser.parse_args(argv)
    if options.device == "cuda":
        need_cuda("give another --device")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.rounds is not None and options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: a spread needs at least 2")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        files.try_to_write(options.output / options.device)
    except OSError as error:
        parser.error(f"--output {options.output}: {error.strerror}")
    # In the order of the table, each once.
    asked = options.providers or DEFAULT_PROVIDERS[options.device]
    options.providers = [name for name in PROVIDERS if name in asked]
    options.modes = [mode for mode in MODES if mode in options.modes]
    options.cases = []
    for what, wanted, given, flag in (
        ("op", options.op, options.shapes, "--shapes"),
        ("block", options.block, options.block_shapes, "--block-shapes"),
    ):
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
    ready_output()
    sys.exit(main())
