"""Reads what a training left: curves from event files, parameters and alphas from checkpoints.

Alphas are effective ones, as they stand in the formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ALPHA_KEY = "decoder.layers.mlp.activation_func.alpha_{side}"  # global shape (layers, 1)

Curve = list[tuple[int, float]]  # (iteration, value), iterations rising


@dataclass(frozen=True)
class Alphas:
    """Effective alphas: ``positive[i][l]`` is αp of layer l after ``iterations[i]``."""

    iterations: list[int]
    positive: list[list[float]]
    negative: list[list[float]]


def read_events(folder: Path) -> dict[str, Curve]:
    """All scalars by tag; the later value, where a resumed training repeated an iteration."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: sorted({event.step: event.value for event in accumulator.Scalars(tag)}.items())
        for tag in accumulator.Tags()["scalars"]
    }


def saved_iteration(checkpoints: Path) -> int | None:
    """The iteration of the last complete checkpoint, where a training resumes; None if none."""
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else None


def complete_checkpoints(checkpoints: Path) -> dict[int, Path]:
    """Checkpoint folders by iteration, rising, without one that a crash left unfinished."""
    last = saved_iteration(checkpoints) or 0
    found = {int(path.name.removeprefix("iter_")): path for path in checkpoints.glob("iter_*")}
    return {
        iteration: found[iteration]
        for iteration in sorted(found)
        if iteration <= last and (found[iteration] / ".metadata").exists()
    }


def count_parameters(checkpoint: Path) -> int:
    """How many numbers the model in a checkpoint has, over all ranks."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    return sum(
        entry.size.numel()
        for key, entry in _metadata(checkpoint).items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
    )


def read_alphas(checkpoints: dict[int, Path], name: str) -> Alphas:
    """Effective alphas of every layer in every checkpoint; nothing else is loaded.

    Args:
        checkpoints: folders by iteration.
        name: ``"xielu"`` or ``"xiprelu"``.
    """
    import torch
    import torch.distributed.checkpoint as dcp

    from megatron_xielu.activations import ACTIVATIONS, DEFAULT_ALPHA_INIT, DEFAULT_BETA
    from megatron_xielu.reference import softplus

    floors = {"p": 0.0, "n": ACTIVATIONS[name].alpha_n_floor(DEFAULT_BETA)}
    history: dict[str, list[list[float]]] = {"p": [], "n": []}
    for checkpoint in checkpoints.values():
        raw = {
            key: torch.empty(_metadata(checkpoint)[key].size, dtype=torch.float32)
            for key in (_ALPHA_KEY.format(side=side) for side in floors)
        }
        dcp.load(raw, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
        for side, floor in floors.items():
            alpha = raw[_ALPHA_KEY.format(side=side)].flatten()  # [layers]
            history[side].append((softplus(alpha) + floor).tolist())
    for values in history.values():
        values.insert(0, [DEFAULT_ALPHA_INIT] * len(values[0]))
    return Alphas([0, *checkpoints], history["p"], history["n"])


def _metadata(checkpoint: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint import FileSystemReader

    return FileSystemReader(checkpoint).read_metadata().state_dict_metadata
