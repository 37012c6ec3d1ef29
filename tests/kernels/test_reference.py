"""The oracle against mpmath at 50 digits, and against autograd of the naive formula in float64.

Error is measured against the largest term of a formula: where two terms of opposite sign meet,
a float64 evaluation can be right in no other sense.
"""

from collections.abc import Callable

import mpmath
import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

from megatron_xielu.kernels import reference

mp.dps = 50

SMALL = (5e-324, 1e-310, 1e-300, 1e-154, 1e-30, 1e-17, 1e-8, 1e-7, 1e-4, 0.02)
MIDDLE = (0.25, 0.4999999, 0.5, 0.5000001, 1.0, 3.0, 20.0, 36.7, 88.0, 745.0, 746.0)
LARGE = (1e4, 1e8, 1e100, 1e154)
MAGNITUDES = (*SMALL, *MIDDLE, *LARGE, float("inf"))
XS = (0.0, *MAGNITUDES, *(-m for m in MAGNITUDES))
RAWS = (-50.0, -5.0, -0.48, 0.0, 0.2, 1.1, 20.0, 40.75, 174.0, 200.0)
BETA = 0.5
NAMES = ("xielu", "xiprelu")
TOLERANCE = mpf(2) ** -49
SMALLEST = mpf(2) ** -1074
LARGEST = mpf(torch.finfo(torch.float64).max)


def exact_softplus(z: float) -> mpmath.mpf:
    return mpmath.log1p(mpmath.exp(mpf(z)))


def exact_sigmoid(z: float) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-mpf(z)))


def exact_h(x: mpmath.mpf) -> mpmath.mpf:
    # Near 0 even 50 digits cancel away.
    return (
        mpmath.nsum(lambda k: x**k / mpmath.factorial(k), [2, 12])
        if (abs(x) < mpf("1e-5"))
        else mpmath.expm1(x) - x
    )


def exact_value(name: str, x: float, raw: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """f(x), and the magnitude of its largest term; one raw alpha for both branches."""
    x, soft = mpf(x), exact_softplus(raw)
    if mpmath.isinf(x):  # the limit; its terms would be inf - inf
        return mpf("inf"), mpf("inf")
    if x > 0 or name == "xiprelu":
        terms = [soft * x * x, BETA * x]
    else:
        terms = [(soft + BETA) * exact_h(x), BETA * x]
    return mpmath.fsum(terms), max(abs(t) for t in terms)


def exact_slope(name: str, x: float, raw: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    x, soft = mpf(x), exact_softplus(raw)
    if x > 0 or name == "xiprelu":
        terms = [2 * soft * x, mpf(BETA)]
    else:
        terms = [soft * mpmath.expm1(x), BETA * mpmath.exp(x)]
    return mpmath.fsum(terms), max(abs(t) for t in terms)


def exact_alpha_term(name: str, x: float) -> mpmath.mpf:
    x = mpf(x)
    return x * x if x > 0 or name == "xiprelu" else exact_h(x)


def assert_rounds_to(got: float, exact: mpmath.mpf, largest_term: mpmath.mpf | None = None) -> None:
    largest_term = abs(exact) if largest_term is None else largest_term
    if abs(exact) > LARGEST:  # rounds to inf, with the sign of exact
        assert got == (float("inf") if exact > 0 else -float("inf"))
        return
    bound = largest_term * TOLERANCE + 4 * SMALLEST
    assert abs(mpf(got) - exact) <= bound, (got, exact, largest_term)


def column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("raw", [-740.0, -300.0, *RAWS, 709.0, 1e6, 1e300])
def test_softplus_and_its_inverse(raw: float) -> None:
    soft = reference.softplus(raw)
    assert_rounds_to(soft.item(), exact_softplus(raw))
    assert_rounds_to(reference.sigmoid(raw).item(), exact_sigmoid(raw))
    # The inverse is exact for the number it is given, soft, not for the raw it came from: where
    # softplus is subnormal, as at -740, neighbouring raws share one value.
    back = reference.inverse_softplus(soft).item()
    exact_back = mpmath.log(mpmath.expm1(mpf(soft.item())))
    assert abs(mpf(back) - exact_back) <= TOLERANCE * max(abs(exact_back), 1)
    if raw >= -700:
        assert back == pytest.approx(raw, rel=1e-15, abs=1e-15)


def test_softplus_at_its_ends() -> None:
    inf, nan = float("inf"), float("nan")
    assert reference.softplus(torch.tensor([inf, -inf])).tolist() == [inf, 0.0]
    assert reference.inverse_softplus(torch.tensor([inf, 0.0])).tolist() == [inf, -inf]
    assert reference.inverse_softplus(-1.0).isnan()
    for function in (reference.softplus, reference.inverse_softplus, reference.sigmoid):
        assert function(nan).isnan()
        assert function(torch.zeros(2, 3, dtype=torch.bfloat16)).shape == (2, 3)
        assert function(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float64


@pytest.mark.parametrize("raw", RAWS)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_slopes_against_mpmath(name: str, raw: float) -> None:
    x = column(XS)
    value = getattr(reference, name)(x, raw, raw)
    slope = getattr(reference, f"{name}_backward")(torch.ones_like(x), x, raw, raw)[0]
    for xi, got_value, got_slope in zip(XS, value.tolist(), slope.tolist(), strict=True):
        assert_rounds_to(got_value, *exact_value(name, xi, raw))
        assert_rounds_to(got_slope, *exact_slope(name, xi, raw))


@pytest.mark.parametrize("raw", RAWS)
@pytest.mark.parametrize("name", NAMES)
def test_alpha_gradients_against_mpmath(name: str, raw: float) -> None:
    backward = getattr(reference, f"{name}_backward")
    alpha = torch.tensor([raw])
    for xi in XS:
        for dy in (1.0, -3e-5):
            _, *got = backward(column((dy,)), column((xi,)), alpha, alpha)
            exact = exact_sigmoid(alpha.item()) * dy * exact_alpha_term(name, xi)
            own, other = got if xi > 0 else got[::-1]
            assert own.shape == other.shape == (1,)
            assert own.dtype == other.dtype == torch.float64
            assert other.item() == 0.0
            if xi != 0:
                assert_rounds_to(own.item(), exact)


@pytest.mark.parametrize("name", NAMES)
def test_alpha_gradients_are_sums_over_their_own_branch(name: str) -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(2, 6, 50, dtype=torch.float64)
    _, d_p, d_n = getattr(reference, f"{name}_backward")(dy, x, 0.2, -0.5)
    pairs = list(zip(dy.flatten().tolist(), x.flatten().tolist(), strict=True))
    for got, raw, mine in ((d_p, 0.2, lambda v: v > 0), (d_n, -0.5, lambda v: v <= 0)):
        terms = [mpf(g) * exact_alpha_term(name, v) for g, v in pairs if mine(v)]
        exact = exact_sigmoid(raw) * mpmath.fsum(terms)
        assert_rounds_to(got.item(), exact, mpmath.fsum(abs(t) for t in terms))
    assert d_p.shape == d_n.shape == ()


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity(name: str) -> None:
    function, backward = getattr(reference, name), getattr(reference, f"{name}_backward")
    inf, nan = float("inf"), float("nan")
    x = column((nan, inf, -inf, 1.0))
    assert function(x, 0.2, 0.3).tolist()[1:3] == [inf, inf]
    assert function(x, 0.2, 0.3).isnan().tolist() == [True, False, False, False]
    gradients = backward(torch.ones_like(x), x, 0.2, 0.3)
    assert gradients[0].isnan().tolist() == [True, False, False, False]
    assert gradients[1].isnan() and gradients[2].isnan()
    # An infinite or NaN dy stays in the branch it belongs to.
    for bad in (inf, nan):
        _, d_p, d_n = backward(column((bad, 1.0)), column((2.0, -2.0)), 0.2, 0.3)
        assert not d_p.isfinite() and d_n.isfinite()
        _, d_p, d_n = backward(column((1.0, bad)), column((2.0, -2.0)), 0.2, 0.3)
        assert d_p.isfinite() and not d_n.isfinite()
    for raw_p, raw_n, poisoned in ((nan, 0.3, 1.0), (0.2, nan, -1.0)):
        assert function(column((poisoned, -poisoned)), raw_p, raw_n).isnan().tolist() == [
            True,
            False,
        ]


@pytest.mark.parametrize("beta", [0.5, 0.3, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_slope_at_zero_is_beta_from_both_sides(name: str, beta: float) -> None:
    x = column((0.0, -0.0, 5e-324, -5e-324, 1e-20, -1e-20))
    dx = getattr(reference, f"{name}_backward")(torch.ones_like(x), x, 3.0, 4.0, beta=beta)[0]
    torch.testing.assert_close(dx, torch.full_like(x, beta), rtol=1e-15, atol=0.0)
    assert getattr(reference, name)(x[:2], 3.0, 4.0, beta=beta).abs().tolist() == [0.0, 0.0]


def test_h_is_continuous_where_the_series_begins() -> None:
    below = torch.nextafter(column((-0.5,)), column((-1.0,)))
    h = reference.expm1_minus_x(torch.cat([below, column((-0.5,))]))
    assert 0.0 <= (h[0] - h[1]).item() <= 4 * torch.finfo(torch.float64).eps * h[1].item()
    x = torch.linspace(-0.52, -0.48, 401, dtype=torch.float64)
    for xi, got in zip(x.tolist(), reference.expm1_minus_x(x).tolist(), strict=True):
        assert_rounds_to(got, exact_h(mpf(xi)))


def naive_xielu(x: Tensor, raw_p: Tensor, raw_n: Tensor) -> Tensor:
    alpha_p, alpha_n = (torch.log1p(torch.exp(raw)) for raw in (raw_p, raw_n))
    negative = (alpha_n + BETA) * (torch.exp(x) - 1 - x)
    return torch.where(x > 0, alpha_p * x**2, negative) + BETA * x


def naive_xiprelu(x: Tensor, raw_p: Tensor, raw_n: Tensor) -> Tensor:
    alpha_p, alpha_n = (torch.log1p(torch.exp(raw)) for raw in (raw_p, raw_n))
    return torch.where(x > 0, alpha_p, alpha_n) * x**2 + BETA * x


@pytest.mark.parametrize(("name", "naive"), [("xielu", naive_xielu), ("xiprelu", naive_xiprelu)])
def test_autograd_of_the_naive_formula(name: str, naive: Callable[..., Tensor]) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    raw_p = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    raw_n = torch.tensor([-1.1], dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    y = naive(x, raw_p, raw_n)
    expected = torch.autograd.grad(y, (x, raw_p, raw_n), dy)
    torch.testing.assert_close(getattr(reference, name)(x, raw_p, raw_n), y.detach())
    got = getattr(reference, f"{name}_backward")(dy, x, raw_p, raw_n)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
