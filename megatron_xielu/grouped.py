"""xIELU and xIPReLU of rows that belong to experts, each with a pair of alphas of its own.

For experts whose matrix products are one grouped product (a mixture of experts): x holds the rows
of all of them, one after the other, and where one expert's rows end may be known to the GPU alone.

    y[r] = w[r] f(x[r]; a_p[e], a_n[e])        in a real row r of expert e
    y[r] = 0                                   in a row of padding

    d/dw[r] = sum over columns of dy[r] f(x[r])

f and the gradients of the alphas are those of `functional`, with ``w dy`` in dy's place. A pass
reads and writes every element once, for all experts and with all gradients, in one launch (and one
that adds up the partial sums of the alphas' gradients). Gradients are summed in a fixed order.

Padding is whatever is no expert's token: FP8 rounds up the number of an expert's rows, and what
comes after the last expert's. It is memory that nobody wrote. It is not read, nor is what dy and
the weights hold there; y, dx and d/dw are 0 there.

As in `functional` each activation is a pair of operators, ``megatron_xielu::grouped_<name>`` and
its backward; all but the first derivatives in reverse mode are PyTorch's, of the closed forms.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megatron_xielu import functional
from megatron_xielu.catalog import DEFAULT_BETA
from megatron_xielu.kernels import choose, reference

__all__ = ["grouped_xielu", "grouped_xiprelu"]

Counts = list[int] | tuple[int, ...] | Tensor

if "_library" in globals():  # at importlib.reload: a process can define an operator once
    globals()["_library"]._destroy()
_library = torch.library.Library("megatron_xielu", "FRAGMENT")


class _ClosedForms:
    """Those of `reference`, in x's dtype."""

    def __init__(self, ranges: Tensor) -> None:
        self.ranges = ranges

    def forward(
        self,
        name: str,
        x: Tensor,
        alpha_p: Tensor,
        alpha_n: Tensor,
        beta: float,
        row_weights: Tensor | None,
    ) -> Tensor:
        y = reference.grouped(name, x, alpha_p, alpha_n, self.ranges, row_weights, beta=beta)
        return y.to(x.dtype)

    def backward(
        self,
        name: str,
        dy: Tensor,
        x: Tensor,
        alpha_p: Tensor,
        alpha_n: Tensor,
        beta: float,
        row_weights: Tensor | None,
    ) -> functional.Gradients:
        dx, d_alpha_p, d_alpha_n, d_weights = reference.grouped_backward(
            name, dy, x, alpha_p, alpha_n, self.ranges, row_weights, beta=beta
        )
        if row_weights is not None and d_weights is not None:
            d_weights = d_weights.to(row_weights.dtype)
        return dx.to(x.dtype), d_alpha_p.to(alpha_p.dtype), d_alpha_n.to(alpha_n.dtype), d_weights


_OPERATORS = {
    name: functional.define_operators(
        _library,
        f"grouped_{name}",
        name,
        "Tensor? row_weights, Tensor ranges",
        choose.choose_grouped,
        _ClosedForms,
    )
    for name in ("xielu", "xiprelu")
}


def grouped_xielu(
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    tokens_per_expert: Counts,
    *,
    beta: float = DEFAULT_BETA,
    row_weights: Tensor | None = None,
    rows_per_expert: Counts | None = None,
) -> Tensor:
    """xIELU of each expert's rows by its alphas; differentiable in x, the alphas and the weights.

    Args:
        x: (rows, ffn), dense, any strides; float64, float32, bfloat16 or float16.
        alpha_p, alpha_n: raw parameters (before softplus) of shape (experts,), in float32 or in
            x's dtype, on x's device. Their gradients have their dtype; an expert without tokens
            gets exactly 0.
        tokens_per_expert: how many real rows each expert has: a list of ints, or an integer tensor
            of shape (experts,) on a CPU or on x's device. One on a GPU is not read by the host: it
            must fit x, and is cut where it does not. A list or a CPU's tensor goes to the GPU
            without waiting. `torch.compile` and CUDA graphs take a list for a constant: give them
            a tensor.
        beta: slope at 0, a positive number within float32's range.
        row_weights: None, or what each row of the result is multiplied by, before it is rounded;
            (rows,) or (rows, 1), in float32 or in x's dtype.
        rows_per_expert: how many rows each expert takes in x, padding included, if that is more
            than its tokens; given like `tokens_per_expert`. Expert e's begin where those of e - 1
            end, and its tokens come first.

    Returns:
        A contiguous tensor of x's shape and dtype; zeros where there is padding.

    On a GPU the host waits in float64, and where Triton is not installed: once a pass.

    Raises:
        TypeError: not a dense tensor, another dtype, counts that are no integers, or a beta that is
            not a Python number.
        ValueError: another shape or device, a beta out of range, or counts that do not fit x.
    """
    counts = tokens_per_expert, rows_per_expert
    return _grouped("xielu", x, alpha_p, alpha_n, *counts, beta, row_weights)


def grouped_xiprelu(
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    tokens_per_expert: Counts,
    *,
    beta: float = DEFAULT_BETA,
    row_weights: Tensor | None = None,
    rows_per_expert: Counts | None = None,
) -> Tensor:
    """xIPReLU of each expert's rows by its alphas.

    Arguments, result and errors are those of `grouped_xielu`.
    """
    counts = tokens_per_expert, rows_per_expert
    return _grouped("xiprelu", x, alpha_p, alpha_n, *counts, beta, row_weights)


def _grouped(
    name: str,
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    tokens_per_expert: Counts,
    rows_per_expert: Counts | None,
    beta: float,
    row_weights: Tensor | None,
) -> Tensor:
    functional.check_dense("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape (rows, ffn), not {tuple(x.shape)}")
    rows = x.shape[0]
    tokens = _as_counts("tokens_per_expert", tokens_per_expert, x)
    experts = len(tokens)
    if experts == 0:
        raise ValueError("tokens_per_expert must have at least one expert, and is empty")
    one_each = f"one element for each of {experts} experts, in shape ({experts},)"
    functional.check(x, alpha_p, alpha_n, beta, ((experts,),), one_each)
    if row_weights is not None:
        functional.check_dense("row_weights", row_weights)
        if row_weights.shape not in ((rows,), (rows, 1)):
            raise ValueError(
                f"row_weights must have one element for each of {rows} rows, in shape ({rows},) "
                f"or ({rows}, 1), not {tuple(row_weights.shape)}"
            )
        functional.check_extra("row_weights", row_weights, x)
    taken = None
    if rows_per_expert is not None:
        taken = _as_counts("rows_per_expert", rows_per_expert, x)
        if len(taken) != experts:
            raise ValueError(
                f"rows_per_expert has {len(taken)} experts, and tokens_per_expert {experts}"
            )
    ranges = _ranges(x, tokens, taken)
    arguments = x, alpha_p, alpha_n, float(beta), row_weights
    if functional.in_forward_mode():
        return _ClosedForms(ranges).forward(name, *arguments)
    return _OPERATORS[name](*arguments, ranges)


def _as_counts(name: str, counts: Any, x: Tensor) -> list[int] | Tensor:
    """As a list where the host knows it, else the tensor, whose values nothing here looks at."""
    if isinstance(counts, Tensor):
        functional.check_dense(name, counts)
        if counts.dtype.is_floating_point or counts.dtype.is_complex or counts.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, not {counts.dtype}")
        if counts.dim() != 1:
            raise ValueError(f"{name} must have shape (experts,), not {tuple(counts.shape)}")
        if counts.device.type != "cpu" and counts.device != x.device:
            raise ValueError(
                f"{name} is on {counts.device} and x on {x.device}: move it there, or to the CPU"
            )
        # A compiler's tensor has no values to look at.
        is_known = counts.device.type == "cpu" and type(counts) is Tensor
        if not is_known or torch.compiler.is_compiling():
            return counts
        return counts.tolist()
    if not isinstance(counts, list | tuple):
        raise TypeError(f"{name} must be a list of ints or a tensor, not {type(counts).__name__}")
    for count in counts:
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"{name} must be ints, not {type(count).__name__}")
    return list(counts)


def _ranges(x: Tensor, tokens: list[int] | Tensor, taken: list[int] | Tensor | None) -> Tensor:
    """Each expert's first row, and one past its last real one: int64, (2, experts), x's device."""
    rows = x.shape[0]
    if isinstance(tokens, list) and not isinstance(taken, Tensor):
        return _upload(_known_ranges(rows, tokens, taken), x.device)
    # Whoever computes stays within x whatever the counts are. Cut to size, they are in order.
    tokens = _upload(tokens, x.device).clamp(0, rows)
    if taken is None:
        ends = tokens.cumsum(0)
        return torch.stack([ends - tokens, ends])
    taken = _upload(taken, x.device).clamp(0, rows)
    starts = taken.cumsum(0) - taken
    return torch.stack([starts, starts + torch.minimum(tokens, taken)])


def _known_ranges(rows: int, tokens: list[int], taken: list[int] | None) -> list[list[int]]:
    counts = {"tokens_per_expert": tokens} | ({} if taken is None else {"rows_per_expert": taken})
    for name, values in counts.items():
        if min(values, default=0) < 0:
            raise ValueError(f"{name} must not be negative, and one is {min(values)}")
        if sum(values) > rows:
            raise ValueError(f"{name} is {sum(values)} in all, and x has {rows} rows")
    if taken is None:
        taken = tokens
    for expert, (real, all_rows) in enumerate(zip(tokens, taken, strict=True)):
        if real > all_rows:
            raise ValueError(
                f"tokens_per_expert is {real} and rows_per_expert {all_rows} of expert {expert}: "
                "its rows must hold its tokens"
            )
    starts = list(accumulate(taken, initial=0))[:-1]
    return [starts, [start + real for start, real in zip(starts, tokens, strict=True)]]


def _upload(counts: list[int] | list[list[int]] | Tensor, device: torch.device) -> Tensor:
    """As int64 on the device, which fetches them itself: the host does not wait for it."""
    if not isinstance(counts, Tensor):
        counts = torch.tensor(counts, device="cpu")
    counts = counts.long()
    if device.type == "cuda" and counts.device.type == "cpu" and not torch.compiler.is_compiling():
        counts = counts.pin_memory()
    return counts.to(device, non_blocking=True)
