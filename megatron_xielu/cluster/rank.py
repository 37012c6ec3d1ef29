"""Runs a training script as one rank of a supervised job.

``… -m megatron_xielu.cluster.rank (SCRIPT.py | -m MODULE) MEGATRON ARGUMENTS``

What it adds to the script, whichever it is: before anything is loaded, rank 0 sets aside damaged
checkpoints, points Megatron at the newest whole one, and reads what is loaded from elsewhere (the
other ranks wait for it); a load that fails is noted, for the next start to act on it; what
Megatron's optimizers write into checkpoints is mended (`workarounds`), whatever the activation; at
the end, the event log says how the rank ended, and what it waited for is written down
(`flight_recorder`); and a training that reached its last step is told
from one that left early by the file ``MEGATRON_XIELU_FINISHED``.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import importlib.util
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record

import megatron_xielu
from megatron_xielu import workarounds
from megatron_xielu.checkpoints import before_load, failed_loads
from megatron_xielu.checkpoints.check import OF_THIS_FILE
from megatron_xielu.checkpoints.folder import RELEASE
from megatron_xielu.checkpoints.repair import NoGoodCheckpoint, repair
from megatron_xielu.cluster import flight_recorder, profiled
from megatron_xielu.cluster.launcher import REFUSED
from megatron_xielu.common import event_log, processes, text
from megatron_xielu.workarounds import releases

# Exit codes of Megatron's rerun state machine, which checks every loss for NaN, Inf and spikes.
_REJECTED_RESULT = {
    16: "a loss was rejected (NaN, Inf or a spike); to be computed again after a restart",
    17: "a loss was rejected (NaN, Inf or a spike) and computed again",
}

_REFUSAL = "megatron_xielu: error: "

_CHECKPOINTING = "megatron.training.checkpointing"
_LOADS = ("load_checkpoint", "load_args_from_checkpoint")  # the second: of the entry's checks

# What PyTorch's plain RuntimeErrors say when memory, the device or the network is at fault.
_OF_THE_MACHINE = ("allocate", "cuda", "gloo", "nccl", "new thread", "shared memory")

_SIGNALLED = 128  # a shell's and Python scripts' exit code, less the signal's number


@record
def main() -> None:
    """Repair, run the script, report."""
    if len(sys.argv) < 2 or (sys.argv[1] == "-m" and len(sys.argv) < 3):
        raise SystemExit("usage: python -m megatron_xielu.cluster.rank (SCRIPT.py | -m MODULE) …")
    if not profiled.is_inside():  # nobody knows which thread of nsys has started it
        # With its launcher; left alone it would block the next attempt.
        processes.end_with_parent()
    if profiled.is_wanted():
        raise SystemExit(profiled.run(sys.argv[1:]))
    flight_recorder.arm()
    at_sigterm = signal.getsignal(signal.SIGTERM)
    is_module = sys.argv[1] == "-m"
    script = sys.argv[2 if is_module else 1]
    arguments = sys.argv[3 if is_module else 2 :]
    flags, loader = _flags(arguments), _loader(sys.argv[1:])
    save = Path(flags.save) if flags.save else None
    finished = os.environ.get("MEGATRON_XIELU_FINISHED")
    if finished and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(finished).unlink(missing_ok=True)  # of an earlier start
    try:
        package = script.partition(".")[0]
        if not (importlib.util.find_spec(package) if is_module else Path(script).exists()):
            raise SystemExit(f"{_REFUSAL}ENTRY: there is no {script}")
        _prepare(flags, loader)
        workarounds.mend_optimizers_when_imported()
        sys.argv = [script, *arguments]
        if is_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            # As for `python SCRIPT.py`: what lies beside the script can be imported.
            sys.path.insert(0, str(Path(script).resolve().parent))
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        failed = _of_a_load(end)
        if end.code in (None, 0) and not failed:
            return  # left early, after saving: a signal, --exit-interval, --exit-duration-in-mins
        reason = _REJECTED_RESULT.get(end.code) or _reason(end, None)  # type: ignore[arg-type]
        event_log.write("worker-failed", reason)
        atexit.register(_kill_children)
        may_do_better = failed and _note(end, failed, flags, loader)
        if not isinstance(end.code, int):
            get_error_handler().record_exception(SystemExit(reason))  # for the launcher
        if reason.startswith(_REFUSAL) and not may_do_better:
            raise SystemExit(REFUSED) from None  # the launcher prints the reason, once
        if failed:
            raise SystemExit(1) from None
        raise
    except BaseException as error:
        flight_recorder.dump()
        failed = _of_a_load(error)
        event_log.write("worker-failed", _reason(error, None if failed else save))
        atexit.register(_kill_children)
        if failed:
            _note(error, failed, flags, loader)
        raise
    finally:
        # Megatron leaves its handler in place, and Python's exit would make a SIGTERM that comes
        # again fatal, after everything is saved.
        signal.signal(signal.SIGTERM, at_sigterm)
    if finished and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(finished).touch()


def _flags(arguments: list[str]) -> Namespace:
    """Megatron's flags that say what is loaded and saved."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for flag in ("--save", "--load", "--pretrained-checkpoint", "--ckpt-step"):
        parser.add_argument(flag)
    parser.add_argument("--use-checkpoint-args", action="store_true")
    parser.add_argument("--spec", nargs="*")
    flags = parser.parse_known_args(arguments)[0]
    step = flags.ckpt_step or ""
    flags.ckpt_step = int(step) if step.isascii() and step.isdigit() else None
    return flags


def _loader(words: list[str]) -> str:
    """A digest of what decides whether files can be loaded: entry, flags, ranks, versions."""
    megatron = ""
    with suppress(ModuleNotFoundError, releases.UnsupportedRelease):  # the entry says it
        megatron = releases.installed()[1]
    ranks = os.environ.get("WORLD_SIZE", "1")
    made_of = [*words, ranks, megatron, torch.__version__, megatron_xielu.__version__]
    return hashlib.sha256("\0".join(made_of).encode(errors="surrogateescape")).hexdigest()


def _prepare(flags: Namespace, loader: str) -> None:
    """On rank 0, while the others wait: see to it that what is loaded is whole."""
    if not (flags.save or flags.load or flags.pretrained_checkpoint):
        return
    try:
        before_load.on_rank_0(partial(_repair_and_read, flags, loader))
    except (NoGoodCheckpoint, NotADirectoryError) as error:
        raise SystemExit(f"{_REFUSAL}--save: {error}") from None
    except ValueError as error:
        raise SystemExit(f"{_REFUSAL}{error}") from None
    except OSError as error:  # of a file system or network that may come back
        raise SystemExit(f"before the checkpoint was loaded: {error}") from None


def _repair_and_read(flags: Namespace, loader: str) -> None:
    repaired = None
    if flags.save:
        iteration = repair(Path(flags.save), loader=loader)
        event_log.write("resume", iteration=iteration or 0)
        repaired = Path(flags.save) / (RELEASE if iteration is None else f"iter_{iteration:07d}")
    before_load.read_what_is_loaded(flags, repaired)


def _of_a_load(error: BaseException) -> BaseException | None:
    """What Megatron raised while it loaded a checkpoint, if that is what led to this error."""
    for one in _chain(error):
        is_ours = isinstance(one, SystemExit) and str(one.code).startswith(_REFUSAL)
        if not is_ours and any(
            frame.f_code.co_name in _LOADS and frame.f_globals.get("__name__") == _CHECKPOINTING
            for frame, _ in traceback.walk_tb(one.__traceback__)
        ):
            return one
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _may_pass(error: BaseException) -> bool:
    """Whether it is of the memory, a device, the network or a file system, or is a signal's."""
    if isinstance(error, OSError):
        return error.errno not in OF_THIS_FILE
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, DistError)):
        return True
    if isinstance(error, RuntimeError):
        return any(word in str(error).lower() for word in _OF_THE_MACHINE)
    if isinstance(error, SystemExit):  # Megatron's have no number
        return isinstance(error.code, int) and error.code > _SIGNALLED
    return not isinstance(error, Exception)


def _note(error: BaseException, failed: BaseException, flags: Namespace, loader: str) -> bool:
    """Note a failed load, unless no file is at fault; whether the next start may do better."""
    if any(map(_may_pass, _causes(failed))):
        return True
    own = flags.save and flags.load and os.path.realpath(flags.load) == os.path.realpath(flags.save)
    if not own or flags.ckpt_step:
        return False
    return failed_loads.note(Path(flags.save), _reason(error, None), loader)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What led to it, on all ranks: Megatron wraps some errors, and ends after others."""
    for one in _chain(error):
        # PyTorch's of a checkpoint holds those of all ranks, and is no `Exception` itself.
        yield from [cause for cause, _ in getattr(one, "failures", {}).values()] or [one]


def _kill_children() -> None:
    """Kill the checkpoint writer and data workers: Python would send SIGTERM and wait for ever.

    They live through a SIGTERM, as they must while the ranks save.
    """
    for child in multiprocessing.active_children():
        child.kill()


def _reason(error: BaseException, save: Path | None) -> str:
    """One line; of a failed save also how full the disk is, which PyTorch's error does not say."""
    if isinstance(error, SystemExit):
        if not error.code:
            return "Megatron ended while it loaded a checkpoint; its output says why"
        return f"exit code {error.code}" if isinstance(error.code, int) else str(error.code)
    reason = text.describe(error)
    if type(error).__name__ == "CheckpointException":
        reason += f" ({text.first_line(str(error).strip().rpartition(chr(10))[2])})"
        if save and save.is_dir():
            reason += f"; {text.size(shutil.disk_usage(save).free)} are free in {save}"
    return reason


if __name__ == "__main__":
    text.ready_output(colours=True)
    main()
