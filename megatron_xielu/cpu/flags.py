"""The flags of a CPU run: which Megatron needs there, and which need a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_xielu.catalog import not_on_cpu

# The flags without which Megatron picks a CUDA-only implementation.
REQUIRED_FLAGS = [
    *("--transformer-impl", "local"),
    *("--distributed-backend", "gloo"),
    *("--num-workers", "0"),
    "--use-cpu-initialization",
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
]


def add_cpu_flags(argv: Sequence[str]) -> list[str]:
    """Return Megatron arguments for a CPU run: the flags it needs, then ``argv``.

    Args:
        argv: arguments as the user gave them, without the program's name.

    Raises:
        SystemExit: a flag that needs a GPU is in ``argv``; the message names it.
    """
    for refused in not_on_cpu(argv):
        raise SystemExit(f"megatron_xielu.cpu: {refused}")
    return [*REQUIRED_FLAGS, *argv]
