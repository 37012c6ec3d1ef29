"""The flags of a CPU run: which Megatron needs there, and which need a GPU."""

from __future__ import annotations

from collections.abc import Sequence

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

# flag -> the values that need a GPU (an empty set: any use of the flag does).
_REFUSED_FLAGS: dict[str, frozenset[str]] = {
    "--transformer-impl": frozenset({"transformer_engine", "inference_optimized"}),
    "--distributed-backend": frozenset({"nccl"}),
    "--attention-backend": frozenset({"flash", "fused"}),
    "--cuda-graph-impl": frozenset({"local", "transformer_engine"}),
    "--use-flash-attn": frozenset(),
    "--use-transformer-engine-op-fuser": frozenset(),
    "--fp8-format": frozenset(),
    "--fp4-format": frozenset(),
    "--enable-cuda-graph": frozenset(),
    "--tp-comm-overlap": frozenset(),
    "--moe-grouped-gemm": frozenset(),
    "--use-megatron-fsdp": frozenset(),
    "--use-torch-fsdp2": frozenset(),
    "--use-nccl-ub": frozenset(),
    "--use-precision-aware-optimizer": frozenset(),
    "--optimizer-cpu-offload": frozenset(),
    "--cpu-offloading-num-layers": frozenset(),
}


def add_cpu_flags(argv: Sequence[str]) -> list[str]:
    """Return Megatron arguments for a CPU run: the flags it needs, then ``argv``.

    Args:
        argv: arguments as the user gave them, without the program's name.

    Raises:
        SystemExit: a flag that needs a GPU is in ``argv``; the message names it.
    """
    for position, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag not in _REFUSED_FLAGS:
            continue
        if not value and position + 1 < len(argv):
            value = argv[position + 1]
        if not _REFUSED_FLAGS[flag] or value in _REFUSED_FLAGS[flag]:
            shown = f"{flag} {value}" if _REFUSED_FLAGS[flag] else flag
            raise SystemExit(f"megatron_xielu.cpu: {shown} needs a GPU; drop it for a CPU run")
    return [*REQUIRED_FLAGS, *argv]
