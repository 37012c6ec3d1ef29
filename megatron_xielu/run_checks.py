"""What a training would end with once its model is built, or in its first step, refused before.

Of its folders, layout, schedule and data; what the flags themselves exclude is in `arguments`.
"""

from __future__ import annotations

import contextlib
import io
import sys
from argparse import Namespace
from pathlib import Path

import torch

from megatron_xielu import arguments, catalog
from megatron_xielu.checkpoints import optimizer_format, resume
from megatron_xielu.common import data_lists, files, fp8
from megatron_xielu.common.flags import argument_of, flag_of


def check_run(args: Namespace) -> None:
    """Refuse what would end a training after its model is built, or when it first saves.

    Raises:
        ValueError: naming the flag.
    """
    if args.fp8:
        _check_fp8(args)
    if args.eval_interval is None and not (args.skip_train or args.full_validation):
        raise ValueError(
            "--eval-interval is missing: Megatron counts validations with it even where there are "
            "none; give one, and --eval-iters 0 for none"
        )
    if args.full_validation != args.multiple_validation_sets:
        raise ValueError(
            "--full-validation and --multiple-validation-sets need each other: Megatron fails with "
            "one alone when it validates; give both, or neither"
        )
    if args.full_validation and data_lists.has_test(args):
        raise ValueError(
            "--full-validation: Megatron fails with it at a test set; give none, as --split 9,1,0"
        )
    for argument in ("load", "save"):
        folder = getattr(args, argument)
        if folder and "://" in folder and not args.enable_msc:
            raise ValueError(
                f"{flag_of(argument)} {folder}: without --enable-msc Megatron takes it for "
                "a folder of that name; add it (pip install multi-storage-client), or give a folder"
            )
    for argument in ("save", "data_cache_path"):
        folder = getattr(args, argument)
        if folder and "://" not in folder:  # an object store has no folders
            try:
                files.make_folder(Path(folder))
            except OSError as error:
                raise ValueError(
                    f"{flag_of(argument)} {folder} cannot be written to: {error.strerror}"
                ) from None
    if not args.skip_train:
        _check_step(args)
        _check_schedule(args)


def _check_fp8(args: Namespace) -> None:
    """Refuse FP8 on a GPU, with a Transformer Engine or at sizes that do not have it."""
    recipe = str(args.fp8_recipe)
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if args.transformer_impl == "local":
        raise ValueError(fp8.LOCAL)
    engine = fp8.engine_fault(recipe, fp8.installed_engine())
    if engine:
        raise ValueError(engine)
    capability = torch.cuda.get_device_capability(args.local_rank)
    gpu = fp8.gpu_fault(recipe, capability, torch.version.cuda)
    if gpu:
        raise ValueError(gpu)
    for fault in fp8.size_faults(
        recipe,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size,
        queries=args.num_attention_heads * args.kv_channels,
        keys=groups * args.kv_channels,
        tokens=args.micro_batch_size * args.seq_length // args.context_parallel_size,
        tensor=args.tensor_model_parallel_size,
        split_tokens=args.sequence_parallel,
    ):
        raise ValueError(fault)


def _check_step(args: Namespace) -> None:
    """Refuse a layout at which Megatron ends in the first step, or builds no model."""
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if args.sequence_parallel and args.seq_length // args.context_parallel_size % tensor:
        raise ValueError(
            f"--sequence-parallel: --tensor-model-parallel-size {tensor} does not divide "
            f"--seq-length {args.seq_length} per CP rank"
        )
    if args.dataloader_inter_document_masking and args.transformer_impl == "local":
        from megatron.core.models import backends

        if backends.DotProductAttention.__module__.startswith("megatron."):  # not `cpu.attention`
            raise ValueError(catalog.DOCUMENTS_NEED_TE)
    if args.num_experts and tensor > 1 and not args.sequence_parallel:
        raise ValueError(
            f"--num-experts with --tensor-model-parallel-size {tensor} needs --sequence-parallel"
        )
    virtual = args.virtual_pipeline_model_parallel_size
    if not virtual:
        return
    uneven = any(getattr(args, argument_of(flag)) for flag in optimizer_format.UNEVEN_STAGES)
    if not uneven and args.num_layers % (pipeline * virtual):
        raise ValueError(
            f"--num-virtual-stages-per-pipeline-rank {virtual} × --pipeline-model-parallel-size "
            f"{pipeline} does not divide --num-layers {args.num_layers}"
        )
    batch = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    group = args.microbatch_group_size_per_vp_stage or pipeline
    if batch < group or 0 < batch % group < pipeline:
        raise ValueError(
            f"virtual pipeline stages need a multiple of {group} micro-batches a step, not {batch};"
            " change --global-batch-size or --micro-batch-size"
        )


def _check_schedule(args: Namespace) -> None:
    """Have Megatron judge the schedule of the learning rate, as it does once the model is built."""
    from megatron.training.checkpointing import _load_base_checkpoint
    from megatron.training.training import get_optimizer_param_scheduler

    before = dict(vars(args))  # it counts iterations and samples in there
    try:
        with arguments.megatrons_checks(), contextlib.redirect_stdout(io.StringIO()):
            scheduler = get_optimizer_param_scheduler(Namespace(param_groups=[]))
    finally:
        vars(args).update(before)
    if not args.load or optimizer_format.starts_anew(args, args.load):
        return
    ours = Namespace(**{**vars(args), "exit_on_missing_checkpoint": False})
    with contextlib.redirect_stdout(io.StringIO()):
        saved, _, released, _ = _load_base_checkpoint(args.load, ours, rank0=True)
    if not released and "opt_param_scheduler" in (saved or ()):
        chosen = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
        then = saved["opt_param_scheduler"]
        resume.check_schedule(scheduler.state_dict(), then, args.load, chosen=chosen)


def check_files(args: Namespace) -> None:
    """Look at the data, and at the lists of them, before a model is built.

    Raises:
        ValueError: naming the flag, and the file.
    """
    if not args.mock_data and all(getattr(args, a) is None for a in data_lists.ARGUMENTS):
        raise ValueError("there is no data to train on; give --data-path PREFIX, or --mock-data")
    data_lists.sequences_per_dataset(args.per_dataset_sequences_path)
    faults, doubts = data_lists.look(args, args.padded_vocab_size)
    if faults:
        raise ValueError(faults[0])
    if doubts and args.rank == 0:
        for doubt in doubts:
            print(f"megatron_xielu: warning: {doubt}", file=sys.stderr, flush=True)
