"""Runs a training script as one rank of a supervised job.

``… -m megatron_xielu.cluster.rank (SCRIPT.py | -m MODULE) MEGATRON ARGUMENTS``

What it adds to the script, whichever it is: before anything is loaded, rank 0 sets aside damaged
checkpoints and points Megatron at the newest whole one (the other ranks wait for it in the
rendezvous); what Megatron's optimizers write into checkpoints is mended (`workarounds`), whatever
the activation; at the end, the event log says how the rank ended; and a training that reached its
last step is told from one that left early by the file ``MEGATRON_XIELU_FINISHED``.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import importlib.util
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record

from megatron_xielu import workarounds
from megatron_xielu.checkpoints.repair import NoGoodCheckpoint, repair
from megatron_xielu.cluster.launcher import REFUSED
from megatron_xielu.common import event_log, text

# Exit codes of Megatron's rerun state machine, which checks every loss for NaN, Inf and spikes.
_REJECTED_RESULT = {
    16: "a loss was rejected (NaN, Inf or a spike); to be computed again after a restart",
    17: "a loss was rejected (NaN, Inf or a spike) and computed again",
}

_REFUSAL = "megatron_xielu: error: "

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@record
def main() -> None:
    """Repair, run the script, report."""
    if len(sys.argv) < 2 or (sys.argv[1] == "-m" and len(sys.argv) < 3):
        raise SystemExit("usage: python -m megatron_xielu.cluster.rank (SCRIPT.py | -m MODULE) …")
    # The kernel ends this rank with its launcher; left alone it would block the next attempt.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    at_sigterm = signal.getsignal(signal.SIGTERM)
    is_module = sys.argv[1] == "-m"
    script = sys.argv[2 if is_module else 1]
    arguments = sys.argv[3 if is_module else 2 :]
    save = _save_folder(arguments)
    try:
        package = script.partition(".")[0]
        if not (importlib.util.find_spec(package) if is_module else Path(script).exists()):
            raise SystemExit(f"{_REFUSAL}ENTRY: there is no {script}")
        if save and os.environ.get("RANK", "0") == "0":
            event_log.write("resume", iteration=_repair(save) or 0)
        workarounds.mend_optimizers_when_imported()
        sys.argv = [script, *arguments]
        if is_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            # As for `python SCRIPT.py`: what lies beside the script can be imported.
            sys.path.insert(0, str(Path(script).resolve().parent))
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code in (None, 0):
            return  # left early, after saving: a signal, --exit-interval, --exit-duration-in-mins
        reason = f"exit code {end.code}" if isinstance(end.code, int) else str(end.code)
        reason = _REJECTED_RESULT.get(end.code, reason)  # type: ignore[arg-type]
        event_log.write("worker-failed", reason)
        atexit.register(_kill_children)
        if not isinstance(end.code, int):
            get_error_handler().record_exception(SystemExit(reason))  # for the launcher
        if reason.startswith(_REFUSAL):
            raise SystemExit(REFUSED) from None  # the launcher prints the reason, once
        raise
    except BaseException as error:
        event_log.write("worker-failed", _reason(error, save))
        atexit.register(_kill_children)
        raise
    finally:
        # Megatron leaves its handler in place, and Python's exit would make a SIGTERM that comes
        # again fatal, after everything is saved.
        signal.signal(signal.SIGTERM, at_sigterm)
    finished = os.environ.get("MEGATRON_XIELU_FINISHED")
    if finished and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(finished).touch()


def _save_folder(arguments: list[str]) -> Path | None:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--save")
    save = parser.parse_known_args(arguments)[0].save
    return Path(save) if save else None


def _repair(save: Path) -> int | None:
    try:
        return repair(save)
    except (NoGoodCheckpoint, NotADirectoryError) as error:
        raise SystemExit(f"{_REFUSAL}--save: {error}") from None
    except OSError as error:  # of a file system that may come back
        raise SystemExit(f"--save: {error}") from None


def _kill_children() -> None:
    """Kill the checkpoint writer and data workers: Python would send SIGTERM and wait for ever.

    They live through a SIGTERM, as they must while the ranks save.
    """
    for child in multiprocessing.active_children():
        child.kill()


def _reason(error: BaseException, save: Path | None) -> str:
    """One line; of a failed save also how full the disk is, which PyTorch's error does not say."""
    reason = text.describe(error)
    if save and save.is_dir() and type(error).__name__ == "CheckpointException":
        free = shutil.disk_usage(save).free
        last = str(error).strip().rpartition("\n")[2].strip()
        reason += f" ({last}); {text.size(free)} are free in {save}"
    return reason


if __name__ == "__main__":
    text.ready_output()
    main()
