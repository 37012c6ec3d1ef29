"""Another learning rate, and weight decay, for the alphas alone: a parameter group of their own.

With ``--xielu-alpha-lr-mult M`` their learning rate goes from M·lr to M·min_lr on the schedule of
the model, with its warm-up (which begins at ``--lr-warmup-init`` as ever). With
``--xielu-alpha-weight-decay W`` their decay is W, whatever ``--weight-decay`` is and however that
increases. What decays is the raw alpha: Adam takes lr·M·W·alpha_p off a step, which draws the
effective αp towards softplus(0) = 0.69 and not towards 0.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_xielu.catalog import ALPHA_GROUP

LR_MULT, WEIGHT_DECAY = ALPHA_GROUP
_NAMES = ("*.activation_func.alpha_p", "*.activation_func.alpha_n")


def is_asked(args: Namespace) -> bool:
    """Whether the alphas of these arguments have a group of their own."""
    return any(getattr(args, name, None) not in (None, ALPHA_GROUP[name]) for name in ALPHA_GROUP)


def with_alphas(args: Namespace, overrides: dict[Any, Any]) -> dict[Any, Any]:
    """Megatron's overrides of parameter groups, with those of the alphas.

    Args:
        args: Megatron's arguments.
        overrides: by key of parameters, what their group has.
    """
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    alphas = ParamKey(name=_NAMES)
    group: dict[str, float] = {}
    mult, decay = getattr(args, LR_MULT), getattr(args, WEIGHT_DECAY)
    if mult != ALPHA_GROUP[LR_MULT]:
        group |= {"max_lr": mult * args.lr, "min_lr": mult * args.min_lr}
    if decay:
        group |= {"start_wd": decay, "end_wd": decay}
        # Of two that match a parameter Megatron takes both: here two weight decays.
        overrides = {
            ParamKey(
                with_name_predicate=ParamWithNamePredicate(
                    name="undecayed_but_alphas",
                    fn=lambda parameter, name, key=key: (
                        key.matches(parameter, name) and not alphas.matches(parameter, name)
                    ),
                )
            )
            if override.get("wd_mult") == 0
            else key: override
            for key, override in overrides.items()
        }
    return {**overrides, alphas: group}
