"""Megatron's arguments for an evaluation: the checkpoint's, the command line's, what they imply.

The order of precedence: a flag that is given, then the checkpoint, then Megatron's default; but for
what the model computes, where Megatron lets the checkpoint decide.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import torch

from megatron_xielu import arguments, catalog
from megatron_xielu.common.text import first_line
from megatron_xielu.workarounds import checkpoint_arguments

# Taken from the checkpoint unless given. Not trust_remote_code: that is for the user to say.
_PRECISION = ("bf16", "fp16", "attention_softmax_in_fp32")
_TEXT = (
    *("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_size"),
    *("vocab_extra_ids", "special_tokens", "null_tokenizer_eod_id", "null_tokenizer_pad_id"),
    *("tokenizer_hf_no_use_fast", "tokenizer_hf_no_include_special_tokens"),
    *("tokenizer_sentencepiece_legacy", "tokenizer_sentencepiece_ignore_extra_whitespaces"),
    *("tiktoken_num_special_tokens", "make_vocab_size_divisible_by"),
    *("reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
    "dataloader_inter_document_masking",
)
_WHICH_DATA = (
    *("data_path", "data_args_path", "per_split_data_args_path", "mock_data"),
    *("train_data_path", "valid_data_path", "test_data_path", "per_dataset_sequences_path"),
)
_WHICH_SAMPLES = (
    *("split", "seed", "data_cache_path", "dataloader_type", "data_sharding"),
    *("mid_level_dataset_surplus", "allow_ambiguous_pad_tokens", "num_dataset_builder_threads"),
    *("train_iters", "train_samples", "eval_interval", "start_eval_at_iter"),
    *("phase_transition_iterations",),
)


def complete(request: Namespace) -> tuple[Namespace, Namespace]:
    """Megatron's arguments, validated and made its global ones; and those of the checkpoint.

    Args:
        request: this command's flags.

    Raises:
        ValueError: naming the flag to change.
    """
    from megatron.training.arguments import validate_args
    from megatron.training.checkpointing import load_args_from_checkpoint
    from megatron.training.global_vars import set_global_variables

    args, given = _parse(request)
    checkpoint = arguments.saved_arguments(args)
    if checkpoint is None:
        raise ValueError(f"--load {request.load}: the checkpoint holds no arguments of its model")
    saved, folder = checkpoint
    if asked := given & set(catalog.TRAINABLE):
        raise ValueError(f"the activation is that of the checkpoint; drop --{' --'.join(asked)}")
    arguments.restore(args, saved, folder)
    checkpoint_arguments.restore(args, saved)
    load_args_from_checkpoint(args)
    _take(args, saved, given, request)
    _set_batches(args, saved, given, request)
    _set_positions(args)
    if args.tokenizer_type is None:  # an imported checkpoint names none; only its size matters
        args.tokenizer_type, args.vocab_size = "NullTokenizer", args.padded_vocab_size
    arguments.validate(args)
    arguments.check_supported(args)
    with arguments.megatrons_checks():
        validate_args(args)
    try:
        set_global_variables(args)
    except Exception as error:
        raise ValueError(
            f"the tokenizer {tokenizer_name(args)} cannot be built ({first_line(str(error))}); say "
            "--tokenizer-type and --tokenizer-model"
        ) from error
    return args, saved


def tokenizer_name(args: Namespace) -> str:
    """For messages: its type, and its file where it has one."""
    file = None if args.tokenizer_type.startswith("Null") else args.tokenizer_model
    return f"{args.tokenizer_type} {file or args.vocab_file or ''}".rstrip()


def _parse(request: Namespace) -> tuple[Namespace, set[str]]:
    """Megatron's parsed command line, and the names of the arguments that it gives."""
    from megatron.training.arguments import parse_args

    given: set[str] = set()

    def add_arguments(parser: ArgumentParser) -> ArgumentParser:
        arguments.with_errors_in_one_line(parser)
        absent = object()
        names = Namespace(**{action.dest: absent for action in parser._actions})
        seen, _ = parser.parse_known_args(namespace=names)
        given.update(name for name, value in vars(seen).items() if value is not absent)
        return parser

    args = parse_args(extra_args_provider=add_arguments)
    for name in ("data_path", "data_args_path", "per_split_data_args_path"):
        value = getattr(request, name)
        if value is not None:
            given.add(name)
            setattr(args, name, value if isinstance(value, list) else str(value))
    fixed = {
        "load": str(request.load),
        "ckpt_step": request.ckpt_step,
        "use_checkpoint_args": True,
        "use_tokenizer_model_from_checkpoint_args": False,  # `_take` does, unless it is given
        "exit_on_missing_checkpoint": True,
        "pretrained_checkpoint": None,
        "finetune": False,
        "no_load_optim": True,
        "no_load_rng": True,
        "skip_train": True,
        "eval_iters": request.eval_iters or 0,
        # Nothing is written.
        "save": None,
        "tensorboard_dir": None,
        "wandb_project": "",
        "log_progress": False,
    }
    for name, value in fixed.items():
        setattr(args, name, value)
    return args, given


def _take(args: Namespace, saved: Namespace, given: set[str], request: Namespace) -> None:
    names = list(_TEXT)
    if not given & {"bf16", "fp16"}:
        names += _PRECISION
        if not hasattr(saved, "bf16"):  # imported: it says in which precision it is stored
            args.bf16 = getattr(saved, "params_dtype", None) == torch.bfloat16
    if request.eval_iters:
        names += _WHICH_SAMPLES
        if not given & set(_WHICH_DATA):
            names += _WHICH_DATA
    else:  # read by megatron_xielu.evaluate.data
        for name in _WHICH_DATA:
            setattr(args, name, None)
        args.mock_data = False
    for name in names:
        if name not in given and hasattr(saved, name):
            setattr(args, name, getattr(saved, name))
    # No optimizer is built. But one that is not distributed is refused for 16-bit checkpoints.
    args.use_distributed_optimizer = args.bf16 or args.fp16


def _set_batches(args: Namespace, saved: Namespace, given: set[str], request: Namespace) -> None:
    """Micro-batches as in training; as many at a time as keep a pipeline busy, or as Megatron's
    validation takes."""
    if "micro_batch_size" not in given:
        args.micro_batch_size = getattr(saved, "micro_batch_size", 1)
    for problem in catalog.out_of_range(args):
        raise ValueError(problem)
    arguments.check_layout(args)
    data_parallel = args.world_size // (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )
    args.eval_micro_batch_size = args.micro_batch_size
    args.global_batch_size = args.micro_batch_size * data_parallel
    args.eval_global_batch_size = args.global_batch_size
    args.rampup_batch_size = args.step_batch_size_schedule = None
    if not request.eval_iters:
        if args.pipeline_model_parallel_size > 1:
            args.eval_global_batch_size *= 4 * args.pipeline_model_parallel_size
        return
    whole = getattr(saved, "eval_global_batch_size", None) or getattr(
        saved, "global_batch_size", None
    )
    if whole is None:
        raise ValueError("--eval-iters needs a checkpoint of a training; leave it out")
    if whole % args.global_batch_size:
        raise ValueError(
            f"--eval-iters: the global batch of {whole} does not divide into micro-batches of "
            f"{args.micro_batch_size} on {data_parallel} data-parallel ranks; change "
            "--micro-batch-size"
        )
    args.eval_global_batch_size = whole


def _set_positions(args: Namespace) -> None:
    """Allow sequences that are longer than in training where the model has no table of them."""
    if args.seq_length is None:  # an imported checkpoint says only what is possible
        args.seq_length = args.max_position_embeddings
    if args.seq_length <= args.max_position_embeddings:
        return
    if args.position_embedding_type == "learned_absolute":
        raise ValueError(
            f"--seq-length {args.seq_length}: the model has {args.max_position_embeddings} learned "
            "positions"
        )
    args.max_position_embeddings = args.seq_length
