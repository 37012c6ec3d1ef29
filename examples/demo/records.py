"""What a finished training left: losses by iteration, speed, parameter count and alphas over time.

Losses and times come from the event files that Megatron writes, parameters and alphas from its
checkpoints. Alphas are effective ones, as they stand in the formula.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from settings import Activation, Settings

# A single batch says little, so "final" training loss is the mean over this many iterations.
FINAL_ITERATIONS = 10

_ALPHA_KEY = "decoder.layers.mlp.activation_func.alpha_{side}"  # global shape (layers, 1)

Curve = list[tuple[int, float]]  # (iteration, value), iterations rising


@dataclass(frozen=True)
class Alphas:
    """Effective alphas: ``positive[i][l]`` is αp of layer l after ``iterations[i]``."""

    iterations: list[int]
    positive: list[list[float]]
    negative: list[list[float]]


@dataclass(frozen=True)
class Record:
    """One activation's finished training. Losses are in nats per byte."""

    parameters: int
    tokens: int
    tokens_per_second: float
    train: Curve
    valid: Curve
    alphas: Alphas | None

    @property
    def train_loss(self) -> float:
        """Mean over the last `FINAL_ITERATIONS` iterations."""
        return statistics.fmean(loss for _, loss in self.train[-FINAL_ITERATIONS:])

    @property
    def valid_loss(self) -> float:
        """The loss on held-out text after the last iteration."""
        return self.valid[-1][1]

    def to_json(self) -> dict[str, Any]:
        """The fields, in plain types; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Record:
        """The inverse of `to_json`."""
        curves = {key: [(step, loss) for step, loss in content[key]] for key in ("train", "valid")}
        alphas = Alphas(**content["alphas"]) if content["alphas"] else None
        return cls(**{**content, **curves, "alphas": alphas})


def read_record(folder: Path, settings: Settings, activation: Activation, name: str) -> Record:
    """Collect the record of the training in ``folder``.

    Args:
        folder: holds ``events`` and ``checkpoints``.
        settings: what it was trained with.
        activation: the same.
        name: its key, which selects the formula of the effective alphas.

    Raises:
        SystemExit: a file is missing or ends early.
    """
    events = read_events(folder / "events")
    for tag in ("lm loss", "lm loss validation"):
        if not events.get(tag) or events[tag][-1][0] != settings.iterations:
            raise SystemExit(
                f"demo: {folder / 'events'} has no '{tag}' at iteration {settings.iterations}; "
                f"delete {folder} and run the same command again"
            )
    # The first iterations of a process are slower (memory, caches); a median does not see them.
    seconds = statistics.median(value for _, value in events["iteration-time"])
    checkpoints = complete_checkpoints(folder / "checkpoints")
    return Record(
        parameters=count_parameters(checkpoints[settings.iterations]),
        tokens=settings.iterations * settings.tokens_per_iteration,
        tokens_per_second=settings.tokens_per_iteration / seconds,
        train=events["lm loss"],
        valid=events["lm loss validation"],
        alphas=read_alphas(checkpoints, name) if activation.trainable else None,
    )


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
