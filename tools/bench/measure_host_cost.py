"""What a call costs the host: forward and backward pass of xIELU on so little that nothing else is.

    python tools/bench/measure_host_cost.py [--device cuda]

The same backend is reached in several ways, which take turns:

    ours            `functional.xielu`: an operator registered with `torch.library.Library`, with an
                    `autograd.Function` as its autograd kernel
    Function        an `autograd.Function` alone: the least there can be, but several nodes in a
                    compiled graph and no operator to export
    custom_op       the operator as `torch.library.custom_op` would register it
    backend alone   both passes without autograd

On a GPU nothing waits for it, so what is timed is the launching. On a CPU computing would take
longest: there the backend is one that allocates its results and leaves them empty.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from bench_flags import need_cuda
from bench_providers import BETA
from torch import Tensor

from megatron_xielu import functional
from megatron_xielu.common.flags import POSITIVE
from megatron_xielu.common.text import ready_output, table
from megatron_xielu.kernels import choose

CALLS = 200  # of one way in a turn
SHAPE = (8, 1024)


class EmptyBackend:
    """In place of a module of `kernels`."""

    @staticmethod
    def forward(name: str, x: Tensor, *rest: object) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(name: str, dy: Tensor, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, *rest: object):
        return torch.empty_like(x), torch.empty_like(alpha_p), torch.empty_like(alpha_n), None


def forward(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float) -> Tensor:
    return choose.choose(x).forward("xielu", x, alpha_p, alpha_n, beta, None)


def backward(
    dy: Tensor, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    return choose.choose(x).backward("xielu", dy, x, alpha_p, alpha_n, beta, None)[:3]


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha_p, alpha_n, beta):
        ctx.save_for_backward(x, alpha_p, alpha_n)
        ctx.beta = beta
        return forward(x, alpha_p, alpha_n, beta)

    @staticmethod
    def backward(ctx, dy):
        return *backward(dy, *ctx.saved_tensors, ctx.beta), None


def custom_op() -> Callable[..., Tensor]:
    op = torch.library.custom_op("host_cost::xielu", forward, mutates_args=())
    backward_op = torch.library.custom_op("host_cost::backward", backward, mutates_args=())

    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.beta = inputs
        ctx.save_for_backward(*tensors)

    def autograd_backward(ctx, dy):
        return *backward_op(dy, *ctx.saved_tensors, ctx.beta), None

    op.register_autograd(autograd_backward, setup_context=setup_context)
    return op


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=POSITIVE.read, default=20)
    options = parser.parse_args()
    if options.device == "cuda":
        need_cuda("give another --device")
    else:
        choose.choose = lambda x: EmptyBackend
    x, dy = torch.randn(2, *SHAPE, device=options.device, dtype=torch.bfloat16)
    x.requires_grad_()
    alphas = [torch.tensor([raw], device=options.device, requires_grad=True) for raw in (0.2, -1.1)]
    by_operator = custom_op()

    def with_autograd(function: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(x, *alphas), (x, *alphas), dy)

    def alone() -> None:
        with torch.no_grad():
            forward(x, *alphas, BETA)
            backward(dy, x, *alphas, BETA)

    ways = {
        "ours": with_autograd(lambda *inputs: functional.xielu(*inputs, beta=BETA)),
        "Function": with_autograd(lambda *inputs: Function.apply(*inputs, BETA)),
        "custom_op": with_autograd(lambda *inputs: by_operator(*inputs, BETA)),
        "backend alone": alone,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(1 + options.rounds):
        for way, call in ways.items():
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            seconds[way].append((time.perf_counter() - begin) / CALLS)
            if options.device == "cuda":
                torch.cuda.synchronize()
    least = median(seconds["backend alone"][1:])
    rows = [["forward and backward", "µs", "more than the backend alone"]]
    for way, found in seconds.items():
        us = 1e6 * median(found[1:])  # the first round warms up
        rows.append([way, f"{us:.1f}", f"{us - 1e6 * least:+.1f}"])
    print(f"torch {torch.__version__}, {options.device}, x {SHAPE[0]}x{SHAPE[1]} bfloat16")
    print(table(rows, left=(0,)))


if __name__ == "__main__":
    ready_output()
    main()
