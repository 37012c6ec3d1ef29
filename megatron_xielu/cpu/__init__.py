"""Megatron on a CPU: run any Megatron training script over gloo, for tests and debugging.

Megatron-core assumes CUDA in a few hundred places: it allocates with ``device="cuda"``, asks for
streams and events, compares ``param.type()`` with ``"torch.cuda.FloatTensor"``. `activate` sends
those calls to the CPU, in this process only, and refuses to where a GPU is usable unless it is
hidden first (``--cpu`` hides it). Nothing here is imported when a GPU is used.

What is redirected:

===============================  ===============================================================
``torch.cuda``, ``.accelerator`` device, stream, event, memory, nvtx, RNG and synchronisation
``Tensor/Module.cuda``, ``.to``  ``"cuda"`` means the CPU
factories (``torch.zeros``, …)   ``device="cuda"`` means the CPU; nothing is pinned
``Tensor.type()``                says ``torch.cuda.…Tensor``, which Megatron's optimizers ask for
``torch.distributed``            ``nccl`` becomes ``gloo``; ``ReduceOp.AVG`` divides, then sums
``jit_fuser`` and its warm-up    do nothing: compiling small fusions takes longer than a test
``WrappedTorchNorm``             accepts sequence parallelism and marks its weights for it
``DotProductAttention``          accepts context parallelism, by gathering keys and values, and
                                 documents, one after the other
grouped linear layers            are Megatron's own, one expert after the other
checkpoint writer                is forked, and gets a copy of the tensors
===============================  ===============================================================

What cannot run is refused by flag: Transformer Engine, FP8 and FP4, CUDA graphs, flash attention,
communication in user buffers, FSDP, NCCL extras. Numbers from here say nothing about speed.

Use from the shell, with any script of a Megatron-LM checkout::

    torchrun --nproc-per-node 2 -m megatron_xielu.cpu pretrain_gpt.py …
"""

from __future__ import annotations

import os
import sys

from megatron_xielu.cpu.flags import add_cpu_flags

__all__ = ["NOTICE", "activate", "add_cpu_flags", "hide_gpus"]

NOTICE = (
    "megatron_xielu.cpu: running Megatron on the CPU over gloo. "
    "This is for tests and debugging: speed and memory figures of this run mean nothing."
)

_active = False


def hide_gpus() -> None:
    """Make this process see no GPU. Call before CUDA is initialised."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def activate() -> None:
    """Redirect the CUDA calls that Megatron makes to the CPU, for the rest of this process.

    Idempotent. Call it before anything of ``megatron`` is imported: Megatron reads ``torch.cuda``
    types and binds its fusion decorator at import.

    Raises:
        RuntimeError: a GPU is visible, or Megatron was imported before.
    """
    global _active
    if _active:
        return
    import torch

    if torch.cuda.is_available():
        raise RuntimeError(
            "megatron_xielu.cpu: a GPU is visible; run without --cpu, or set CUDA_VISIBLE_DEVICES="
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron_xielu.cpu: call activate() before importing megatron.core")
    import torch._dynamo  # inspects torch.cuda at import, so before anything is redirected

    # Megatron insists on it for tensor parallelism; on a CPU it has no effect.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # As `jit_fuser`: compiling takes longer than a test, and torch.compile does not know its
    # way around the redirections.
    os.environ.setdefault("MEGATRON_XIELU_BACKEND", "eager")
    from megatron_xielu.cpu import collectives, cuda

    cuda.redirect()
    collectives.redirect()
    from megatron_xielu.cpu import megatron  # into the redirected torch

    megatron.redirect()
    _active = True
    if os.environ.get("RANK", "0") == "0":
        print(f"\n{'=' * 100}\n{NOTICE}\n{'=' * 100}\n", file=sys.stderr, flush=True)
