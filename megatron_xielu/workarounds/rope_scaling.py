"""``--rope-scaling-factor``, which Megatron reads and forgets: any factor would be 8.

In 0.19.2 `gpt_config_from_args` leaves it out; before, Megatron-LM's own pretrain_gpt.py does not
hand it to the model. No upstream change that ends it is known.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

_MEGATRONS = 8.0


def set_factor(config: Any, args: Namespace) -> None:
    """Give it to a ``GPTModelConfig``, of which the model is not built yet."""
    config.rope_scaling_factor = args.rope_scaling_factor


def refuse_another_factor(args: Namespace) -> None:
    """For ways in that do not see the model's configuration.

    Raises:
        ValueError: naming the flag.
    """
    if args.use_rope_scaling and args.rope_scaling_factor != _MEGATRONS:
        raise ValueError(
            f"--rope-scaling-factor {args.rope_scaling_factor:g}: Megatron does not hand it to the "
            f"model, which has {_MEGATRONS:g} whatever it says; drop it, or train with python -m "
            "megatron_xielu.pretrain_gpt"
        )
