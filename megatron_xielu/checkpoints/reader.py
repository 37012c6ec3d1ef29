"""Opens a checkpoint of any kind for its model's tensors.

The public research fork's are put right on the way (`fork`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_xielu.checkpoints import fork
from megatron_xielu.checkpoints.folder import (
    TRACKER,
    NoCheckpoint,
    TwoSaveFolders,
    checkpoints,
    find,
    save_folder,
)
from megatron_xielu.checkpoints.legacy import open_legacy
from megatron_xielu.checkpoints.source import Refused, Source
from megatron_xielu.checkpoints.torch_dist import TorchDist


def open_source(
    checkpoint: Path, *, trust_pickle: bool = False, report: Callable[[str], None] = print
) -> Source:
    """Open a checkpoint: one of its own (``iter_…``), or a run's last one.

    Args:
        checkpoint: its folder, or the run's, or the run's checkpoints folder.
        trust_pickle: whether the pickles of a legacy checkpoint (``mp_rank_…``) may be executed.
        report: told, a line each, what was found and put right.

    Raises:
        Refused: there is no checkpoint that can be read.
    """
    folder = _find(checkpoint)
    source: Source
    if any(folder.glob("mp_rank_*")):
        source = open_legacy(folder, trust_pickle=trust_pickle)
    elif (folder / ".metadata").is_file():
        source = TorchDist(folder)
    else:
        raise Refused(f"{folder} is not a checkpoint: neither .metadata nor mp_rank_* is in it")
    return fork.adapt(source, report)


def _find(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise Refused(f"{checkpoint} is not a folder")
    try:
        folder = save_folder(checkpoint)
        return find(folder)
    except TwoSaveFolders as error:
        raise Refused(str(error)) from None
    except NoCheckpoint as error:
        if checkpoints(folder):
            raise Refused(f"{error}; name one of the iter_* folders instead") from None
        if (folder / TRACKER).exists():
            raise Refused(f"{error}, and there are no iter_* folders") from None
        return folder
