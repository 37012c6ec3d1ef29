"""Trainable activations xIELU and xIPReLU for NVIDIA Megatron-LM / megatron-core.

Importing this package patches nothing and loads neither torch, Megatron, Triton nor Transformer
Engine: its classes are imported on first use. `XIELU` and `XIPReLU` are plain PyTorch modules, the
other two are for Megatron's MLPs and need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_xielu.activations import XIELU, XIPReLU
    from megatron_xielu.megatron_activations import MegatronXIELU, MegatronXIPReLU

__version__ = "0.1.0"
__all__ = ["XIELU", "MegatronXIELU", "MegatronXIPReLU", "XIPReLU", "__version__"]

_HOMES = {
    **dict.fromkeys(("XIELU", "XIPReLU"), "activations"),
    **dict.fromkeys(("MegatronXIELU", "MegatronXIPReLU"), "megatron_activations"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
