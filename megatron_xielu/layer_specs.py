"""What Megatron builds a model from, with our activation in it: by our entry, or by ``--spec``.

From an unmodified Megatron-LM script::

    --spec megatron_xielu.layer_specs xielu_layer_spec --use-te-activation-func
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_xielu import arguments
from megatron_xielu.activation_slot import audit, fill_prediction_layers, with_activation
from megatron_xielu.activations import ACTIVATIONS
from megatron_xielu.catalog import BY_ENTRY, WITH_OURS
from megatron_xielu.checkpoints import optimizer_format
from megatron_xielu.features import (
    activation_summary,
    alpha_init,
    alpha_logging,
    bias_fusion,
    recompute,
    shared_alphas,
)
from megatron_xielu.megatron_activations import ActivationBuilder
from megatron_xielu.workarounds import releases, rope_scaling


def model_config(args: Namespace) -> Any:
    """Megatron's own configuration of a model, with our activation where ``args`` ask for one.

    Args:
        args: validated.

    Returns:
        Megatron's ``GPTModelConfig``.
    """
    from megatron.training.argument_utils import gpt_config_from_args

    config = gpt_config_from_args(args)
    rope_scaling.set_factor(config, args)
    builder = arguments.activation_builder(args)
    if builder is not None:
        config.transformer_layer_spec = partial(layer_spec, builder)
        config.pre_wrap_hooks += [
            partial(fill_prediction_layers, builder=builder),
            *model_hooks(args, builder),
        ]
    return config


def model_hooks(args: Namespace, builder: ActivationBuilder) -> list[Callable[[list], list]]:
    """What is to be done with the built model, in order: the audit, and what flags ask for.

    Args:
        args: validated.
        builder: see `with_activation`.

    Returns:
        Functions of the model chunks of this rank, as Megatron's ``pre_wrap_hooks`` are.
    """
    hooks = [_audit_hook(builder)]
    if alpha_init.is_asked(args):
        hooks.append(partial(alpha_init.install, args))
    if args.xielu_fuse_bias:
        hooks.append(bias_fusion.install)
    if args.xielu_recompute_output:
        hooks.append(recompute.install)
    if args.xielu_shared_alphas:
        hooks.append(shared_alphas.install)
    return hooks


def _audit_hook(builder: ActivationBuilder) -> Callable[[list], list]:
    def hook(model: list) -> list:
        audit(model, builder.activation)
        return model

    return hook


def layer_spec(builder: ActivationBuilder, config: Any, vp_stage: int | None = None) -> Any:
    """The spec that Megatron would use for this model, with our activation.

    Args:
        builder: see `with_activation`.
        config: Megatron's ``GPTModelConfig``.
        vp_stage: virtual pipeline stage.

    Raises:
        ValueError: the configuration needs an MLP that is not supported; names the flag.
    """
    from megatron.training.models.gpt import default_layer_spec

    check_config(config.transformer)
    return with_activation(default_layer_spec(config, vp_stage), builder)


def check_config(transformer: Any) -> None:
    """Refuse a ``TransformerConfig`` with which Megatron would build another MLP, or no activation.

    Raises:
        ValueError: naming the flag.
    """
    if not transformer.use_te_activation_func:
        raise ValueError(
            "add --use-te-activation-func: without it Megatron's MLP ignores the activation slot "
            "and would train with GELU"
        )
    if transformer.gated_linear_unit:
        raise ValueError("drop --swiglu (or --quick-geglu): xIELU and xIPReLU are not gated")
    for refusal in (*WITH_OURS, *BY_ENTRY):
        if refusal.in_spec and refusal.is_given(transformer):
            raise ValueError(f"{refusal.flag} is not supported with xIELU and xIPReLU yet")


def _script_layer_spec(name: str, config: Any, vp_stage: int | None) -> Any:
    """`model_config` for a script that parsed its flags without us; checks what it still can."""
    from megatron.training import get_args

    releases.check_spec()
    args = get_args()
    builder = arguments.activation_builder(args) or ActivationBuilder(ACTIVATIONS[name])
    rope_scaling.set_factor(config, args)  # read once the spec is there
    if not vp_stage:  # Megatron asks once per virtual pipeline stage, the first one first
        arguments.check_upcycling(args)
        optimizer_format.check_optimizer(args)
        arguments.check_checkpoint(args)
        config.pre_wrap_hooks += [
            partial(fill_prediction_layers, builder=builder),
            _audit_hook(builder),
            partial(activation_summary.announce, args),
        ]
        alpha_logging.install_if_asked(args)
    return layer_spec(builder, config, vp_stage)


def xielu_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """For ``--spec megatron_xielu.layer_specs xielu_layer_spec --use-te-activation-func``."""
    return _script_layer_spec("xielu", config, vp_stage)


def xiprelu_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """For ``--spec megatron_xielu.layer_specs xiprelu_layer_spec --use-te-activation-func``."""
    return _script_layer_spec("xiprelu", config, vp_stage)


def _older_script_layer_spec(name: str) -> Any:
    """`_script_layer_spec` before 0.19. Megatron has no hook for an audit there: this builds the
    whole spec, of nothing but dense layers, so that every MLP has the activation."""
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    releases.check_spec()
    args = get_args()
    rope_scaling.refuse_another_factor(args)
    optimizer_format.check_optimizer(args)
    arguments.check_checkpoint(args)
    check_config(core_transformer_config_from_args(args))
    builder = arguments.activation_builder(args) or ActivationBuilder(ACTIVATIONS[name])
    alpha_logging.install_if_asked(args)
    found = activation_summary.found_in(builder(config=None), args)
    activation_summary.say({("", str(layer)): found for layer in range(args.num_layers)})
    return with_activation(releases.dense_layer_spec(args), builder)


if releases.release() < (0, 19):
    xielu_layer_spec = releases.lazy_layer_spec(partial(_older_script_layer_spec, "xielu"))
    xiprelu_layer_spec = releases.lazy_layer_spec(partial(_older_script_layer_spec, "xiprelu"))
