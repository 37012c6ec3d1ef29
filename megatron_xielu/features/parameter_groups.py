"""Which parameters are in which group of the optimizer, where a flag of ours says so.

Megatron 0.19 has overrides of parameter groups, and no flag or callback to add one: the function of
``megatron.training.training`` that chooses them is wrapped in this process.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from typing import Any

from megatron_xielu.features import alpha_group, norm_decay


def install_if_asked(args: Namespace) -> None:
    """`install`, where one of the flags is given."""
    if norm_decay.is_asked(args) or alpha_group.is_asked(args):
        install()


@functools.cache
def install() -> None:
    """Have Megatron's training loop make its parameter groups so, for arguments that ask for it."""
    from megatron.training import training

    choose = training.get_megatron_optimizer_config

    @functools.wraps(choose)
    def with_ours(args: Namespace) -> tuple[Any, Any]:
        config, overrides = choose(args)
        if norm_decay.is_asked(args):
            overrides = norm_decay.decaying_norms(overrides)
        if alpha_group.is_asked(args):
            overrides = alpha_group.with_alphas(args, overrides)
        return config, overrides

    training.get_megatron_optimizer_config = with_ours
