"""What a Megatron checkpoint is to the export: tensors by key, and the saved arguments.

Keys are those of ``torch_dist``: stacked over layers (``decoder.layers.mlp.linear_fc1.weight`` of
shape (L, …)) or one per layer (``decoder.layers.0.mlp.…``). `open_source` opens a folder.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from megatron_xielu.common.event_log import first_line

TRACKER = "latest_checkpointed_iteration.txt"


class Refused(ValueError):
    """A conversion that cannot be done; one line that names the field or file, and the fix."""


def reason(error: Exception) -> str:
    """Why something failed, in one line for a `Refused`."""
    return first_line(str(error)) or type(error).__name__


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


def open_source(
    checkpoint: Path, *, trust_pickle: bool = False, report: Callable[[str], None] = print
) -> Source:
    """Open a checkpoint: one of its own (``iter_…``), or the last one of a checkpoints folder.

    Args:
        checkpoint: the folder.
        trust_pickle: whether the pickles of a legacy checkpoint (``mp_rank_…``) may be executed.
        report: told, a line each, what was found and put right.

    Raises:
        Refused: there is no checkpoint that can be read.
    """
    from megatron_xielu.checkpoints.torch_dist import TorchDist
    from megatron_xielu.convert import fork

    folder = _find(checkpoint)
    source: Source
    if any(folder.glob("mp_rank_*")):
        source = fork.open_legacy(folder, trust_pickle=trust_pickle)
    elif (folder / ".metadata").is_file():
        source = TorchDist(folder)
    else:
        raise Refused(f"{folder} is not a checkpoint: neither .metadata nor mp_rank_* is in it")
    return fork.adapt(source, report)


def _find(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise Refused(f"{checkpoint} is not a folder")
    tracker = checkpoint / TRACKER
    if not tracker.is_file():
        if not (checkpoint / ".metadata").exists() and any(checkpoint.glob("iter_*")):
            raise Refused(f"{tracker} is missing; name one of the iter_* folders instead")
        return checkpoint
    text = tracker.read_text(errors="replace").strip()
    if text != "release" and not text.isdigit():
        raise Refused(f"{tracker} names no iteration; name one of the iter_* folders instead")
    return checkpoint / (text if text == "release" else f"iter_{int(text):07d}")
