"""Command lines as Megatron's own parser reads them, with this package's flags."""

import functools
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence


@functools.cache
def parser() -> ArgumentParser:
    """Megatron's, with this package's flags."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_xielu.arguments import add_arguments

    return add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))


def parse(words: Sequence[str]) -> Namespace:
    """What the parser makes of them; nothing is derived or checked yet."""
    return parser().parse_args(words)


def validated(words: Sequence[str], *, gpus: int) -> Namespace:
    """With Megatron's own checks and this package's, and what Megatron derives.

    ``CUDA_DEVICE_MAX_CONNECTIONS`` must be 1, as pretrain.sh sets it.
    """
    from megatron.training.arguments import validate_args

    from megatron_xielu import arguments

    args = parse(words)
    args.rank, args.world_size = 0, gpus
    arguments.validate(args)
    validate_args(args)
    return args
