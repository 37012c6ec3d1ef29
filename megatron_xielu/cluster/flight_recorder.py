"""What each rank did when a training hung: its last collectives, and where its Python was.

PyTorch's flight recorder holds the last 2000 collectives of a rank in memory, all the time. Over
NCCL every rank writes them when one of them has waited too long; over gloo `dump` does when a rank
fails. Both go to ``RUN_DIR/flight_recorder/now/rank_N``; ``stack_N`` beside it has the Python
stacks at the moment when the launcher ended the rank. When all ranks of node 0 have ended, its
launcher says in one event who was waited for (`desync`), and gives the folder its time as a name;
the newest few are kept. They can be read by PyTorch's own analyser, too:
``python -m torch.distributed.flight_recorder.fr_trace FOLDER -p rank_ --allow-incomplete-ranks``.
"""

from __future__ import annotations

import faulthandler
import io
import os
import pickle
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_xielu.cluster import desync
from megatron_xielu.common import event_log, files
from megatron_xielu.common.pickled_names import foreign

FOLDER = "MEGATRON_XIELU_FLIGHT_RECORDER"  # of the run; nothing is recorded without it
STACKS = signal.SIGUSR2
_KEPT = 5  # folders: of a run that hangs again and again
_NOW = "now"
_RECORD = re.compile(r"rank_(\d+)")
_OF_TIME = re.compile(r"\d{8}T\d{6}Z")
_LONGEST = 256 * 2**20  # bytes of a record
_SILENCE, _PATIENCE = 3.0, 30.0  # seconds: no new record, at the most


def arm() -> None:
    """Before the process groups are made: where this rank's record goes, and its stacks."""
    if not (folder := _now()):
        return
    rank = os.environ.get("RANK", "0")
    prefix = str(folder / "rank_")
    # Both names of each, old and new; who has set one means it. All calls, not only those that have
    # not ended: of a rank that is late, there are none.
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", prefix)
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", prefix)
    os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_INCLUDE_ONLY_ACTIVE", "0")
    os.environ.setdefault("TORCH_INCLUDE_STACK_TRACE", "0")
    signal.signal(STACKS, signal.SIG_IGN)  # what Python goes back to at its end
    with suppress(OSError):  # the recorder ends no training
        if rank == "0":
            _set_aside(folder)  # of a start whose launcher was killed
        folder.mkdir(parents=True, exist_ok=True)
        # Open for as long as the process lives: a signal's handler opens no files.
        faulthandler.register(STACKS, file=(folder / f"stack_{rank}").open("w"))


def dump() -> None:
    """Write what this rank has called, if its backend does not by itself."""
    import torch.distributed as dist

    folder = _now()
    if not (folder and dist.is_available() and dist.is_initialized()):
        return
    if "gloo" not in str(dist.get_backend()):
        return
    with suppress(Exception):  # of a PyTorch that records nothing over gloo; or a full disk
        from torch._C._distributed_c10d import _dump_fr_trace

        record = _plain(_dump_fr_trace(includeStackTraces=False, onlyActive=False))
        world = dist.distributed_c10d._world
        # Gloo's own has the default group only.
        record["pg_config"] = {
            world.pg_names[group]: {
                "name": world.pg_names[group],
                "desc": group.group_desc,
                "ranks": str(list(ranks)),
            }
            for group, ranks in world.pg_group_ranks.items()
            if not isinstance(group, int)  # nobody's group
        }
        files.write(folder / f"rank_{dist.get_rank()}", pickle.dumps(record))


def report(world_size: int) -> None:
    """On node 0, when its ranks have ended: who was waited for, in one event.

    Other nodes' ranks come to their end at about the same time; their records are waited for while
    new ones come.
    """
    folder = _now()
    if not (folder and _records(folder)):
        return
    end, seen, quiet = time.monotonic() + _PATIENCE, 0, time.monotonic()
    while seen < world_size and time.monotonic() < min(end, quiet + _SILENCE):
        if (found := len(_records(folder))) > seen:
            seen, quiet = found, time.monotonic()
        time.sleep(0.1)
    dumps = {}
    for rank, path in _records(folder).items():
        with suppress(Exception):  # half written: a pickle then fails in any way
            dumps[rank] = _read(path)
    try:
        finding = desync.explain(dumps) if dumps else None
    except (KeyError, TypeError, ValueError, SyntaxError, AttributeError, RecursionError):
        event_log.write("desync", f"the records of PyTorch in {folder} are of an unknown form")
        finding = None
    with suppress(OSError):
        kept = _set_aside(folder)
        if finding:
            ranks = ",".join(map(str, finding.ranks[:8]))
            event_log.write("desync", f"{finding.reason}; {kept} has the records", rank=ranks)


def _now() -> Path | None:
    folder = os.environ.get(FOLDER)
    return Path(folder) / _NOW if folder else None


def _records(folder: Path) -> dict[int, Path]:
    try:
        paths = list(folder.iterdir())
    except OSError:
        return {}
    return {int(m[1]): path for path in paths if (m := _RECORD.fullmatch(path.name))}


def _set_aside(folder: Path) -> Path:
    """Give a folder with records its time as a name, and delete the oldest of such folders."""
    if not _records(folder):
        return folder
    kept = folder.with_name(time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))
    while kept.exists():
        time.sleep(1)
        kept = folder.with_name(time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))
    folder.rename(kept)
    older = sorted(path for path in folder.parent.iterdir() if _OF_TIME.fullmatch(path.name))
    for path in older[:-_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
    return kept


def _read(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LONGEST:
        raise ValueError(f"{path} is too long for a record")
    return _plain(path.read_bytes())


def _plain(record: bytes) -> dict[str, Any]:
    """A record is a pickle of numbers, texts, lists and dictionaries, and of nothing else.

    Raises:
        ValueError, EOFError, pickle.UnpicklingError: it is none, or not whole.
    """
    content = _Plain(io.BytesIO(record)).load()
    if not isinstance(content, dict):
        raise ValueError("no record")
    return content


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Refuse: a record names nothing."""
        raise foreign(f"{module}.{name}")
