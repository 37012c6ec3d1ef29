"""Starts and restarts the ranks of one node: torchrun, or ft_launcher where it is installed.

``python -m megatron_xielu.cluster.launcher [TORCHRUN OPTIONS] -m megatron_xielu.cluster.rank …``

A rank that is killed cannot say so itself, so the launcher's own verdict goes to the event log:
which rank ended how, every restart, and, on node 0, whom all others waited for
(`flight_recorder`). A rank that ended with 2, because of a flag or checkpoint
that was refused, ends this launcher with 2, too, without a restart, and with the reason as the last
line. Why methods are wrapped rather than a log parsed: ``_monitor_workers`` returns ranks, exit
codes and signals as numbers.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_xielu.cluster import flight_recorder
from megatron_xielu.common import event_log, text

_TAIL = 8192  # bytes of a rank's output in which its last error is looked for
_FOR_STACKS = 0.5  # seconds; a signal that ends a rank overtakes those before it
REFUSED = 2  # exit code of argparse, and of `rank` for what this package refuses


def main() -> None:
    """Run the launcher with this process's arguments (with ``--fault-tolerance``: ft_launcher)."""
    if "--fault-tolerance" in sys.argv:
        sys.argv.remove("--fault-tolerance")
        from nvidia_resiliency_ext.fault_tolerance import launcher

        agent, run = launcher.LocalElasticAgent, launcher.main
    else:
        from torch.distributed import run as torchrun
        from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

        agent, run = LocalElasticAgent, torchrun.main
    refused = _report_failures(agent)
    try:
        run()
    except BaseException:
        if refused:
            print(*dict.fromkeys(refused), sep="\n", file=sys.stderr, flush=True)
            sys.exit(REFUSED)
        raise


def _report_failures(agent: Any) -> list[str]:
    """Returns a list to which is added why ranks refuse to train."""
    refused: list[str] = []
    monitor, restart = agent._monitor_workers, agent._restart_workers
    start, stop = agent._start_workers, agent._stop_workers

    @functools.wraps(monitor)
    def monitor_and_report(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = monitor(self, *args, **kwargs)
        if result.is_failed():
            for rank, failure in result.failures.items():
                # Every rank leads a session. Its checkpoint writer outlives it, and would write
                # into the folder that the next attempt uses.
                with suppress(ProcessLookupError):
                    os.killpg(failure.pid, signal.SIGKILL)
                reason = _reason(failure, self._pcontext.stderrs.get(failure.local_rank, ""))
                event_log.write(
                    "rank-failed",
                    reason,
                    rank=rank,
                    local_rank=failure.local_rank,
                    exit=failure.exitcode,
                )
                if failure.exitcode == REFUSED:
                    refused.append(reason)
                    self._remaining_restarts = 0
        return result

    @functools.wraps(restart)
    def report_and_restart(self: Any, *args: Any, **kwargs: Any) -> Any:
        event_log.write(
            "restart", f"all ranks; {self._remaining_restarts} restarts left in this job"
        )
        return restart(self, *args, **kwargs)

    @functools.wraps(start)
    def start_and_wrap(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = start(self, *args, **kwargs)
        self._pcontext.close = functools.partial(_close, self._pcontext, self._pcontext.close)
        return result

    @functools.wraps(stop)
    def stop_and_report(self: Any, group: Any, *args: Any, **kwargs: Any) -> Any:
        result = stop(self, group, *args, **kwargs)
        if group.group_rank == 0 and group.workers:
            flight_recorder.report(group.workers[0].world_size)
        return result

    agent._start_workers, agent._stop_workers = start_and_wrap, stop_and_report
    agent._monitor_workers = monitor_and_report
    agent._restart_workers = report_and_restart
    return refused


def _close(context: Any, close: Any, *args: Any, **kwargs: Any) -> None:
    """Ends the ranks, those that hang have first written where they are."""
    processes = [handler.proc for handler in getattr(context, "subprocess_handlers", {}).values()]
    alive = [process for process in processes if process.poll() is None]
    if alive and os.environ.get(flight_recorder.FOLDER):
        for process in alive:
            process.send_signal(flight_recorder.STACKS)
        time.sleep(_FOR_STACKS)
    close(*args, **kwargs)


def _reason(failure: Any, errors: str) -> str:
    """Why a rank ended, in one line.

    Args:
        failure: torchrun's.
        errors: the file with what the rank wrote to standard error, if there is one (``--tee``).
    """
    if failure.exitcode == -flight_recorder.STACKS:
        return "ended by its launcher, after another rank, before it could write its stacks"
    if failure.exitcode < 0:
        return f"killed by {failure.signal_name()}"
    if isinstance(failure.message, dict):  # the rank itself has told torchrun
        return text.first_line(str(failure.message.get("message", ""))).removeprefix("SystemExit: ")
    return _last_error(errors) or f"exit code {failure.exitcode}; the output of the rank says why"


def _last_error(errors: str) -> str:
    try:
        with Path(errors).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    said = [line for line in map(str.strip, lines) if line and not line.startswith("[event] ")]
    return next((line for line in reversed(said) if "error" in line.lower()), (said or [""])[-1])


if __name__ == "__main__":
    text.ready_output(colours=True)
    main()
