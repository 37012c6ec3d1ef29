"""Initial alphas of each layer (a list or a file for ``--xielu-alpha-p-init``, ``…-n-init``).

Megatron tells an activation nothing of the layer that it is built for. So every layer is built with
one pair, and `install` sets those of the built model, by the index that a layer has in a
checkpoint: whatever the pipeline stage. Experts start with those of their layer, prediction layers
with the last layer's.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_xielu.catalog import PER_LAYER
from megatron_xielu.common.per_layer import of_layer
from megatron_xielu.features.layer_names import layer_label
from megatron_xielu.megatron_activations import MegatronActivation


def is_asked(args: Namespace) -> bool:
    """Whether layers start with alphas of their own."""
    return any(isinstance(getattr(args, name, None), list) for name in PER_LAYER)


def install(args: Namespace, model: list) -> list:
    """Set the alphas of ``model``.

    Args:
        args: validated.
        model: model chunks of this rank, before a checkpoint is loaded.

    Returns:
        ``model``, so that this is one of Megatron's ``pre_wrap_hooks``.
    """
    for chunk in model:
        modules = dict(chunk.named_modules())
        for name, module in modules.items():
            if isinstance(module, MegatronActivation):
                label = layer_label(name, modules)
                module.alpha_p_init = of_layer(args.xielu_alpha_p_init, label)
                module.alpha_n_init = of_layer(args.xielu_alpha_n_init, label)
                module.reset_parameters()
    return model
