"""Triton kernels of the activation where rows belong to experts, each with alphas of its own.

The arithmetic is that of `gpu_triton`, whose functions these kernels call. What is here is which
rows are whose. x is [rows, cols], and expert e's segment of rows runs from its first row to that of
the next expert with rows, the last one's to the end: segments partition the rows, and none of them
is left unwritten. The first rows of a segment are real, the others padding: they are written as
zeros and never read.

A program takes `rows_per_program` rows in a row, which may hold several experts, or a part of one.
It finds its experts by counting how many begin at or before its first and its last row, and goes
through the real rows of each in tiles: 16 bytes for each thread. Without weights the rows of a
segment are one long row, whose tiles take all warps, as in `gpu_triton`. With weights each warp has
a row of its own, so that the sum over columns that is a weight's gradient stays within a warp.

Alpha gradients are summed per thread, then for each program and expert into a float32 partial. It
lies in slot `program + expert`: both only grow along the rows, so no two pairs have the same sum,
and the programs that share an expert have slots side by side. `_finish_kernel` adds those up in
float64. Who adds what depends on the shape, the experts' rows and the device alone; nothing is
atomic, and the host reads no count.

Whatever `ranges` hold, nothing outside of the tensors is read or written: a program stays within
its own rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xielu.kernels import gpu_triton
from megatron_xielu.kernels.gpu_triton import (
    _alpha_gradient,
    _effective,
    _xielu,
    _xielu_slope,
    _xiprelu,
    _xiprelu_slope,
)

NUM_WARPS = 4
# Programs a multiprocessor, by whether there are weights: as many as its registers hold of any
# dtype and activation, as docs/benchmarks/sm90-code.md lists it.
FORWARD_PROGRAMS = {False: 12, True: 12}
BACKWARD_PROGRAMS = {False: 9, True: 8}
# Up to so many experts there is one kernel for any number of them.
LEAST_EXPERTS = 64
# Elements that a program may go through: its offsets have 32 bits.
MOST_ELEMENTS = 2**30
# What a program of `_finish_kernel` loads at a time: the partials of one alpha of one expert.
ALPHA_SUMS = 256


@triton.jit
def _value(x, alpha_p, alpha_n, soft_n, beta, NAME: tl.constexpr):
    if NAME == "xielu":
        y = _xielu(x, alpha_p, alpha_n, soft_n, beta)
    else:
        y = _xiprelu(x, alpha_p, alpha_n, beta)
    return y


@triton.jit
def _my_rows(rows, rows_per_program):
    """The first row of this program, and one past its last."""
    first = tl.program_id(0) * rows_per_program
    return first, first + tl.minimum(rows_per_program, rows - first)


@triton.jit
def _experts_of(first_row, end_row, ranges_ptr, experts, EXPERTS: tl.constexpr):
    """The first expert of these rows and one past the last; those between may have none."""
    lanes = tl.arange(0, EXPERTS)
    exists = lanes < experts
    starts = tl.load(ranges_ptr + lanes, mask=exists, other=0)
    first = tl.sum((exists & (starts <= first_row)).to(tl.int32)) - 1
    end = tl.sum((exists & (starts < end_row)).to(tl.int32))
    return tl.maximum(first, 0), end


@triton.jit
def _within(row, least, most):
    return tl.minimum(tl.maximum(row, least), most).to(tl.int32)


@triton.jit
def _segment(expert, first_row, end_row, ranges_ptr, experts):
    """Of an expert's segment in these rows: its first row, one past its last real one, its end."""
    begin = _within(tl.load(ranges_ptr + expert), first_row, end_row)
    end = tl.load(ranges_ptr + expert + 1, mask=expert + 1 < experts, other=end_row)
    end = _within(end, begin, end_row)
    real_end = _within(tl.load(ranges_ptr + experts + expert), begin, end)
    return begin, real_end, end


@triton.jit
def _fill_with_zeros(ptr, begin, end, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        zeros = tl.zeros([BLOCK], ptr.dtype.element_ty)
        tl.store(ptr + start + lanes, zeros, mask=lanes < end - start)


@triton.jit
def _as_rows(begin, real_end, cols, HAS_WEIGHTS: tl.constexpr):
    """How many rows of how many columns to go through: one long one where rows do not matter."""
    count = real_end - begin
    if HAS_WEIGHTS:
        return count, cols
    else:
        return tl.minimum(count, 1), count * cols


@triton.jit
def _of_threads(terms, ELEMENTS: tl.constexpr):
    """Sums of the elements that a thread has side by side. An accumulator takes one register then
    where it would take one for each element, for as many additions."""
    rows: tl.constexpr = terms.shape[0]
    threads: tl.constexpr = terms.shape[1] // ELEMENTS
    return tl.sum(tl.reshape(terms, [rows, threads, ELEMENTS]), axis=2)


@triton.jit(do_not_specialize=["rows", "rows_per_program", "experts"])
def _forward_kernel(
    x_ptr,
    weights_ptr,
    alpha_p_ptr,
    alpha_n_ptr,
    ranges_ptr,
    y_ptr,
    rows,
    cols,
    rows_per_program,
    experts,
    beta,
    NAME: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    tile_rows = tl.arange(0, TILE_ROWS)[:, None]
    tile_cols = tl.arange(0, TILE_COLS)[None, :]
    first_row, end_row = _my_rows(rows, rows_per_program)
    first, end_expert = _experts_of(first_row, end_row, ranges_ptr, experts, EXPERTS)
    for expert in range(first, end_expert):
        begin, real_end, end = _segment(expert, first_row, end_row, ranges_ptr, experts)
        alpha_p, alpha_n, soft_n = _effective(
            alpha_p_ptr + expert, alpha_n_ptr + expert, beta, NAME
        )
        # 64 bits: a tensor may have more than 2^31 elements. What is one program's has fewer.
        start = begin * tl.cast(cols, tl.int64)
        x_start, y_start = x_ptr + start, y_ptr + start
        count, width = _as_rows(begin, real_end, cols, HAS_WEIGHTS)
        for row in range(0, count, TILE_ROWS):
            is_row = tile_rows < count - row
            offsets = (row + tile_rows) * width + tile_cols
            if HAS_WEIGHTS:
                weights = tl.load(weights_ptr + begin + row + tile_rows, mask=is_row, other=0.0)
                weights = weights.to(tl.float32)
            for col in range(0, width, TILE_COLS):
                at = offsets + col
                exists = is_row & (tile_cols < width - col)
                x = tl.load(x_start + at, mask=exists, other=0.0).to(tl.float32)
                y = _value(x, alpha_p, alpha_n, soft_n, beta, NAME)
                if HAS_WEIGHTS:
                    y *= weights
                tl.store(y_start + at, y.to(y_ptr.dtype.element_ty), mask=exists)
        _fill_with_zeros(y_start, (real_end - begin) * cols, (end - begin) * cols, 1024)


@triton.jit(do_not_specialize=["rows", "rows_per_program", "experts"])
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weights_ptr,
    alpha_p_ptr,
    alpha_n_ptr,
    ranges_ptr,
    dx_ptr,
    d_weights_ptr,
    alpha_sums_ptr,
    rows,
    cols,
    rows_per_program,
    experts,
    beta,
    NAME: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    tile_rows = tl.arange(0, TILE_ROWS)[:, None]
    tile_cols = tl.arange(0, TILE_COLS)[None, :]
    program = tl.program_id(0)
    slots = tl.num_programs(0) + experts
    first_row, end_row = _my_rows(rows, rows_per_program)
    first, end_expert = _experts_of(first_row, end_row, ranges_ptr, experts, EXPERTS)
    for expert in range(first, end_expert):
        begin, real_end, end = _segment(expert, first_row, end_row, ranges_ptr, experts)
        alpha_p, alpha_n, soft_n = _effective(
            alpha_p_ptr + expert, alpha_n_ptr + expert, beta, NAME
        )
        sum_p = tl.zeros([TILE_ROWS, TILE_COLS // ELEMENTS], tl.float32)
        sum_n = tl.zeros([TILE_ROWS, TILE_COLS // ELEMENTS], tl.float32)
        # 64 bits: a tensor may have more than 2^31 elements. What is one program's has fewer.
        start = begin * tl.cast(cols, tl.int64)
        dy_start, x_start, dx_start = dy_ptr + start, x_ptr + start, dx_ptr + start
        count, width = _as_rows(begin, real_end, cols, HAS_WEIGHTS)
        for row in range(0, count, TILE_ROWS):
            is_row = tile_rows < count - row
            offsets = (row + tile_rows) * width + tile_cols
            if HAS_WEIGHTS:
                weight_offsets = begin + row + tile_rows
                weights = tl.load(weights_ptr + weight_offsets, mask=is_row, other=0.0)
                weights = weights.to(tl.float32)
                sum_weights = tl.zeros([TILE_ROWS, TILE_COLS // ELEMENTS], tl.float32)
            for col in range(0, width, TILE_COLS):
                at = offsets + col
                exists = is_row & (tile_cols < width - col)
                x = tl.load(x_start + at, mask=exists, other=0.0).to(tl.float32)
                # What does not exist has dy = 0 and adds nothing.
                dy = tl.load(dy_start + at, mask=exists, other=0.0).to(tl.float32)
                if HAS_WEIGHTS:
                    value = _value(x, alpha_p, alpha_n, soft_n, beta, NAME)
                    sum_weights += _of_threads(dy * value, ELEMENTS)
                    dy *= weights
                if NAME == "xielu":
                    slope, basis = _xielu_slope(x, alpha_p, alpha_n, beta)
                else:
                    slope, basis = _xiprelu_slope(x, alpha_p, alpha_n, beta)
                term = dy * basis
                # A NaN in x belongs to both sides, as in the oracle.
                sum_p += _of_threads(tl.where(x <= 0.0, 0.0, term), ELEMENTS)
                sum_n += _of_threads(tl.where(x > 0.0, 0.0, term), ELEMENTS)
                dx = (dy * slope).to(dx_ptr.dtype.element_ty)
                tl.store(dx_start + at, dx, mask=exists)
            if HAS_WEIGHTS:
                d_weights = tl.sum(sum_weights, axis=1, keep_dims=True)
                d_weights = d_weights.to(d_weights_ptr.dtype.element_ty)
                tl.store(d_weights_ptr + weight_offsets, d_weights, mask=is_row)
        tl.store(alpha_sums_ptr + program + expert, tl.sum(sum_p))
        tl.store(alpha_sums_ptr + slots + program + expert, tl.sum(sum_n))
        _fill_with_zeros(dx_start, (real_end - begin) * cols, (end - begin) * cols, 1024)
        if HAS_WEIGHTS:
            _fill_with_zeros(d_weights_ptr, real_end, end, 128)


@triton.jit(do_not_specialize=["rows", "rows_per_program", "experts", "slots"])
def _finish_kernel(
    alpha_sums_ptr,
    alpha_p_ptr,
    alpha_n_ptr,
    ranges_ptr,
    d_alpha_p_ptr,
    d_alpha_n_ptr,
    rows,
    rows_per_program,
    experts,
    slots,
    ALPHA_SUMS: tl.constexpr,
):
    """Add up the partials: a program for each expert, and each of its alphas."""
    expert = tl.program_id(0)
    first_row = tl.minimum(tl.maximum(tl.load(ranges_ptr + expert), 0), rows)
    end_row = tl.minimum(tl.load(ranges_ptr + experts + expert), rows)
    first = first_row // rows_per_program
    programs = tl.cdiv(end_row, rows_per_program) - first
    programs = tl.where(end_row > first_row, programs, 0).to(tl.int32)
    sums_ptr = alpha_sums_ptr + first + expert
    if tl.program_id(1) == 0:
        _alpha_gradient(
            sums_ptr, alpha_p_ptr + expert, d_alpha_p_ptr + expert, programs, ALPHA_SUMS
        )
    else:
        _alpha_gradient(
            sums_ptr + slots, alpha_n_ptr + expert, d_alpha_n_ptr + expert, programs, ALPHA_SUMS
        )


def tile(itemsize: int, has_weights: bool) -> dict[str, int]:
    """Constants of both kernels: 16 bytes of x for each thread, on each row a warp or all warps."""
    elements = 16 // itemsize
    rows = NUM_WARPS if has_weights else 1
    return {"TILE_ROWS": rows, "TILE_COLS": NUM_WARPS // rows * 32 * elements, "ELEMENTS": elements}


class _Layout:
    """How rows are divided among programs; a function of shapes, dtype and device only."""

    def __init__(self, x: Tensor, ranges: Tensor, has_weights: bool, most: dict[bool, int]) -> None:
        rows, cols = x.shape
        if max(rows, cols) >= MOST_ELEMENTS:
            raise ValueError(f"x must have fewer than 2^30 rows and columns, not {rows} x {cols}")
        experts = ranges.shape[1]
        multiprocessors = gpu_triton._multiprocessors(x.device)
        rows_per_program = triton.cdiv(rows, multiprocessors * most[has_weights])
        rows_per_program = max(1, min(rows_per_program, MOST_ELEMENTS // max(cols, 1)))
        # At least one, also for no rows: a grid has no size 0.
        self.programs = max(1, triton.cdiv(rows, rows_per_program))
        self.slots = self.programs + experts
        self.sizes = {"rows": rows, "rows_per_program": rows_per_program, "experts": experts}
        self.constants = {
            "HAS_WEIGHTS": has_weights,
            "EXPERTS": max(LEAST_EXPERTS, triton.next_power_of_2(experts)),
            **tile(x.element_size(), has_weights),
        }


class Kernels:
    """The implementation for these `ranges`, [2, experts]; see `grouped`."""

    def __init__(self, ranges: Tensor) -> None:
        self.ranges = ranges.contiguous()

    def forward(
        self,
        name: str,
        x: Tensor,
        alpha_p: Tensor,
        alpha_n: Tensor,
        beta: float,
        row_weights: Tensor | None,
    ) -> Tensor:
        """``w f(x)`` in real rows, 0 in others; contiguous, in x's dtype. See `grouped`."""
        x = x.contiguous()
        y = torch.empty_like(x)
        layout = _Layout(x, self.ranges, row_weights is not None, FORWARD_PROGRAMS)
        with gpu_triton._on(x.device):
            _forward_kernel[(layout.programs,)](
                x_ptr=x,
                weights_ptr=None if row_weights is None else row_weights.contiguous(),
                alpha_p_ptr=alpha_p.contiguous(),
                alpha_n_ptr=alpha_n.contiguous(),
                ranges_ptr=self.ranges,
                y_ptr=y,
                cols=x.shape[1],
                beta=beta,
                NAME=name,
                **layout.sizes,
                **layout.constants,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
        return y

    def backward(
        self,
        name: str,
        dy: Tensor,
        x: Tensor,
        alpha_p: Tensor,
        alpha_n: Tensor,
        beta: float,
        row_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients by x (contiguous), alphas and weights, each in the dtype of its input."""
        dy, x = dy.contiguous(), x.contiguous()
        alpha_p, alpha_n = alpha_p.contiguous(), alpha_n.contiguous()
        dx, d_alpha_p, d_alpha_n = map(torch.empty_like, (x, alpha_p, alpha_n))
        d_weights = None
        if row_weights is not None:
            row_weights = row_weights.contiguous()
            d_weights = torch.empty_like(row_weights)
        layout = _Layout(x, self.ranges, row_weights is not None, BACKWARD_PROGRAMS)
        alpha_sums = torch.empty((2, layout.slots), dtype=torch.float32, device=x.device)
        with gpu_triton._on(x.device):
            _backward_kernel[(layout.programs,)](
                dy_ptr=dy,
                x_ptr=x,
                weights_ptr=row_weights,
                alpha_p_ptr=alpha_p,
                alpha_n_ptr=alpha_n,
                ranges_ptr=self.ranges,
                dx_ptr=dx,
                d_weights_ptr=d_weights,
                alpha_sums_ptr=alpha_sums,
                cols=x.shape[1],
                beta=beta,
                NAME=name,
                **layout.sizes,
                **layout.constants,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
            _finish_kernel[(self.ranges.shape[1], 2)](
                alpha_sums_ptr=alpha_sums,
                alpha_p_ptr=alpha_p,
                alpha_n_ptr=alpha_n,
                ranges_ptr=self.ranges,
                d_alpha_p_ptr=d_alpha_p,
                d_alpha_n_ptr=d_alpha_n,
                **layout.sizes,
                slots=layout.slots,
                ALPHA_SUMS=ALPHA_SUMS,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
        return dx, d_alpha_p, d_alpha_n, d_weights
