"""What only a GPU can show of the Triton kernels.

``make test-gpu`` runs it with what the interpreter runs elsewhere: all that is marked ``gpu``.
"""

import pytest
import torch
from test_functional import check

from megatron_xielu import functional
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
