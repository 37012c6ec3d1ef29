"""The command-line flags: what they are, what they exclude, and what a checkpoint says about them.

Every check here runs before Megatron allocates anything and names the flag to change.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import re
import sys
import traceback
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn

from megatron_xielu import __version__, catalog
from megatron_xielu.activations import ACTIVATIONS
from megatron_xielu.catalog import DEFAULT_ALPHA_INIT, DEFAULT_BETA
from megatron_xielu.checkpoints import before_load, missing, optimizer_format, resume
from megatron_xielu.checkpoints.folder import TRACKER
from megatron_xielu.checkpoints.saved_arguments import check_spec
from megatron_xielu.common import per_layer
from megatron_xielu.common.flags import flag_of, unknown_flag
from megatron_xielu.common.text import one_line
from megatron_xielu.common.versions import made_with
from megatron_xielu.features import alpha_group, norm_decay, recompute, shared_alphas, stragglers
from megatron_xielu.megatron_activations import ActivationBuilder
from megatron_xielu.workarounds import checkpoint_arguments, releases

_FROZEN_FLAG = "--xielu-frozen-alphas"

# Which alphas there are to be trained, and to have an optimizer state.
_TRAINED_ALPHAS = ("xielu_frozen_alphas", "xielu_shared_alphas")
# What makes the optimizer's parameter groups, and its default: a state is of one choice of them.
# Restored too, unless given.
_PARAMETER_GROUPS: dict[str, float] = {
    **dict.fromkeys((*_TRAINED_ALPHAS, norm_decay.ARGUMENT), False),
    **catalog.ALPHA_GROUP,
}


def add_activation_arguments(parser: ArgumentParser) -> Any:
    """Add the flags that choose and configure an activation; returns their argument group."""
    group = parser.add_argument_group(title="trainable activations (megatron_xielu)")
    group.add_argument("--xielu", action="store_true", help="Use the xIELU activation in the MLP.")
    group.add_argument(
        "--xiprelu", action="store_true", help="Use the xIPReLU activation in the MLP."
    )
    group.add_argument(
        "--xielu-alpha-p-init",
        metavar="ALPHA",  # None: not given; `validate` puts the default there, and reads files
        help="Initial effective (after softplus) alpha for positive inputs "
        f"({DEFAULT_ALPHA_INIT}): one number, one for each layer (0.8,1.2), or a file that "
        "python -m megatron_xielu.convert alphas has written.",
    )
    group.add_argument(
        "--xielu-alpha-n-init",
        metavar="ALPHA",
        help=f"The same for negative inputs ({DEFAULT_ALPHA_INIT}); above beta for xIELU.",
    )
    group.add_argument("--xielu-beta", type=float, help=f"Slope at 0, a constant ({DEFAULT_BETA}).")
    group.add_argument(
        "--xielu-check-tp-sync",
        type=int,
        default=0,
        metavar="N",
        help="Every N iterations, stop unless all tensor-parallel ranks hold bitwise equal alphas "
        "(0: never). Costs one small all-gather.",
    )
    group.add_argument(
        recompute.FLAG,
        action="store_true",
        help="Free the activation's output after the forward pass of fc2 and compute it again in "
        "the backward pass: almost half of the MLP's saved activations, the same numbers.",
    )
    group.add_argument(
        _FROZEN_FLAG,
        action="store_true",
        help="An ablation: do not train alphas; they keep their initial values, or those of the "
        "checkpoint that is loaded.",
    )
    group.add_argument(
        shared_alphas.FLAG,
        action="store_true",
        help="An ablation: all MLPs of the model share one pair of alphas. Not with pipeline "
        "parallelism.",
    )
    group.add_argument(
        flag_of(alpha_group.LR_MULT),
        type=float,
        metavar="M",
        help="The alphas' learning rate in those of the model: M times --lr and --min-lr, on the "
        "same schedule (1).",
    )
    group.add_argument(
        flag_of(alpha_group.WEIGHT_DECAY),
        type=float,
        metavar="W",
        help="Weight decay of the raw alphas, whatever --weight-decay is (0).",
    )
    return group


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of this package's entry to Megatron's parser (an ``extra_args_provider``)."""
    group = add_activation_arguments(parser)
    group.add_argument(
        "--cpu",
        action="store_true",
        help="Run on the CPU over gloo, for tests and debugging (default where there is no GPU).",
    )
    group.add_argument(
        norm_decay.FLAG,
        action="store_true",
        help="Weight decay for the gains of norms too, with any activation: only alphas and biases "
        "stay without, as in the paper's runs.",
    )
    group.add_argument(
        stragglers.FLAG,
        type=float,
        default=0.0,
        metavar="RATIO",
        help="Write an event for each rank that twice in a row takes more than so many times the "
        "median of its pipeline stage for its own part of a step (0: none).",
    )
    group.add_argument(
        catalog.INPUTS_FLAG,
        type=int,
        default=0,
        metavar="N",
        help="At iteration 1 and every N iterations, with any activation: write the standard "
        "deviation of its inputs in every layer to TensorBoard (0: never).",
    )
    # Megatron 0.19.2 has a help text with a bare "%", at which --help fails.
    for action in parser._actions:
        if "--yaml-cfg" in action.option_strings:
            action.type = _no_file  # Megatron reads it in place of all flags, ours too
        if action.help:
            action.help = re.sub(r"(?<!%)%(?![(%])", "%%", action.help)
    return parser


def with_errors_in_one_line(parser: ArgumentParser) -> ArgumentParser:
    """`add_arguments`, and no usage: hundreds of lines, of every rank."""

    def error(message: str) -> NoReturn:
        strange = message.partition("unrecognized arguments: ")[2].split()
        flag = next((word for word in strange if word.startswith("-")), "").partition("=")[0]
        raise ValueError(unknown_flag(flag, parser._option_string_actions) if flag else message)

    parser.error = error  # type: ignore[method-assign]
    return add_arguments(parser)


def _no_file(path: str) -> None:
    raise ArgumentTypeError("this entry has no code for it; give its settings as flags")


def activation_name(args: Namespace) -> str | None:
    """The activation that arguments ask for, by flag or by ``--spec``; None for one of Megatron's.

    Raises:
        ValueError: more than one is asked for.
    """
    asked = [name for name in catalog.activations_of(args) if name in catalog.TRAINABLE]
    if len(asked) > 1:
        raise ValueError(f"give one activation, not {' and '.join(f'--{name}' for name in asked)}")
    return asked[0] if asked else None


def activation_builder(args: Namespace) -> ActivationBuilder | None:
    """What goes into Megatron's activation slot; None if the arguments ask for none of ours.

    Raises:
        ValueError: more than one activation, or a setting out of range; names the flag.
    """
    name = activation_name(args)
    if name is None:
        return None
    frozen = getattr(args, "xielu_frozen_alphas", False)

    def of_layer(label: str) -> ActivationBuilder:
        settings: dict[str, Any] = {
            argument.removeprefix("xielu_"): per_layer.of_layer(_setting(args, argument), label)
            for argument in catalog.SETTINGS
        }
        return ActivationBuilder(ACTIVATIONS[name], frozen_alphas=frozen, **settings)

    starts = [_setting(args, argument) for argument in catalog.PER_LAYER]
    layers = max(len(start) if isinstance(start, list) else 1 for start in starts)
    try:
        # Where each has its own (`features.alpha_init`), all are checked here.
        first, *_ = [of_layer(f"layer_{layer}") for layer in range(layers)]
        return first
    except ValueError as error:
        message = re.sub(
            r"^\w+", lambda setting: f"--xielu-{setting[0].replace('_', '-')}", str(error)
        )
        raise ValueError(message) from None


def _setting(args: Namespace, argument: str) -> Any:
    """Its value; the default where it was not given, or where a script has no such flag."""
    value = getattr(args, argument, None)
    return {**catalog.SETTINGS, **_PARAMETER_GROUPS}[argument] if value is None else value


def validate(args: Namespace) -> None:
    """Check parsed arguments, and set those that our activations imply.

    Sets ``use_te_activation_func``: with it Megatron's MLP builds a module in its activation slot;
    ``xielu_fuse_bias`` in place of ``bias_gelu_fusion``; and settings that are not given.

    Raises:
        ValueError: naming the flag to change.
    """
    catalog.read_per_layer(args)
    builder = activation_builder(args)
    for problem in (*catalog.out_of_range(args), *catalog.contradictions(args)):
        raise ValueError(problem)
    if builder is None:
        switches = ("xielu_recompute_output", "xielu_check_tp_sync", *_TRAINED_ALPHAS)
        for argument in (*switches, *catalog.DEFAULTS):
            if getattr(args, argument) not in (None, 0):
                raise ValueError(catalog.needs_ours(flag_of(argument)))
    for argument in catalog.DEFAULTS:  # as checkpoints keep them, with any activation
        setattr(args, argument, _setting(args, argument))
    if builder is None:
        return
    flag = f"--{activation_name(args)}"
    for refusal in catalog.WITH_OURS:
        if refusal.is_given(args):
            raise ValueError(refusal.with_(flag))
    if releases.release() < (0, 19):
        for refusal in catalog.EXPERTS_AND_MTP:
            if refusal.is_given(args):
                raise ValueError(f"{flag} with {refusal.flag} needs megatron-core 0.19")
    for problem in catalog.also_not_with_ours(args, flag):
        raise ValueError(problem)
    # Megatron's own fusion of a bias and an activation knows only its own activations.
    args.xielu_fuse_bias = args.bias_gelu_fusion and args.add_bias_linear
    args.bias_gelu_fusion = False
    optimizer_format.check_optimizer(args)
    if args.xielu_recompute_output:
        recompute.check(args)
        recompute.build_extension()
    if args.xielu_shared_alphas:
        shared_alphas.check(args)
    args.use_te_activation_func = True


def check_supported(args: Namespace) -> None:
    """Refuse what Megatron's own pretrain_gpt.py has code for and this entry has not.

    Raises:
        ValueError: naming the flag.
    """
    for refusal in catalog.BY_ENTRY:
        if refusal.is_given(args) and not refusal.instead:
            raise ValueError(refusal.alone())
        if refusal.is_given(args):
            raise ValueError(
                f"{refusal.said} is not supported by this entry; use Megatron-LM's "
                "pretrain_gpt.py with --spec megatron_xielu.layer_specs xielu_layer_spec "
                "--use-te-activation-func"
            )
    for refusal in catalog.UNREAD:
        if refusal.is_given(args):
            raise ValueError(refusal.alone())
    if args.spec is not None:
        _check_spec(args.spec)
    if args.mtp_num_layers and args.pipeline_model_parallel_layout:
        raise ValueError(
            "--mtp-num-layers with --pipeline-model-parallel-layout is not supported by this "
            "entry, which feeds prediction layers on the last stage only; drop one of them"
        )


def _check_spec(words: list[str]) -> None:
    """Megatron logs that a module is missing, and trains its default layers instead."""
    where = f"--spec {' '.join(words)}"
    if len(words) != 2:
        raise ValueError(f"{where}: it takes a module and a name in it")
    try:
        module = importlib.import_module(words[0])
    except Exception as error:
        raise ValueError(f"{where}: {words[0]} cannot be imported: {one_line(error)}") from error
    if words[1] not in vars(module):
        raise ValueError(f"{where}: {words[0]} has no {words[1]}")


def check_layout(args: Namespace) -> None:
    """Refuse parallel sizes that the ranks or the model cannot be divided by.

    Raises:
        ValueError: naming the flags.
    """
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    context = args.context_parallel_size
    parts = tensor * pipeline * context
    if args.world_size % parts:
        raise ValueError(
            f"{args.world_size} ranks are not a multiple of --tensor-model-parallel-size {tensor} "
            f"× --pipeline-model-parallel-size {pipeline} × --context-parallel-size {context}; "
            "change one of them, or the number of ranks"
        )
    heads = args.num_attention_heads
    if args.group_query_attention and heads and heads % args.num_query_groups:
        raise ValueError(
            f"--num-query-groups {args.num_query_groups} does not divide --num-attention-heads "
            f"{heads}"
        )
    split = ["num_attention_heads", "padded_vocab_size"]
    split += [] if args.num_experts else ["ffn_hidden_size"]  # experts have their own sizes
    for argument in split:
        size = getattr(args, argument)
        if size and size % tensor:
            raise ValueError(
                f"--tensor-model-parallel-size {tensor} does not divide {flag_of(argument)} {size}"
            )
    if args.num_experts:
        _check_experts(args)


def _check_experts(args: Namespace) -> None:
    tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    parts = tensor * args.expert_model_parallel_size * args.pipeline_model_parallel_size
    if args.world_size % parts:
        raise ValueError(
            f"{args.world_size} ranks are not a multiple of --expert-tensor-parallel-size {tensor} "
            f"× --expert-model-parallel-size {args.expert_model_parallel_size} × "
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}; change one of "
            "them, or the number of ranks"
        )
    if not 1 <= args.moe_router_topk <= args.num_experts:
        raise ValueError(
            f"--moe-router-topk {args.moe_router_topk} must be from 1 to --num-experts "
            f"{args.num_experts}"
        )
    every = args.moe_layer_freq
    if isinstance(every, int) and every < 1:
        raise ValueError(f"--moe-layer-freq must be 1 or more, not {every}")
    if isinstance(every, list) and len(every) != args.num_layers:
        raise ValueError(
            f"--moe-layer-freq lists {len(every)} layers, and --num-layers is {args.num_layers}"
        )


@contextlib.contextmanager
def megatrons_checks() -> Iterator[None]:
    """Have what Megatron raises over its arguments as a ValueError of one line.

    An assertion may have no words, and a KeyError no name of a flag: their line of code is quoted.
    """
    try:
        yield
    except Exception as error:
        said = one_line(error)
        in_words = isinstance(error, (AssertionError, ValueError, RuntimeError, OSError))
        if not (said and in_words):
            # The innermost that has a line: modules frozen into Python have none.
            frames = traceback.extract_tb(error.__traceback__)
            place = next(frame for frame in reversed(frames) if frame.line)
            said = (
                f"{type(error).__name__} {said}".rstrip()
                + f" at {place.line} ({Path(place.filename).name}, line {place.lineno})"
            )
        raise ValueError(f"Megatron does not take these arguments: {said}") from error


def check_upcycling(args: Namespace) -> None:
    """Refuse to make experts of a dense checkpoint: Megatron scales their weights for GELU.

    Raises:
        ValueError: naming the flag.
    """
    if args.moe_use_upcycling:
        raise ValueError(catalog.UPCYCLING)


def saved_arguments(args: Namespace) -> tuple[Namespace, str] | None:
    """The arguments saved in the checkpoint that ``args`` would load, and where; None if none.

    Raises:
        ValueError: it is not there, or damaged; names flag and folder.
    """
    missing.check(args)
    from megatron.training.checkpointing import load_args_from_checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    ours = copy.copy(args)
    ours.exit_on_missing_checkpoint = False  # see `missing`
    for load_arg in ("load", "pretrained_checkpoint"):
        folder = getattr(ours, load_arg, None)
        if not folder:
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints each argument it would set
                result: Any = load_args_from_checkpoint(ours, load_arg=load_arg)
        except (Exception, CheckpointException, SystemExit) as error:  # the last: of the tracker
            said = (str(error).strip() or f"its {TRACKER} names no iteration").splitlines()[-1]
            raise ValueError(
                f"{flag_of(load_arg)} {folder} cannot be read: {said}; python -m "
                f"megatron_xielu.checkpoints {quote(str(folder))} repair sets damaged checkpoints "
                "aside"
            ) from error
        if isinstance(result, tuple):
            return result[1], folder
    return None


def check_checkpoint(args: Namespace) -> tuple[Namespace, str] | None:
    """Refuse a checkpoint of another activation or model, or an optimizer state of another layout.

    Megatron would not refuse the first: it ignores what a checkpoint has and the model lacks.

    Returns:
        As `saved_arguments`.

    Raises:
        ValueError: naming what differs.
    """
    checkpoint = saved_arguments(args)
    if checkpoint is not None:
        refuse_another_activation(args, *checkpoint)
        if catalog.activation_of(args) in catalog.TRAINABLE:
            _keep_initial_alphas(args, *checkpoint)
        resume.check_model(args, *checkpoint)
        optimizer_format.check_resume(args, *checkpoint)
        for doubt in resume.doubts(args, *checkpoint) if args.rank == 0 else ():
            print(f"megatron_xielu: warning: {doubt}", file=sys.stderr, flush=True)
    return checkpoint


def refuse_another_activation(args: Namespace, saved: Namespace, folder: str) -> None:
    """`check_checkpoint` for arguments that a checkpoint in ``folder`` holds."""
    asked, then = catalog.activation_of(args), catalog.activation_of(saved)
    if asked != then:
        wrong, right = (catalog.ACTIVATIONS[name].flag for name in (asked, then))
        fixes = [f"drop {wrong}"] if wrong else []
        fixes += [f"add {right}"] if right else []
        raise ValueError(
            f"the checkpoint in {folder} was trained with {_describe(saved)}, but this run asks "
            f"for {_describe(args)}; {' and '.join(fixes)}"
            + ("" if args.use_checkpoint_args else ", or add --use-checkpoint-args")
            + (f" (pretrain.sh: ACTIVATION={then})" if then in catalog.PRETRAIN_SH else "")
        )
    if asked in catalog.TRAINABLE:
        _refuse_another_beta(_setting(args, "xielu_beta"), saved, folder)
    _refuse_other_groups(args, saved, folder)


def _refuse_another_beta(beta: float, saved: Namespace, folder: str) -> None:
    saved_beta = _setting(saved, "xielu_beta")
    if beta != saved_beta:
        raise ValueError(
            f"the checkpoint in {folder} was trained with --xielu-beta {saved_beta}, not {beta}"
        )


def _keep_initial_alphas(args: Namespace, saved: Namespace, folder: str) -> None:
    """Have the next checkpoint say what the alphas in ``folder`` began with: this run adapts those.

    None says that it is not known: of a model that another training made, or a conversion.

    Raises:
        ValueError: a flag says another thing. Where it is given as the default, none is seen.
    """
    begins = args.finetune or folder == getattr(args, "pretrained_checkpoint", None)
    for argument in catalog.PER_LAYER:
        default, now = catalog.SETTINGS[argument], _setting(args, argument)
        then = None if begins else getattr(saved, argument, default)
        if now not in (default, then):
            flag = flag_of(argument)
            raise ValueError(
                f"{flag}: this run takes its alphas from the checkpoint in {folder}"
                + ("" if then is None else f", which began with {_as_given(then)}")
                + f"; drop {flag}"
            )
        if now != then:
            setattr(args, argument, then)


def _as_given(alphas: list[float] | float) -> str:
    return ",".join(map(str, alphas)) if isinstance(alphas, list) else str(alphas)


def _refuse_other_groups(args: Namespace, saved: Namespace, folder: str) -> None:
    """Refuse an optimizer state of other parameters, or of other groups, than this run's."""
    starts_anew = optimizer_format.starts_anew(args, folder)
    for argument in _PARAMETER_GROUPS:
        flag = flag_of(argument)
        now, then = (_setting(a, argument) for a in (args, saved))
        if now and not then and argument == "xielu_shared_alphas":
            raise ValueError(
                f"the checkpoint in {folder} has a pair of alphas for each layer; drop {flag}"
            )
        if now != then and not starts_anew:
            if argument in catalog.ALPHA_GROUP:
                how, fix = f"with {flag} {then:g}, not {now:g}", "give"
                if not hasattr(args, argument):  # of a script that has only --spec from us
                    fix = "train with python -m megatron_xielu.pretrain_gpt, which has"
            else:
                how, fix = f"with{'' if then else 'out'} {flag}", "add" if then else "drop"
            raise ValueError(
                f"the checkpoint in {folder} was trained {how}, and so was its optimizer state; "
                f"{fix} it, or add --no-load-optim (optimizer and learning rate schedule start "
                "anew)"
            )


def _describe(args: Namespace) -> str:
    activation = catalog.ACTIVATIONS[catalog.activation_of(args)]
    return activation.flag or activation.label


def restore_from_checkpoint(args: Namespace) -> None:
    """What --use-checkpoint-args takes from the checkpoint beside Megatron's own list.

    The activation with its settings, and the rest of what the model's function depends on.
    """
    checkpoint = saved_arguments(args)
    if checkpoint is None:
        raise ValueError("--use-checkpoint-args: there is no checkpoint with arguments in --load")
    restore(args, *checkpoint)
    checkpoint_arguments.restore(args, checkpoint[0])


def restore(args: Namespace, saved: Namespace, folder: str) -> None:
    """Take the activation and its settings from arguments that a checkpoint in ``folder`` holds.

    Raises:
        ValueError: a flag contradicts them, or they ask for code that nobody else does.
    """
    check_spec(saved, args.spec, folder)
    found = activation_name(saved)
    for name, default in _PARAMETER_GROUPS.items():
        now, then = getattr(args, name, "no such flag"), _setting(saved, name)
        if then != default and (now is None or now is False):  # 0 is given
            setattr(args, name, then)
    # A flag that contradicts the checkpoint is an error, not a choice.
    if found and args.xielu_beta is None:
        args.xielu_beta = _setting(saved, "xielu_beta")
    if activation_name(args) is not None:
        refuse_another_activation(args, saved, folder)
    if found:  # also where it was trained with --spec
        _refuse_another_beta(args.xielu_beta, saved, folder)
        setattr(args, found, True)


def parse_and_validate_args(args_defaults: dict[str, Any], *, resumes: bool = True) -> Namespace:
    """Megatron's function of this name, with our flags added, checked and restored.

    Args:
        args_defaults: Megatron's.
        resumes: whether the checkpoint of ``--load`` must fit; else nothing of it is read, but for
            ``--use-checkpoint-args``.

    Raises:
        ValueError: naming the flag to change.
    """
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.checkpointing import load_args_from_checkpoint
    from megatron.training.global_vars import set_global_variables

    with megatrons_checks():  # some flags have types of their own
        args = parse_args(extra_args_provider=with_errors_in_one_line)
    if resumes or args.use_checkpoint_args:
        before_load.once(args)
    if args.use_checkpoint_args:
        if not (args.load or args.pretrained_checkpoint):
            raise ValueError("--use-checkpoint-args needs --load or --pretrained-checkpoint")
        if args.non_persistent_ckpt_type == "local":
            raise ValueError("--use-checkpoint-args needs a global checkpoint, not a local one")
        restore_from_checkpoint(args)
        load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
        load_args_from_checkpoint(args)
    # For the report: a checkpoint and the event files keep the arguments, on these two ranks.
    if args.rank in (0, args.world_size - 1):
        args.xielu_made_with = made_with(__version__)
    # Megatron names an activation of its own by a flag, and --spec by a module: check both first.
    optimizer_format.check_optimizer(args)
    validate(args)
    check_layout(args)
    with megatrons_checks():
        validate_args(args, args_defaults)
    checkpoint = check_checkpoint(args) if resumes else None
    with megatrons_checks():
        set_global_variables(args)
    if checkpoint is not None:
        resume.check_model(args, *checkpoint)  # now with the vocabulary, if the tokenizer has it
    return args
