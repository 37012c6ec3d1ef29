"""Which implementation computes an activation.

==================  =============================  ==============================================
backend             used for                       where
==================  =============================  ==============================================
``triton``          CUDA tensors                   `gpu_triton`
``compiled``        CPU tensors                    `cpu_compiled`; needs a C++ compiler
``eager``           float64, and whatever is left  `eager`
==================  =============================  ==============================================

Rows of experts are computed by `grouped_triton` where that is ``triton``, else by the same backends
in a loop over the experts (`grouped_loop`).

``MEGATRON_XIELU_BACKEND=triton|compiled|eager`` forces one, for debugging; what it cannot compute
is then an error. Without it a backend that cannot run here is replaced by the eager one, and the
reason is logged once.
"""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_xielu.catalog import DEFAULT_BETA
from megatron_xielu.kernels import eager, grouped_loop

VARIABLE = "MEGATRON_XIELU_BACKEND"

# Below this many elements a call costs what its overhead costs, and none is worth a compilation.
_COMPILE_FROM = 2**16

_logger = logging.getLogger(__name__)


@functools.cache  # once for each reason
def _log_fallback(reason: str) -> None:
    _logger.warning("megatron_xielu: using the eager backend: %s", reason)


@functools.cache
def _triton() -> ModuleType | None:
    try:
        from megatron_xielu.kernels import gpu_triton
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None
    return gpu_triton


def check_forced(device: str) -> None:
    """Before anything is computed: whether a forced backend can compute on ``cpu`` or ``cuda``.

    Raises:
        ValueError: it cannot, or there is none of that name; names the variable.
    """
    forced = os.environ.get(VARIABLE)
    if forced:
        _forced(forced, torch.device(device), torch.float32)


def _forced(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend that the environment variable names.

    Raises:
        ValueError: there is none of that name, or it cannot compute such tensors.
    """
    if name == "eager":
        return eager
    if name not in ("triton", "compiled"):
        raise ValueError(f"{VARIABLE} must be triton, compiled or eager, not {name!r}")
    if dtype == torch.float64:
        raise ValueError(f"{VARIABLE}={name} computes in float32; unset it for float64 tensors")
    if name == "compiled":
        if device.type != "cpu":
            raise ValueError(f"{VARIABLE}=compiled is for CPU tensors, and x is on {device}")
        from megatron_xielu.kernels import cpu_compiled

        return cpu_compiled
    triton = _triton()
    if triton is None:
        raise ValueError(f"{VARIABLE}=triton: the package triton is not installed")
    if device.type != "cuda" and not triton.is_interpreted():
        raise ValueError(
            f"{VARIABLE}=triton is for CUDA tensors, and x is on {device}; set "
            "TRITON_INTERPRET=1 to run the kernels on a CPU"
        )
    return triton


def _default(x: Tensor) -> ModuleType:
    if x.dtype == torch.float64:
        return eager
    if x.is_cuda:
        triton = _triton()
        if triton is None:
            _log_fallback("the package triton is not installed")
        return triton or eager
    if x.device.type != "cpu":
        _log_fallback(f"there is no kernel for {x.device.type} tensors")
        return eager
    if x.numel() < _COMPILE_FROM or not _compiler_works():
        return eager
    from megatron_xielu.kernels import cpu_compiled

    return cpu_compiled


def choose(x: Tensor) -> ModuleType:
    """The backend module for x; see the top of this file."""
    forced = os.environ.get(VARIABLE)
    return _forced(forced, x.device, x.dtype) if forced else _default(x)


def choose_grouped(x: Tensor, ranges: Tensor) -> Any:
    """The implementation for the rows of experts: Triton's kernels, or a loop of another's."""
    dense = choose(x)
    if dense is not _triton():
        return grouped_loop.Loop(dense, ranges)
    from megatron_xielu.kernels import grouped_triton

    return grouped_triton.Kernels(ranges)


@functools.cache
def _compiler_works() -> bool:
    """Compile and run one kernel, to see whether this machine can."""
    from megatron_xielu.kernels import cpu_compiled

    x, alpha = torch.zeros(4), torch.zeros(1)
    try:
        cpu_compiled.forward("xielu", x, alpha, alpha, DEFAULT_BETA, None)
    except Exception as error:
        _log_fallback(f"torch.compile does not work here ({type(error).__name__}: {error})")
        return False
    return True
