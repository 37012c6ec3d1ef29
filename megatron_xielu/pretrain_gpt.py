"""Pretrain a GPT or Llama with ``--xielu`` or ``--xiprelu`` on a pip-installed Megatron.

``torchrun --nproc-per-node 8 -m megatron_xielu.pretrain_gpt --xielu …``

The training loop, the model and every other flag are Megatron's own. Without ``--xielu`` or
``--xiprelu`` it trains Megatron's activations. The way of the data, one file after the other:
`startup`, `arguments`, `layer_specs`, `training_step`, `activation_slot`, `activations`,
`functional`, ``kernels/``.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

from megatron_xielu import startup
from megatron_xielu.common import text


def main() -> None:
    """Parse the command line and train."""
    startup.start()
    from megatron_xielu import arguments, run_checks

    with _errors_in_one_line():
        args = arguments.parse_and_validate_args({"tokenizer_type": "GPT2BPETokenizer"})
        arguments.check_supported(args)
        run_checks.check_files(args)
        run_checks.check_run(args)
    _train(args)


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"megatron_xielu: error: {error}") from None


def _train(args: Namespace) -> None:
    from megatron.core.enums import ModelType
    from megatron.training import inprocess_restart, pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.global_vars import get_tensorboard_writer

    from megatron_xielu import layer_specs, training_step
    from megatron_xielu.arguments import activation_name, megatrons_checks
    from megatron_xielu.features import (
        activation_inputs,
        activation_summary,
        alpha_logging,
        parameter_groups,
        stragglers,
    )

    with _errors_in_one_line(), megatrons_checks():
        model = layer_specs.model_config(args)
        model.pre_wrap_hooks.append(partial(activation_summary.announce, args))
        model.pre_wrap_hooks.append(partial(activation_inputs.install_if_asked, args))
        config = pretrain_cfg_container_from_args(args, model)
    if activation_name(args):
        alpha_logging.install_if_asked(args)
    parameter_groups.install_if_asked(args)
    # Megatron then builds the data sets on the ranks that need them, not on rank 0 alone.
    data_sets = training_step.train_valid_test_datasets
    data_sets.is_distributed = True  # type: ignore[attr-defined]
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    pretrain(
        config,
        data_sets,
        ModelType.encoder_or_decoder,
        stragglers.watched(args, training_step.forward_step),
        store=store,
    )
    # Megatron flushes before its last validation, and the writer's thread ends with the process.
    if (writer := get_tensorboard_writer()) is not None:
        writer.flush()


if __name__ == "__main__":
    text.ready_output(colours=True)
    main()
