"""What the functions refuse: one line that names the argument, before anything is computed."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_xielu import functional

X, ALPHA, BIAS = torch.randn(2, 3), torch.zeros(1), torch.zeros(3)
NESTED = [torch.zeros(2, 3), torch.zeros(1, 3)]
DTYPES = "must be float64, float32, bfloat16 or float16, not"
BETA = r"beta must be from 1\.2e-38 to 3\.4e\+38 \(float32\), not"


@pytest.mark.filterwarnings("ignore")  # sparse, nested and quantized tensors are not stable
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be a tensor, not NoneType"),
        ({"x": np.ones(3)}, TypeError, "x must be a tensor, not ndarray"),
        ({"x": X.int()}, TypeError, f"x {DTYPES} torch.int32"),
        ({"x": X > 0}, TypeError, f"x {DTYPES} torch.bool"),
        ({"x": X.to(torch.complex64)}, TypeError, f"x {DTYPES} torch.complex64"),
        ({"x": X.to(torch.float8_e4m3fn)}, TypeError, f"x {DTYPES} torch.float8_e4m3fn"),
        (
            {"x": lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)},
            TypeError,
            f"x {DTYPES} torch.qint8",
        ),
        ({"x": X.to_sparse}, TypeError, "x must be a dense tensor, not torch.sparse_coo"),
        ({"x": X.to_sparse_csr}, TypeError, "x must be a dense tensor, not torch.sparse_csr"),
        ({"x": X.to_mkldnn}, TypeError, "x must be a dense tensor, not torch._mkldnn"),
        (
            {"x": lambda: torch.nested.nested_tensor(NESTED)},
            TypeError,
            "x must be a dense tensor, not a nested one",
        ),
        (
            {"x": lambda: torch.nested.nested_tensor(NESTED, layout=torch.jagged)},
            TypeError,
            "x must be a dense tensor, not a nested one",
        ),
        ({"alpha_p": 0.8}, TypeError, "alpha_p must be a tensor, not float"),
        ({"alpha_n": None}, TypeError, "alpha_n must be a tensor, not NoneType"),
        ({"alpha_n": np.zeros(1)}, TypeError, "alpha_n must be a tensor, not ndarray"),
        ({"alpha_p": ALPHA.to_sparse}, TypeError, "alpha_p must be a dense tensor"),
        ({"alpha_p": torch.zeros(2)}, ValueError, "alpha_p must have one element"),
        ({"alpha_n": torch.zeros(1, 1)}, ValueError, "alpha_n must have one element"),
        ({"alpha_n": torch.zeros(0)}, ValueError, "alpha_n must have one element"),
        ({"alpha_p": ALPHA.int()}, TypeError, "alpha_p is torch.int32"),
        ({"alpha_p": ALPHA.double()}, TypeError, "alpha_p is torch.float64"),
        ({"alpha_p": ALPHA.to(torch.complex64)}, TypeError, "alpha_p is torch.complex64"),
        (
            {"alpha_n": ALPHA.bfloat16()},
            TypeError,
            r"alpha_n is torch.bfloat16: keep it in float32.*float32",
        ),
        ({"alpha_p": ALPHA.to("meta")}, ValueError, "alpha_p is on meta and x on cpu"),
        ({"x": X.to("meta")}, ValueError, "alpha_p is on cpu and x on meta"),
        ({"beta": None}, TypeError, "beta must be a Python number, not NoneType"),
        ({"beta": True}, TypeError, "beta must be a Python number, not bool"),
        ({"beta": torch.tensor(0.5)}, TypeError, "beta must be a Python number, not Tensor"),
        *(
            ({"beta": beta}, ValueError, BETA)
            for beta in (0, -0.5, 1e-46, 1e39, 10**400, float("inf"), float("nan"))
        ),
        ({"bias": [0.0] * 3}, TypeError, "bias must be a tensor, not list"),
        ({"bias": BIAS.to_sparse}, TypeError, "bias must be a dense tensor"),
        ({"bias": BIAS[:2]}, ValueError, r"bias must have one .* x is \(2, 3\) and bias \(2,\)"),
        ({"x": X[0, 0], "bias": BIAS[:1]}, ValueError, "bias must have one element"),
        ({"x": X[:, :0], "bias": BIAS[:0]}, ValueError, "bias must have one element"),
        ({"bias": BIAS.bfloat16()}, TypeError, "bias is torch.bfloat16"),
        ({"bias": BIAS.to("meta")}, ValueError, "bias is on meta"),
    ],
)
@pytest.mark.parametrize("name", ["xielu", "xiprelu"])
def test_bad_input(name: str, arguments: dict[str, Any], error: type, message: str) -> None:
    given = {"x": X, "alpha_p": ALPHA, "alpha_n": ALPHA} | arguments
    with pytest.raises(error, match=message) as raised:
        getattr(functional, name)(**{k: v() if callable(v) else v for k, v in given.items()})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["xielu", "xiprelu"])
def test_views_that_negate(name: str, backend: str) -> None:
    """The imaginary part of a conjugate is a view of numbers of the other sign."""
    negated = torch.randn(3, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    plain = negated.resolve_neg().clone()
    results = []
    for view in (negated, plain):
        inputs = [t.detach().requires_grad_() for t in (view, view[:1], view[1:2], view)]
        y = getattr(functional, name)(*inputs[:3], bias=inputs[3])
        results.append([y, *torch.autograd.grad(y, inputs, view)])
    assert all(map(torch.equal, *results))
