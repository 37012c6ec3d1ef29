"""`functional` against the float64 oracle, and its contract with autograd and the compiler.

Every test runs on every backend: eager, compiled, and Triton (on a GPU, or in the interpreter).

Forward bound: 0.51 units in the last place of the exact result (0.5 is the rounding to storage)
plus 2^-22 of the largest term of the formula, which is what float32 arithmetic leaves where terms
of opposite sign meet; 2^-50 for float64. Alphas are handed to oracle and operator as the same
stored numbers, x and dy likewise, so no rounding of inputs enters.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from transformers.activations import XIELUActivation

from megatron_xielu import functional
from megatron_xielu.kernels import eager, reference

pytestmark = pytest.mark.usefixtures("backend")

NAMES = ("xielu", "xiprelu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RAWS = (-50.0, -5.0, 0.0, 0.2, 1.1, 20.0, 41.0, 174.0, 200.0)
INF, NAN = float("inf"), float("nan")
BETA = 0.5
# How much a backend takes at a time: what the eager one and a program of Triton's take in a step,
# and what makes a compiled loop use several threads.
BLOCKS = {
    "eager": eager._CPU_ELEMENTS_PER_THREAD * torch.get_num_threads(),
    "compiled": 2**15,
    "triton": 1024 * (16 if torch.cuda.is_available() else interpreter.PROGRAMS),
}
# float32 backends overflow x^2 beyond this; the eager one adds the alpha gradients up in float64.
LARGEST = 1.8e19


def arithmetic_eps(dtype: torch.dtype) -> float:
    return 2.0**-50 if dtype == torch.float64 else 2.0**-22


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring numbers of dtype around exact (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs()).exponent - 1
    lowest = torch.frexp(torch.tensor(info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(exact, info.eps), torch.maximum(exponent, lowest))


def effective(alpha_p: Tensor, alpha_n: Tensor) -> tuple[Tensor, Tensor]:
    """softplus of both, 0-d."""
    return reference.softplus(alpha_p).reshape(()), reference.softplus(alpha_n).reshape(())


def largest_term(name: str, x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
    """Of alpha_p x^2, beta x, alpha_n expm1(x), alpha_n x (alpha_n x^2), where they apply."""
    x = x.double()
    pos, neg = x.clamp_min(0.0), -x.clamp_max(0.0)
    soft_p, soft_n = effective(alpha_p, alpha_n)
    on_neg = (soft_n + BETA) * neg if name == "xielu" else soft_n * neg * neg
    return torch.stack([soft_p * pos * pos, BETA * x.abs(), on_neg]).amax(0)


def largest_slope_term(name: str, x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
    x = x.double()
    soft_p, soft_n = effective(alpha_p, alpha_n)
    neg = x.clamp_max(0.0)
    on_neg = (soft_n + BETA) * -torch.expm1(neg) if name == "xielu" else -2.0 * soft_n * neg
    return 2.0 * soft_p * x.clamp_min(0.0) + on_neg + BETA


def assert_within(got: Tensor, exact: Tensor, term: Tensor) -> None:
    """got is the exact result rounded to got's dtype, within the bound of the module docstring;
    at the very end of the range, the largest number and inf will both do. So will any infinity or
    NaN where the bound is infinite: dy = inf times a slope that is 0 to within rounding."""
    dtype = got.dtype
    bound = 0.51 * ulp(exact, dtype) + arithmetic_eps(dtype) * term
    got, exact_in_dtype = got.double(), exact.to(dtype).double()
    same = (got == exact_in_dtype) | (got.isnan() & exact.isnan())
    close = (got - exact).abs() <= bound
    limit = torch.finfo(dtype).max
    at_the_edge = (got.abs() >= limit * 0.999) & (exact.abs() >= limit * 0.999)
    at_the_edge &= got.sign() == exact.sign()
    undecided = (bound == INF) & ~got.isfinite() & ~exact.isnan()
    wrong = ~(same | close | at_the_edge | undecided)
    assert not wrong.any(), (got[wrong][:4], exact[wrong][:4], bound[wrong][:4])


def assert_alpha_gradient(got: Tensor, exact: Tensor, rtol: float, atol: float = 0.0) -> None:
    assert got.shape == exact.shape
    if exact.isnan().any():
        assert got.isnan().all()
        return
    limit = torch.finfo(got.dtype).max
    got, exact = (t.double().clamp(-limit, limit) for t in (got, exact))
    torch.testing.assert_close(got, exact, rtol=rtol, atol=atol)


def check(
    name: str,
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    *dys: Tensor,
    bias: Tensor | None = None,
) -> None:
    """Output of one call, and all gradients for each dy, against the oracle."""
    x = x.detach().requires_grad_()
    alpha_p, alpha_n = (a.detach().requires_grad_() for a in (alpha_p, alpha_n))
    inputs = [x, alpha_p, alpha_n]
    if bias is not None:
        bias = bias.detach().requires_grad_()
        inputs.append(bias)
    y = getattr(functional, name)(x, alpha_p, alpha_n, bias=bias)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    gradients = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in dys]
    x, alpha_p, alpha_n = (t.detach() for t in (x, alpha_p, alpha_n))
    if bias is not None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32  # of the arithmetic
        x = x.to(wide) + bias.detach().to(wide)
    exact_y = getattr(reference, name)(x, alpha_p, alpha_n)
    assert_within(y.detach(), exact_y, largest_term(name, x, alpha_p, alpha_n))
    for dy, of_dy in zip(dys, gradients, strict=True):
        assert [g.dtype for g in of_dy] == [t.dtype for t in inputs]
        check_gradients(name, x, alpha_p, alpha_n, dy, of_dy)


def check_gradients(
    name: str,
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    dy: Tensor,
    gradients: tuple[Tensor, ...],
) -> None:
    """x includes the bias."""
    dx, d_p, d_n, *d_bias = gradients
    backward = getattr(reference, f"{name}_backward")
    exact_dx, exact_p, exact_n = backward(dy, x, alpha_p, alpha_n)
    assert_within(
        dx, exact_dx, 2.0 * dy.double().abs() * largest_slope_term(name, x, alpha_p, alpha_n)
    )
    if d_bias:
        exact_bias = exact_dx.sum_to_size(d_bias[0].shape)
        torch.testing.assert_close(
            d_bias[0].double(),
            exact_bias.to(d_bias[0].dtype).double(),
            rtol=torch.finfo(d_bias[0].dtype).eps,
            atol=1e-6 * exact_dx.abs().sum_to_size(d_bias[0].shape).max().item(),
        )
    # The sums may cancel: their error is relative to the sum of magnitudes, which is what
    # gives 1e-5 of the total in the tests below, where the total does not vanish.
    magnitude = backward(dy.abs(), x, alpha_p, alpha_n)[1:]
    for got, exact, size in zip((d_p, d_n), (exact_p, exact_n), magnitude, strict=True):
        if not size.isfinite() and not dy.isfinite().all():
            # inf times a basis below float32's range may be NaN where the oracle has inf.
            assert not got.isfinite().any()
            continue
        finite_size = size.item() if size.isfinite() else 0.0
        rounding = 0.51 * torch.finfo(got.dtype).eps
        tiny = torch.finfo(got.dtype).smallest_normal * max(1.0, float(dy.numel()))
        assert_alpha_gradient(got, exact, rounding, 1e-6 * finite_size + tiny)


def layouts(x: Tensor) -> Iterator[Tensor]:
    """x of 24 elements in shapes and strides a model, or a careless caller, may produce."""
    yield x
    yield x[0].reshape(())
    yield x[:0]
    yield x.view(2, 3, 4)
    yield x.view(2, 1, 3, 2, 2)
    yield x.view(4, 6).t()
    yield x.view(2, 3, 4).permute(2, 0, 1)
    yield x.view(4, 6)[:, ::2]
    yield x.view(4, 6)[1:, 1:4]
    yield x.view(24, 1).expand(24, 3)
    yield x[3].expand(2, 5)
    yield x.view(2, 3, 2, 2).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_strides(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base, base_dy = torch.randn(2, 24, dtype=torch.float64).to(dtype)
    kinds = list(itertools.product((torch.float32, dtype), ((1,), ())))
    for number, (x, dy) in enumerate(zip(layouts(base), layouts(base_dy), strict=True)):
        pairs = (
            (x, dy),
            (x, dy.contiguous()),
            (x.contiguous(), dy),
            (x, torch.ones((), dtype=dtype).expand(x.shape)),
        )
        # Each layout meets every kind of alpha, and so does each pair.
        for turn, (this, upstream) in enumerate(pairs):
            alpha_dtype, shape = kinds[(number + turn) % len(kinds)]
            alpha_p = torch.full(shape, 0.2, dtype=alpha_dtype)
            alpha_n = torch.full(shape, -1.1, dtype=alpha_dtype)
            check(name, this, alpha_p, alpha_n, upstream)


@pytest.mark.parametrize("raw", RAWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_extreme_alphas(name: str, dtype: torch.dtype, raw: float, backend: str) -> None:
    torch.manual_seed(1)
    # The interpreter takes as long for a block as a loop does for all.
    count = 300 if backend == "triton" and not torch.cuda.is_available() else 2000
    noise = torch.randn(5, count, dtype=torch.float64)
    scales = torch.tensor([1e-4, 0.02, 1.0, 4.0, 60.0], dtype=torch.float64)
    # 0 and the switches at -1/2 and -1
    ends = torch.linspace(-1.0, 1.0, count + 1, dtype=torch.float64)
    x = torch.cat([(noise * scales[:, None]).flatten(), ends]).to(dtype)
    dy = torch.randn_like(x)
    for other in (raw, 0.2):
        check(name, x, torch.tensor([raw]), torch.tensor([other]), dy)
        check(name, x, torch.tensor(other).to(dtype), torch.tensor(raw).to(dtype), dy)


@pytest.mark.parametrize("raw", [-50.0, 0.2, 200.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_special_values_one_by_one(name: str, dtype: torch.dtype, raw: float) -> None:
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    magnitudes = (tiny, info.smallest_normal, 1e-6, 0.5, 90.0, 6e4, info.max, INF)
    alpha = torch.tensor([raw])
    for value in (0.0, -0.0, NAN, *magnitudes, *(-m for m in magnitudes)):
        x = torch.tensor([value, 1.0, -1.0]).to(dtype)
        # The slope of a huge x is out of float32's range, whatever dy would make of it.
        is_huge = abs(value) >= 1e30 and dtype != torch.float64
        upstreams = (1.0, INF, NAN) if is_huge else (1.0, -0.5, 0.0, INF, NAN)
        dys = (torch.tensor([upstream, 1.0, 1.0]).to(dtype) for upstream in upstreams)
        check(name, x, alpha, alpha, *dys)


@pytest.mark.parametrize("name", NAMES)
def test_products_beyond_float32_in_the_alpha_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_XIELU_BACKEND", "eager")
    # sigma(-50) = 2e-22 brings dy x^2 = 1e42 back into range.
    x, alpha = torch.tensor([1e21, -1e21]), torch.tensor([-50.0])
    check(name, x, alpha, alpha, torch.ones(2))


@pytest.mark.parametrize("scale", [1e-4, 0.02, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_alpha_gradients_to_1e_minus_5_of_the_total(
    name: str, dtype: torch.dtype, scale: float, backend: str
) -> None:
    torch.manual_seed(2)
    # Each lane of the compiled loop adds up to 4096 terms in a row, which costs up to 6e-6 of sums
    # of bf16 numbers without dy's signs; how many it adds here depends on the machine's lanes.
    size, rtol = (2**20, 1e-5) if backend == "compiled" else (BLOCKS[backend], 1e-6)
    # More than one block, the last one ragged.
    x = (scale * torch.randn(size + 77)).to(dtype)
    alpha_p, alpha_n = (torch.tensor([a], requires_grad=True) for a in (0.2, -1.1))
    for dy in (torch.randn_like(x) + 0.1, torch.ones(()).to(dtype)):
        dy = dy.expand(x.shape)
        y = getattr(functional, name)(x, alpha_p, alpha_n)
        got = torch.autograd.grad(y, (alpha_p, alpha_n), dy)
        backward = getattr(reference, f"{name}_backward")
        exact = backward(dy, x, alpha_p, alpha_n)[1:]
        for g, e in zip(got, exact, strict=True):
            assert_alpha_gradient(g, e, rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_bitwise_repeatable(name: str, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(3)
    x = torch.randn(2 * BLOCKS[backend] + 5).to(dtype).requires_grad_()
    dy = torch.randn_like(x)
    alphas = [torch.tensor([a], requires_grad=True) for a in (0.2, -1.1)]
    runs = []
    for _ in range(3):
        y = getattr(functional, name)(x, *alphas)
        runs.append((y.detach(), *torch.autograd.grad(y, (x, *alphas), dy)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_bias(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    # One column, one row, a part of a block, a block and a bit, more rows than programs, three.
    for shape in ((5, 1), (1, 7), (7,), (2, 3, 24), (0, 4), (3, 1500), (40, 30), (3, 40)):
        x, dy = torch.randn(2, *shape, dtype=torch.float64).to(dtype)
        alpha_p, alpha_n = torch.tensor([0.2]), torch.tensor([-1.1])
        for bias_dtype in {torch.float32, dtype}:
            bias = torch.randn(shape[-1], dtype=torch.float64).to(bias_dtype)
            check(name, x, alpha_p, alpha_n, dy, bias=bias)
        if len(shape) == 3:
            for axis in (0, 1):
                moved, moved_dy = x.transpose(axis, 2), dy.transpose(axis, 2)
                bias = torch.randn(moved.shape[-1])
                check(name, moved, alpha_p, alpha_n, moved_dy, bias=bias)
                ones = torch.ones((), dtype=dtype).expand(moved.shape)
                check(name, moved, alpha_p, alpha_n, ones, bias=bias)


@pytest.mark.parametrize("name", NAMES)
def test_three_blocks_of_columns(name: str) -> None:
    """So as many programs of Triton's, whose sum is over a power of two."""
    torch.manual_seed(9)
    x, bias = torch.randn(2, 2100), torch.randn(2100)
    alphas = [torch.tensor([a], requires_grad=True) for a in (0.2, -1.1)]
    y = getattr(functional, name)(x, *alphas, bias=bias)
    got = torch.autograd.grad(y, alphas, torch.ones_like(y))
    backward = getattr(reference, f"{name}_backward")
    exact = backward(torch.ones_like(y), x.double() + bias.double(), *alphas)[1:]
    for g, e in zip(got, exact, strict=True):
        assert_alpha_gradient(g, e, 1e-5)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=4),
    raws=st.tuples(st.floats(-50.0, 200.0), st.floats(-50.0, 200.0)),
    transpose=st.booleans(),
)
def test_any_input(
    data: st.DataObject,
    name: str,
    dtype: torch.dtype,
    shape: list[int],
    raws: tuple[float, float],
    transpose: bool,
) -> None:
    count = int(torch.Size(shape).numel())
    value = st.one_of(st.floats(width=16), st.floats(width=32), st.floats(-4.0, 4.0))
    x = torch.tensor(data.draw(st.lists(value, min_size=count, max_size=count)))
    if os.environ["MEGATRON_XIELU_BACKEND"] != "eager":
        dtype = torch.float32 if dtype == torch.float64 else dtype
        x = torch.where(x.abs() > LARGEST, x * 1e-20, x)
    # dy is moderate: a slope out of float32's range times a tiny dy is the stated limit.
    moderate = st.floats(-2.0, 2.0).filter(lambda v: abs(v) > 1.0)
    dy = torch.tensor(data.draw(st.lists(moderate, min_size=count, max_size=count)))
    x, dy = x.to(dtype).reshape(shape), dy.to(dtype).reshape(shape)
    if transpose:
        x, dy = x.transpose(0, -1) if shape else x, dy.transpose(0, -1) if shape else dy
    check(name, x, torch.tensor([raws[0]]), torch.tensor(raws[1]), dy)


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_element_of_every_output_is_written(
    name: str, dtype: torch.dtype, backend: str
) -> None:
    alpha = torch.tensor([0.2], requires_grad=True)
    block = BLOCKS[backend]
    for shape in ((1,), (31,), (block - 1,), (block,), (block + 1,), (3, 1500)):
        x = torch.linspace(-3.0, 3.0, math.prod(shape)).to(dtype).view(shape).requires_grad_()
        bias = torch.zeros(shape[-1], requires_grad=True) if len(shape) == 2 else None
        with nan_filled_memory():
            assert torch.empty(3).isnan().all()
            y = getattr(functional, name)(x, alpha, alpha, bias=bias)
            inputs = (x, alpha) if bias is None else (x, alpha, bias)
            gradients = torch.autograd.grad(y, inputs, torch.ones_like(y))
        for t in (y, *gradients):
            assert t.isfinite().all()


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_for_x_only_and_alphas_only(name: str, wanted: tuple[bool, bool]) -> None:
    for_x, for_alphas = wanted
    x = torch.linspace(-2.0, 2.0, 9).requires_grad_(for_x)
    alphas = [torch.tensor([a], requires_grad=for_alphas) for a in (0.2, -1.1)]
    getattr(functional, name)(x, *alphas).sum().backward()
    exact = getattr(reference, f"{name}_backward")(torch.ones_like(x), x, *alphas)
    for t, e in zip((x, *alphas), exact, strict=True):
        if t.requires_grad:
            torch.testing.assert_close(t.grad, e.float())
        else:
            assert t.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_saves_x_and_the_alphas_and_nothing_else(name: str) -> None:
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    # Not even a contiguous copy of x.
    x = torch.randn(6, 4).bfloat16().t().requires_grad_()
    alphas = [torch.tensor([a], requires_grad=True) for a in (0.2, -1.1)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        getattr(functional, name)(x, *alphas)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (x, *alphas)]
    assert saved[0].stride() == x.stride()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing(name: str, use_reentrant: bool) -> None:
    torch.manual_seed(5)
    x = torch.randn(7, 8, requires_grad=True)
    alphas = [torch.tensor([a], requires_grad=True) for a in (0.2, -1.1)]
    function = getattr(functional, name)
    plain = torch.autograd.grad(function(x, *alphas).sum(), (x, *alphas))
    checkpoint(function, x, *alphas, use_reentrant=use_reentrant).sum().backward()
    assert all(torch.equal(t.grad, p) for t, p in zip((x, *alphas), plain, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_keeps_the_dtype_of_x(name: str) -> None:
    torch.manual_seed(6)
    x, weight = torch.randn(4, 8), torch.randn(16, 8, requires_grad=True)
    alphas = [torch.tensor([a], requires_grad=True) for a in (0.2, -1.1)]
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        hidden = torch.nn.functional.linear(x, weight)
        y = getattr(functional, name)(hidden, *alphas)
    assert y.dtype == hidden.dtype == torch.bfloat16
    exact = getattr(reference, name)(hidden, *alphas)
    assert_within(y.detach(), exact, largest_term(name, hidden.detach(), *alphas).detach())
    y.float().sum().backward()
    assert weight.grad is not None
    assert all(a.grad is not None and a.grad.dtype == torch.float32 for a in alphas)


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors(name: str) -> None:
    x = torch.empty(5, 4, 3, dtype=torch.bfloat16, device="meta").transpose(0, 2).requires_grad_()
    alphas = [torch.empty(1, device="meta", requires_grad=True) for _ in range(2)]
    y = getattr(functional, name)(x, *alphas)
    assert (y.device.type, y.dtype, y.shape) == ("meta", x.dtype, x.shape)
    gradients = torch.autograd.grad(y, (x, *alphas), torch.empty_like(y))
    assert y.is_contiguous() and gradients[0].is_contiguous()  # as they are made
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in (x, *alphas)]


class GraphCounter:
    """A compiler backend that counts graphs, and the calls of our operators in them."""

    def __init__(self) -> None:
        self.operators: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        self.operators.append([t for t in targets if "megatron_xielu" in t])
        return graph.forward


@pytest.mark.parametrize("name", NAMES)
def test_compiles_to_one_operator_without_recompiling_for_a_new_batch_size(name: str) -> None:
    torch._dynamo.reset()
    counter = GraphCounter()
    function = getattr(functional, name)
    alphas = [torch.tensor([a]) for a in (0.2, -1.1)]
    compiled = torch.compile(
        lambda x: function(x * 2.0, *alphas) + 1.0, backend=counter, fullgraph=True, dynamic=True
    )
    for batch in (2, 3, 17):
        x = torch.randn(batch, 6)
        assert torch.equal(compiled(x), function(x * 2.0, *alphas) + 1.0)
    assert len(counter.operators) == 1
    assert len(counter.operators[0]) == 1
    assert name in counter.operators[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_forward_and_backward_equal_eager(name: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    function = getattr(functional, name)
    alphas = [torch.tensor([a], requires_grad=True) for a in (0.2, -1.1)]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 9, 2):
            x = torch.randn(batch, 3, 5).to(dtype).transpose(1, 2).requires_grad_()
            torch._dynamo.mark_dynamic(x, 0)
            dy = torch.randn(x.shape).to(dtype)
            results = []
            for f in (function, compiled):
                y = f(x, *alphas)
                results.append((y.detach(), *torch.autograd.grad(y, (x, *alphas), dy)))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiles_with_the_default_backend_and_a_beta_argument() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(functional.xielu, fullgraph=True)
    x = torch.randn(5, 7, requires_grad=True)
    alphas = [torch.tensor([a], requires_grad=True) for a in (0.2, -1.1)]
    for beta in (0.5, 0.75):
        results = []
        for f in (functional.xielu, compiled):
            y = f(x, *alphas, beta=beta)
            results.append((y.detach(), *torch.autograd.grad(y.sum(), (x, *alphas))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_both_passes_in_one_traced_graph(name: str, backend: str) -> None:
    alphas = [torch.tensor([a], requires_grad=True) for a in (0.2, -1.1)]
    x = torch.randn(3, 4, requires_grad=True)

    def step(x: Tensor, *alphas: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(getattr(functional, name)(x, *alphas).sum(), (x, *alphas))

    # Real tensors run the backend; torch.compile cannot run while FX traces.
    mode = "fake" if backend == "compiled" else "real"
    graph = make_fx(step, tracing_mode=mode)(x, *alphas)
    assert sum(f"megatron_xielu.{name}" in str(node.target) for node in graph.graph.nodes) == 2
    with torch.no_grad():  # else the operator, which has derivatives, goes by the formula
        traced = graph(x, *alphas)
    assert all(map(torch.equal, traced, step(x, *alphas)))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    forward = getattr(torch.ops.megatron_xielu, name).default
    backward = getattr(torch.ops.megatron_xielu, f"{name}_backward").default
    for x in (torch.randn(4, 6), torch.randn(2, 3, 4).bfloat16().transpose(0, 2), torch.zeros(0)):
        alphas = [torch.tensor([a]) for a in (0.2, -1.1)]
        torch.library.opcheck(backward, (torch.ones_like(x), x, *alphas, BETA))
        with_grad = [t.clone().requires_grad_() for t in (x, *alphas)]
        torch.library.opcheck(forward, (*with_grad, BETA))
        if x.numel() == 0:
            continue
        bias = torch.zeros(x.shape[-1])
        torch.library.opcheck(backward, (torch.ones_like(x), x, *alphas, BETA, bias))
        torch.library.opcheck(forward, (*with_grad, BETA, bias.requires_grad_()))


def test_transformers_activation_as_a_peer() -> None:
    # The peer computes expm1(min(x, eps)) with eps = -1e-6. For x <= eps it is the same function;
    # on (eps, 0] it returns alpha_n (expm1(eps) - x) + beta x, below ours by up to alpha_n 1e-6,
    # and its slope there is beta - alpha_n. Its alpha_n gradient is off by as little per element.
    torch.manual_seed(7)
    peer = XIELUActivation(dtype=torch.float32)
    peer.alpha_p.data.fill_(0.7)
    alpha_n = reference.softplus(peer.alpha_n).item() + BETA
    x = torch.cat([torch.randn(4000), 1e-6 * torch.rand(50) - 1e-6, torch.zeros(1)])
    x.requires_grad_()
    dy = torch.rand_like(x)
    y, ours = peer(x), functional.xielu(x, peer.alpha_p, peer.alpha_n)
    tolerance = 1.01e-6 * alpha_n
    torch.testing.assert_close(ours, y, rtol=1e-6, atol=tolerance)
    assert (ours - y)[-1].item() == pytest.approx(1e-6 * alpha_n, rel=1e-3)
    inputs = (x, peer.alpha_p, peer.alpha_n)
    dx_p, *theirs = torch.autograd.grad(y, inputs, dy)
    dx, *own = torch.autograd.grad(ours, inputs, dy)
    outside = (x < -1e-6) | (x > 0)
    torch.testing.assert_close(dx[outside], dx_p[outside], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dx[-1:], dy[-1:] * BETA)
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
