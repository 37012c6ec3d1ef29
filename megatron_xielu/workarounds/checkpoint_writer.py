"""Ends a rank whose asynchronous checkpoint writer has died, and a writer whose rank is at its end.

Megatron's persistent writer (``--async-save --use-persistent-ckpt-worker --async-strategy mcore``)
is a process of its own. When it dies (no memory, a full disk with several writers) Megatron 0.19.2
does not notice: training goes on without checkpoints, and the second next save waits for ever.
A writer that was given nothing to write Megatron does not end. Python sends it a SIGTERM then and
waits: for ever where it was forked (on a CPU) after Megatron had taken that signal for its own.
No upstream change that ends either is known.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from typing import Any

# What the writer may have to say through its queues is read first.
_GRACE_SECONDS = 1.0
_WRITER_DIED = 74  # EX_IOERR of sysexits.h


def watch() -> None:
    """Watch the writer from the moment that Megatron starts it. Idempotent."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    start = PersistentAsyncCaller._get_process
    if getattr(start, "_watched", False):
        return
    watched: set[int] = set()

    @functools.wraps(start)
    def start_and_watch(*args: Any, **kwargs: Any) -> Any:
        process = start(*args, **kwargs)
        if process.pid not in watched:
            watched.add(process.pid)
            atexit.register(_end, process)
            threading.Thread(target=_end_with, args=(process,), daemon=True).start()
        return process

    start_and_watch._watched = True  # type: ignore[attr-defined]
    PersistentAsyncCaller._get_process = start_and_watch


_ended: set[int] = set()


def _end(process: Any) -> None:
    """At this rank's end: what was to be written is, or Megatron has failed."""
    _ended.add(process.pid)
    process.kill()


def _end_with(process: Any) -> None:
    multiprocessing.connection.wait([process.sentinel])
    time.sleep(_GRACE_SECONDS)
    # Megatron ends it with 0 at the end of training, and Python a daemon with SIGTERM.
    if process.pid not in _ended and process.exitcode not in (0, -signal.SIGTERM, None):
        message = f"the checkpoint writer died with exit code {process.exitcode}; ending this rank"
        print(f"megatron_xielu: error: {message}", file=sys.stderr, flush=True)
        os._exit(_WRITER_DIED)
