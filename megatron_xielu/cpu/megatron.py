"""What in Megatron itself needs a GPU, replaced by what runs on a CPU."""

# mypy: disable-error-code="assignment, method-assign"

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch


def redirect() -> None:
    """Take Megatron's other ways to a CUDA device; it must not have been imported before."""
    torch_compile = torch.compile
    torch.compile = lambda model=None, **kwargs: model if model is not None else (lambda f: f)
    try:
        import megatron.core.jit  # noqa: F401  (binds jit_fuser to torch.compile at import)
    finally:
        torch.compile = torch_compile

    from megatron.core.models import backends
    from megatron.core.transformer import torch_norm

    from megatron_xielu.cpu.attention import CPUAttention
    from megatron_xielu.workarounds import megatron_wheel

    megatron_wheel.prepare()
    backends.DotProductAttention = CPUAttention
    backends.LocalSpecProvider.grouped_mlp_modules = _grouped_if_asked(
        backends.LocalSpecProvider.grouped_mlp_modules
    )
    torch_norm.WrappedTorchNorm.__new__ = _norm_for_sequence_parallel(
        torch_norm.WrappedTorchNorm.__new__
    )
    _redirect_checkpoint_writer()
    # Nothing is compiled here, so nothing needs a warm-up; and its dropouts would take random
    # numbers from the generator of the initial weights, as many as the parallel layout asks for.
    from megatron.training import initialize, training

    initialize._warmup_jit_function = lambda **kwargs: None
    # What documents add their lengths to; Megatron would make it on a device of its own spelling.
    training._seqlen_stats_in_iteration = torch.zeros(2, dtype=torch.float64)
    # Here the "GPU" random state is the CPU's, so this warning would follow every dropout.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _grouped_if_asked(experts_of_their_own: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``--moe-grouped-gemm`` build Megatron's grouped experts, which it leaves to Transformer
    Engine."""

    @functools.wraps(experts_of_their_own)
    def wrapper(self: Any, moe_use_grouped_gemm: bool) -> Any:
        if not moe_use_grouped_gemm:
            return experts_of_their_own(self, moe_use_grouped_gemm)
        from megatron.core.transformer.moe.experts import TEGroupedMLP

        from megatron_xielu.cpu.grouped_linear import CPU_GROUPED_LINEARS

        return functools.partial(TEGroupedMLP, submodules=CPU_GROUPED_LINEARS)

    return wrapper


def _redirect_checkpoint_writer() -> None:
    """Let ``--async-save --use-persistent-ckpt-worker --async-strategy mcore`` work."""
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    caller, writer = async_utils.PersistentAsyncCaller, filesystem_async.FileSystemWriterAsync
    start, preload = caller._get_process, writer.preload_tensors

    # A fresh process would lack the redirections; a forked one has them.
    @functools.wraps(start)
    def fork(rank: int, mp_mode: str = "fork", *args: Any, **kwargs: Any) -> Any:
        return start(rank, "fork", *args, **kwargs)

    # What comes from a GPU is a copy. From here the writer would get the memory of the parameters,
    # and write what training has made of them meanwhile.
    @functools.wraps(preload)
    def copy(buckets: Any, non_blocking: bool = True) -> Any:
        return [
            (name, key, (blobs, [(item, tensor.clone()) for item, tensor in tensors]))
            for name, key, (blobs, tensors) in preload(buckets, non_blocking)
        ]

    caller._get_process = fork
    writer.preload_tensors = staticmethod(copy)


def _norm_for_sequence_parallel(build: Callable[..., Any]) -> Callable[..., Any]:
    """Let the torch norm be built under sequence parallelism, with its weights marked for it."""

    @functools.wraps(build)
    def wrapper(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        with _set(config, "sequence_parallel", False) as sequence_parallel:
            norm = build(cls, config, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel
        return norm

    return wrapper


@contextlib.contextmanager
def _set(owner: Any, name: str, value: Any):
    """Set an attribute for the length of a block; yields what it was."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)
