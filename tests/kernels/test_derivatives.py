"""Derivatives beyond the first in reverse mode: of every kind and order, on every backend.

A float32 result is compared with PyTorch's derivative of a naive formula in float64, and float64
with finite differences.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from megatron_xielu import XIELU, XIPReLU, functional

pytestmark = pytest.mark.usefixtures("backend")

BOTH = pytest.mark.parametrize("name", ["xielu", "xiprelu"])
# What does not depend on the backend: it alone takes float64.
EAGER = pytest.mark.parametrize("dtype", [torch.float64], ids=str)
BETA = 0.5


def naive(name: str, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, bias: Tensor) -> Tensor:
    """In operations that PyTorch differentiates, in float64: right for the moderate x of a test."""
    x, soft_p, soft_n = x.double() + bias, alpha_p.double().exp(), alpha_n.double().exp()
    soft_p, soft_n = soft_p.log1p(), soft_n.log1p()
    negative = (soft_n + BETA) * (x.exp() - 1 - x) if name == "xielu" else soft_n * x * x
    return torch.where(x > 0, soft_p * x * x, negative) + BETA * x


def dual(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
    """The tangent of the result for tangents that are the inputs."""
    with forward_ad.dual_level():
        results = function(*(forward_ad.make_dual(t, 0.7 * t.detach()) for t in inputs))
        return torch.utils._pytree.tree_map(lambda r: forward_ad.unpack_dual(r).tangent, results)


def gradients(function: Callable[..., Tensor], create_graph: bool = False) -> Callable[..., Any]:
    def of(*inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=create_graph)

    return of


def twice(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Any:
    return gradients(lambda *i: sum(g.square().sum() for g in gradients(function, True)(*i)))(
        *inputs
    )


def dual_upstream(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Any:
    """Forward mode that begins in the backward pass, after a forward pass that knew nothing."""
    y = function(*inputs)
    return dual(lambda dy: torch.autograd.grad(y, inputs, dy), [torch.ones_like(y)])


def total(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: function(*inputs).sum()


ALL = (0, 1, 2, 3)  # x, both alphas, bias
ROWS = (0, None, None, None)
DERIVATIVES: dict[str, Callable[[Callable[..., Tensor], Sequence[Tensor]], Any]] = {
    "forward mode": dual,
    "forward over reverse": lambda f, i: dual(gradients(f), i),
    "reverse over forward": lambda f, i: gradients(lambda *j: dual(f, j))(*i),
    "forward mode of a backward pass": dual_upstream,
    "twice": twice,
    "jvp": lambda f, i: torch.func.jvp(f, tuple(i), tuple(i)),
    "vjp": lambda f, i: torch.func.vjp(f, *i)[1](torch.ones_like(i[0])),
    "jacfwd": lambda f, i: torch.func.jacfwd(f, ALL)(*i),
    "jacrev": lambda f, i: torch.func.jacrev(f, ALL)(*i),
    "hessian": lambda f, i: torch.func.hessian(total(f), ALL)(*i),
    "reverse over reverse": lambda f, i: torch.func.jacrev(torch.func.grad(total(f)))(*i),
    "of each row": lambda f, i: torch.func.vmap(torch.func.grad(total(f), ALL), ROWS)(*i),
}


def inputs_of(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(10)
    leaves = torch.randn(3, 5), torch.tensor([0.2]), torch.tensor([-1.1]), torch.randn(5)
    return [leaf.to(dtype).requires_grad_() for leaf in leaves]


def with_bias(name: str) -> Callable[..., Tensor]:
    def function(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, bias: Tensor) -> Tensor:
        return getattr(functional, name)(x, alpha_p, alpha_n, bias=bias)

    return function


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@BOTH
def test_of_every_kind(name: str, dtype: torch.dtype) -> None:
    """Right whatever computes the activation, and never left out in silence."""
    inputs, ours = inputs_of(dtype), with_bias(name)

    def exact(*inputs: Tensor) -> Tensor:
        return naive(name, *inputs).to(dtype)

    for kind, derivative in DERIVATIVES.items():
        torch.testing.assert_close(
            derivative(ours, inputs), derivative(exact, inputs), msg=lambda m, k=kind: f"{k}: {m}"
        )


@EAGER
def test_compiled_and_traced(dtype: torch.dtype) -> None:
    inputs, ours = inputs_of(dtype), with_bias("xielu")
    plain = [leaf.detach() for leaf in inputs]
    torch._dynamo.reset()
    _, tangent = torch.func.jvp(ours, tuple(plain), tuple(plain))
    torch.testing.assert_close(torch.func.linearize(ours, *plain)[1](*plain), tangent)
    gradient = torch.compile(torch.func.grad(total(ours), ALL), backend="aot_eager")
    torch.testing.assert_close(gradient(*plain), gradients(ours)(*inputs))
    compiled = torch.compile(ours, backend="aot_eager")
    compiled(*plain)  # a graph that knows no tangents
    torch.testing.assert_close(dual(compiled, plain), dual(ours, plain))
    operator = torch.ops.megatron_xielu.xielu.default
    with pytest.raises(RuntimeError, match="no forward-mode derivative in a graph"):
        dual(lambda x, *alphas: operator(x, *alphas, BETA), plain[:3])
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        twice(torch.compile(ours, backend="aot_eager"), inputs)


@EAGER
@BOTH
def test_gradcheck(name: str, dtype: torch.dtype) -> None:
    """Finite differences of the first derivatives and of the second, in both modes."""
    torch.manual_seed(4)
    x = torch.randn(3, 5, dtype=dtype)
    x = torch.where(x.abs() < 0.01, x + 0.1, x)  # xIPReLU's curvature jumps at 0
    alphas = [torch.tensor([a], dtype=dtype) for a in (0.2, -1.1)]
    bias = 0.001 * torch.arange(5, dtype=dtype)
    inputs = tuple(t.requires_grad_() for t in (x, *alphas, bias))

    def function(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, bias: Tensor) -> Tensor:
        return getattr(functional, name)(x, alpha_p, alpha_n, bias=bias)

    for of, of_inputs in ((function, inputs), (getattr(functional, name), inputs[:3])):
        assert torch.autograd.gradcheck(of, of_inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(of, of_inputs, check_fwd_over_rev=True)


@BOTH
def test_derivatives_where_branches_meet_and_at_the_ends(name: str) -> None:
    def function(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
        return getattr(functional, name)(x, alpha_p, alpha_n)

    zero, soft = torch.zeros(()), math.log(2.0)  # softplus(0); its derivatives are 1/2 and 1/4
    curvature = {"xielu": soft + BETA, "xiprelu": 2 * soft}[name]
    of_x, of_p, of_n = (torch.func.grad(function, which) for which in range(3))
    second = torch.func.hessian(function, (0, 1, 2))(zero, zero, zero)
    assert of_x(zero, zero, zero).item() == BETA
    assert second[0][0].item() == pytest.approx(curvature)
    two = torch.tensor(2.0)
    basis = {"xielu": math.expm1(-2.0) + 2.0, "xiprelu": 4.0}[name]
    assert of_p(two, zero, zero).item() == pytest.approx(4.0 / 2)
    assert of_n(-two, zero, zero).item() == pytest.approx(basis / 2)
    for x, factor, which in ((two, 4.0, 1), (-two, basis, 2)):
        second = torch.func.hessian(function, (0, 1, 2))(x, zero, zero)
        assert second[which][which].item() == pytest.approx(factor / 4)
    for far in (1e4, math.inf):
        assert not math.isnan(of_x(torch.tensor(-far), zero, zero).item())
        assert of_p(torch.tensor(far), zero, zero).item() > 1e7
        assert of_p(torch.tensor(-far), zero, zero).item() == 0.0
    assert of_x(torch.tensor(math.nan), zero, zero).isnan()


@EAGER
@pytest.mark.parametrize("activation", [XIELU, XIPReLU])
def test_gradients_of_each_sample(activation: type, dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), activation(), torch.nn.Linear(6, 1))
    parameters, x = dict(model.to(dtype).named_parameters()), torch.randn(5, 4, dtype=dtype)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).sum()

    of_each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for row, sample in enumerate(x):
        expected = torch.autograd.grad(model(sample).sum(), tuple(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(of_each[name][row], gradient)
