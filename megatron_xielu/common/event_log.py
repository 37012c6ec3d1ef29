"""The log of a run: one line per event, with time, node, rank and reason.

``2026-11-24T10:17:20Z node=n1 rank=3 event=worker-failed exit=-9 reason="killed by SIGKILL"``

Every node appends to a file of its own (``MEGATRON_XIELU_EVENTS``), since appends of two nodes to
one file can overwrite each other on NFS, and to standard error, so that the job's log has them all.
`examples/pretrain.sh` writes the same lines.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress

from megatron_xielu.common.text import LONGEST_LINE, first_line, now, visible


def node() -> str:
    """Name of this node: ``MEGATRON_XIELU_NODE``, or the host name."""
    return os.environ.get("MEGATRON_XIELU_NODE") or socket.gethostname()


def write(event: str, reason: str = "", **fields: object) -> None:
    """Append one event.

    Args:
        event: what happened, in one word.
        reason: why, in words; of several lines the first non-empty one is kept.
        **fields: further ``name=value`` pairs; ``rank`` replaces this process's own rank.
    """
    pairs = {"node": node(), "rank": os.environ.get("RANK", "-"), "event": event, **fields}
    line = now()
    line += "".join(f" {name}={value}" for name, value in pairs.items())
    text = first_line(reason)
    if text:
        line += f" reason={json.dumps(text[:LONGEST_LINE], ensure_ascii=False)}"
    line = visible(line)  # in the file, too, which is read on a terminal
    _say(line)
    path = os.environ.get("MEGATRON_XIELU_EVENTS")
    if path:
        try:
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(line + "\n")
        except OSError as error:  # a full disk must not end a training that could go on
            _say(f"{path}: {error}")


def _say(line: str) -> None:
    with suppress(OSError):  # nor must an output that nobody reads any more
        # One write: many processes share the log, and print() may write the line end apart.
        print(f"[event] {line}\n", end="", file=sys.stderr, flush=True)
