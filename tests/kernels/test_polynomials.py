"""The errors that `polynomials` states, in 40 digits."""

from collections.abc import Callable, Sequence

import mpmath
import pytest

from megatron_xielu.kernels import polynomials


def q(x: mpmath.mpf) -> mpmath.mpf:
    return (mpmath.expm1(x) - x) / x**2 if x else mpmath.mpf(1) / 2


def log1p_over_u(u: mpmath.mpf) -> mpmath.mpf:
    return mpmath.log1p(u) / u if u else mpmath.mpf(1)


LN2_HALF = 0.34657359027997264


@pytest.mark.parametrize(
    ("coefficients", "function", "interval", "stated"),
    [
        (polynomials.Q_UNIT, q, (-1.0, 0.0), 1.95e-8),
        (polynomials.Q_HALF, q, (-0.5, 0.0), 2.25e-8),
        (polynomials.EXP, mpmath.exp, (-LN2_HALF, LN2_HALF), 1.95e-9),
        (polynomials.LOG1P, log1p_over_u, (0.0, 1.0), 4.75e-9),
    ],
)
def test_relative_error(
    coefficients: Sequence[float],
    function: Callable[[mpmath.mpf], mpmath.mpf],
    interval: tuple[float, float],
    stated: float,
) -> None:
    low, high = interval
    with mpmath.workdps(40):
        for i in range(501):
            x = mpmath.mpf(low) + (mpmath.mpf(high) - low) * i / 500
            value = mpmath.polyval(list(reversed(coefficients)), x)
            assert abs(value / function(x) - 1) <= stated
