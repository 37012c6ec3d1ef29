"""Trainable activations xIELU and xIPReLU for NVIDIA Megatron-LM / megatron-core.

Importing this package patches nothing and loads neither Megatron, Triton nor Transformer Engine:
`XIELU` and `XIPReLU` are imported on first use, since they are Megatron modules.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_xielu.activations import XIELU, XIPReLU

__version__ = "0.1.0"
__all__ = ["XIELU", "XIPReLU", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("XIELU", "XIPReLU"):
        from megatron_xielu import activations

        return getattr(activations, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
