"""xIELU and xIPReLU as differentiable functions of x and the two raw alphas, on every device.

With ``softplus(z) = log(1 + e^z)``, ``sigma`` its derivative and ``h(x) = expm1(x) - x``:

    xIELU     x > 0     alpha_p x^2 + beta x             alpha_p = softplus(a_p)
              x <= 0    alpha_n h(x) + beta x            alpha_n = beta + softplus(a_n)
    xIPReLU   x > 0     alpha_p x^2 + beta x             alpha_p = softplus(a_p)
              x <= 0    alpha_n x^2 + beta x             alpha_n = softplus(a_n)

    d/da_p = sigma(a_p) sum_{x>0} dy x^2,    d/da_n = sigma(a_n) sum_{x<=0} dy h(x)  (dy x^2)

Source: Huang and Schlag, arXiv:2411.13010; the closed forms in float64 are in `reference`.

Each activation is a pair of custom operators, ``megatron_xielu::<name>`` and
``megatron_xielu::<name>_backward``: one node in a compiled graph, and x, a_p, a_n (and a bias, if
one is fused) are all that is kept for the backward pass. The arithmetic is float32 (float64 for
float64) whatever the storage dtype, rounded once at the end. `choose` chooses who computes it.
DTensor knows how they are split, and exporters such as ONNX's what they consist of. They have the
first derivatives in reverse mode; all others (second ones, forward mode, those of torch.func) are
PyTorch's own, of the closed forms in `reference`: in float64, and with all that autograd keeps.

Limits that follow from float32 arithmetic: a slope beyond its range is inf even if dy would
bring dx back into range, an h(x) below its range is 0, and so is the softplus of a raw alpha below
about -100.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from megatron_xielu.catalog import DEFAULT_BETA, FLOAT32_LEAST, FLOAT32_MOST
from megatron_xielu.kernels import choose, reference

__all__ = ["xielu", "xiprelu"]

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]

if "_library" in globals():  # at importlib.reload: a process can define an operator once
    globals()["_library"]._destroy()
_library = torch.library.Library("megatron_xielu", "DEF")


class Implementation(Protocol):
    """Who computes a pair of operators.

    `extra` is a tensor that has a gradient, or None: a bias, say. The backward pass returns the
    gradients of x, of both alphas and of `extra`, None if there is none.
    """

    def forward(
        self,
        name: str,
        x: Tensor,
        alpha_p: Tensor,
        alpha_n: Tensor,
        beta: float,
        extra: Tensor | None,
        /,
    ) -> Tensor: ...

    def backward(
        self,
        name: str,
        dy: Tensor,
        x: Tensor,
        alpha_p: Tensor,
        alpha_n: Tensor,
        beta: float,
        extra: Tensor | None,
        /,
    ) -> Gradients: ...


def define_operators(
    library: torch.library.Library,
    operator: str,
    name: str,
    more_arguments: str,
    backend: Callable[[Tensor, Any], Implementation],
    closed_forms: Callable[[Any], Implementation],
) -> torch._ops.OpOverload:
    """Register ``megatron_xielu::<operator>`` and its backward operator; return the first.

    Args:
        name: of the activation, as the backends know it.
        more_arguments: of the operators, after beta: `Implementation`'s `extra`, and `ranges`, a
            tensor without a gradient, if there is one.
        backend: who computes it for this x and `ranges` (None if there are none).
        closed_forms: what PyTorch differentiates for all but the first derivatives.
    """

    def forward(x, alpha_p, alpha_n, beta, extra=None, ranges=None):
        return backend(x, ranges).forward(name, x, alpha_p, alpha_n, beta, extra)

    def forward_fake(x, alpha_p, alpha_n, beta, extra=None, ranges=None):
        _before_dtensor()
        return x.new_empty(x.shape)

    def backward(dy, x, alpha_p, alpha_n, beta, extra=None, ranges=None):
        dx, d_alpha_p, d_alpha_n, d_extra = backend(x, ranges).backward(
            name, dy, x, alpha_p, alpha_n, beta, extra
        )
        # An operator returns tensors: an empty one where there is no such input.
        return dx, d_alpha_p, d_alpha_n, x.new_empty(0) if d_extra is None else d_extra

    def backward_by_formula(dy, x, alpha_p, alpha_n, beta, extra=None, ranges=None):
        dx, d_alpha_p, d_alpha_n, d_extra = closed_forms(ranges).backward(
            name, dy, x, alpha_p, alpha_n, beta, extra
        )
        return dx, d_alpha_p, d_alpha_n, x.new_empty(0) if d_extra is None else d_extra

    def backward_fake(dy, x, alpha_p, alpha_n, beta, extra=None, ranges=None):
        _before_dtensor()
        return (
            x.new_empty(x.shape),
            alpha_p.new_empty(alpha_p.shape),
            alpha_n.new_empty(alpha_n.shape),
            x.new_empty(0) if extra is None else extra.new_empty(extra.shape),
        )

    # `torch.library.custom_op` would register the same, and make each call dearer by Python that
    # looks for what these operators cannot do (tools/bench/measure_host_cost.py times both).
    inputs = f"Tensor x, Tensor alpha_p, Tensor alpha_n, float beta, {more_arguments}"
    library.define(f"{operator}({inputs}) -> Tensor")
    library.define(f"{operator}_backward(Tensor dy, {inputs}) -> (Tensor, Tensor, Tensor, Tensor)")
    forward_op = getattr(torch.ops.megatron_xielu, operator).default
    backward_op = getattr(torch.ops.megatron_xielu, f"{operator}_backward").default

    def forward_below_autograd(x, alpha_p, alpha_n, beta, extra, ranges):
        with torch._C._AutoDispatchBelowAutograd():
            if ranges is None:
                return forward_op(x, alpha_p, alpha_n, beta, extra)
            return forward_op(x, alpha_p, alpha_n, beta, extra, ranges)

    def backward_below_autograd(dy, x, alpha_p, alpha_n, beta, extra, ranges):
        with torch._C._AutoDispatchBelowAutograd():
            if ranges is None:
                return backward_op(dy, x, alpha_p, alpha_n, beta, extra)
            return backward_op(dy, x, alpha_p, alpha_n, beta, extra, ranges)

    class Activation(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, alpha_p, alpha_n, beta, extra, ranges):
            ctx.save_for_backward(x, alpha_p, alpha_n, extra, ranges)
            ctx.beta = beta
            return forward_below_autograd(x, alpha_p, alpha_n, beta, extra, ranges)

        @staticmethod
        def backward(ctx, dy):
            x, alpha_p, alpha_n, extra, ranges = ctx.saved_tensors
            inputs = dy, x, alpha_p, alpha_n, ctx.beta, extra, ranges
            if torch.is_grad_enabled() or in_forward_mode():  # create_graph, or a tangent of dy
                dx, d_alpha_p, d_alpha_n, d_extra = backward_by_formula(*inputs)
            else:
                dx, d_alpha_p, d_alpha_n, d_extra = backward_below_autograd(*inputs)
            return dx, d_alpha_p, d_alpha_n, None, None if extra is None else d_extra, None

    # The name is what grad_fn and profilers show.
    activation = type(operator, (Activation,), {})

    def forward_with_autograd(x, alpha_p, alpha_n, beta, extra=None, ranges=None):
        if torch._C._are_functorch_transforms_active():
            return closed_forms(ranges).forward(name, x, alpha_p, alpha_n, beta, extra)
        _refuse_tangents(x, alpha_p, alpha_n, extra)
        return activation.apply(x, alpha_p, alpha_n, beta, extra, ranges)

    def backward_with_autograd(dy, x, alpha_p, alpha_n, beta, extra=None, ranges=None):
        if torch.is_grad_enabled():
            return backward_by_formula(dy, x, alpha_p, alpha_n, beta, extra, ranges)
        _refuse_tangents(dy, x, alpha_p, alpha_n, extra)
        return backward_below_autograd(dy, x, alpha_p, alpha_n, beta, extra, ranges)

    for registered, function, fake, with_autograd in (
        (operator, forward, forward_fake, forward_with_autograd),
        (f"{operator}_backward", backward, backward_fake, backward_with_autograd),
    ):
        library.impl(registered, function, "CompositeExplicitAutograd")
        library.impl(registered, with_autograd, "Autograd")
        torch.library.register_fake(f"megatron_xielu::{registered}", fake, lib=library)
    return forward_op


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """In a graph that was compiled without them, the operators meet them behind `xielu`'s back."""
    if in_forward_mode() and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(
            "xielu and xiprelu have no forward-mode derivative in a graph that was compiled without"
            " it: call torch._dynamo.reset(), or what was compiled uncompiled"
        )


def _shifted(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x.double() + bias.double()


class ClosedForms:
    """Those of `reference`, in x's dtype; arguments and results are those of a backend."""

    @staticmethod
    def forward(
        name: str, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, bias: Tensor | None
    ) -> Tensor:
        formula = reference.FORWARD[name]
        return formula(_shifted(x, bias), alpha_p, alpha_n, beta=beta).to(x.dtype)

    @staticmethod
    def backward(
        name: str,
        dy: Tensor,
        x: Tensor,
        alpha_p: Tensor,
        alpha_n: Tensor,
        beta: float,
        bias: Tensor | None,
    ) -> Gradients:
        formula = reference.BACKWARD[name]
        dx, d_alpha_p, d_alpha_n = formula(dy, _shifted(x, bias), alpha_p, alpha_n, beta=beta)
        d_bias = None if bias is None else dx.sum_to_size(bias.shape).to(bias.dtype)
        return dx.to(x.dtype), d_alpha_p.to(alpha_p.dtype), d_alpha_n.to(alpha_n.dtype), d_bias


def _before_dtensor() -> None:
    """DTensor asks for the shape of a result before it asks for the placements: a place to tell
    these at no cost to anybody else."""
    if "torch.distributed.tensor" in sys.modules:
        _register_shardings()


def _define_dense(name: str) -> torch._ops.OpOverload:
    def decomposition(x, alpha_p, alpha_n, beta, bias=None):
        """For exporters to where there is no such operator; ONNX's looks for one by itself."""
        from megatron_xielu.kernels import cpu_compiled

        return cpu_compiled.formula(name, x, alpha_p, alpha_n, beta, bias)

    operator = define_operators(
        _library,
        name,
        name,
        "Tensor? bias=None",
        lambda x, ranges: choose.choose(x),
        lambda ranges: ClosedForms,
    )
    torch._decomp.register_decomposition(operator)(decomposition)
    return operator


_xielu_op = _define_dense("xielu")
_xiprelu_op = _define_dense("xiprelu")


@functools.cache
def _register_shardings() -> None:
    """Tell DTensor that a shard of x gives that shard of the result, and a part of the sums that
    are the gradients of the alphas and, where rows are split, of the bias."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    whole, part = Replicate(), Partial()

    def shardings(x: Any) -> Iterator[tuple[Any, ...]]:
        """Placements of x, of an alpha's gradient, of the bias and of its gradient."""
        yield whole, whole, whole, whole
        for dim in range(x.ndim - 1):
            yield Shard(dim), part, whole, part
        if x.ndim > 0:
            yield Shard(x.ndim - 1), part, Shard(0), Shard(0)

    def forward(x: Any, alpha_p: Any, alpha_n: Any, beta: float, *bias: Any) -> Any:
        return [
            ([of_x], [of_x, whole, whole, None, *(b and of_bias for b in bias)])
            for of_x, _, of_bias, _ in shardings(x)
        ]

    def backward(dy: Any, x: Any, alpha_p: Any, alpha_n: Any, beta: float, *bias: Any) -> Any:
        return [
            (
                [of_x, of_sum, of_sum, of_d_bias if any(bias) else whole],
                [of_x, of_x, whole, whole, None, *(b and of_bias for b in bias)],
            )
            for of_x, of_sum, of_bias, of_d_bias in shardings(x)
        ]

    operators = torch.ops.megatron_xielu
    register_sharding([operators.xielu.default, operators.xiprelu.default])(forward)
    register_sharding([operators.xielu_backward.default, operators.xiprelu_backward.default])(
        backward
    )


def check_dense(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested one" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor, not {kind}")


def check(
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    beta: float,
    shapes: tuple[tuple[int, ...], ...],
    meaning: str,
) -> None:
    """Raise on what the operators do not support; looks at metadata only, never at values.

    Args:
        shapes: which the alphas may have.
        meaning: of the shapes, for the message.
    """
    check_dense("x", x)
    dtype, device = x.dtype, x.device
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, not {dtype}")
    for name, alpha in (("alpha_p", alpha_p), ("alpha_n", alpha_n)):
        check_dense(name, alpha)
        if alpha.shape not in shapes:
            raise ValueError(f"{name} must have {meaning}, not {tuple(alpha.shape)}")
        if alpha.dtype not in (torch.float32, dtype):
            raise TypeError(
                f"{name} is {alpha.dtype}: keep it in float32 (call .float() on it), "
                f"or in x's dtype, {dtype}"
            )
        if alpha.device != device:
            raise ValueError(f"{name} is on {alpha.device} and x on {device}: move one of them")
    if not isinstance(beta, float | int) or isinstance(beta, bool):
        raise TypeError(f"beta must be a Python number, not {type(beta).__name__}")
    if not FLOAT32_LEAST <= beta <= FLOAT32_MOST:
        raise ValueError(
            f"beta must be from {FLOAT32_LEAST} to {FLOAT32_MOST} (float32), not {beta}"
        )


def check_extra(name: str, extra: Tensor, x: Tensor) -> None:
    """Raise unless a bias, or whatever else is applied to x, has a dtype and device for it."""
    if extra.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"{name} is {extra.dtype}: keep it in float32 or in x's dtype, {x.dtype}")
    if extra.device != x.device:
        raise ValueError(f"{name} is on {extra.device} and x on {x.device}: move one of them")


def _check_all(
    x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, bias: Tensor | None
) -> None:
    check(x, alpha_p, alpha_n, beta, ((1,), ()), "one element, in shape (1,) or ()")
    if bias is None:
        return
    check_dense("bias", bias)
    if x.dim() == 0 or bias.shape != x.shape[-1:] or bias.numel() == 0:
        raise ValueError(
            f"bias must have one element for each of x's columns: x is {tuple(x.shape)} and bias "
            f"{tuple(bias.shape)}"
        )
    check_extra("bias", bias, x)


def xielu(
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    *,
    beta: float = DEFAULT_BETA,
    bias: Tensor | None = None,
) -> Tensor:
    """xIELU of x + bias, differentiable in x, alpha_p, alpha_n and bias.

    Args:
        x: any shape and strides, but dense; float64, float32, bfloat16 or float16.
        alpha_p, alpha_n: raw parameters (before softplus) of shape (1,) or (), in float32 or in
            x's dtype, on x's device. Their gradients have their dtype and shape.
        beta: slope at 0, a positive number within float32's range.
        bias: added to every row of x before the activation, without a pass of its own and without
            rounding in between; shape ``x.shape[-1:]``, in float32 or in x's dtype.

    Returns:
        A contiguous tensor of x's shape and dtype. NaN stays NaN; x = -inf and +inf give +inf.

    Raises:
        TypeError: not a dense tensor, another dtype, or a beta that is not a Python number.
        ValueError: an alpha or bias of another shape or device, or a beta out of range.
    """
    _check_all(x, alpha_p, alpha_n, beta, bias)
    if in_forward_mode():
        return ClosedForms.forward("xielu", x, alpha_p, alpha_n, float(beta), bias)
    return _xielu_op(x, alpha_p, alpha_n, float(beta), bias)


def xiprelu(
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    *,
    beta: float = DEFAULT_BETA,
    bias: Tensor | None = None,
) -> Tensor:
    """xIPReLU of x + bias, differentiable in x, alpha_p, alpha_n and bias.

    Arguments, result and errors are those of `xielu`.
    """
    _check_all(x, alpha_p, alpha_n, beta, bias)
    if in_forward_mode():
        return ClosedForms.forward("xiprelu", x, alpha_p, alpha_n, float(beta), bias)
    return _xiprelu_op(x, alpha_p, alpha_n, float(beta), bias)
