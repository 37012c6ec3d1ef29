"""One training for one RUN_DIR, and no process that outlives the script that started it.

``python -m megatron_xielu.cluster.guard PARENT [--run-dir RUN_DIR --node-rank N --wait SECONDS
--since TIME]`` runs beside pretrain.sh and preflight.sh, whose process number PARENT is. It prints
``ready``, and lives through every signal that is meant for the ranks. ``--again``: in the place of
one that ended while PARENT, which has the lock, was at work.

- On node 0 it first takes ``RUN_DIR/lock`` (`common.lock_file`) and then renews it; status 2 and
  one line when another training holds it. That one has ended if its process is gone, if this is a
  later attempt of the same Slurm job or launch.sh, or if it was silent for a minute. Other nodes
  wait while a run other than theirs holds it, before they write anything.
- When PARENT has ended, whatever ended it, or sends SIGUSR2, or this process fails, every process
  with this ``MEGATRON_XIELU_GUARD`` in its environment is killed, and the lock is given back. By
  the environment: ranks lead sessions of their own, and checkpoint writers and data workers, forked
  or spawned, outlive a rank that is killed. One that starts with this value and a dot is of a guard
  within.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from megatron_xielu.common import event_log, processes, text
from megatron_xielu.common.lock_file import LockFile

_MARK = "MEGATRON_XIELU_GUARD"
_RENEW_EVERY = 3.0
_SILENT_FOR = 60.0  # seconds after which a holder is taken to be gone
_REFUSED = 2
_STOPPED = 75


def main() -> None:
    """Take the lock, guard, clean up."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parent", type=int)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--wait", type=float, default=600.0)
    parser.add_argument("--since", default="")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    with suppress(PermissionError):  # it leads its session already
        os.setsid()  # out of the group of PARENT, which may be killed as a whole
    lock = None
    if args.run_dir:
        run, attempt = _run()
        lock = LockFile(
            args.run_dir / "lock",
            pid=args.parent,
            node=event_log.node(),
            since=args.since,
            run=run,
            attempt=attempt,
        )
        try:
            if args.again:
                pass
            elif args.node_rank:
                _wait_for_node_0(lock, run, args)
            else:
                _take(lock, args)
        except OSError as error:
            _say(f"error: RUN_DIR={args.run_dir} cannot be written to: {text.one_line(error)}")
            sys.exit(_REFUSED)
        if args.node_rank:
            lock = None
    is_ours = True
    try:
        print("ready", flush=True)
        _to_nowhere()
        is_ours = _guard(args.parent, lock)
    finally:
        if not is_ours:
            with suppress(ProcessLookupError):
                os.kill(args.parent, signal.SIGKILL)
        _kill_all(os.environ[_MARK])
        if lock and is_ours:
            lock.release()


def _run() -> tuple[str, int]:
    """The run that this node is part of, and which attempt it is; see `lock_file.Holder`."""
    variables = os.environ
    if launch := variables.get("MEGATRON_XIELU_LAUNCH"):  # which may stand in a job of Slurm's
        return launch, _number(variables.get("MEGATRON_XIELU_ATTEMPT"))
    if job := variables.get("SLURM_JOB_ID"):
        return f"Slurm job {job}", _number(variables.get("SLURM_RESTART_COUNT"))
    if variables.get("NNODES", "1") != "1":  # the same for all of them
        return f"{variables.get('MASTER_ADDR')}:{variables.get('MASTER_PORT')}", 0
    return "", 0


def _number(value: str | None) -> int:
    return int(value) if value and value.isdecimal() else 0


def _take(lock: LockFile, args: argparse.Namespace) -> None:
    is_told = False
    while not lock.create():
        lock.look()
        if lock.is_renewed:
            _refuse(lock, args.run_dir)
        if lock.is_free(_SILENT_FOR):
            if lock.silence:
                told = f"{_held(lock, args.run_dir)}, which did not answer for {lock.silence:.0f} s"
                _say(f"{told}; this one goes on from there")
            if lock.take_over():
                time.sleep(1)
                if lock.renew():
                    return
        elif not is_told and lock.silence > 2 * _RENEW_EVERY:
            is_told = True
            _say(
                f"{_held(lock, args.run_dir)}, and does not answer; "
                f"taken over unless it does within {_SILENT_FOR:.0f} s"
            )
        _pause(args.parent)


def _wait_for_node_0(lock: LockFile, run: str, args: argparse.Namespace) -> None:
    """While another run holds the lock: node 0 is refused, or takes over."""
    end = time.monotonic() + args.wait
    lock.look()
    while run and lock.holder and lock.holder.run != run:
        if time.monotonic() > end:
            _refuse(lock, args.run_dir)
        _pause(args.parent)
        lock.look()


def _pause(parent: int) -> None:
    if signal.sigtimedwait({signal.SIGUSR2}, 1):
        sys.exit(_STOPPED)
    if not processes.is_alive(parent):
        sys.exit(1)


def _held(lock: LockFile, run_dir: Path) -> str:
    who = "another training"
    if holder := lock.holder:
        part = f" of {holder.run}" if holder.run else ""
        who += f"{part} (process {holder.pid} on {holder.node}, since {holder.since})"
    return f"RUN_DIR={run_dir} belongs to {who}"


def _refuse(lock: LockFile, run_dir: Path) -> None:
    end = ""
    if holder := lock.holder:
        end = f"on {holder.node}, `kill {holder.pid}`"
        match holder.run.split():
            # Not the allocation that both are in.
            case ["Slurm", "job", job] if job != os.environ.get("SLURM_JOB_ID"):
                end = f"`scancel {job}`"
            case ["launch.sh", pid, host, _]:
                end = f"on {host}, `kill {pid}`"
        end += " saves and ends it; "
    _say(f"error: {_held(lock, run_dir)}, which is at work; {end}or choose another RUN_DIR")
    sys.exit(_REFUSED)


def _say(line: str) -> None:
    with suppress(OSError):
        print(f"pretrain.sh: {line}", file=sys.stderr, flush=True)


def _guard(parent: int, lock: LockFile | None) -> bool:
    """Until the end; False if the lock is another's."""
    renewed = time.monotonic()
    while processes.is_alive(parent):
        if signal.sigtimedwait({signal.SIGUSR2}, 0.5):
            break
        if lock and time.monotonic() - renewed >= _RENEW_EVERY:
            renewed = time.monotonic()
            if not lock.renew():
                event_log.write("lock-lost", "another training has taken RUN_DIR over")
                return False
    return True


def _kill_all(mark: str) -> None:
    """Kill whatever has the mark in its environment, for as long as there is some."""
    end = time.monotonic() + 20
    while (found := _marked(mark)) and time.monotonic() < end:
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _marked(mark: str) -> list[int]:
    own = f"{_MARK}={mark}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and int(entry) != os.getpid():
            with suppress(OSError):
                variables = Path("/proc", entry, "environ").read_bytes().split(b"\0")
                if any(one == own or one.startswith(own + b".") for one in variables):
                    found.append(int(entry))
    return found


def _to_nowhere() -> None:
    """Whoever reads the output of the script need not wait for this process."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


if __name__ == "__main__":
    text.ready_output()
    main()
