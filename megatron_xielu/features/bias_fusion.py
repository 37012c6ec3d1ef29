"""Adds fc1's bias inside the activation, instead of in a pass of its own before it.

Megatron's MLP takes ``(output, bias)`` from fc1, writes ``output + bias``, and hands that to the
activation module. With `install`, a forward hook on fc1 keeps the bias back and the activation
takes it, so that ``f(output + bias)`` and the gradient of the bias come out of the kernel that
computes f anyway; the sum is not rounded in between. No class of Megatron is patched.

This is what ``--bias-gelu-fusion``, Megatron's default for its own activations, asks for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_xielu.activations import TrainableActivation


def install(model: list) -> list:
    """Fuse the bias of fc1 in every MLP that has one of our activations.

    Args:
        model: model chunks of this rank, before or after wrapping.

    Returns:
        ``model``, so that this is one of Megatron's ``pre_wrap_hooks``.
    """
    for chunk in model:
        for mlp in chunk.modules():
            activation = getattr(mlp, "activation_func", None)
            if isinstance(activation, TrainableActivation):
                bias = _KeptBias()
                mlp.linear_fc1.register_forward_hook(bias.keep)
                activation.take_bias = bias.take  # type: ignore[method-assign]
    return model


class _KeptBias:
    """On its way from fc1 to the activation, between which nothing else of the model runs."""

    def __init__(self) -> None:
        self.bias: Tensor | None = None

    def keep(self, fc1: torch.nn.Module, args: tuple, outputs: tuple) -> tuple[Tensor, None]:
        """Forward hook of fc1, local or Transformer Engine's; both return (output, bias)."""
        output, self.bias = outputs
        return output, None

    def take(self) -> Tensor | None:
        """The bias, once."""
        bias, self.bias = self.bias, None
        return bias
