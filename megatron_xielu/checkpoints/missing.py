"""Refuses a start without the checkpoint that its flags ask for.

Without the checkpoint that flags ask for, Megatron trains from scratch and says so in a warning
among hundreds of lines; with ``--exit-on-missing-checkpoint`` it ends with status 0, as a run that
is finished does. The one start that has nothing to load is the first of a run that loads what it
saves (``--load`` is ``--save``).
"""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from megatron_xielu.checkpoints.folder import TRACKER, checkpoints, find, read_tracker, to_load


def check(args: Namespace) -> None:
    """Refuse to start without the checkpoint that is asked for.

    Args:
        args: Megatron's, whether or not it has validated them.

    Raises:
        ValueError: naming the flag and the folder.
    """
    load, pretrained = args.load, getattr(args, "pretrained_checkpoint", None)
    if any("://" in folder for folder in (load, pretrained) if folder):
        return  # an object store
    if getattr(args, "non_persistent_ckpt_type", None):
        return  # which may be elsewhere, and newer
    flag, folder = to_load(load, pretrained)
    if not folder:
        if args.finetune:
            raise ValueError("--finetune has nothing to go on from; add --load, or drop it")
        return
    step, tracker = getattr(args, "ckpt_step", None), read_tracker(Path(folder))
    if tracker == "missing" and (not step or flag != "--load"):
        if why := _why_needed(args, flag):
            raise ValueError(
                f"{flag} {folder}: there is no checkpoint in it (no {TRACKER}), {why}; give the "
                "folder of one"
            )
        return
    if tracker not in ("missing", "release") and not isinstance(tracker, int):
        return  # Megatron's to read, and refused then
    checkpoint = find(Path(folder), step)
    if step and not checkpoint.is_dir():
        there = ", ".join(map(str, sorted(checkpoints(Path(folder)))))
        raise ValueError(
            f"--ckpt-step {step}: there is no {checkpoint}; there is {there or 'none at all'}"
        )


def _why_needed(args: Namespace, flag: str) -> str:
    """What asks for a checkpoint; empty where a run may as well begin without."""
    for argument in ("use_checkpoint_args", "finetune", "exit_on_missing_checkpoint"):
        if getattr(args, argument, False):
            return f"which --{argument.replace('_', '-')} needs"
    if flag != "--load":
        return "and none in --load either"
    save = getattr(args, "save", None)
    if save and os.path.realpath(save) == os.path.realpath(args.load):
        return ""
    return "and it is not the folder of --save, which a first start may find empty"
