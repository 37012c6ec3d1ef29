"""How the benchmark measures: time, peak memory, and the error against the oracle.

Time. On a GPU between two device events; on the CPU by the wall clock. Inputs rotate through sets
that together are `CACHE_MULTIPLE` times the last-level cache, so that x comes from memory. One
step gives all three times: forward and backward pass are timed one after the other, and what they
return is freed after the clock has stopped. The forward pass is that of training, which keeps what
the backward pass needs; gradients are returned, not added into ``.grad``.

Memory. The highest sum of what a call allocates, its results included, over what was there
before: from the CUDA allocator's own peak, or from the profiler's record of every allocation and
release of PyTorch's CPU allocator, which compiled code uses too.

Error. Judged on the very shape that is timed: x is one tile of a few rows, repeated, so that the
float64 answer is needed for the tile only. dy has mean 1, so that a bias of the alpha gradients
adds up instead of averaging out. With r the root mean square of the exact result:

    error     max |got - exact| / (|exact| + r)                     of y and dx
    excess    max (|got - exact| - half a unit in the last place of exact) / (|exact| + r), at
              least 0: what is left beyond the rounding to x's dtype, which nobody can avoid
    alpha     max |got - exact| / |exact|                           of the alpha gradients

Ours must have an excess of at most 2^-20 and an alpha error of at most 1e-5, and give the same
bits again. Peers round more often, or clamp at eps, by design: their errors are shown and they are
only asked to compute the same function, ||got - exact|| <= 0.25 ||exact||.
"""

from __future__ import annotations

import gc
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

# Read when the profiler starts; its notes would be printed into the progress.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from bench_providers import Candidate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_xielu.common.text import describe

CACHE_MULTIPLE = 3
SIGMAS = (1.0, 0.02)
OUR_EXCESS = 2.0**-20
OUR_ALPHA_ERROR = 1e-5
PEER_NORM_ERROR = 0.25
# By backend. The Triton kernels have programs that end in any order, and a repetition is one
# launch or two; eager's many operations at the sizes of a GPU would take most of a case's time.
REPEATS = {"eager": 3, "compiled": 3, "triton": 100}

_TILE_ROWS = 64
_BACKWARD = "benchmark: backward"
_CACHE_IF_UNKNOWN = 64 * 2**20
_SLEEP_CYCLES = (4_000_000, 100_000_000)  # about 2 ms, and 50 ms at the most


class RefusedError(Exception):
    """A result is wrong; the message says which and by how much."""


class NoRoomError(RuntimeError):
    """A case does not fit in memory; like what PyTorch's allocators raise, a RuntimeError."""


def reason(error: Exception) -> str:
    """Why something was not measured, in one line: an allocator says a page."""
    if isinstance(error, RefusedError | NoRoomError):
        return str(error)
    asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    return f"out of memory, asking for {asked[1]}" if asked else describe(error)


def release(device: str) -> None:
    """Free what nobody refers to any more, circles through a traceback's frames included.

    Else that would count as less memory in the turn in which it happens to be freed.
    """
    gc.collect()
    if device == "cuda":
        with suppress(RuntimeError):  # of a device that has failed: whoever uses it next says so
            torch.cuda.empty_cache()


def free_bytes(device: str) -> float:
    """Memory that a GPU has left; of a CPU's, as much as anybody asks for."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else math.inf


@dataclass(frozen=True)
class Errors:
    """As defined in the module docstring, the larger of those at both sigmas; NaN: has none."""

    y: float = math.nan
    dx: float = math.nan
    alpha: float = math.nan
    excess_y: float = math.nan
    excess_dx: float = math.nan
    repeats: int = 0  # alpha gradients that came out with the same bits


def last_level_cache(device: str) -> int:
    """Bytes of the cache that x must not stay in."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    units = {"K": 2**10, "M": 2**20}
    sizes = [
        int(text[:-1]) * units[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in units
    ]
    return max(sizes, default=_CACHE_IF_UNKNOWN)


def sets_needed(device: str, bytes_per_set: int) -> int:
    """How many input sets exceed the cache; at least 2."""
    return max(2, math.ceil(CACHE_MULTIPLE * last_level_cache(device) / bytes_per_set))


def rotating(
    count: int, shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: str
) -> Iterator[tuple[Tensor, ...]]:
    """Endlessly the same `count` sets of N(0, 1) tensors; the first of a set requires grad."""
    first = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    sets = [tuple(first)] + [tuple(t.clone() for t in first) for _ in range(count - 1)]
    for x, *_ in sets:
        x.requires_grad_()
    return cycle(sets)


@dataclass(frozen=True)
class Step:
    """A forward and a backward pass on one set of inputs; `inputs` are what gradients go to."""

    call: Callable[[Tensor], Tensor]
    inputs: tuple[Tensor, ...]  # x first
    dy: Tensor

    def forward(self) -> Tensor:
        return self.call(self.inputs[0])

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.inputs, self.dy)


def time_on_cpu(step: Step, backward: bool) -> dict[str, float]:
    """Seconds by mode by the wall clock; without `backward`, of the forward pass only."""
    begin = time.perf_counter()
    y = step.forward()
    middle = time.perf_counter()
    if not backward:
        return {"forward": middle - begin}
    gradients = step.backward(y)
    end = time.perf_counter()
    del gradients
    return {"forward": middle - begin, "backward": end - middle, "both": end - begin}


class CudaTimer:
    """Seconds by mode that the GPU is busy.

    The GPU is made to wait while the host queues everything, so that kernels follow each other
    without gaps, as in a training step. If the wait was over before all was queued, it is doubled
    and the step measured again; at its longest it is enough for anything but a call that itself
    waits for the GPU, and that one's time is then part of the result. A step that was measured
    makes the next wait shorter: one pause of the host must not cost all that follow.
    """

    def __init__(self) -> None:
        self.least, self.most = _SLEEP_CYCLES
        self.cycles = self.least

    def __call__(self, step: Step, backward: bool) -> dict[str, float]:
        while True:
            begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            torch.cuda._sleep(self.cycles)
            begin.record()
            y = step.forward()
            middle.record()
            gradients = step.backward(y) if backward else ()
            end.record()
            too_short = begin.query()
            end.synchronize()
            del y, gradients
            if too_short and self.cycles < self.most:
                self.cycles = min(2 * self.cycles, self.most)
                continue
            self.cycles = max(self.least, self.cycles * 7 // 8)
            times = {"forward": begin.elapsed_time(middle) / 1e3}
            if backward:
                times["backward"] = middle.elapsed_time(end) / 1e3
                times["both"] = begin.elapsed_time(end) / 1e3
            return times


def peak_on_cpu(step: Step, backward: bool) -> dict[str, int]:
    """Most bytes that each mode has allocated at any time, results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        y = step.forward()
        with record_function(_BACKWARD):
            gradients = step.backward(y) if backward else ()
    del y, gradients
    now = at_start = 0
    peak = {"forward": 0, "backward": 0, "both": 0}
    mode = "forward"
    events = record.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == _BACKWARD:
            mode, at_start = "backward", now
        elif event.name() == "[memory]":
            now += event.nbytes()
            peak[mode] = max(peak[mode], now - at_start)
            peak["both"] = max(peak["both"], now)
    return peak


def peak_on_cuda(step: Step, backward: bool) -> dict[str, int]:
    """The same, from the CUDA allocator."""
    # Once for what stays: cuBLAS's workspaces would count as memory of whoever comes first.
    step.backward(step.forward()) if backward else step.forward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = step.forward()
    forward_peak, middle = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = step.backward(y) if backward else ()
    backward_peak = torch.cuda.max_memory_allocated()
    del y, gradients
    return {
        "forward": forward_peak - before,
        "backward": backward_peak - middle,
        "both": max(forward_peak, backward_peak) - before,
    }


def check(
    candidate: Candidate, x_shape: tuple[int, int], dtype: torch.dtype, device: str
) -> Errors:
    """The errors of a candidate on x of this shape, at both sigmas.

    Raises:
        RefusedError: they are beyond what the module docstring allows.
    """
    found = [_errors_at(sigma, candidate, x_shape, dtype, device) for sigma in SIGMAS]
    worst = {
        name: max(getattr(errors, name) for errors in found)
        for name in ("y", "dx", "alpha", "excess_y", "excess_dx")
    }
    if candidate.ours:
        for name, limit in (
            ("excess_y", OUR_EXCESS),
            ("excess_dx", OUR_EXCESS),
            ("alpha", OUR_ALPHA_ERROR),
        ):
            if not worst[name] <= limit:
                raise RefusedError(f"{name} is {worst[name]:.2e}, over {limit:.2e}")
    return Errors(**worst, repeats=min(errors.repeats for errors in found))


def _errors_at(
    sigma: float,
    candidate: Candidate,
    x_shape: tuple[int, int],
    dtype: torch.dtype,
    device: str,
) -> Errors:
    rows, x_width = x_shape
    y_width = x_width // 2 if candidate.gated else x_width
    tile_rows = math.gcd(rows, _TILE_ROWS)
    copies = rows // tile_rows
    generator = torch.Generator(device).manual_seed(1)

    def random(width: int) -> Tensor:
        return torch.randn(tile_rows, width, generator=generator, device=device)

    tile_x, tile_dy = (sigma * random(x_width)).to(dtype), (1.0 + random(y_width)).to(dtype)
    exact_y, *exact_gradients = candidate.exact(tile_x, tile_dy)
    x = tile_x.repeat(copies, 1).requires_grad_()
    dy = tile_dy.repeat(copies, 1)
    y = candidate.call(x)
    error_y, excess_y = compare("y", y.detach(), exact_y, dtype)
    if not candidate.differentiable:
        return Errors(y=error_y, excess_y=excess_y)

    inputs = (x, *candidate.alphas)
    dx, *alpha_gradients = torch.autograd.grad(y, inputs, dy, retain_graph=candidate.ours)
    exact_dx, *exact_alphas = exact_gradients
    error_dx, excess_dx = compare("dx", dx, exact_dx, dtype)
    error_alpha = math.nan
    for got, tile_gradient in zip(alpha_gradients, exact_alphas, strict=True):
        exact = copies * tile_gradient.double()
        error = ((got.double() - exact).abs() / exact.abs()).item()
        if not error <= PEER_NORM_ERROR:
            raise RefusedError(f"an alpha gradient is off by {error:.2e} of itself")
        error_alpha = error if math.isnan(error_alpha) else max(error, error_alpha)
    repeats = 0
    if candidate.ours:
        for repeats in range(1, REPEATS[candidate.backend] + 1):
            again = torch.autograd.grad(y, candidate.alphas, dy, retain_graph=True)
            if not all(torch.equal(a, b) for a, b in zip(again, alpha_gradients, strict=True)):
                raise RefusedError(f"alpha gradients differ in repetition {repeats}")
    return Errors(error_y, error_dx, error_alpha, excess_y, excess_dx, repeats)


def compare(what: str, got: Tensor, exact: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Error and excess of copies of a tile; exact is one tile."""
    tiles, remainder = divmod(got.shape[0], exact.shape[0])
    if remainder or got.shape[1:] != exact.shape[1:] or got.dtype != dtype:
        raise RefusedError(f"{what} is {tuple(got.shape)} in {got.dtype}")
    scale = exact.abs() + exact.square().mean().sqrt()
    half_ulp = _half_ulp(exact, dtype)
    error = excess = 0.0
    before: Tensor | None = None
    for tile in got.view(tiles, *exact.shape):
        # Equal tiles have equal errors: the slow comparison in float64 is for those that differ.
        if before is not None and torch.equal(tile, before):
            continue
        before = tile
        off = (tile.double() - exact).abs()
        relative_norm = (off.norm() / exact.norm()).item()
        if not relative_norm <= PEER_NORM_ERROR:
            raise RefusedError(f"{what} is off by {relative_norm:.2e} of its norm")
        error = max(error, (off / scale).max().item())
        excess = max(excess, ((off - half_ulp) / scale).max().item())
    return error, excess


def _half_ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbouring numbers of dtype around exact (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs()).exponent - 1
    lowest = torch.frexp(torch.tensor(info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(exact, info.eps / 2), exponent.clamp_min(int(lowest)))
