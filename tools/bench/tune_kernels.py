"""Times other shapes of the Triton kernels on a GPU: block, warps, programs, forms of the loop.

    python tools/bench/tune_kernels.py --output FILE.json [--shapes 8192x9216] [--bias]
    python tools/bench/tune_kernels.py --compile     no GPU: what each compiles to for sm_90

Everything is measured through `gpu_triton.forward` and `backward` as users call them, the launch
that adds up the partials included, with the module's constants and kernels replaced. The loop is

    plain     as in `gpu_triton`
    ahead     loads what the next round needs before it computes: a load is always in flight
    staged    Triton's pipeline of three stages

Each must first give the same y or dx as the shipped one, bit for bit, and alpha gradients within
1e-6. Candidates then take turns, each after a copy of x in the same round: its time is a fraction
of that. The JSON file is written after each shape.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import triton
import triton.language as tl
from bench_flags import joined_sizes, need_cuda
from bench_measure import CudaTimer, rotating, sets_needed, time_on_cpu
from bench_providers import BETA, bytes_moved
from inspect_kernels import compile_for_sm90, programs_that_fit, read
from torch import Tensor

from megatron_xielu.common import files
from megatron_xielu.common.flags import POSITIVE
from megatron_xielu.common.text import ready_output, table
from megatron_xielu.kernels import gpu_triton
from megatron_xielu.kernels.gpu_triton import _effective, _xielu, _xielu_slope

KERNELS = ("forward", "backward")
ALPHA_RTOL = 1e-6


@triton.jit(do_not_specialize=["row_programs"])
def forward_loop(
    x_ptr,
    bias_ptr,
    alpha_p_ptr,
    alpha_n_ptr,
    y_ptr,
    numel,
    cols,
    row_programs,
    beta,
    NAME: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`gpu_triton._forward_kernel` of xIELU without a bias."""
    tl.static_assert(NAME == "xielu" and not HAS_BIAS)
    alpha_p, alpha_n, soft_n = _effective(alpha_p_ptr, alpha_n_ptr, beta, NAME)
    lanes = tl.arange(0, BLOCK)
    first = tl.program_id(0) * tl.cast(cols, tl.int64)
    step = row_programs * tl.cast(cols, tl.int64)
    if AHEAD:
        next_x = tl.load(x_ptr + first + lanes, mask=lanes < numel - first, other=0.0)
    for start in tl.range(first, numel, step, num_stages=STAGES):
        if AHEAD:
            x, after = next_x.to(tl.float32), start + step
            next_x = tl.load(x_ptr + after + lanes, mask=lanes < numel - after, other=0.0)
        else:
            x = tl.load(x_ptr + start + lanes, mask=lanes < numel - start, other=0.0).to(tl.float32)
        y = _xielu(x, alpha_p, alpha_n, soft_n, beta)
        tl.store(y_ptr + start + lanes, y.to(y_ptr.dtype.element_ty), mask=lanes < numel - start)


@triton.jit(do_not_specialize=["row_programs"])
def backward_loop(
    dy_ptr,
    x_ptr,
    bias_ptr,
    alpha_p_ptr,
    alpha_n_ptr,
    dx_ptr,
    alpha_sums_ptr,
    bias_sums_ptr,
    numel,
    cols,
    row_programs,
    beta,
    NAME: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`gpu_triton._backward_kernel` of xIELU without a bias."""
    tl.static_assert(NAME == "xielu" and not HAS_BIAS)
    alpha_p, alpha_n, _ = _effective(alpha_p_ptr, alpha_n_ptr, beta, NAME)
    lanes = tl.arange(0, BLOCK)
    first = tl.program_id(0) * tl.cast(cols, tl.int64)
    step = row_programs * tl.cast(cols, tl.int64)
    sum_p = tl.zeros([BLOCK], tl.float32)
    sum_n = tl.zeros([BLOCK], tl.float32)
    if AHEAD:
        next_x = tl.load(x_ptr + first + lanes, mask=lanes < numel - first, other=0.0)
        next_dy = tl.load(dy_ptr + first + lanes, mask=lanes < numel - first, other=0.0)
    for start in tl.range(first, numel, step, num_stages=STAGES):
        if AHEAD:
            x, dy, after = next_x.to(tl.float32), next_dy.to(tl.float32), start + step
            next_x = tl.load(x_ptr + after + lanes, mask=lanes < numel - after, other=0.0)
            next_dy = tl.load(dy_ptr + after + lanes, mask=lanes < numel - after, other=0.0)
        else:
            exists = lanes < numel - start
            x = tl.load(x_ptr + start + lanes, mask=exists, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + start + lanes, mask=exists, other=0.0).to(tl.float32)
        slope, basis = _xielu_slope(x, alpha_p, alpha_n, beta)
        dx = dy * slope
        term = dy * basis
        sum_p += tl.where(x <= 0.0, 0.0, term)
        sum_n += tl.where(x > 0.0, 0.0, term)
        tl.store(dx_ptr + start + lanes, dx.to(dx_ptr.dtype.element_ty), mask=lanes < numel - start)
    program = tl.program_id(0)
    tl.store(alpha_sums_ptr + program, tl.sum(sum_p))
    tl.store(alpha_sums_ptr + tl.num_programs(0) + program, tl.sum(sum_n))


LOOPS = {
    "plain": {},
    "ahead": {"AHEAD": True, "STAGES": 1},
    "staged": {"AHEAD": False, "STAGES": 3},
}


@dataclass(frozen=True)
class Candidate:
    """One way to launch a kernel."""

    what: str  # forward or backward
    loop: str
    block: int
    warps: int
    programs: int  # a multiprocessor
    maxnreg: int | None = None  # registers of a thread at most, the compiler's choice if None

    @property
    def kernel(self) -> triton.runtime.JITFunction:
        """The function that is launched."""
        if self.loop == "plain":
            return getattr(gpu_triton, f"_{self.what}_kernel")
        return {"forward": forward_loop, "backward": backward_loop}[self.what]

    @contextmanager
    def selected(self) -> Iterator[None]:
        """Has `gpu_triton` launch this one."""
        programs = dict.fromkeys((False, True), self.programs)
        more = LOOPS[self.loop] | ({"maxnreg": self.maxnreg} if self.maxnreg else {})
        with mock.patch.multiple(
            gpu_triton,
            BLOCK=self.block,
            NUM_WARPS=self.warps,
            **{
                f"{self.what.upper()}_PROGRAMS": programs,
                f"_{self.what}_kernel": _With(self.kernel, more),
            },
        ):
            yield

    def call(
        self, x: Tensor, dy: Tensor, bias: Tensor | None, alphas: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """y; or dx and the gradients of both alphas and of the bias."""
        with self.selected():
            if self.what == "forward":
                return (gpu_triton.forward("xielu", x, *alphas, BETA, bias),)
            return gpu_triton.backward("xielu", dy, x, *alphas, BETA, bias)


@dataclass(frozen=True)
class _With:
    """A kernel that is launched with more arguments and options."""

    kernel: triton.runtime.JITFunction
    more: dict[str, int | bool]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        launch = self.kernel[grid]
        return lambda *args, **kwargs: launch(*args, **kwargs, **self.more)


def _alphas(device: str) -> list[Tensor]:
    return [torch.tensor([raw], device=device) for raw in (0.2, -1.1)]


def candidates(bias: bool) -> list[Candidate]:
    """The shipped one of each kernel first."""
    shapes = {  # block, warps, programs; 100,000: a program for every block
        "forward": [
            *((1024, 4, programs) for programs in (16, 12, 32, 64, 100_000)),
            *((2048, 4, 16), (2048, 4, 8), (2048, 8, 8), (2048, 8, 100_000)),
            *((4096, 8, 8), (1024, 2, 16), (512, 2, 32)),
        ],
        "backward": [
            *((1024, 4, programs) for programs in (10, 8, 9, 12, 16, 32)),
            *((2048, 4, 7), (2048, 8, 6), (2048, 8, 4), (4096, 8, 3)),
            *((1024, 2, 14), (512, 2, 24), (512, 2, 20)),
        ],
    }
    shipped = {"forward": gpu_triton.FORWARD_PROGRAMS, "backward": gpu_triton.BACKWARD_PROGRAMS}
    found = []
    for what, sizes in shapes.items():
        found += [
            Candidate(what, "plain", gpu_triton.BLOCK, gpu_triton.NUM_WARPS, shipped[what][bias])
        ]
        for loop in ("plain",) if bias else LOOPS:
            found += [Candidate(what, loop, *size) for size in sizes]
    for programs, maxnreg in ((12, 40), (10, 48)):
        found += [Candidate("backward", "plain", 1024, 4, programs, maxnreg)]
    return list(dict.fromkeys(found))


def _compile_one(candidate: Candidate, dtype: torch.dtype, bias: bool) -> str | None:
    """Run it once on little, so that it is compiled, in this process and the cache on the disk."""
    x, dy = torch.ones(2, 4, 8192, device="cuda", dtype=dtype)
    try:
        candidate.call(x, dy, torch.ones(8192, device="cuda") if bias else None, _alphas("cuda"))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    return None


def compile_all(found: list[Candidate], dtype: torch.dtype, bias: bool) -> list[Candidate]:
    """Those that compile and run, compiled by as many processes as there are cores."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=spawn) as pool:
        futures = [pool.submit(_compile_one, candidate, dtype, bias) for candidate in found]
    # A worker that dies takes the others along: what they had is compiled here.
    errors = [
        _compile_one(candidate, dtype, bias) if future.exception() else future.result()
        for candidate, future in zip(found, futures, strict=True)
    ]
    for candidate, error in zip(found, errors, strict=True):
        if error:
            print(f"{candidate}: {error}", flush=True)
    return [c for c, error in zip(found, errors, strict=True) if not error]


@dataclass
class _AfterCopy:
    """A `bench_measure.Step`: a copy of x as its forward pass, a candidate as its backward pass."""

    candidate: Candidate
    inputs: tuple[Tensor, Tensor, Tensor | None, list[Tensor]]
    target: Tensor

    def forward(self) -> Tensor:
        return self.target.copy_(self.inputs[0])

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        return self.candidate.call(*self.inputs)


def measure(
    found: list[Candidate],
    shape: tuple[int, int],
    dtype: torch.dtype,
    bias: bool,
    rounds: int,
    device: str = "cuda",
) -> list[dict]:
    """A record for each candidate that computes the same as the first of its kernel."""
    x_bytes = shape[0] * shape[1] * dtype.itemsize
    moved = {what: bytes_moved(what, *shape, dtype.itemsize, gated=False) for what in KERNELS}
    over_copy = {what: moved[what] / moved["forward"] for what in KERNELS}
    pool = rotating(sets_needed(device, 3 * x_bytes), (shape,) * 3, dtype, device)
    bias_tensor = torch.randn(shape[1], device=device) if bias else None
    alphas = _alphas(device)
    x, dy, _ = (t.detach() for t in next(pool))
    dy = dy.abs()  # of one sign: where the sum cancels, its last bits are the order's
    right: list[Candidate] = []
    expected: dict[str, tuple[Tensor, ...]] = {}
    for candidate in found:
        got = candidate.call(x, dy, bias_tensor, alphas)
        exact = expected.setdefault(candidate.what, got)
        pairs = zip(got[1:3], exact[1:3], strict=True)
        off = [((g - e).abs() / e.abs()).item() for g, e in pairs]
        if torch.equal(got[0], exact[0]) and all(o <= ALPHA_RTOL for o in off):
            right.append(candidate)
        else:
            print(f"{candidate}: not the shipped one's result (alphas off by {off})", flush=True)
    del got, exact, expected
    timer = CudaTimer() if device == "cuda" else time_on_cpu
    seconds: dict[Candidate, list[float]] = {c: [] for c in right}
    of_copy: dict[Candidate, list[float]] = {c: [] for c in right}
    for _ in range(rounds):
        for candidate in right:
            x, dy, target = (t.detach() for t in next(pool))
            step = _AfterCopy(candidate, (x, dy, bias_tensor, alphas), target)
            times = timer(step, backward=True)
            seconds[candidate].append(times["backward"])
            of_copy[candidate].append(
                over_copy[candidate.what] * times["forward"] / times["backward"]
            )
    return [
        asdict(c)
        | {
            "shape": "x".join(map(str, shape)),
            "dtype": str(dtype).removeprefix("torch."),
            "bias": bias,
            "us": 1e6 * median(seconds[c]),
            "of_copy": median(of_copy[c]),
        }
        for c in right
    ]


def compiled_table(found: list[Candidate], bias: bool) -> str:
    """What each compiles to for sm_90, in bf16."""
    rows = [["kernel", "loop", "block", "warps", "maxnreg", "registers", "spilled", "fit", "asked"]]
    for c in found:
        options = LOOPS[c.loop] | {"BLOCK": c.block, "num_warps": c.warps, "maxnreg": c.maxnreg}
        registers, spilled, _ = read(compile_for_sm90(c.kernel, "xielu", "bf16", bias, **options))
        fit = programs_that_fit(registers, c.warps)
        limit = c.maxnreg or "–"
        values = (c.what, c.loop, c.block, c.warps, limit, registers, spilled, fit, c.programs)
        rows.append([str(value) for value in values])
    return table(rows, left=(0, 1))


def best(records: list[dict], count: int = 6) -> str:
    """The shipped one and the fastest of each kernel."""
    rows = [["kernel", "loop", "block", "warps", "programs", "maxnreg", "µs", "of copy"]]
    for what in KERNELS:
        shipped, *others = [r for r in records if r["what"] == what]
        for r in (shipped, *sorted(others, key=lambda r: r["us"])[:count]):
            names = ("what", "loop", "block", "warps", "programs", "maxnreg")
            mark = " (shipped)" if r is shipped else ""
            cells = [str(r[name] or "–") for name in names]
            rows.append([*cells, f"{r['us']:.1f}", f"{r['of_copy']:.3f}{mark}"])
    return table(rows, left=(0, 1, 7))


def main() -> None:
    """Print what is best for each shape; all of it goes to the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, metavar="FILE.json", help="default: runs/bench/tune.json")
    add("--compile", action="store_true", help="compile for sm_90 and list registers; no GPU")
    add("--shapes", nargs="+", type=joined_sizes(2), default=["8192x9216"], metavar="TxF")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--bias", action="store_true", help="with a bias; the plain loop only")
    add("--rounds", type=POSITIVE.read, default=30)
    options = parser.parse_args()
    found = candidates(options.bias)
    if options.compile:
        print(compiled_table(found, options.bias))
        return
    need_cuda("--compile needs none")
    output = options.output or Path(__file__).parents[2] / "runs" / "bench" / "tune.json"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        files.try_to_write(output)
    except OSError as error:
        parser.error(f"--output {output}: {error.strerror}")
    if output.is_dir():
        parser.error(f"--output {output} is a folder; name a file")
    dtype, card = getattr(torch, options.dtype), torch.cuda.get_device_name(0)
    print(f"{card}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    found = compile_all(found, dtype, options.bias)
    records = []
    for shape in options.shapes:
        rows, cols = map(int, shape.split("x"))
        of_shape = measure(found, (rows, cols), dtype, options.bias, options.rounds)
        records += [{"card": card, "triton": triton.__version__, **r} for r in of_shape]
        named = f"{shape} {options.dtype}{' with a bias' * options.bias}"
        print(f"\n{named}\n{best(of_shape)}", flush=True)
        files.keep(output, json.dumps(records, indent=1) + "\n")
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    ready_output()
    sys.exit(main())
