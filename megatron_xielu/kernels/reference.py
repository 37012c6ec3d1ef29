"""The oracle: xIELU and xIPReLU in closed form, in float64, against which all else is judged.

With raw (trained, stored) parameters ``a_p``, ``a_n``, ``softplus(z) = log(1 + e^z)``, ``sigma``
its derivative, and ``h(x) = expm1(x) - x``:

    xIELU     x > 0     alpha_p x^2 + beta x
              x <= 0    alpha_n h(x) + beta x            alpha_n = beta + softplus(a_n)
    xIPReLU   x > 0     alpha_p x^2 + beta x
              x <= 0    alpha_n x^2 + beta x             alpha_n = softplus(a_n)
    both                                                 alpha_p = softplus(a_p)

The slope at 0 is beta from both sides. xIELU is from Huang and Schlag, "Deriving Activation
Functions Using Integration" (arXiv:2411.13010). Their code clamps the negative branch at
eps = -1e-6; the closed forms here need no clamp.

Three rules make this an oracle and not just another implementation:

- Nothing cancels that need not. On x <= 0 xIELU is summed as ``softplus(a_n) h(x) + beta expm1(x)``
  (the same function, with beta x absorbed), so that x = -inf gives +inf and not inf - inf, and
  its slope as ``softplus(a_n) expm1(x) + beta e^x``. A quadratic is ``(alpha x + beta) x``.
- A branch is chosen by ``torch.where`` on the operands, before any arithmetic: what the other
  branch would have computed, or an infinite upstream gradient there, cannot leak in as NaN.
- A NaN in x belongs to both branches, so it shows in the output and in every gradient.

Shapes: x and dy are any one shape and dtype; alphas are numbers or tensors of one element.
Everything comes back in float64. Autograd, in either mode, and `torch.func` differentiate it as
often as one likes, also where a branch begins and at a raw alpha of 0: `functional` has the
derivatives from here that the kernels do not compute.
"""

from collections.abc import Iterator
from math import factorial

import torch
from torch import Tensor

from megatron_xielu.catalog import DEFAULT_BETA

__all__ = [
    "BACKWARD",
    "FORWARD",
    "expm1_minus_x",
    "grouped",
    "grouped_backward",
    "inverse_softplus",
    "sigmoid",
    "softplus",
    "xielu",
    "xielu_backward",
    "xiprelu",
    "xiprelu_backward",
]

# Coefficients of q(x) = h(x) / x^2 = sum of x^k / (k + 2)!. On [-1/2, 0] the first term left out
# is 2^-14 / 16!, below 2^-57 of q: more terms would not change a float64 result.
Q_TAYLOR = tuple(1.0 / factorial(k + 2) for k in range(14))


def _float64(value: Tensor | float, device: torch.device | None = None) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(torch.float64)
    return torch.tensor(value, dtype=torch.float64, device=device)


def softplus(z: Tensor | float) -> Tensor:
    """``log(1 + e^z)`` in float64, any shape, with neither an overflow nor a cut-off.

    ``torch.nn.functional.softplus`` returns z itself above a threshold of 20; here the small
    term stays.
    """
    z = _float64(z)
    return torch.logaddexp(z, torch.zeros_like(z))


def inverse_softplus(y: Tensor | float) -> Tensor:
    """The raw parameter whose softplus is y > 0: ``log(e^y - 1)`` in float64, any shape.

    Written as ``y + log(1 - e^-y)``, which neither overflows for large y nor loses digits for
    small y. y = 0 gives -inf, y < 0 gives NaN.
    """
    y = _float64(y)
    return y + torch.log(-torch.expm1(-y))


def sigmoid(z: Tensor | float) -> Tensor:
    """``d softplus / dz = 1 / (1 + e^-z)`` in float64, any shape, with full relative accuracy
    also where it is tiny (``1 / (1 + e^-z)`` itself overflows to 0 below -709)."""
    z = _float64(z)
    return torch.where(z < -100.0, torch.exp(z.clamp_max(-100.0)), torch.sigmoid(z))


def expm1_minus_x(x: Tensor | float) -> Tensor:
    """``h(x) = expm1(x) - x`` for x <= 0 in float64, any shape, to a few units in the last place.

    Close to 0 the difference cancels (at x = -1e-8 no digit would be left), so on [-1/2, 0] it is
    ``x^2 q(x)`` with the power series of q.
    """
    x = _float64(x)
    near = torch.where(x >= -0.5, x, torch.zeros_like(x))
    q = torch.full_like(near, Q_TAYLOR[-1])
    for coefficient in reversed(Q_TAYLOR[:-1]):
        q = q * near + coefficient
    return torch.where(x >= -0.5, near * near * q, torch.expm1(x) - x)


def _branches(x: Tensor) -> tuple[Tensor, Tensor]:
    """x where it is positive, and x where it is not; 0 elsewhere, NaN in both."""
    zero = torch.zeros_like(x)
    return torch.where(x <= 0, zero, x), torch.where(x > 0, zero, x)


def _alpha_gradient(raw: Tensor, dy: Tensor, *factors: Tensor) -> Tensor:
    """``sigma(raw) * sum(dy * factors)``, in the shape of raw.

    Multiplied one by one: dy x x stays finite where x^2 alone would overflow.
    """
    for factor in factors:
        dy = dy * factor
    return (sigmoid(raw) * dy.sum()).reshape(raw.shape)


def xielu(
    x: Tensor, alpha_p: Tensor | float, alpha_n: Tensor | float, *, beta: float = DEFAULT_BETA
) -> Tensor:
    """xIELU of x (any shape) for raw alpha_p, alpha_n; float64."""
    x = _float64(x)
    soft_p = softplus(_float64(alpha_p, x.device)).reshape(())
    soft_n = softplus(_float64(alpha_n, x.device)).reshape(())
    pos, neg = _branches(x)
    return torch.where(
        x > 0,
        (soft_p * pos + beta) * pos,
        soft_n * expm1_minus_x(neg) + beta * torch.expm1(neg),
    )


def xielu_backward(
    dy: Tensor,
    x: Tensor,
    alpha_p: Tensor | float,
    alpha_n: Tensor | float,
    *,
    beta: float = DEFAULT_BETA,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(dy * xielu(x))`` by x, alpha_p and alpha_n.

    Returns dx in the shape of x, and the alpha gradients in the shapes of the (raw) alphas:
    ``sigma(a_p) sum_{x>0} dy x^2`` and ``sigma(a_n) sum_{x<=0} dy h(x)``; float64.
    """
    dy, x = _float64(dy), _float64(x)
    raw_p, raw_n = _float64(alpha_p, x.device), _float64(alpha_n, x.device)
    soft_p, soft_n = softplus(raw_p).reshape(()), softplus(raw_n).reshape(())
    pos, neg = _branches(x)
    dy_pos, dy_neg = torch.where(x <= 0, 0.0, dy), torch.where(x > 0, 0.0, dy)
    slope = torch.where(
        x > 0,
        2.0 * soft_p * pos + beta,
        soft_n * torch.expm1(neg) + beta * torch.exp(neg),
    )
    return (
        dy * slope,
        _alpha_gradient(raw_p, dy_pos, pos, pos),
        _alpha_gradient(raw_n, dy_neg, expm1_minus_x(neg)),
    )


def xiprelu(
    x: Tensor, alpha_p: Tensor | float, alpha_n: Tensor | float, *, beta: float = DEFAULT_BETA
) -> Tensor:
    """xIPReLU of x (any shape) for raw alpha_p, alpha_n; float64."""
    x = _float64(x)
    soft_p = softplus(_float64(alpha_p, x.device)).reshape(())
    soft_n = softplus(_float64(alpha_n, x.device)).reshape(())
    return (torch.where(x > 0, soft_p, soft_n) * x + beta) * x


def xiprelu_backward(
    dy: Tensor,
    x: Tensor,
    alpha_p: Tensor | float,
    alpha_n: Tensor | float,
    *,
    beta: float = DEFAULT_BETA,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(dy * xiprelu(x))`` by x, alpha_p and alpha_n.

    Returns dx in the shape of x, and the alpha gradients in the shapes of the (raw) alphas:
    ``sigma(a) sum dy x^2`` over the branch of each; float64.
    """
    dy, x = _float64(dy), _float64(x)
    raw_p, raw_n = _float64(alpha_p, x.device), _float64(alpha_n, x.device)
    soft_p, soft_n = softplus(raw_p).reshape(()), softplus(raw_n).reshape(())
    pos, neg = _branches(x)
    dy_pos, dy_neg = torch.where(x <= 0, 0.0, dy), torch.where(x > 0, 0.0, dy)
    return (
        dy * (2.0 * torch.where(x > 0, soft_p, soft_n) * x + beta),
        _alpha_gradient(raw_p, dy_pos, pos, pos),
        _alpha_gradient(raw_n, dy_neg, neg, neg),
    )


# By the name of the activation.
FORWARD = {"xielu": xielu, "xiprelu": xiprelu}
BACKWARD = {"xielu": xielu_backward, "xiprelu": xiprelu_backward}


def _expert_slices(ranges: Tensor, rows: int) -> Iterator[tuple[slice, int]]:
    """Of each expert its real rows, and how many rows of padding come after them."""
    starts, ends = ranges.clamp(0, rows).tolist()
    for start, end, next_start in zip(starts, ends, [*starts[1:], rows], strict=True):
        yield slice(start, end), next_start - end


def grouped(
    activation: str,
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    ranges: Tensor,
    row_weights: Tensor | None = None,
    *,
    beta: float = DEFAULT_BETA,
) -> Tensor:
    """Each expert's rows by its own alphas, times the weights of the rows; float64, (rows, ffn).

    Args:
        activation: ``xielu`` or ``xiprelu``.
        x: (rows, ffn).
        alpha_p, alpha_n: raw, (experts,).
        ranges: integers, (2, experts): the first row of each expert, and one past its last real
            one. The rows from there to the next expert's, or to the end, are padding: 0.
        row_weights: (rows,) or (rows, 1).
    """
    pieces = []
    for expert, (rows, padding) in enumerate(_expert_slices(ranges, len(x))):
        y = FORWARD[activation](x[rows], alpha_p[expert], alpha_n[expert], beta=beta)
        if row_weights is not None:
            y = y * _float64(row_weights[rows]).reshape(-1, 1)
        pieces += [y, y.new_zeros(padding, x.shape[1])]
    return torch.cat(pieces)


def grouped_backward(
    activation: str,
    dy: Tensor,
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    ranges: Tensor,
    row_weights: Tensor | None = None,
    *,
    beta: float = DEFAULT_BETA,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of ``sum(dy * grouped(x))`` by x, alpha_p, alpha_n and the weights.

    Returns each in the shape of its input, float64; None for weights that are None.
    """
    pieces, d_alphas, d_weights = [], [], []
    for expert, (rows, padding) in enumerate(_expert_slices(ranges, len(x))):
        upstream, alphas = _float64(dy[rows]), (alpha_p[expert], alpha_n[expert])
        if row_weights is not None:
            value = FORWARD[activation](x[rows], *alphas, beta=beta)
            sums = (upstream * value).sum(1)
            d_weights += [sums, sums.new_zeros(padding)]
            upstream = upstream * _float64(row_weights[rows]).reshape(-1, 1)
        dx, *of_alphas = BACKWARD[activation](upstream, x[rows], *alphas, beta=beta)
        pieces += [dx, dx.new_zeros(padding, x.shape[1])]
        d_alphas.append(torch.stack(of_alphas))
    d_alpha_p, d_alpha_n = torch.stack(d_alphas).unbind(1)
    d_row_weights = None if row_weights is None else torch.cat(d_weights).reshape(row_weights.shape)
    return torch.cat(pieces), d_alpha_p, d_alpha_n, d_row_weights
