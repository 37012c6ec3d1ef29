"""How the ranks of a preflight agree without a collective that could hang.

Every rank runs a check in a thread, with a time limit, and posts its answer to the rendezvous's TCP
store. Rank 0 waits for the answers until a deadline, publishes them to all, and prints the verdict;
a rank that has not answered is named and not waited for again. So a dead, stuck or unreachable rank
costs one time limit, and never the report.

Stages: ``<stage>/<rank>`` is a rank's answer, ``<stage>/all`` are all of them, in JSON.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed import TCPStore

from megatron_xielu.common import event_log
from megatron_xielu.common.text import one_line

_GRACE = 5.0  # seconds that an answer may take to arrive after the time limit of its check
_LAST = 3.0  # seconds that node 0 stays after a failure
_STOP_GRACE = 1.5  # seconds between the launcher's SIGTERM and the verdict


MIB, GIB = 2**20, 2**30


class Problem(Exception):
    """What a check found wrong on this rank, in words that say how to mend it."""


class Answers(dict[int, Any]):
    """What a stage returned, by rank; ranks that failed or did not answer are left out."""


def most_common(values: Mapping[int, Any]) -> Any:
    """The value (of JSON) that most ranks have; of a tie the one of the lowest rank."""
    counts = Counter(json.dumps(values[rank], sort_keys=True) for rank in sorted(values))
    return json.loads(counts.most_common(1)[0][0])


class Board:
    """This rank's end of the exchange, and rank 0's report.

    Args:
        limit: seconds that one check may take on one rank.
        connect: seconds to wait for the store, and for the last rank to arrive.

    Raises:
        RuntimeError: the store of rank 0 cannot be reached.
    """

    def __init__(self, *, limit: float, connect: float) -> None:
        self.limit = limit
        self.rank = int(os.environ["RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_size = int(os.environ["LOCAL_WORLD_SIZE"])
        self._address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun's agent may serve the store that its ranks use; else rank 0 does.
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.store = TCPStore(
            *self._address,
            is_master=self.rank == 0 and not served,
            timeout=timedelta(seconds=connect),
            wait_for_workers=False,
        )
        self.node = event_log.node()
        self._nodes = [f"node number {r // self.local_size}" for r in range(self.world_size)]
        self._lost: set[int] = set()
        self._failures: dict[str, int] = {}
        self._start = time.monotonic()
        self._stopped_at: float | None = None
        signal.signal(signal.SIGTERM, self._stop)

        self._post("hello", {"value": self.node})
        hello = self._collect_or_wait("hello", connect)
        for rank, answer in enumerate(hello):
            if answer is not None:
                self._nodes[rank] = answer["value"]
        self._report_missing("ranks", hello)

    # --- who is there -----------------------------------------------------------------------------

    @property
    def leaders(self) -> dict[str, int]:
        """The first rank that answers of every node, by the node's name, in the order of ranks."""
        leaders: dict[str, int] = {}
        for rank, node in enumerate(self._nodes):
            if rank not in self._lost:
                leaders.setdefault(node, rank)
        return leaders

    def one_per_node(self) -> Callable[[int], bool]:
        """Whether a rank is the one that answers for its node, for `ask`."""
        ranks = set(self.leaders.values())
        return lambda rank: rank in ranks

    @property
    def is_leader(self) -> bool:
        """Whether this rank answers for its node."""
        return self.leaders.get(self.node) == self.rank

    @property
    def complete(self) -> bool:
        """Whether every rank has answered so far: all know the same, so all may use collectives."""
        return not self._lost

    def node_of(self, rank: int) -> str:
        """Name of a rank's node."""
        return self._nodes[rank]

    def ranks_of(self, node: str) -> list[int]:
        """Ranks on a node."""
        return [rank for rank, name in enumerate(self._nodes) if name == node]

    def new_client(self, *, timeout: float) -> TCPStore:
        """A connection of its own to the store: one that waits would hold up the exchange.

        Args:
            timeout: seconds until a ``get`` or ``wait`` raises.
        """
        return TCPStore(*self._address, is_master=False, timeout=timedelta(seconds=timeout))

    # --- stages -----------------------------------------------------------------------------------

    def ask(
        self,
        check: str,
        measure: Callable[[], Any],
        *,
        stage: str = "",
        only: Callable[[int], bool] = lambda rank: True,
        limit: float | None = None,
    ) -> Answers:
        """Run ``measure`` on every rank, or those in ``only``, and exchange what it returns.

        An exception, a time limit passed or a missing answer is reported as a failure of ``check``,
        by node and rank. Call it on all ranks.

        Args:
            check: under which name a failure is printed.
            measure: returns what JSON can hold; run in a thread.
            stage: distinguishes the stages of one check.
            only: which ranks measure.
            limit: seconds, instead of the board's.

        Returns:
            The same on all ranks.
        """
        if self._stopped_at is not None:
            self._leave_above_rank_0()
            # The others see the verdict while they wait for this stage.
            self.fail(check, "not run: the launcher ends the ranks of this node", rank=0)
            self.finish()
        limit = limit or self.limit
        # If even this thread hangs: its stack is printed and the process ends, so that its launcher
        # and the job can. Longer than it may wait for rank 0.
        faulthandler.dump_traceback_later(limit + 3 * _GRACE, exit=True)
        name = f"{check}.{stage}"
        self._post(name, self._attempt(measure, limit) if only(self.rank) else {"value": None})
        answers = self._collect_or_wait(name, limit + _GRACE)
        self._report_missing(check, answers)
        for rank, answer in enumerate(answers):
            if answer and "error" in answer:
                self.fail(check, answer["error"], rank=rank)
        return Answers(
            {
                rank: answer["value"]
                for rank, answer in enumerate(answers)
                if answer and "value" in answer and only(rank)
            }
        )

    def _attempt(self, measure: Callable[[], Any], limit: float) -> dict[str, Any]:
        result: dict[str, Any] = {}

        def run() -> None:
            try:
                result["value"] = measure()
            except Problem as problem:
                result["error"] = str(problem)
            except BaseException as error:  # in a thread, SystemExit and all must come out here
                result["error"] = f"{type(error).__name__}: {one_line(error)}"[:500]

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        end = time.monotonic() + limit
        while thread.is_alive() and time.monotonic() < end:
            thread.join(0.2)
            if self._stopped_at is not None:
                self._leave_above_rank_0()
                end = min(end, self._stopped_at + _STOP_GRACE)
        return dict(result) or {"error": f"not done within {limit:.0f} s"}

    def _post(self, stage: str, answer: dict[str, Any]) -> None:
        self.store.set(f"{stage}/{self.rank}", json.dumps(answer))

    def _collect_or_wait(self, stage: str, seconds: float) -> list[Any]:
        """Every rank's answer or None; rank 0 gathers and publishes, the others wait for that."""
        end = time.monotonic() + seconds
        if self.rank:
            return json.loads(self._get(f"{stage}/all", end + _GRACE))
        answers: list[Any] = []
        for rank in range(self.world_size):
            try:
                until = time.monotonic() if rank in self._lost else end
                answer = json.loads(self._get(f"{stage}/{rank}", until))
            except (TimeoutError, ValueError):  # ValueError: not one of ours
                answer = None
            answers.append(answer if isinstance(answer, dict) else None)
        self.store.set(f"{stage}/all", json.dumps(answers))
        return answers

    def _get(self, key: str, end: float) -> bytes:
        while True:
            # Asked first, since rank 0 sets it last: between two questions it may do all it has to.
            ended = self.rank and self.store.check(["verdict"])
            if self.store.check([key]):
                return self.store.get(key)
            if self._stopped_at is not None:
                self._leave_above_rank_0()
                end = min(end, self._stopped_at + _STOP_GRACE)
            left = end - time.monotonic()
            if ended or left <= 0:
                raise TimeoutError("rank 0 does not answer, or has ended the preflight")
            time.sleep(min(0.05, left))  # the store's own wait logs every time limit

    def _report_missing(self, check: str, answers: list[Any]) -> None:
        for rank, answer in enumerate(answers):
            if answer is not None or rank in self._lost:
                continue
            self._lost.add(rank)
            self.fail(
                check,
                "no answer: it ended or hangs, or its launcher ended it with another rank of the "
                "node; its own output says more, or the kernel log (dmesg: out of memory, Xid)",
                rank=rank,
            )

    # --- the report -------------------------------------------------------------------------------

    def _print(self, level: str, check: str, text: str) -> None:
        if self.rank == 0:
            print(f"{level:<4} {check:<12} {' '.join(text.split())}", flush=True)

    def fail(self, check: str, text: str, *, rank: int | None = None) -> None:
        """Report a failure; ``rank`` names it and its node."""
        self._failures[check] = self._failures.get(check, 0) + 1
        self._print("FAIL", check, f"{self._where(rank)}{text}")

    def warn(self, check: str, text: str, *, rank: int | None = None) -> None:
        """Report what does not end the preflight."""
        self._print("warn", check, f"{self._where(rank)}{text}")

    def done(self, check: str, figures: str) -> None:
        """Report that the check passed, unless it failed."""
        if check not in self._failures:
            self._print("ok", check, figures)

    def _where(self, rank: int | None) -> str:
        return "" if rank is None else f"{self._nodes[rank]} (rank {rank}): "

    def failed(self, check: str) -> bool:
        """Whether rank 0 has reported a failure of the check; on rank 0 only."""
        return check in self._failures

    # --- the end ----------------------------------------------------------------------------------

    def finish(self) -> NoReturn:
        """Print the verdict and end this process, with 1 if anything failed on any rank."""
        if self.rank:
            verdict = json.loads(self._get("verdict", time.monotonic() + self.limit + _GRACE))
            with suppress(RuntimeError):  # rank 0 does not wait for ever
                self.store.set(f"bye/{self.rank}", "")
            self.leave(verdict)
        verdict = int(bool(self._failures))
        seconds = time.monotonic() - self._start
        where = f"{len(set(self._nodes))} nodes, {self.world_size} ranks, {seconds:.1f} s"
        if verdict:
            names = ", ".join(self._failures)
            print(f"preflight: FAIL ({where}): {names}", flush=True)
        else:
            print(f"preflight: ok ({where})", flush=True)
        self.store.set("verdict", json.dumps(verdict))
        end = time.monotonic() + _GRACE  # the store may end with this process
        for rank in set(range(1, self.world_size)) - self._lost:
            try:
                self._get(f"bye/{rank}", end)
            except TimeoutError:
                break
        self.leave(verdict)

    def _stop(self, *_: object) -> None:
        """SIGTERM: the launcher ends this node's ranks since one of them has ended.

        What waits or measures sees it and ends; a rank that hangs stays, to print its stack.
        """
        self._stopped_at = time.monotonic()

    def _leave_above_rank_0(self) -> None:
        if self.rank:  # it is missed, and named
            self.leave(1)

    def leave(self, code: int) -> NoReturn:
        """End this process at once: a thread stuck in a collective cannot be joined."""
        sys.stdout.flush()
        sys.stderr.flush()
        if code and self._stopped_at is None and os.environ.get("NODE_RANK", "0") == "0":
            # A launcher ends with its ranks, and node 0's serves the store with which the others
            # have to close theirs.
            time.sleep(_LAST)
        os._exit(code)
