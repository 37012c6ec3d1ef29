"""Reads a checkpoint whole before it is loaded: Megatron and PyTorch compare no checksum.

One flipped bit on a disk would be a changed weight, without a word. A start from the ``--save``
folder under the launcher has read it in `repair`; all other ways in come here: another ``--load``,
``--pretrained-checkpoint``, ``--ckpt-step``, training without the launcher, evaluation, conversion.
"""

from __future__ import annotations

import os
import shlex
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from megatron_xielu.checkpoints import saved_arguments
from megatron_xielu.checkpoints.check import Damaged, check
from megatron_xielu.checkpoints.folder import NoCheckpoint, find, size_and_stamp, to_load
from megatron_xielu.checkpoints.ledger import Record
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common import text, torchrun

THREADS = 8  # nothing else runs yet
_WORTH_A_LINE = 3.0  # seconds

# Ranks that wait have no deadline of their own: with rank 0, which holds the store, they end.
_TO_CONNECT, _PATIENCE = timedelta(minutes=10), timedelta(days=7)
_stores: list[Any] = []  # a store is closed when nobody holds it

_done = False  # by `rank`, before the entry of the same process


def read_whole(
    checkpoint: Path,
    named: str,
    fix: str,
    *,
    only_model: bool = False,
    trusts_pickles: bool = False,
) -> None:
    """Check a checkpoint that is about to be loaded.

    Args:
        checkpoint: its folder; one that is not there is the reader's to refuse.
        named: what the user calls it.
        fix: what to do about one that is damaged.
        only_model: no optimizer's state is loaded.
        trusts_pickles: as `check.check` has it.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read now.
    """
    if not checkpoint.is_dir():
        return
    start = time.monotonic()
    hashes = Record(checkpoint.parent).hashes(checkpoint)
    try:
        check(
            checkpoint,
            whole=True,
            hashes=hashes,
            threads=THREADS,
            only_model=only_model,
            trusts_pickles=trusts_pickles,
        )
    except Damaged as error:
        raise ValueError(f"{named}: {checkpoint.name} is damaged: {error}; {fix}") from None
    seconds = time.monotonic() - start
    if seconds > _WORTH_A_LINE:
        size = text.size(size_and_stamp(checkpoint)[0])
        what = ", without the optimizer's state," if only_model else ""
        print(
            f"megatron_xielu: {checkpoint} ({size}) was read{what} in {seconds:.0f} s: it is whole",
            flush=True,
        )


def read_what_is_loaded(args: Namespace, repaired: Path | None = None) -> None:
    """Check the checkpoint that a training with these arguments would load.

    Args:
        args: ``load``, ``pretrained_checkpoint``, ``ckpt_step``, ``use_checkpoint_args``, ``spec``.
        repaired: the one that `repair` has just read.

    Raises:
        ValueError: it is damaged, or asks for code of its own; names flag and file.
        OSError: it cannot be read now.
    """
    flag, folder = to_load(args.load, args.pretrained_checkpoint)
    if not folder or "://" in folder:
        return
    with suppress(NoCheckpoint):
        found = find(Path(folder), args.ckpt_step)
        if repaired is None or found.resolve() != repaired.resolve():
            fix = (
                "give another by --ckpt-step; python -m megatron_xielu.checkpoints "
                f"{shlex.quote(str(folder))} verify says which are whole"
            )
            read_whole(found, f"{flag} {folder}", fix)
        if args.use_checkpoint_args:
            saved_arguments.check_spec(_arguments(found), args.spec, folder)


def _arguments(checkpoint: Path) -> Namespace:
    from megatron_xielu.checkpoints import inert  # which import torch
    from megatron_xielu.checkpoints.torch_dist import TorchDist

    try:
        for path in sorted(checkpoint.glob("mp_rank_*/model_optim_rng.pt")):
            return Namespace(**vars(inert.load(path, str(path)).get("args") or Namespace()))
        return TorchDist(checkpoint).arguments if checkpoint.is_dir() else Namespace()
    except Refused as error:
        raise ValueError(str(error)) from None


def once(args: Namespace) -> None:
    """`read_what_is_loaded` on rank 0, unless the launcher has; the other ranks wait for it.

    Raises:
        ValueError: it is damaged, or cannot be read.
    """
    if _done:
        return
    try:
        on_rank_0(partial(read_what_is_loaded, args))
    except OSError as error:
        raise ValueError(f"--load {args.load}: {error}") from error


def on_rank_0(work: Callable[[], None]) -> None:
    """Do something on rank 0 while the others wait, as long as it takes.

    In Megatron's own rendezvous they would give up after ``--distributed-timeout-minutes``. The
    store is the one that it uses itself: of torchrun, or opened on rank 0 and shared with it.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        work()
    else:
        torchrun.check(os.environ)
        rank = int(os.environ["RANK"])
        # As in PyTorch: an agent's store lives through restarts, of which each node counts its own.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT") if _is_of_agent() else None
        key = f"megatron_xielu/read/{attempt or 0}"
        try:
            store = _store(opens=rank == 0)
            if rank:
                store.wait([key], _PATIENCE)
        except RuntimeError as error:  # of the network
            raise ConnectionError(
                f"rank 0 cannot be reached, or ended before it had read the checkpoint: "
                f"{text.reason(error)}"
            ) from error
        if rank == 0:
            work()
            store.set(key, "")
    global _done
    _done = True


def _is_of_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(*, opens: bool) -> Any:
    from torch.distributed import TCPStore

    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=opens and not _is_of_agent(),
        timeout=_TO_CONNECT,
        wait_for_workers=False,
        multi_tenant=True,
    )
    _stores.append(store)
    return store
