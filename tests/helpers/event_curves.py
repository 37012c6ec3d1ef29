"""What a training wrote for TensorBoard."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every TensorBoard curve."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in events.Tags()["scalars"]}


def alpha_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Those of the alphas and their gradients."""
    return {tag: values for tag, values in curves(folder).items() if tag.startswith("alpha_")}
