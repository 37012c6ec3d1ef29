"""xIELU and xIPReLU in plain PyTorch operations: any device, no compiler, little memory.

Works through the flat tensor in blocks that stay in cache, with in-place operations on buffers of
one block. Beside the outputs nothing full-size is allocated, unless x or dy has a layout that
cannot be viewed flat. The sums behind the alpha and bias gradients are float64 in a fixed order.
"""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from megatron_xielu.kernels import reference
from megatron_xielu.kernels.polynomials import Q_HALF

# q on [-1/2, 0]: a polynomial for float32, the oracle's power series for float64.
_Q_COEFFICIENTS = {torch.float32: Q_HALF, torch.float64: reference.Q_TAYLOR}
_EXP_MINUS_HALF = math.exp(-0.5)

# PyTorch gives a CPU thread at least 2^15 elements. Twice that halves the cost of dispatch, and a
# thread's share of a buffer (256 KiB in float32) still stays in cache from one operation to the
# next; 2^15 measured slower, 2^17 no faster.
_CPU_ELEMENTS_PER_THREAD = 2**16
# Elsewhere a block only has to be long beside a kernel launch and small beside the tensors.
_DEVICE_ELEMENTS = 2**24


class _Formula(Protocol):
    """The arithmetic of one activation on one block; all tensors 1-D in the compute dtype.

    `buffers` are scratch blocks. An implementation holds the effective alphas and what follows
    from them as 0-d tensors on x's device, so that nothing waits for a device to be read.
    """

    # The term of alpha_n is alpha_n * basis ** basis_power.
    basis_power: int

    def __init__(
        self, alpha_p: Tensor, alpha_n: Tensor, beta: float, dtype: torch.dtype
    ) -> None: ...

    def value(self, x: Tensor, out: Tensor, *buffers: Tensor) -> None:
        """out = f(x)."""

    def slope(self, x: Tensor, out: Tensor, basis: Tensor, *buffers: Tensor) -> None:
        """out = f'(x); basis = that of alpha_n at min(x, 0)."""


class _XIELU:
    """xIELU without branches: x is split, and each part vanishes outside its own interval.

    With ``pos = max(x, 0)``, ``z = clamp(x, -1/2, 0)`` and ``r = min(x + 1/2, 0)``:

        A        = z^2 q(z) + e^-1/2 expm1(r)
        expm1(x) = A + z    and    h(x) = A - r                      for x <= 0
        f(x)     = (alpha_p pos + beta) pos + beta z + alpha_n A - softplus(a_n) r

    Exact at r = 0, free of cancellation near 0, and finite minus finite, or plus inf, at -inf:
    beta x has been folded into the terms it would otherwise be subtracted from.
    """

    basis_power = 1

    def __init__(self, alpha_p: Tensor, alpha_n: Tensor, beta: float, dtype: torch.dtype) -> None:
        soft_p, soft_n = _softplus_0d(alpha_p), _softplus_0d(alpha_n)
        full_n = soft_n + beta
        self.beta = beta
        self.alpha_p, self.alpha_n = soft_p.to(dtype), full_n.to(dtype)
        self.twice_alpha_p = (2.0 * soft_p).to(dtype)
        self.soft_n = soft_n.to(dtype)
        self.scaled_exp = (full_n * _EXP_MINUS_HALF).to(dtype)
        # Filled on the device rather than copied to it: a copy cannot be captured in a CUDA graph.
        self.q = tuple(soft_n.new_full((), c, dtype=dtype) for c in _Q_COEFFICIENTS[dtype])
        # beta + alpha_n z q(z), to be multiplied by z.
        scaled_q = ((full_n * c).to(dtype) for c in _Q_COEFFICIENTS[dtype])
        self.beta_and_scaled_q = (soft_n.new_full((), beta, dtype=dtype), *scaled_q)

    def value(self, x: Tensor, out: Tensor, *buffers: Tensor) -> None:
        part, scratch = buffers
        torch.clamp(x, -0.5, 0.0, out=part)
        _horner(part, self.beta_and_scaled_q, out).mul_(part)
        torch.clamp_max(x, -0.5, out=part).add_(0.5)
        out.addcmul_(part, self.soft_n, value=-1.0)
        out.addcmul_(part.expm1_(), self.scaled_exp)
        torch.clamp_min(x, 0.0, out=part)
        torch.mul(part, self.alpha_p, out=scratch).add_(self.beta)
        out.addcmul_(scratch, part)

    def slope(self, x: Tensor, out: Tensor, basis: Tensor, *buffers: Tensor) -> None:
        part, scratch = buffers
        torch.clamp(x, -0.5, 0.0, out=part)
        _horner(part, self.q, out).mul_(part).mul_(part)
        torch.clamp_max(x, -0.5, out=basis).add_(0.5)
        out.add_(torch.expm1(basis, out=scratch), alpha=_EXP_MINUS_HALF)
        torch.sub(out, basis, out=basis)
        out.add_(part).mul_(self.alpha_n).add_(self.beta)
        torch.clamp_min(x, 0.0, out=part)
        out.addcmul_(part, self.twice_alpha_p)


class _XIPReLU:
    """xIPReLU without branches: ``m = alpha_p max(x, 0) + alpha_n min(x, 0)`` has one term that
    is 0; ``f(x) = (m + beta) x`` and ``f'(x) = 2 m + beta``."""

    basis_power = 2

    def __init__(self, alpha_p: Tensor, alpha_n: Tensor, beta: float, dtype: torch.dtype) -> None:
        soft_p, soft_n = _softplus_0d(alpha_p), _softplus_0d(alpha_n)
        self.beta = beta
        self.alpha_p, self.alpha_n = soft_p.to(dtype), soft_n.to(dtype)
        self.twice_alpha_p, self.twice_alpha_n = (2.0 * soft_p).to(dtype), (2.0 * soft_n).to(dtype)

    def value(self, x: Tensor, out: Tensor, *buffers: Tensor) -> None:
        part = buffers[0]
        torch.clamp_min(x, 0.0, out=out).mul_(self.alpha_p)
        out.addcmul_(torch.clamp_max(x, 0.0, out=part), self.alpha_n)
        out.add_(self.beta).mul_(x)

    def slope(self, x: Tensor, out: Tensor, basis: Tensor, *buffers: Tensor) -> None:
        torch.clamp_min(x, 0.0, out=out).mul_(self.twice_alpha_p)
        out.addcmul_(torch.clamp_max(x, 0.0, out=basis), self.twice_alpha_n)
        out.add_(self.beta)


def _softplus_0d(alpha: Tensor) -> Tensor:
    return reference.softplus(alpha).reshape(())


def _horner(x: Tensor, coefficients: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """out = the polynomial in x, constant term first; coefficients are 0-d tensors."""
    torch.mul(x, coefficients[-1], out=out).add_(coefficients[-2])
    for coefficient in reversed(coefficients[:-2]):
        torch.addcmul(coefficient, out, x, out=out)
    return out


_FORMULAS: dict[str, type[_Formula]] = {"xielu": _XIELU, "xiprelu": _XIPReLU}


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(x: Tensor, cols: int) -> Iterator[slice]:
    """Slices of whole rows of `cols` elements that cover a flat x; a function of its length,
    device and the thread count only."""
    on_cpu = x.device.type == "cpu"
    step = _CPU_ELEMENTS_PER_THREAD * torch.get_num_threads() if on_cpu else _DEVICE_ELEMENTS
    step = max(step // cols, 1) * cols
    for start in range(0, x.numel(), step):
        yield slice(start, min(start + step, x.numel()))


def _buffers(x: Tensor, cols: int, count: int, dtype: torch.dtype) -> list[Tensor]:
    longest = next(_blocks(x, cols), slice(0, 0)).stop
    return [torch.empty(longest, dtype=dtype, device=x.device) for _ in range(count)]


def _columns(bias: Tensor | None) -> int:
    return 1 if bias is None else bias.numel()


def _load(block: Tensor, buffer: Tensor, bias: Tensor | None = None) -> Tensor:
    """The block, plus the bias in each of its rows, in the buffer's dtype: the block itself where
    that is what it is, else in the buffer."""
    if bias is not None:
        rows = (-1, bias.numel())
        torch.add(block.view(rows), bias.to(buffer.dtype), out=buffer.view(rows))
        return buffer
    return block if block.dtype == buffer.dtype else buffer.copy_(block)


def forward(
    name: str, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, bias: Tensor | None
) -> Tensor:
    """``f(x + bias)``, contiguous, in x's dtype. See `functional` for the arguments."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dtype, cols = _compute_dtype(x), _columns(bias)
    formula = _FORMULAS[name](alpha_p, alpha_n, beta, dtype)
    # A layout that cannot be viewed flat (a transpose, say) is copied once, here, in row-major
    # order: the blocks and the order of the sums then depend on the values of x alone.
    flat_x, flat_y = x.reshape(-1), y.view(-1)
    buffers = _buffers(flat_x, cols, 4, dtype)
    for block in _blocks(flat_x, cols):
        x_buffer, y_buffer, *scratch = (b[: block.stop - block.start] for b in buffers)
        y_block = flat_y[block]
        result = y_block if y.dtype == dtype else y_buffer
        formula.value(_load(flat_x[block], x_buffer, bias), result, *scratch)
        if result is not y_block:
            y_block.copy_(result)
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
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dtype, cols = _compute_dtype(x), _columns(bias)
    formula = _FORMULAS[name](alpha_p, alpha_n, beta, dtype)
    # As in the forward pass; an expanded dy (of a sum, say) has a flat view and is not copied.
    flat_dy, flat_x, flat_dx = dy.reshape(-1), x.reshape(-1), dx.view(-1)
    sum_p, sum_n = torch.zeros(2, dtype=torch.float64, device=x.device).unbind()
    sum_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float64)
    buffers = _buffers(flat_x, cols, 6, dtype)
    double_buffers = _buffers(flat_x, cols, 2, torch.float64)
    for block in _blocks(flat_x, cols):
        length = block.stop - block.start
        x_buffer, dy_buffer, slope, basis, part, scratch = (b[:length] for b in buffers)
        doubles = [b[:length] for b in double_buffers]
        x_block, dy_block = _load(flat_x[block], x_buffer, bias), _load(flat_dy[block], dy_buffer)

        formula.slope(x_block, slope, basis, part, scratch)
        flat_dx[block].copy_(slope.mul_(dy_block))
        if sum_bias is not None:
            sum_bias += slope.view(-1, cols).sum(0, dtype=torch.float64)

        _keep_where_positive(dy_block, x_block, 0.0, part)
        sum_p += _sum_of_products(part, torch.clamp_min(x_block, 0.0, out=scratch), 2, doubles)
        # x <= 0 is -x > -(the smallest number): x = 0 belongs to this branch.
        below_zero = -torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        _keep_where_positive(dy_block, torch.neg(x_block, out=scratch), below_zero, part)
        sum_n += _sum_of_products(part, basis, formula.basis_power, doubles)
    return (
        dx,
        (sum_p * reference.sigmoid(alpha_p)).to(alpha_p.dtype),
        (sum_n * reference.sigmoid(alpha_n)).to(alpha_n.dtype),
        None if bias is None or sum_bias is None else sum_bias.to(bias.dtype),
    )


def _keep_where_positive(dy: Tensor, x: Tensor, threshold: float, out: Tensor) -> None:
    """out = dy where x > threshold or x is NaN, else 0, also where dy is inf or NaN.

    This is the derivative of ReLU, which PyTorch vectorises; torch.where and masked_fill_ are
    some five times slower on a CPU.
    """
    torch.ops.aten.threshold_backward.grad_input(dy, x, threshold, grad_input=out)


def _sum_of_products(dy: Tensor, basis: Tensor, power: int, doubles: list[Tensor]) -> Tensor:
    """sum(dy * basis ** power) in float64, where a product cannot leave float32's range."""
    product, factor = doubles
    product.copy_(dy)
    factor.copy_(basis)
    for _ in range(power):
        product.mul_(factor)
    return product.sum()
