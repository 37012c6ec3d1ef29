"""What a Megatron-LM checkout calls that has one of the patches in ``patches/``: a function a hunk.

``patches/README.md`` says where each is called from, and what happens without it. As long as
neither a flag nor a checkpoint asks for one of our activations, all that they do is to mend what
Megatron's optimizers write into checkpoints: a baseline is compared with.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_xielu import arguments, catalog, workarounds
from megatron_xielu.common.flags import flag_of
from megatron_xielu.features import alpha_group, shared_alphas
from megatron_xielu.megatron_activations import ActivationBuilder
from megatron_xielu.workarounds import rope_scaling

# What this process trains with, once `validate` has seen its arguments: Megatron hands no arguments
# to the place where a model is built.
_builder: ActivationBuilder | None = None


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"megatron_xielu: error: {error}") from None


def add_arguments(parser: ArgumentParser) -> None:
    """Add our flags, unless a script has: this package's own entry does.

    Raises:
        SystemExit: they are given together with ``--yaml-cfg``, for which Megatron drops all flags.
    """
    if "--xielu" in parser._option_string_actions:
        return
    arguments.add_activation_arguments(parser)
    given = {word.partition("=")[0] for word in sys.argv[1:]}
    if "--yaml-cfg" in given and (ours := given & {"--xielu", "--xiprelu"}):
        raise SystemExit(
            f"megatron_xielu: error: {' '.join(ours)} does not work with --yaml-cfg; drop one"
        )


def validate(args: Namespace) -> None:
    """Check our flags and set what they imply, before Megatron checks its own.

    Raises:
        SystemExit: naming the flag to change, or the activation of the checkpoint to be loaded.
    """
    global _builder
    if hasattr(args, "xielu_fuse_bias"):  # this package's own entry has done it
        return
    with _errors_in_one_line():
        arguments.validate(args)
        if args.xielu_shared_alphas:  # `model_built` comes after DDP has laid out the gradients
            raise ValueError(
                f"{shared_alphas.FLAG} needs python -m megatron_xielu.pretrain_gpt: a patched "
                "checkout cannot share alphas"
            )
        if alpha_group.is_asked(args):  # not all of those releases have the overrides for it
            raise ValueError(
                f"{' and '.join(map(flag_of, catalog.ALPHA_GROUP))} need python -m "
                "megatron_xielu.pretrain_gpt: a patched checkout has the alphas in Megatron's "
                "parameter groups"
            )
        _builder = arguments.activation_builder(args)
        if _builder is not None:
            rope_scaling.refuse_another_factor(args)
            arguments.check_checkpoint(args)


def restore(args: Namespace, saved: Namespace, folder: str) -> None:
    """Take the activation from the arguments of the checkpoint in ``folder``.

    Raises:
        SystemExit: a flag contradicts them.
    """
    with _errors_in_one_line():
        arguments.restore(args, saved, folder)


def check_checkpoint(args: Namespace, saved: Namespace, folder: str) -> None:
    """Refuse to load the checkpoint in ``folder`` into a model of another activation.

    Raises:
        SystemExit: naming both.
    """
    with _errors_in_one_line():
        arguments.refuse_another_activation(args, saved, folder)


def layer_specs(*specs: Any) -> tuple[Any, ...]:
    """The specs of a GPT model's decoder and multi-token prediction, with our activation.

    Args:
        specs: as Megatron has chosen them, local or Transformer Engine; None where there is none.

    Raises:
        ValueError: a layer's MLP is of a kind whose activation cannot be replaced.
    """
    if _builder is None:
        return specs
    from megatron_xielu.activation_slot import with_activation

    return tuple(spec and with_activation(spec, _builder) for spec in specs)


def model_built(args: Namespace, model: list) -> None:
    """Audit a model that has just been built, say what it has, and mend what its optimizer saves.

    Args:
        args: Megatron's arguments.
        model: model chunks of this rank.

    Raises:
        RuntimeError: naming the MLPs that have another activation.
    """
    workarounds.mend_optimizers()
    from megatron_xielu.features import activation_summary, alpha_logging

    if _builder is not None:
        from megatron_xielu.layer_specs import model_hooks

        for hook in model_hooks(args, _builder):
            hook(model)
        alpha_logging.install_if_asked(args)
    activation_summary.announce(args, model)


def check_tp_sync(args: Namespace, model: list, iteration: int) -> None:
    """Every ``--xielu-check-tp-sync`` iterations, stop unless TP ranks hold the same alphas.

    Raises:
        RuntimeError: naming the parameters that differ.
    """
    if _builder is None or iteration % args.xielu_check_tp_sync:
        return
    from megatron_xielu.features.tp_sync import check_tp_sync

    for chunk in model:
        check_tp_sync(chunk, iteration)
