"""What only a GPU can show of the Triton kernels.

``make test-gpu`` runs it with what the interpreter runs elsewhere: all that is marked ``gpu``.
"""

import pytest
import torch
from test_functional import check
from test_grouped import check_values

from megatron_xielu import functional, grouped
from megatron_xielu.kernels import choose, eager, gpu_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ("xielu", "xiprelu")
ALPHAS = (0.2, -1.1)


def test_the_backend_of_a_cuda_tensor() -> None:
    assert choose.choose(torch.zeros(1, device="cuda")) is gpu_triton
    assert choose.choose(torch.zeros(1, device="cuda", dtype=torch.float64)) is eager


# 9216 columns are nine blocks, 3001 two and a ragged one; a program takes some 25 rows of either.
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(4096, 9216), (4097, 3001)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_many_times_round_the_loop(name, dtype, shape, has_bias):
    torch.manual_seed(0)
    x = (2.0 * torch.randn(shape, device="cuda")).to(dtype)
    dy = (1.0 + torch.randn(shape, device="cuda")).to(dtype)
    alphas = [torch.tensor([a], device="cuda") for a in ALPHAS]
    bias = torch.randn(shape[1], device="cuda") if has_bias else None
    check(name, x, *alphas, dy, bias=bias)


def _inputs(*shape: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    alphas = (torch.tensor([a], device="cuda", requires_grad=True) for a in ALPHAS)
    return x, *alphas, torch.randn_like(x)


@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_replays_it_without_synchronisation(name):
    x, alpha_p, alpha_n, dy = _inputs(512, 9216)

    def step():
        y = getattr(functional, name)(x, alpha_p, alpha_n)
        return y, *torch.autograd.grad(y, (x, alpha_p, alpha_n), dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.detach().fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("has_bias", [False, True])
def test_allocates_its_outputs_and_partials_only(has_bias):
    x, alpha_p, alpha_n, dy = _inputs(4096, 9216)
    bias = torch.zeros(9216, device="cuda", requires_grad=True) if has_bias else None
    for _ in range(2):  # the first call compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = functional.xielu(x, alpha_p, alpha_n, bias=bias)
        inputs = (x, alpha_p, alpha_n) + ((bias,) if has_bias else ())
        gradients = torch.autograd.grad(y, inputs, dy)
        extra = torch.cuda.max_memory_allocated() - before
        del y, gradients
    partials = (16 if has_bias else 1) * 2**20
    assert extra <= 2 * x.numel() * x.element_size() + partials


@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_times_the_same_bits(name):
    x, alpha_p, alpha_n, dy = _inputs(8192, 9216)
    y = getattr(functional, name)(x, alpha_p, alpha_n)
    first = torch.autograd.grad(y, (x, alpha_p, alpha_n), dy, retain_graph=True)
    for _ in range(100):
        again = torch.autograd.grad(y, (x, alpha_p, alpha_n), dy, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


EXPERTS = 64


def _rows_of_experts(
    rows: int, cols: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    """x, both alphas, dy, weights, tokens and rows of each expert; NaN where there is padding."""
    torch.manual_seed(0)
    # Two experts have none, and one has a third.
    share = torch.rand(EXPERTS, device="cuda")
    share[0], share[5:7] = share.sum() / 2, 0.0
    tokens = (share / share.sum() * (rows - 32 * EXPERTS)).long()
    taken = (tokens + 15) // 16 * 16
    x = 2.0 * torch.randn(rows, cols, device="cuda")
    dy, weights = torch.randn_like(x), torch.rand(rows, device="cuda")
    ranges = grouped._ranges(x, tokens, taken)
    row = torch.arange(rows, device="cuda")[:, None]
    padding = ~((row >= ranges[0]) & (row < ranges[1])).any(1)
    for tensor in (x, dy, weights):
        tensor[padding] = float("nan")
    # Of which the float32 softplus is known to be within the bound.
    alphas = torch.tensor(ALPHAS, device="cuda").repeat(EXPERTS // 2)
    leaves = [x.to(dtype), alphas, alphas.flip(0)]
    return *(t.requires_grad_() for t in leaves), dy.to(dtype), weights, tokens, taken


@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize("cols", [1408, 3001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_experts(name, dtype, cols, has_weights):
    *inputs, dy, weights, tokens, taken = _rows_of_experts(12_000, cols, dtype)
    if has_weights:
        inputs.append(weights.requires_grad_())
    function = getattr(grouped, f"grouped_{name}")
    counts = {"tokens_per_expert": tokens, "rows_per_expert": taken}
    y = function(*inputs[:3], row_weights=weights if has_weights else None, **counts)
    results = [y, *torch.autograd.grad(y, inputs, dy)]
    as_list = function(
        *inputs[:3], tokens.tolist(), rows_per_expert=taken.tolist(), row_weights=(*inputs, None)[3]
    )
    assert torch.equal(as_list, y)
    x, *alphas = (t.detach() for t in inputs[:3])
    ranges = grouped._ranges(x, tokens, taken)
    given = weights.detach() if has_weights else None
    check_values(name, x, dy, alphas, ranges, given, *(t.detach() for t in results))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_experts_wait_for_nothing_and_repeat_their_bits(name):
    """A hundred times, and in a CUDA graph that meets other counts than it was captured with."""
    *inputs, dy, weights, tokens, taken = _rows_of_experts(8192, 2048)
    inputs.append(weights.requires_grad_())
    in_lists = tokens.tolist(), taken.tolist()

    def step(tokens, taken):
        y = getattr(grouped, f"grouped_{name}")(
            *inputs[:3], tokens, rows_per_expert=taken, row_weights=weights
        )
        return y, *torch.autograd.grad(y, inputs, dy)

    def equal(results, others):
        return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(tokens, taken)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected, of_lists = step(tokens, taken), step(*in_lists)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert equal(of_lists, expected)
    assert all(equal(step(tokens, taken), expected) for _ in range(100))
    given = tokens.clone()
    given.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(given, taken)
    given.copy_(tokens)
    graph.replay()
    torch.cuda.synchronize()
    assert equal(captured, expected)
