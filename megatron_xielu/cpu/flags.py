"""The flags of a CPU run: which Megatron needs there, and which need a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_xielu.catalog import ON_CPU

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
    for position, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if not value and position + 1 < len(argv):
            value = argv[position + 1]
        for refusal in ON_CPU:
            if flag == refusal.flag and (not refusal.values or value in refusal.values):
                raise SystemExit(
                    f"megatron_xielu.cpu: {refusal.said} needs a GPU; drop it for a CPU run"
                )
    return [*REQUIRED_FLAGS, *argv]
