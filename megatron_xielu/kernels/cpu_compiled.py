"""xIELU and xIPReLU on a CPU through PyTorch's compiler: one vectorised, threaded loop a pass.

The formulas are those of `gpu_triton`: closed-form gradients of x alone, so nothing but x is
kept, and float32 inside. The sums behind the alpha and bias gradients are float32 within a chunk of
`_CHUNK` elements and float64 over the chunks (float64 throughout is half again as slow), in the
order of threads and chunks: bitwise repeatable for one number of threads. Within a chunk the
compiler adds 4096 terms in a row, then pairwise: measured, 6e-6 of the sum at worst.

Compiled once for each activation and dtype, with and without a bias, for every size at once. What
it cannot take (a machine without a C++ compiler) raises; `backends` then uses the eager one.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_xielu.kernels import eager, reference
from megatron_xielu.kernels.polynomials import Q_UNIT

# Long beside the 50 microseconds of a call, short beside what a float32 sum can hold.
_CHUNK = 2**22

_Effective = tuple[Tensor, Tensor, Tensor, Tensor]  # alpha_p, alpha_n, softplus(a_n), beta: 0-d


def _q(x: Tensor) -> Tensor:
    q = x * Q_UNIT[-1] + Q_UNIT[-2]
    for coefficient in Q_UNIT[-3::-1]:
        q = q * x + coefficient
    return q


def _xielu(x: Tensor, effective: _Effective) -> Tensor:
    alpha_p, alpha_n, soft_n, beta = effective
    near = (x * torch.where(x > 0, alpha_p, alpha_n * _q(x)) + beta) * x
    far = alpha_n * torch.exp(x) - (soft_n * x + alpha_n)
    return torch.where(x > -1, near, far)


def _xielu_slope(x: Tensor, effective: _Effective) -> tuple[Tensor, Tensor]:
    """f'(x), and the factor of dy in the gradient of the alpha on x's side."""
    alpha_p, alpha_n, _, beta = effective
    is_near, is_pos = x > -1, x > 0
    near_basis = x * x * torch.where(is_pos, 1.0, _q(x))
    expm1 = torch.where(is_near, x + near_basis, torch.exp(x) - 1)
    slope = torch.where(is_pos, 2 * alpha_p * x, alpha_n * expm1) + beta
    return slope, torch.where(is_near, near_basis, expm1 - x)


def _xiprelu(x: Tensor, effective: _Effective) -> Tensor:
    alpha_p, alpha_n, _, beta = effective
    return (torch.where(x > 0, alpha_p, alpha_n) * x + beta) * x


def _xiprelu_slope(x: Tensor, effective: _Effective) -> tuple[Tensor, Tensor]:
    alpha_p, alpha_n, _, beta = effective
    return 2 * torch.where(x > 0, alpha_p, alpha_n) * x + beta, x * x


def _load(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.float() if bias is None else x.float() + bias


def _define(value: Callable, slope_of: Callable) -> tuple[Callable, Callable]:
    # Both write into memory that they are given; backward is called chunk by chunk.
    def forward(x: Tensor, effective: _Effective, bias: Tensor | None, y_out: Tensor) -> None:
        y_out.copy_(value(_load(x, bias), effective))

    def backward(
        dy: Tensor, x: Tensor, effective: _Effective, bias: Tensor | None, dx_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        shifted, dy = _load(x, bias), dy.float()
        slope, basis = slope_of(shifted, effective)
        dx, term = dy * slope, dy * basis
        dx_out.copy_(dx)
        # A NaN in x belongs to both sides, as in the oracle.
        sum_p = torch.where(shifted <= 0, 0.0, term).sum()
        sum_n = torch.where(shifted > 0, 0.0, term).sum()
        return sum_p, sum_n, None if bias is None else dx.sum(0)

    return forward, backward


_FUNCTIONS = {"xielu": _define(_xielu, _xielu_slope), "xiprelu": _define(_xiprelu, _xiprelu_slope)}


@functools.cache
def _compiled(name: str, direction: int, dtype: torch.dtype, has_bias: bool) -> Callable:
    function = _FUNCTIONS[name][direction]
    # A code object for each: the compiler counts recompilations by code object, and stops at 8.
    code = function.__code__.replace(co_name=f"{name}_{function.__name__}_{dtype}_{has_bias}")
    own = types.FunctionType(code, function.__globals__, closure=function.__closure__)
    # Else the first size seen, here or by whoever filled the compiler's cache, decides for all
    # sizes whether the loop is threaded.
    return torch.compile(own, dynamic=True, fullgraph=True, options={"cpp.dynamic_threads": True})


def _effective(name: str, alpha_p: Tensor, alpha_n: Tensor, beta: float) -> _Effective:
    soft_p, soft_n = (reference.softplus(alpha).reshape(()) for alpha in (alpha_p, alpha_n))
    full_n = soft_n + beta if name == "xielu" else soft_n
    values = (soft_p, full_n, soft_n, torch.full_like(soft_p, beta))
    return tuple(value.float() for value in values)  # type: ignore[return-value]


def formula(
    name: str,
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    beta: float,
    bias: Tensor | None = None,
) -> Tensor:
    """``f(x + bias)``, any dtype, in operations that every exporter knows."""
    if x.dtype == torch.float64:
        exact = reference.FORWARD[name]
        return exact(x if bias is None else x + bias, alpha_p, alpha_n, beta=beta)
    value = {"xielu": _xielu, "xiprelu": _xiprelu}[name]
    return value(_load(x, bias), _effective(name, alpha_p, alpha_n, beta)).to(x.dtype)


def _chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of whole rows, the last one longer than the others rather than a single row."""
    rows = max(2, _CHUNK // math.prod(shape[1:]))
    count = max(1, shape[0] // rows)
    for i in range(count):
        yield slice(i * rows, shape[0] if i == count - 1 else (i + 1) * rows)


def _plain(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same values as a contiguous tensor that begins at its own address, is no view and not on
    the autograd tape: the compiler would compile anew for each of these. Copies only if it must."""
    return torch.from_dlpack(tensor.detach().reshape(shape).contiguous())


def _plain_bias(bias: Tensor | None) -> Tensor | None:
    """In float32, whatever it is in: the compiler would compile anew for each dtype."""
    return None if bias is None else _plain(bias.float(), bias.shape)


@contextmanager
def _below_autograd() -> Iterator[None]:
    """The same dispatch state whoever calls, autograd or a compiled graph: the compiler guards on
    it."""
    with torch._C._AutoDispatchBelowADInplaceOrView(), torch.no_grad():
        yield


def _shape(x: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """x is taken flat, or as [rows, columns of the bias]."""
    if bias is None:
        return (x.numel(),)
    return x.numel() // bias.numel(), bias.numel()


def forward(
    name: str, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, bias: Tensor | None
) -> Tensor:
    """``f(x + bias)``, contiguous, in x's dtype. See `functional` for the arguments."""
    shape = _shape(x, bias)
    if min(shape) < 2:  # the compiler takes sizes 0 and 1 for constants
        return eager.forward(name, x, alpha_p, alpha_n, beta, bias)
    function = _compiled(name, 0, x.dtype, bias is not None)
    y = torch.empty(x.shape, dtype=x.dtype)
    with _below_autograd():
        function(
            _plain(x, shape),
            _effective(name, alpha_p, alpha_n, beta),
            _plain_bias(bias),
            _plain(y, shape),
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
    shape = _shape(x, bias)
    if min(shape) < 2:
        return eager.backward(name, dy, x, alpha_p, alpha_n, beta, bias)
    function = _compiled(name, 1, x.dtype, bias is not None)
    dx = torch.empty(x.shape, dtype=x.dtype)
    sums = []
    with _below_autograd():
        effective = _effective(name, alpha_p, alpha_n, beta)
        tensors = [t.reshape(shape) for t in (dy, x, dx)]
        plain_bias = _plain_bias(bias)
        for chunk in _chunks(shape):
            dy_chunk, x_chunk, dx_chunk = (_plain(t[chunk], t[chunk].shape) for t in tensors)
            sums.append(function(dy_chunk, x_chunk, effective, plain_bias, dx_chunk))
    sum_p, sum_n = (_total(sums, which) for which in (0, 1))
    return (
        dx,
        (sum_p * reference.sigmoid(alpha_p)).to(alpha_p.dtype),
        (sum_n * reference.sigmoid(alpha_n)).to(alpha_n.dtype),
        None if bias is None else _total(sums, 2).to(bias.dtype),
    )


def _total(sums: list[tuple[Tensor, ...]], which: int) -> Tensor:
    return torch.stack([chunk[which] for chunk in sums]).sum(0, dtype=torch.float64)
