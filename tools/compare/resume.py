"""``--check-resume``: does a training that was stopped end with the bits of one that was not?

One training goes to its end; the same is stopped by SIGTERM on its way and started again with the
same command. Every tensor of the two last checkpoints is then compared bit for bit (weights,
alphas, the optimizer's fp32 copies and moments), and the losses of all iterations.

Both run in Megatron's deterministic mode. Without it the gradient of the embedding may be summed in
another order each time on a GPU, so that two trainings can differ though neither was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from compare.records import TRAIN, VALID, complete
from compare.settings import Settings
from megatron_xielu.checkpoints.folder import complete_checkpoints
from megatron_xielu.report.events import read_events

FLAG = "--deterministic-mode"
STOP_AFTER = 4  # iterations; a slow look at the log may cost some more before the signal arrives


def shortened(settings: Settings) -> Settings:
    """The same model and batch for as many iterations as the check needs, saved at the end."""
    return replace(
        settings,
        iterations=16,
        warmup=4,
        decay=6,
        save_every=16,
        validate_every=7,
        validation_batches=1,
    )


@dataclass(frozen=True)
class Outcome:
    """What the two trainings left: ``differing`` names tensors, and the iterations' losses."""

    stopped_at: int
    iterations: int
    tensors: int
    bytes: int
    differing: tuple[str, ...]

    def markdown(self, title: str, context: Mapping[str, str]) -> str:
        """For ``results/resume.md``."""
        verdict = "differ: " + ", ".join(self.differing) if self.differing else "the same bits"
        lines = [f"# Stopped and resumed: {title}", ""]
        lines += [f"- {key}: {value}" for key, value in context.items()]
        lines += [
            f"- stopped by SIGTERM after iteration {self.stopped_at} of {self.iterations}, then "
            f"the same command; beside it a training in one go; both with Megatron's {FLAG}",
            f"- compared: {self.tensors} tensors of the last checkpoints, "
            f"{self.bytes / 2**20:,.1f} MiB (weights, the optimizer's copies and moments), and the "
            f"losses of {self.iterations} iterations",
            "",
            f"**{verdict}**",
        ]
        return "\n".join(lines) + "\n"


def compare(whole: Path, stopped: Path, *, stopped_at: int, iterations: int) -> Outcome:
    """Compare two run folders with ``checkpoints``, ``events`` and ``log.txt``."""
    one, other = (
        _tensors(complete_checkpoints(folder / "checkpoints")[iterations])
        for folder in (whole, stopped)
    )
    differing = sorted(one.keys() ^ other.keys())
    both = sorted(one.keys() & other.keys())
    differing += [key for key in both if _bits(one[key]) != _bits(other[key])]
    for tag in (TRAIN, VALID):
        losses, others = (
            complete(read_events(folder / "events"), folder / "log.txt", tag)
            for folder in (whole, stopped)
        )
        differing += [tag] if losses != others else []
    size = sum(tensor.nbytes for tensor in one.values())
    return Outcome(stopped_at, iterations, len(one), size, tuple(differing))


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = dcp.FileSystemReader(checkpoint)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, bytes]:
    """To tell −0 from 0, and find a NaN equal to itself."""
    return tensor.dtype, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
