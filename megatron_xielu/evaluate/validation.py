"""The samples of Megatron's own validation at the iteration of a checkpoint.

Training draws all samples of all its validations once, and each validation takes the next of them.
A checkpoint is written after the validation at its iteration, where there is one, and counts what
has been taken: the samples before that count are those of ``validation loss at iteration N``. At
an iteration between validations there is none but the one after the end of training, ``… at
iteration N on validation set``, which takes the samples after it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron_xielu.common.flags import flag_of
from megatron_xielu.training_step import train_valid_test_datasets


def check(args: Namespace, saved: Namespace) -> None:
    """Refuse a validation that is not repeated here.

    Raises:
        ValueError: naming the flag of the training.
    """
    for name in ("full_validation", "multiple_validation_sets"):
        if getattr(saved, name, False):
            raise ValueError(
                f"--eval-iters does not work with {flag_of(name)}, which it was trained with"
            )
    if args.dataloader_type == "external":
        raise ValueError("--eval-iters does not work with --dataloader-type external")
    if isinstance(getattr(saved, "eval_iters", 0), list):
        raise ValueError("--eval-iters: its training validated on several sets; leave it out")
    if not (getattr(saved, "eval_iters", 0) and getattr(saved, "eval_interval", 0)):
        raise ValueError("--eval-iters: its training had no validation; leave it out")


def samples(
    args: Namespace, saved: Namespace, iteration: int, vp_stage: int | None
) -> Iterator[dict[str, Any]] | None:
    """Micro-batches of this rank; None where this pipeline stage or tensor-parallel rank has none.

    Args:
        args: validated; the process groups are there.
        saved: of the checkpoint.
        iteration: of the checkpoint.
        vp_stage: virtual pipeline stage.

    Raises:
        ValueError: the data has fewer samples.
    """
    from megatron.training.datasets.data_samplers import build_pretraining_data_loader
    from megatron.training.training import cyclic_iter, get_train_valid_test_num_samples

    # Megatron asks for as many samples as all validations of the training take.
    as_trained = {
        "skip_train": False,
        "global_batch_size": saved.global_batch_size,
        "eval_iters": saved.eval_iters,
        "iteration": iteration,
        "full_validation": False,
    }
    now = {name: getattr(args, name, None) for name in as_trained}
    vars(args).update(as_trained)
    numbers = get_train_valid_test_num_samples()
    vars(args).update(now)
    _, valid, _ = train_valid_test_datasets(numbers, vp_stage=vp_stage)
    if valid is None:
        return None
    first = _first_sample(args, saved, iteration)
    last = first + args.eval_iters * args.eval_global_batch_size
    if args.dataloader_type == "single" and last > len(valid):
        raise ValueError(
            f"--eval-iters {args.eval_iters}: the validation data of the training ends "
            f"{last - len(valid)} samples before"
        )
    loader = build_pretraining_data_loader(valid, first)
    return iter(loader if args.dataloader_type == "single" else cyclic_iter(loader))


def _first_sample(args: Namespace, saved: Namespace, iteration: int) -> int:
    taken = saved.consumed_valid_samples
    begin = getattr(saved, "start_eval_at_iter", None) or 0
    if iteration % saved.eval_interval == 0 and iteration >= begin:
        taken -= saved.eval_iters * args.eval_global_batch_size
    return max(taken, 0)
