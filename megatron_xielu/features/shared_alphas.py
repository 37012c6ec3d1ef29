"""One pair of alphas for all MLPs of a model, an ablation (``--xielu-shared-alphas``).

`install` gives every activation the two parameters of the first. Autograd then sums the gradients
of all layers, and DDP, the optimizer and the gradient norm meet each parameter once.

In a checkpoint every layer has its slot of ``decoder.layers.mlp.activation_func.alpha_p`` as ever,
all of one value, so that what reads checkpoints needs to know nothing. A parameter's optimizer
state, though, takes the place of one tensor of the model, and one slot of a stack is no whole
tensor. So the first activation is also a child of the model itself, the last one:
``shared_activation.alpha_p``, and Megatron files the state under the last name that it meets.
"""

from __future__ import annotations

from typing import Any

from megatron_xielu.catalog import WITH_SHARED_ALPHAS
from megatron_xielu.megatron_activations import MegatronActivation

FLAG = "--xielu-shared-alphas"


def check(args: Any) -> None:
    """Refuse layers whose alphas are elsewhere, or in groups of their own.

    Raises:
        ValueError: naming the flag to change.
    """
    for refusal in WITH_SHARED_ALPHAS:
        if refusal.is_given(args):
            raise ValueError(refusal.with_(FLAG))


def install(model: list) -> list:
    """Give every activation of ``model`` the alphas of the first.

    Args:
        model: the one model chunk of this rank, before wrapping: DDP lays out gradients by
            parameter.

    Returns:
        ``model``, so that this is one of Megatron's ``pre_wrap_hooks``.
    """
    (chunk,) = model
    first, *others = (m for m in chunk.modules() if isinstance(m, MegatronActivation))
    for activation in others:
        activation.alpha_p, activation.alpha_n = first.alpha_p, first.alpha_n
    chunk.shared_activation = first
    return model
