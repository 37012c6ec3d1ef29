"""Keeps a run's checkpoint folder trustworthy: verify, repair, watch, status.

``python3 -m megatron_xielu.checkpoints RUN COMMAND``

A Megatron save folder holds ``iter_0000200/`` and a tracker, ``latest_checkpointed_iteration.txt``,
and Megatron checks neither. A kill or a full disk leaves half a folder, or an empty tracker, on
which the next start exits with status 0; without a tracker it trains from scratch.

* ``verify`` reads checkpoints (`check`) and says which are damaged.
* ``repair`` goes before a start, in one process, and never beside a training that saves (`repair`).
  Its last line is ``resume 200``, ``resume none`` or ``resume release``.
* ``watch`` goes beside a training (`watch`).
* ``status`` prints a table.

Exit codes: 0; 1 something is damaged, or there is nothing (verify); 2 usage, or a file system that
fails; 3 there were checkpoints, and none is good (repair).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from megatron_xielu.checkpoints import watch
from megatron_xielu.checkpoints.check import Damaged, check
from megatron_xielu.checkpoints.folder import (
    RELEASE,
    TRACKER,
    TwoSaveFolders,
    checkpoints,
    is_there,
    read_tracker,
    save_folder,
    size_and_stamp,
)
from megatron_xielu.checkpoints.ledger import Record, kept
from megatron_xielu.checkpoints.repair import NoGoodCheckpoint, repair
from megatron_xielu.common import event_log, text
from megatron_xielu.common.flags import COUNT, POSITIVE, Limits


def verify(save_dir: Path, *, last: int | None = None, quick: bool = False) -> bool:
    """Print one line per checkpoint, newest first; whether there is one, and all are good."""
    record, tracker = Record(save_dir), read_tracker(save_dir)
    converted = {tracker: save_dir / RELEASE} if tracker == RELEASE else {}
    found: dict[int | str, Path] = dict([*converted.items(), *checkpoints(save_dir).items()])
    good = bool(found)
    if not found:
        print(f"no checkpoints in {save_dir}")
    for iteration, folder in list(found.items())[:last]:
        start = time.monotonic()
        try:
            check(folder, whole=not quick, hashes=record.hashes(folder))
            size = text.size(size_and_stamp(folder)[0])
            print(f"iter {iteration} ok {size} {time.monotonic() - start:.1f} s", flush=True)
        except Damaged as error:
            good = False
            print(f"iter {iteration} DAMAGED: {error}", flush=True)
    if tracker not in found and (found or tracker != "missing"):
        good = False
        print(f"tracker DAMAGED: {TRACKER} names no checkpoint here ({tracker}); run repair")
    return good


def status(save_dir: Path) -> None:
    """Print a table of the checkpoints."""
    record = Record(save_dir)
    reasons = kept(save_dir, record)
    rows = [("iteration", "size", "verified", "kept because")]
    for iteration, folder in reversed(checkpoints(save_dir).items()):
        when = record.verified[folder.name].time if folder in record else "no"
        size = text.size(size_and_stamp(folder)[0])
        rows.append((str(iteration), size, when, reasons.get(iteration, "to be deleted")))
    print(text.table(rows, left=(2, 3)))
    for folder in sorted(save_dir.glob("damaged_iter_*")):
        print(f"{folder.name}  {text.size(size_and_stamp(folder)[0])}")
    print(f"tracker: {read_tracker(save_dir)}")


def main() -> None:
    """Parse the command line and run one command."""
    parser = argparse.ArgumentParser(prog="python3 -m megatron_xielu.checkpoints")
    parser.add_argument(
        "save_dir",
        type=Path,
        metavar="RUN",
        help="a run's folder, or its checkpoints folder (Megatron's --save)",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="check them all, newest first")
    command.add_argument("--last", type=POSITIVE.read, metavar="N", help="only the N newest")
    command.add_argument("--quick", action="store_true", help="no checksums")
    commands.add_parser("repair", help="before a start: set damaged ones aside")
    command = commands.add_parser("watch", help="verify new ones, delete old ones")
    command.add_argument("--keep-last", type=POSITIVE.read, required=True, metavar="K")
    command.add_argument("--keep-every", type=COUNT.read, default=0, metavar="E", help="0: none")
    seconds = Limits(1e-3, 86400, whole=False).read
    command.add_argument("--interval", type=seconds, default=5.0, metavar="SECONDS")
    command.add_argument("--events", metavar="FILE", help="event log, for MEGATRON_XIELU_EVENTS")
    command.add_argument("--once", action="store_true", help="what is there now, and end")
    commands.add_parser("status", help="a table")
    args = parser.parse_args()
    try:
        if not is_there(args.save_dir) and args.command in ("verify", "status"):
            parser.error(f"no such folder: {args.save_dir}")
        args.save_dir = save_folder(args.save_dir)
        _run(args)
    except NoGoodCheckpoint as error:
        event_log.write("no-good-checkpoint", str(error))
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3)
    except (OSError, TwoSaveFolders) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _run(args: argparse.Namespace) -> None:
    if args.command == "verify":
        sys.exit(not verify(args.save_dir, last=args.last, quick=args.quick))
    elif args.command == "status":
        status(args.save_dir)
    elif args.command == "repair":
        repair(args.save_dir)
    else:
        if args.events:
            os.environ["MEGATRON_XIELU_EVENTS"] = args.events
        keep = {"keep_last": args.keep_last, "keep_every": args.keep_every}
        if args.once:
            watch.Watcher(args.save_dir, **keep).step()
        else:
            watch.watch(args.save_dir, **keep, interval=args.interval)


if __name__ == "__main__":
    text.ready_output()
    main()
