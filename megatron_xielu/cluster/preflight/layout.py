"""Preflight check of the layout: will checkpoints of this run keep its optimizer's state?

Rank 0 walks the layout with the installed Megatron (`megatron_xielu.checkpoint_walk`), in a process
that has no GPU and runs beside the other checks. See `megatron_xielu.cluster.preflight`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from argparse import Namespace

from megatron_xielu.cluster.preflight.exchange import Board, Problem

_REFUSED = 2  # by Megatron or this package: nothing that could be done without


class Layout:
    """Starts the walk on rank 0, if there are arguments of a training; `check` waits for it."""

    def __init__(self, board: Board, args: Namespace) -> None:
        self._started, self._limit = time.monotonic(), args.layout_limit
        self._walk: subprocess.Popen[str] | None = None
        self._asked = bool(args.training)
        if self._asked and board.rank == 0:
            module = [sys.executable, "-m", "megatron_xielu.checkpoint_walk"]
            self._walk = subprocess.Popen(
                [*module, "--gpus", str(board.world_size), "--", *args.training],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

    def check(self, board: Board) -> None:
        """On all ranks."""
        if not self._asked:
            board.done("layout", "skipped: no arguments of a training, or LAYOUT_CHECK=0")
            return
        limit = self._limit + 5.0  # so that rank 0 says itself that it took too long
        found = board.ask("layout", self._result, only=lambda rank: rank == 0, limit=limit)
        if found:
            board.done("layout", found[0])

    def _result(self) -> str:
        assert self._walk is not None
        left = max(1.0, self._started + self._limit - time.monotonic())
        try:
            output, errors = self._walk.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            self._walk.kill()
            raise Problem(
                f"whether checkpoints keep the optimizer's state is not proven after "
                f"{self._limit:.0f} s; raise --layout-limit, or set LAYOUT_CHECK=0 to do without"
            ) from None
        verdict = (output.strip() or errors.strip() or "no answer").splitlines()[-1]
        if self._walk.returncode:
            unproven = self._walk.returncode != _REFUSED
            raise Problem(
                verdict.removeprefix("FAIL: ")
                + ("; LAYOUT_CHECK=0 does without this proof" if unproven else "")
            )
        return verdict.removeprefix("ok: ")
