"""What a run must have in common with the checkpoint that it goes on from.

That is the model's shape and the schedule of the learning rate; for the optimizer's format and its
layout see `optimizer_format`. At a difference Megatron ends on every rank and at every restart with
a traceback of what it met first, or trains on and leaves out what the model does not have.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_xielu.common.flags import flag_of

# Megatron loads an embedding of another length without a word; the rows that pad it count in the
# loss. Of a --finetune that is the way to more tokens.
_VOCABULARY = "padded_vocab_size"
_SHAPE = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("num_query_groups", "num_experts", "add_bias_linear", "add_qkv_bias", "normalization"),
    *("untie_embeddings_and_output_weights", "position_embedding_type", "qk_layernorm"),
    _VOCABULARY,
)
_GROUPED = "moe_grouped_gemm"
_DOCUMENTS = "dataloader_inter_document_masking"
_MEGATRONS_STRICTNESS = "assume_ok_unexpected"

# What the optimizer's parameter groups are found by, and what else a schedule is made of: as the
# scheduler keeps it, with the flag that sets it.
_RATES = {"max_lr": "--lr", "min_lr": "--min-lr"}
_LENGTH = "--train-iters or --train-samples (pretrain.sh: TOKENS)"
_SCHEDULE = {
    "lr_decay_steps": f"{_LENGTH}, or --lr-decay-iters or --lr-decay-samples",
    "lr_warmup_steps": "--lr-warmup-iters or --lr-warmup-samples",
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "--weight-decay or --start-weight-decay",
    "end_wd": "--weight-decay or --end-weight-decay",
    "wd_incr_steps": _LENGTH,
    "wd_incr_style": "--weight-decay-incr-style",
}


def check_model(args: Namespace, saved: Namespace, folder: str) -> None:
    """Refuse a checkpoint of another model, unless parts of one are asked for.

    Args:
        args: of this run; a size that is not derived yet is not compared.
        saved: of the checkpoint.
        folder: of the checkpoints.

    Raises:
        ValueError: naming what differs.
    """
    _check_experts(args, saved, folder)
    strictness = getattr(args, "dist_ckpt_strictness", _MEGATRONS_STRICTNESS)
    if strictness != _MEGATRONS_STRICTNESS or args.moe_use_upcycling:
        return
    for name in _SHAPE:
        if not (hasattr(args, name) and hasattr(saved, name)):
            continue
        if name == "num_query_groups" and not args.group_query_attention:
            continue  # of no meaning, and Megatron changes it while it trains
        if name == _VOCABULARY and args.finetune:
            continue
        now, then = getattr(args, name), getattr(saved, name)
        if None in (now, then) and name != "num_experts":
            continue  # as layers of a hybrid pattern
        if now != then:
            raise ValueError(
                f"the checkpoint in {folder} is of another model: {name} is {then} there, and "
                f"{now} here; give the flags of its run, or --use-checkpoint-args, or another "
                "folder (pretrain.sh: RUN_DIR)"
                + (
                    f"; here {flag_of(name)} {then} (PADDED_VOCAB_SIZE)"
                    if name == _VOCABULARY
                    else ""
                )
            )


def _check_experts(args: Namespace, saved: Namespace, folder: str) -> None:
    """Refuse grouped experts where others were saved, or the other way, in the format ``torch``.

    Its keys are the modules' own. Megatron loads what has the same key, and would go on with new
    experts and say nothing.
    """
    if getattr(saved, "ckpt_format", None) != "torch" or not getattr(args, "num_experts", None):
        return
    now, then = (bool(getattr(a, _GROUPED, False)) for a in (args, saved))
    if now != then:
        flag = flag_of(_GROUPED)
        raise ValueError(
            f"the checkpoint in {folder} was saved with{'' if then else 'out'} {flag} and "
            f"--ckpt-format torch, from which other experts cannot be loaded; "
            f"{'add' if then else 'drop'} {flag}, or start from one of --ckpt-format torch_dist"
        )


def doubts(args: Namespace, saved: Namespace, folder: str) -> Iterator[str]:
    """What a run may have meant to have in common with its checkpoint, and has not; a line each.

    Args:
        args: of this run.
        saved: of the checkpoint.
        folder: of the checkpoints.
    """
    now, then = (getattr(a, _DOCUMENTS, False) for a in (args, saved))
    if now != then and not args.finetune:
        yield (
            f"the checkpoint in {folder} was trained with{'' if then else 'out'} "
            f"{flag_of(_DOCUMENTS)}, and this run goes on with{'' if now else 'out'} it "
            f"(pretrain.sh: DOCUMENT_MASK={now:d})"
        )


def check_schedule(
    now: Mapping[str, Any], then: Mapping[str, Any], folder: str, *, chosen: bool
) -> None:
    """Refuse a learning rate that the checkpoint's optimizer state cannot be read with, or another
    schedule where nobody says which of the two is meant.

    Args:
        now: the state of this run's scheduler.
        then: of the checkpoint's.
        folder: of the checkpoints.
        chosen: the run says which.

    Raises:
        ValueError: naming the flag.
    """
    for name, flag in _RATES.items():
        if now[name] != then.get(name, now[name]):
            raise ValueError(
                f"the checkpoint in {folder} was trained with {flag} {then[name]}, and Megatron "
                f"finds its optimizer state only with that, not with {now[name]}; give it, or add "
                "--no-load-optim (optimizer and learning rate schedule start anew)"
            )
    for name, flag in () if chosen else _SCHEDULE.items():
        if now[name] != then.get(name, now[name]):
            raise ValueError(
                f"the checkpoint in {folder} was trained with another schedule: {name} was "
                f"{then[name]}, and is {now[name]} by {flag}; give what it had, or add "
                "--override-opt_param-scheduler to go on with this run's schedule, or "
                "--use-checkpoint-opt_param-scheduler for the checkpoint's"
            )
