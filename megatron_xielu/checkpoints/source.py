"""What a Megatron checkpoint is to a reader: tensors by key, and the saved arguments.

Keys are those of ``torch_dist``: stacked over layers (``decoder.layers.mlp.linear_fc1.weight`` of
shape (L, …)) or one per layer (``decoder.layers.0.mlp.…``).
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Refused(ValueError):
    """What cannot be read or converted; one line that names the field or file, and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\n", "\\n"))  # of a name in a damaged file


class Source(Protocol):
    """A checkpoint's model tensors; no optimizer state.

    Attributes:
        folder: where it is, for messages.
        arguments: Megatron's saved arguments; older releases lack some of them.
    """

    folder: Path
    arguments: Namespace

    def keys(self) -> set[str]:
        """Keys of the model's tensors."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape; a stacked tensor's begins with the number of layers."""

    def dtype(self, key: str) -> torch.dtype:
        """As stored."""

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """The tensor, or entry ``layer`` of a stacked one; reads no other from the disk."""
