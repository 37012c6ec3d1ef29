"""Triton kernels of xIELU and xIPReLU: each tensor is read or written once, float32 inside.

Forward moves x and y (4 bytes an element in bf16), backward x, dy and dx (6 bytes), with both alpha
gradients and the bias gradient in the same pass. With ``h(x) = expm1(x) - x = x^2 q(x)`` and
``s_n = softplus(a_n)``, xIELU at x <= 0 is evaluated as

    -1 < x <= 0     f = (x alpha_n q(x) + beta) x          f' = alpha_n (x + x^2 q(x)) + beta
         x <= -1    f = alpha_n e^x - (s_n x + alpha_n)    f' = alpha_n expm1(x) + beta

so that nothing cancels near 0, and x = -inf gives +inf instead of inf - inf. q is a polynomial and
e^x is ``exp2``: both run in Triton's interpreter too, which has no libdevice.

How the work is laid out. A tensor is a number of rows of `cols` elements, and a program walks down
one block of columns, taking every `row_programs`-th row. Without a bias the tensor is flat and a
"row" is one block. With a bias, `cols` is its length: a program keeps its part of the bias, and of
the bias gradient, in registers. Alpha gradients are summed per thread, then per program into
float32 partials, then by `_finish_kernel` over the programs in float64, each in a fixed order. The
number of programs depends on the shape and the device alone, and nothing is atomic or tuned: the
same input gives the same bits.

Limits that follow from float32: |x| above 1.8e19 overflows x^2; the softplus of a raw alpha below
-87 loses bits, and is 0 below about -103. float64 is left to the eager backend.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from megatron_xielu.kernels import polynomials

# Elements a program takes at a time, 8 for each thread: one 16-byte access of a 16-bit tensor, two
# of a float32 one. The compiled code has no spills; docs/benchmarks/sm90-code.md lists it.
BLOCK = 1024
NUM_WARPS = 4
# Programs a multiprocessor, by whether there is a bias: as many as its registers hold of any dtype
# and activation (16 x 128 threads fill it). Each has 2 or 4 KiB of 16-bit loads in flight; all
# together three times what an H200's read bandwidth times its latency (about 700 ns) asks for.
# tools/bench/tune_kernels.py times others.
FORWARD_PROGRAMS = {False: 16, True: 16}
BACKWARD_PROGRAMS = {False: 10, True: 9}
# What a program of `_finish_kernel` loads at a time: the partials of an alpha, or of the bias, 32
# columns of which are one line of the cache. For 9216 columns on 132 multiprocessors it loads once
# or twice.
FINISH_BLOCKS = {"ALPHA_SUMS": 2048, "BIAS_ROWS": 128, "BIAS_COLS": 32}
# The interpreter runs programs one after the other: as few as show every case.
_INTERPRETED_MULTIPROCESSORS = 1

Q0, Q1, Q2, Q3, Q4, Q5 = map(tl.constexpr, polynomials.Q_UNIT)
E0, E1, E2, E3, E4, E5, E6 = map(tl.constexpr, polynomials.EXP)
L0, L1, L2, L3, L4, L5, L6, L7, L8, L9 = map(tl.constexpr, polynomials.LOG1P)
LOG2_E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693145751953125)  # 17 bits: its product with an exponent is exact
LN2_LOW = tl.constexpr(1.428606820309417e-06)


@triton.jit
def _q(x):
    return ((((Q5 * x + Q4) * x + Q3) * x + Q2) * x + Q1) * x + Q0


@triton.jit
def _softplus(z):
    """log(1 + e^z) of a float32 scalar to float32 accuracy: max(z, 0) + log1p(e^-|z|)."""
    z_abs = tl.abs(z)
    k = tl.floor(0.5 - z_abs * LOG2_E)  # e^-|z| = 2^k e^r with |r| <= ln(2)/2
    r = (-z_abs - k * LN2_HIGH) - k * LN2_LOW
    e = (((((E6 * r + E5) * r + E4) * r + E3) * r + E2) * r + E1) * r + E0
    u = e * tl.exp2(k)
    p = ((((L9 * u + L8) * u + L7) * u + L6) * u + L5) * u + L4
    p = (((p * u + L3) * u + L2) * u + L1) * u + L0
    return tl.maximum(z, 0.0) + p * u


@triton.jit
def _xielu(x, alpha_p, alpha_n, soft_n, beta):
    near = (x * tl.where(x > 0.0, alpha_p, alpha_n * _q(x)) + beta) * x
    far = alpha_n * tl.exp2(x * LOG2_E) - (soft_n * x + alpha_n)
    return tl.where(x > -1.0, near, far)


@triton.jit
def _xielu_slope(x, alpha_p, alpha_n, beta):
    """f'(x), and the factor of dy in the gradient of the alpha on x's side: x^2 or h(x)."""
    is_near = x > -1.0
    is_pos = x > 0.0
    near_basis = x * x * tl.where(is_pos, 1.0, _q(x))
    expm1 = tl.where(is_near, x + near_basis, tl.exp2(x * LOG2_E) - 1.0)
    slope = tl.where(is_pos, 2.0 * alpha_p * x + beta, alpha_n * expm1 + beta)
    return slope, tl.where(is_near, near_basis, expm1 - x)


@triton.jit
def _xiprelu(x, alpha_p, alpha_n, beta):
    return (tl.where(x > 0.0, alpha_p, alpha_n) * x + beta) * x


@triton.jit
def _xiprelu_slope(x, alpha_p, alpha_n, beta):
    return 2.0 * tl.where(x > 0.0, alpha_p, alpha_n) * x + beta, x * x


@triton.jit
def _effective(alpha_p_ptr, alpha_n_ptr, beta, NAME: tl.constexpr):
    """alpha_p and alpha_n as they stand in the formula, and softplus(a_n)."""
    alpha_p = _softplus(tl.load(alpha_p_ptr).to(tl.float32))
    soft_n = _softplus(tl.load(alpha_n_ptr).to(tl.float32))
    return alpha_p, soft_n + beta if NAME == "xielu" else soft_n, soft_n


@triton.jit
def _my_columns(cols, BLOCK: tl.constexpr):
    """The columns of this program, [BLOCK], and the number of its first row."""
    blocks = tl.cdiv(cols, BLOCK)
    program = tl.program_id(0)
    return (program % blocks) * BLOCK + tl.arange(0, BLOCK), program // blocks


@triton.jit
def _in_row(columns, cols, start, numel, HAS_BIAS: tl.constexpr):
    """Which columns exist in the row that begins at `start`: a flat tensor's last row is short."""
    return columns < cols if HAS_BIAS else columns < numel - start


@triton.jit(do_not_specialize=["row_programs"])
def _forward_kernel(
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
):
    alpha_p, alpha_n, soft_n = _effective(alpha_p_ptr, alpha_n_ptr, beta, NAME)
    columns, first_row = _my_columns(cols, BLOCK)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < cols, other=0.0).to(tl.float32)
    # 64 bits: a tensor may have more than 2^31 elements.
    row_size = tl.cast(cols, tl.int64)
    for start in range(first_row * row_size, numel, row_programs * row_size):
        exists = _in_row(columns, cols, start, numel, HAS_BIAS)
        x = tl.load(x_ptr + start + columns, mask=exists, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias
        if NAME == "xielu":
            y = _xielu(x, alpha_p, alpha_n, soft_n, beta)
        else:
            y = _xiprelu(x, alpha_p, alpha_n, beta)
        tl.store(y_ptr + start + columns, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["row_programs"])
def _backward_kernel(
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
):
    alpha_p, alpha_n, _ = _effective(alpha_p_ptr, alpha_n_ptr, beta, NAME)
    columns, first_row = _my_columns(cols, BLOCK)
    sum_p = tl.zeros([BLOCK], tl.float32)
    sum_n = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < cols, other=0.0).to(tl.float32)
        sum_bias = tl.zeros([BLOCK], tl.float32)
    # 64 bits: a tensor may have more than 2^31 elements.
    row_size = tl.cast(cols, tl.int64)
    for start in range(first_row * row_size, numel, row_programs * row_size):
        exists = _in_row(columns, cols, start, numel, HAS_BIAS)
        x = tl.load(x_ptr + start + columns, mask=exists, other=0.0).to(tl.float32)
        # What does not exist has dy = 0 and adds nothing.
        dy = tl.load(dy_ptr + start + columns, mask=exists, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias
        if NAME == "xielu":
            slope, basis = _xielu_slope(x, alpha_p, alpha_n, beta)
        else:
            slope, basis = _xiprelu_slope(x, alpha_p, alpha_n, beta)
        dx = dy * slope
        term = dy * basis
        # A NaN in x belongs to both sides, as in the oracle.
        sum_p += tl.where(x <= 0.0, 0.0, term)
        sum_n += tl.where(x > 0.0, 0.0, term)
        if HAS_BIAS:
            sum_bias += dx
        tl.store(dx_ptr + start + columns, dx.to(dx_ptr.dtype.element_ty), mask=exists)
    program = tl.program_id(0)
    tl.store(alpha_sums_ptr + program, tl.sum(sum_p))
    tl.store(alpha_sums_ptr + tl.num_programs(0) + program, tl.sum(sum_n))
    if HAS_BIAS:
        tl.store(bias_sums_ptr + first_row * row_size + columns, sum_bias, mask=columns < cols)


@triton.jit
def _alpha_gradient(sums_ptr, raw_ptr, out_ptr, programs, BLOCK: tl.constexpr):
    """sigma(raw) times the sum of the partials, both in float64."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        exists = lanes < programs - start
        sums += tl.load(sums_ptr + start + lanes, mask=exists, other=0.0).to(tl.float64)
    raw = tl.load(raw_ptr).to(tl.float64)
    small = tl.exp(-tl.abs(raw))
    sigmoid = tl.where(raw < 0.0, small, 1.0) / (1.0 + small)
    # Through float32: the interpreter has no float64 to bfloat16.
    tl.store(out_ptr, (sigmoid * tl.sum(sums)).to(tl.float32).to(out_ptr.dtype.element_ty))


@triton.jit
def _bias_gradient(sums_ptr, out_ptr, columns, rows, cols, ROWS: tl.constexpr):
    """The sum of `columns` over the rows: ROWS of them at a time, so that loads wait together."""
    lanes = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, columns.shape[0]], tl.float32)
    for row in range(0, rows, ROWS):
        offsets = (row + lanes)[:, None] * cols + columns[None, :]
        exists = (lanes < rows - row)[:, None] & (columns < cols)[None, :]
        sums += tl.load(sums_ptr + offsets, mask=exists, other=0.0)
    total = tl.sum(sums, axis=0)
    tl.store(out_ptr + columns, total.to(out_ptr.dtype.element_ty), mask=columns < cols)


@triton.jit(do_not_specialize=["programs", "row_programs"])
def _finish_kernel(
    alpha_sums_ptr,
    bias_sums_ptr,
    alpha_p_ptr,
    alpha_n_ptr,
    d_alpha_p_ptr,
    d_alpha_n_ptr,
    d_bias_ptr,
    programs,
    row_programs,
    cols,
    HAS_BIAS: tl.constexpr,
    ALPHA_SUMS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    BIAS_COLS: tl.constexpr,
):
    """Add up the partials: a program for each alpha, and one for each BIAS_COLS of the bias."""
    program = tl.program_id(0)
    if program == 0:
        _alpha_gradient(alpha_sums_ptr, alpha_p_ptr, d_alpha_p_ptr, programs, ALPHA_SUMS)
    elif program == 1:
        second = alpha_sums_ptr + programs
        _alpha_gradient(second, alpha_n_ptr, d_alpha_n_ptr, programs, ALPHA_SUMS)
    elif HAS_BIAS:
        columns = (program - 2) * BIAS_COLS + tl.arange(0, BIAS_COLS)
        _bias_gradient(bias_sums_ptr, d_bias_ptr, columns, row_programs, cols, BIAS_ROWS)


def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1 at import)."""
    return isinstance(_forward_kernel, InterpretedFunction)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Layout:
    """How a tensor's elements are divided among programs; a function of shape and device only."""

    def __init__(self, x: Tensor, bias: Tensor | None, programs: dict[bool, int]) -> None:
        self.numel = x.numel()
        self.cols = BLOCK if bias is None else bias.numel()
        rows = triton.cdiv(self.numel, self.cols)
        col_blocks = triton.cdiv(self.cols, BLOCK)
        most = _multiprocessors(x.device) * programs[bias is not None] // col_blocks
        # At least one, also for an empty tensor: its gradients are zeros, and written.
        self.row_programs = max(1, min(rows, most))
        self.programs = col_blocks * self.row_programs


def _on(device: torch.device):
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def forward(
    name: str, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, bias: Tensor | None
) -> Tensor:
    """``f(x + bias)``, contiguous, in x's dtype. See `functional` for the arguments."""
    x = x.contiguous()
    y = torch.empty_like(x)
    layout = _Layout(x, bias, FORWARD_PROGRAMS)
    with _on(x.device):
        _forward_kernel[(layout.programs,)](
            x,
            bias,
            alpha_p,
            alpha_n,
            y,
            layout.numel,
            layout.cols,
            layout.row_programs,
            beta,
            NAME=name,
            HAS_BIAS=bias is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return y


def backward(
    name: str,
    dy: Tensor,
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    beta: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients by x (contiguous), both alphas and the bias, each in the dtype of its input."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    layout = _Layout(x, bias, BACKWARD_PROGRAMS)
    d_alpha_p, d_alpha_n = torch.empty_like(alpha_p), torch.empty_like(alpha_n)
    alpha_sums = x.new_empty((2, layout.programs), dtype=torch.float32)
    bias_sums = d_bias = None
    if bias is not None:
        bias_sums = x.new_empty((layout.row_programs, layout.cols), dtype=torch.float32)
        d_bias = torch.empty_like(bias)
    with _on(x.device):
        _backward_kernel[(layout.programs,)](
            dy,
            x,
            bias,
            alpha_p,
            alpha_n,
            dx,
            alpha_sums,
            bias_sums,
            layout.numel,
            layout.cols,
            layout.row_programs,
            beta,
            NAME=name,
            HAS_BIAS=bias is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
        bias_programs = 0
        if bias is not None:
            bias_programs = triton.cdiv(layout.cols, FINISH_BLOCKS["BIAS_COLS"])
        _finish_kernel[(2 + bias_programs,)](
            alpha_sums,
            bias_sums,
            alpha_p,
            alpha_n,
            d_alpha_p,
            d_alpha_n,
            d_bias,
            layout.programs,
            layout.row_programs,
            layout.cols,
            HAS_BIAS=bias is not None,
            **FINISH_BLOCKS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return dx, d_alpha_p, d_alpha_n, d_bias
