"""Times the activation on rows of experts: one pass for all, against a call for each expert.

    python tools/bench/bench_grouped.py [--device cpu] [--shapes 49152x1408] [--output FILE.md]

Three ways take turns, in bf16, with uneven experts (two have no rows, one a fifth of them) and no
padding. Where there are weights, the grouped way applies them itself, and the others multiply in a
pass of their own, as Megatron does:

    grouped       `grouped.grouped_xielu`, its counts on the device
    each expert   `functional.xielu` for each expert, joined by ``torch.cat``
    dense         `functional.xielu` on as many elements, with one pair of alphas for all

Each is first compared with the float64 oracle, on fewer rows. Inputs rotate, so that they come from
memory. The floor is the bytes that must move (forward reads x and writes y, backward reads dy and
x and writes dx) at the speed of a copy of x in the same round: "of the floor" is the floor's time
over the measured one, and so at most about 1.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from bench_activation import cpu_model
from bench_flags import joined_sizes, need_cuda
from bench_measure import (
    OUR_EXCESS,
    CudaTimer,
    RefusedError,
    Step,
    compare,
    rotating,
    sets_needed,
    time_on_cpu,
)
from torch import Tensor

from megatron_xielu import functional, grouped
from megatron_xielu.common import files
from megatron_xielu.common.flags import POSITIVE, output_file
from megatron_xielu.common.text import ready_output
from megatron_xielu.kernels import choose, reference

DTYPE = torch.bfloat16
SHAPES = {"cpu": ["2048x1408", "2048x2048"], "cuda": ["49152x1408", "49152x2048"]}
ROUNDS = {"cpu": 7, "cuda": 50}
CHECKED_ROWS = 512
PASSES = {"forward": 2, "backward": 3}  # tensors of x's size that must move


@dataclass(frozen=True)
class Experts:
    """Alphas, where rows end, and weights; `call` has the three ways by name."""

    alphas: tuple[Tensor, Tensor]
    tokens: list[int]
    weights: Tensor | None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What has a gradient beside x."""
        return (*self.alphas, *(() if self.weights is None else (self.weights,)))

    def calls(self) -> dict[str, Callable[[Tensor], Tensor]]:
        counts = torch.tensor(self.tokens, device=self.alphas[0].device)

        def weighted(y: Tensor) -> Tensor:
            return y if self.weights is None else (y * self.weights[:, None]).to(y.dtype)

        def each_expert(x: Tensor) -> Tensor:
            pairs = zip(x.split(self.tokens), *(a.unbind() for a in self.alphas), strict=True)
            return weighted(torch.cat([functional.xielu(*inputs) for inputs in pairs]))

        def all_at_once(x: Tensor) -> Tensor:
            return grouped.grouped_xielu(x, *self.alphas, counts, row_weights=self.weights)

        def dense(x: Tensor) -> Tensor:
            return weighted(functional.xielu(x, self.alphas[0][:1], self.alphas[1][:1]))

        return {"grouped": all_at_once, "each expert": each_expert, "dense": dense}


def uneven(rows: int, experts: int) -> list[int]:
    """Tokens of each expert, rows in all: 1, 1/2, 1/3 … of the most, in mixed order, two empty."""
    share = torch.arange(1, experts + 1, dtype=torch.float64).reciprocal()
    share[experts // 2 :: max(1, experts // 2 - 1)] = 0.0
    share = share[torch.randperm(experts, generator=torch.Generator().manual_seed(0))]
    tokens = (share / share.sum() * rows).long()
    tokens[tokens.argmax()] += rows - tokens.sum()
    return tokens.tolist()


def make(rows: int, experts: int, device: str, has_weights: bool) -> Experts:
    generator = torch.Generator().manual_seed(1)
    alphas = (
        torch.rand(experts, generator=generator).to(device).requires_grad_() for _ in range(2)
    )
    weights = torch.rand(rows, generator=generator).to(device).requires_grad_()
    return Experts(tuple(alphas), uneven(rows, experts), weights if has_weights else None)


def check(cols: int, experts: int, device: str, has_weights: bool) -> None:
    """Raises:
    RefusedError: y or dx is not what it should be.
    """
    few = make(CHECKED_ROWS, experts, device, has_weights)
    generator = torch.Generator().manual_seed(2)
    x, dy = (
        torch.randn(CHECKED_ROWS, cols, generator=generator).to(device, DTYPE) for _ in range(2)
    )
    ranges = grouped._ranges(x, few.tokens, None)
    given = (*few.alphas, ranges, few.weights)
    one = tuple(a[:1] for a in few.alphas)
    all_rows = torch.tensor([[0], [CHECKED_ROWS]])
    for name, call in few.calls().items():
        arguments = (*one, all_rows, few.weights) if name == "dense" else given
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        exact_y = reference.grouped("xielu", x, *arguments)
        exact_dx = reference.grouped_backward("xielu", dy, x, *arguments)[0]
        for what, got, exact in (("y", y, exact_y), ("dx", dx, exact_dx)):
            _, excess = compare(f"{name}: {what}", got.detach(), exact.detach(), DTYPE)
            if name == "grouped" and excess > OUR_EXCESS:
                raise RefusedError(f"{name}: excess of {what} is {excess:.2e}")


def measure(
    shape: str, experts: int, device: str, has_weights: bool, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each pass, by way and mode, in each round; a copy has a forward pass alone."""
    rows, cols = map(int, shape.split("x"))
    check(cols, experts, device, has_weights)
    case = make(rows, experts, device, has_weights)
    count = sets_needed(device, 2 * rows * cols * DTYPE.itemsize)
    pool = rotating(count, ((rows, cols), (rows, cols)), DTYPE, device)
    target = torch.empty(rows, cols, dtype=DTYPE, device=device)
    calls = {"copy": lambda x: target.copy_(x.detach()), **case.calls()}
    take = CudaTimer() if device == "cuda" else time_on_cpu
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in calls}
    for turn in range(1 + rounds):
        for name, call in calls.items():
            x, dy = next(pool)
            inputs = (x, *case.inputs)
            for mode, taken in take(Step(call, inputs, dy), name != "copy").items():
                if turn:  # the first round warms up
                    seconds[name].setdefault(mode, []).append(taken)
    return seconds


def lines(
    shape: str, has_weights: bool, seconds: dict[str, dict[str, list[float]]]
) -> list[list[str]]:
    """A row of the table for each way: medians over the rounds, ratios within a round."""

    def ratio(way: str, mode: str, other: list[float], factor: float = 1.0) -> str:
        pairs = zip(other, seconds[way][mode], strict=True)
        return f"{median(factor * theirs / own for theirs, own in pairs):.2f}"

    found = []
    for way in ("grouped", "each expert", "dense"):
        cells = [shape, "yes" if has_weights else "no", way]
        for mode, passes in PASSES.items():
            cells.append(f"{1e3 * median(seconds[way][mode]):.3f}")
            cells.append(ratio(way, mode, seconds["copy"]["forward"], passes / 2))
        cells.append(ratio("grouped", "both", seconds[way]["both"]))
        found.append(cells)
    return found


def report(rows: list[list[str]], heading: list[str]) -> str:
    """The table in Markdown."""
    names = ["shape", "weights", "way", "forward, ms", "of the floor", "backward, ms"]
    names += ["of the floor", "time, grouped = 1"]
    table = [names, ["---"] * len(names), *rows]
    return "\n".join([*heading, "", *(f"| {' | '.join(row)} |" for row in table)]) + "\n"


def main() -> int:
    """Measure, print the table, and write it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", type=joined_sizes(2), metavar="ROWSxFFN")
    parser.add_argument("--experts", type=POSITIVE.read, default=64)
    parser.add_argument("--rounds", type=POSITIVE.read)
    parser.add_argument("--output", type=output_file, help="a Markdown file to write")
    options = parser.parse_args()
    device = options.device
    if device == "cuda":
        need_cuda("give another --device")
    hardware = torch.cuda.get_device_name() if device == "cuda" else cpu_model()
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    heading = [
        "# Rows of experts",
        "",
        f"{hardware}{threads}, PyTorch {torch.__version__}, Python {platform.python_version()};",
        f"{options.experts} experts, bfloat16, xIELU: `python tools/bench/bench_grouped.py`, whose",
        "first lines say what is compared, and what the floor is.",
    ]
    rows: list[list[str]] = []
    for shape in options.shapes or SHAPES[device]:
        backend = choose.choose(
            torch.empty(*map(int, shape.split("x")), dtype=DTYPE, device=device)
        )
        print(f"{shape}, {backend.__name__.rpartition('.')[2]}", flush=True)
        for has_weights in (False, True):
            rounds = options.rounds or ROUNDS[device]
            seconds = measure(shape, options.experts, device, has_weights, rounds)
            rows += lines(shape, has_weights, seconds)
    text = report(rows, heading)
    print(text, end="", flush=True)
    if options.output is not None:
        files.keep(Path(options.output), text)
    return 0


if __name__ == "__main__":
    ready_output()
    sys.exit(main())
