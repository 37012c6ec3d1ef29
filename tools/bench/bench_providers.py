"""What the benchmark compares: each provider of an activation, and the float64 answer it owes.

Dimensions: T tokens (rows), F ffn columns of an ungated MLP, G = 2F/3 of a gated one, so that
fc1 and fc2 together have the same number of weights: 2 H F = H 2G + G H.

A provider is built for one device, dtype and shape. Ours and the plain formulas are given float32
alphas, as in a model; the Hugging Face module and the public CUDA kernel keep theirs in x's dtype,
which is how they are used, and are compared with the exact result for the alphas they hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_xielu import functional
from megatron_xielu.catalog import DEFAULT_ALPHA_INIT, DEFAULT_BETA, alpha_n_floor
from megatron_xielu.kernels import reference
from megatron_xielu.kernels.choose import VARIABLE

BETA = DEFAULT_BETA
# The paper's initial alphas. Their raw values differ, so that mixing them up shows.
ALPHA_P = ALPHA_N = DEFAULT_ALPHA_INIT
# Hugging Face's and the public kernel's clamp of the negative branch.
EPS = -1e-6

MODES = ("forward", "backward", "both")


class NotThereError(Exception):
    """This provider cannot run here; the message is the reason, in one line."""


@dataclass(frozen=True)
class Request:
    """What a provider is built for."""

    device: str
    dtype: torch.dtype
    rows: int
    ffn: int
    activation: str = "xielu"
    sets: int = 2  # of rotating buffers


@dataclass(frozen=True)
class Candidate:
    """One provider, ready to be called.

    `call` maps x (T, F) to y (T, F), or (T, 2G) to (T, G) if gated. `exact` maps x and dy to
    what y, dx and the gradients of `alphas` should be, in float64.
    """

    name: str
    call: Callable[[Tensor], Tensor]
    exact: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    alphas: tuple[Tensor, ...] = ()
    gated: bool = False
    backend: str | None = None  # ours, forced to this one
    differentiable: bool = True

    @property
    def ours(self) -> bool:
        return self.backend is not None

    @contextmanager
    def selected(self) -> Iterator[None]:
        """Forces this candidate's backend, for both passes; nothing for the others."""
        if self.backend is None:
            yield
            return
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = self.backend
        try:
            yield
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before


def widths(ffn: int, gated: bool) -> tuple[int, int]:
    """Columns of x and of y: F and F, or 2G and G."""
    return (4 * ffn // 3, 2 * ffn // 3) if gated else (ffn, ffn)


def bytes_moved(mode: str, rows: int, ffn: int, itemsize: int, *, gated: bool) -> int:
    """What must move at least: read x, write y; read x and dy, write dx. Alphas do not count."""
    x, y = (rows * width * itemsize for width in widths(ffn, gated))
    forward, backward = x + y, x + y + x
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def bytes_held(name: str, itemsize: int) -> int:
    """The most that a step of a provider holds beside its inputs, for an element of T F.

    The peaks in docs/benchmarks/cpu.md, in bytes and rounded up: with what autograd keeps, nine
    buffers of x's dtype for Hugging Face's module, and up to 38 bytes for the formula, which
    computes in float32. For all others y, dx and less than one buffer more.
    """
    return {"hf": 10 * itemsize, "eager": 40}.get(name, 3 * itemsize)


def xielu_formula(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
    """xIELU as one would write it: float32 inside, differentiated by autograd."""
    z, soft_p = x.float(), F.softplus(alpha_p.float())
    full_n = BETA + F.softplus(alpha_n.float())
    below = full_n * (torch.expm1(z.clamp_max(0.0)) - z) + BETA * z
    return torch.where(z > 0, soft_p * z * z + BETA * z, below).to(x.dtype)


def xiprelu_formula(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
    """xIPReLU likewise."""
    z, soft_p, soft_n = x.float(), F.softplus(alpha_p.float()), F.softplus(alpha_n.float())
    return (torch.where(z > 0, soft_p * z * z, soft_n * z * z) + BETA * z).to(x.dtype)


FORMULAS = {"xielu": xielu_formula, "xiprelu": xiprelu_formula}


def _alphas(request: Request) -> tuple[Tensor, Tensor]:
    shift = alpha_n_floor(request.activation, BETA)
    raw = (reference.inverse_softplus(v) for v in (ALPHA_P, ALPHA_N - shift))
    alpha_p, alpha_n = (
        r.reshape(1).to(request.device, torch.float32).requires_grad_() for r in raw
    )
    return alpha_p, alpha_n


def _exact(activation: str, alphas: tuple[Tensor, ...]) -> Callable:
    def exact(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        forward = getattr(reference, activation)
        backward = getattr(reference, f"{activation}_backward")
        return forward(x, *alphas, beta=BETA), *backward(dy, x, *alphas, beta=BETA)

    return exact


def _ours(backend: str) -> Callable[[Request], Candidate]:
    def build(request: Request) -> Candidate:
        if backend == "triton" and request.device != "cuda":
            raise NotThereError("it needs a CUDA device")
        if backend == "compiled" and request.device != "cpu":
            raise NotThereError("it is for CPU tensors")
        alphas = _alphas(request)
        function = getattr(functional, request.activation)
        return Candidate(
            f"ours-{backend}",
            lambda x: function(x, *alphas, beta=BETA),
            _exact(request.activation, alphas),
            alphas,
            backend=backend,
        )

    return build


def _eager(request: Request) -> Candidate:
    alphas, formula = _alphas(request), FORMULAS[request.activation]
    exact = _exact(request.activation, alphas)
    return Candidate("eager", lambda x: formula(x, *alphas), exact, alphas)


def _compile(request: Request) -> Candidate:
    alphas = _alphas(request)
    formula = torch.compile(FORMULAS[request.activation], dynamic=False)
    exact = _exact(request.activation, alphas)
    return Candidate("compile", lambda x: formula(x, *alphas), exact, alphas)


def _needs_xielu(request: Request) -> None:
    if request.activation != "xielu":
        raise NotThereError(f"it has no {request.activation}")


def _hugging_face(request: Request) -> Candidate:
    _needs_xielu(request)
    try:
        from transformers.activations import XIELUActivation
        from transformers.utils import logging
    except ModuleNotFoundError as error:
        raise NotThereError(f"transformers is not installed ({error.name})") from None
    logging.set_verbosity_error()  # else it recommends the public kernel on every run
    module = XIELUActivation(ALPHA_P, ALPHA_N, BETA, EPS, dtype=request.dtype).to(request.device)
    # Where the public kernel is installed the module would call it, and that has its own row.
    module._xielu_cuda_obj = None
    alphas = (module.alpha_p, module.alpha_n)
    return Candidate("hf", module, _exact("xielu", alphas), alphas)


def _public_cuda(request: Request) -> Candidate:
    """github.com/nickjbrowning/XIELU, called as transformers calls it."""
    _needs_xielu(request)
    if request.device != "cuda":
        raise NotThereError("it runs on CUDA devices only")
    if request.dtype != torch.bfloat16:
        raise NotThereError("it is compared in bfloat16, the dtype it is used in")
    if request.ffn % 8:
        raise NotThereError("it needs columns divisible by 8")
    try:
        import xielu.ops  # noqa: F401

        kernel = torch.classes.xielu.XIELU()
    except (ImportError, OSError, RuntimeError) as error:
        raise NotThereError(f"package xielu cannot be imported ({error})") from None
    alphas = tuple(a.detach().to(request.dtype).requires_grad_() for a in _alphas(request))

    def call(x: Tensor) -> Tensor:
        y = kernel.forward(x.unsqueeze(0), *alphas, BETA, EPS, False)
        return y.squeeze(0)

    return Candidate("public-cuda", call, _exact("xielu", alphas), alphas)


def _squared_relu(request: Request) -> Candidate:
    try:
        from megatron.core.activations import squared_relu
    except ModuleNotFoundError as error:
        raise NotThereError(f"megatron-core is not installed ({error.name})") from None

    def exact(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        positive = x.double().clamp_min(0.0)
        return positive**2, 2.0 * positive * dy.double()

    return Candidate("relu2", squared_relu, exact)


def _swiglu(request: Request) -> Candidate:
    if request.ffn % 3:
        raise NotThereError("at equal parameters it has 2/3 of the columns: F must divide by 3")
    try:
        from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
    except ModuleNotFoundError as error:
        raise NotThereError(f"megatron-core is not installed ({error.name})") from None

    def exact(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        gate, up = x.double().chunk(2, -1)
        dy, sigma = dy.double(), torch.sigmoid(gate)
        d_gate = dy * up * sigma * (1.0 + gate * (1.0 - sigma))
        return gate * sigma * up, torch.cat((d_gate, dy * gate * sigma), -1)

    return Candidate("swiglu", lambda x: bias_swiglu_impl(x, None), exact, gated=True)


@dataclass
class _Copy:
    """Copies x into memory that is already there: the most that the memory can do."""

    request: Request
    targets: Iterator[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        r = self.request
        buffers = torch.ones(r.sets, r.rows, r.ffn, dtype=r.dtype, device=r.device)
        self.targets = cycle(buffers.unbind())

    def __call__(self, x: Tensor) -> Tensor:
        return next(self.targets).copy_(x.detach())


def _copy(request: Request) -> Candidate:
    return Candidate("copy", _Copy(request), lambda x, dy: (x.double(),), differentiable=False)


PROVIDERS: dict[str, Callable[[Request], Candidate]] = {
    "copy": _copy,
    "hf": _hugging_face,
    "eager": _eager,
    "compile": _compile,
    "public-cuda": _public_cuda,
    "ours-eager": _ours("eager"),
    "ours-compiled": _ours("compiled"),
    "ours-triton": _ours("triton"),
    "relu2": _squared_relu,
    "swiglu": _swiglu,
}
LABELS = {
    "copy": "plain copy",
    "hf": "Hugging Face module",
    "eager": "formula, torch eager",
    "compile": "formula, torch.compile",
    "public-cuda": "public CUDA kernel",
    "ours-eager": "ours, eager",
    "ours-compiled": "ours, compiled",
    "ours-triton": "ours, Triton",
    "relu2": "ReLU² (Megatron)",
    "swiglu": "SwiGLU (Megatron, fused)",
}
# All that can run there.
DEFAULT_PROVIDERS = {
    "cpu": [name for name in PROVIDERS if name not in ("ours-triton", "public-cuda")],
    "cuda": [name for name in PROVIDERS if name != "ours-compiled"],
}
