"""Finds the checkpoint to evaluate, before anything of Megatron is imported."""

from __future__ import annotations

from pathlib import Path

_TRACKER = "latest_checkpointed_iteration.txt"


def find(folder: Path, step: int | None) -> int:
    """The iteration of the checkpoint that Megatron would load; 0 for a ``release``.

    Args:
        folder: ``--load``.
        step: ``--ckpt-step``, None for the last one.

    Raises:
        ValueError: there is none, or not of the format ``torch_dist``.
    """
    if not folder.is_dir():
        raise ValueError(f"--load {folder}: no such folder")
    tracker = folder / _TRACKER
    last = tracker.read_text().strip() if tracker.is_file() else None
    if last is None and step is None:
        inside = folder / "checkpoints" / _TRACKER
        hint = f"; say --load {inside.parent}" if inside.is_file() else ""
        raise ValueError(f"--load {folder}: no checkpoint, {_TRACKER} is missing{hint}")
    if last is not None and last != "release" and not last.isdigit():
        raise ValueError(f"{tracker} names no iteration; say --ckpt-step")
    if last == "release":
        iteration, name = 0, "release"
    else:
        iteration = step if step is not None else int(last or 0)
        name = f"iter_{iteration:07d}"
    checkpoint = folder / name
    if not checkpoint.is_dir():
        flag = f"--ckpt-step {step}" if step is not None else f"--load {folder}"
        there = sorted(path.name for path in folder.glob("iter_*"))
        raise ValueError(f"{flag}: no {checkpoint}; there is {', '.join(there) or 'none'}")
    if not (checkpoint / ".metadata").is_file():
        raise ValueError(
            f"{checkpoint} is not a complete checkpoint of the format torch_dist: no .metadata"
        )
    return iteration
