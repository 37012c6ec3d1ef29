"""Finds the checkpoint to evaluate, before anything of Megatron is imported."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from shlex import quote

from megatron_xielu.checkpoints import before_load
from megatron_xielu.checkpoints import folder as save_folder
from megatron_xielu.checkpoints.folder import RELEASE, TRACKER
from megatron_xielu.checkpoints.torch_dist import TorchDist


def find(folder: Path, step: int | None) -> Path:
    """The checkpoint that Megatron would load.

    Args:
        folder: of checkpoints.
        step: ``--ckpt-step``, None for the last one.

    Raises:
        ValueError: there is none, or not of the format ``torch_dist``.
    """
    if not folder.is_dir():
        raise ValueError(f"--load {folder}: no such folder")
    if (folder / ".metadata").is_file():
        number = folder.name.removeprefix("iter_").lstrip("0") or "0"
        raise ValueError(
            f"--load {folder} is one checkpoint; give --load {quote(str(folder.parent))} "
            f"--ckpt-step {number}"
        )
    try:
        checkpoint = save_folder.find(folder, step)
    except save_folder.NoCheckpoint as error:
        if not save_folder.checkpoints(folder) and not (folder / TRACKER).exists():
            raise ValueError(f"--load {folder}: there is no checkpoint in it") from None
        raise ValueError(
            f"{error}; mend it with python3 -m megatron_xielu.checkpoints {quote(str(folder))} "
            "repair"
        ) from None
    if not checkpoint.is_dir():
        flag = f"--ckpt-step {step}" if step else f"--load {folder}"
        there = sorted(path.name for path in folder.glob("iter_*"))
        raise ValueError(f"{flag}: no {checkpoint}; there is {', '.join(there) or 'none'}")
    if not (checkpoint / ".metadata").is_file():
        raise ValueError(
            f"{checkpoint} is not a complete checkpoint of the format torch_dist: no .metadata"
        )
    return checkpoint


def check(checkpoint: Path) -> int:
    """Refuse one that is damaged, arguments that Megatron would not have saved, and code in
    ``.metadata``: Megatron reads all of it, whatever it is.

    Args:
        checkpoint: as `find` found it.

    Returns:
        Its iteration; 0 of a ``release``.

    Raises:
        ValueError: naming the argument, or the file.
        OSError: it cannot be read now.
    """
    fix = "give another by --ckpt-step"
    read = partial(
        before_load.read_whole, checkpoint, f"--load {checkpoint.parent}", fix, only_model=True
    )
    before_load.on_rank_0(read)
    TorchDist(checkpoint)
    return 0 if checkpoint.name == RELEASE else int(checkpoint.name.removeprefix("iter_"))
