"""Adds fc1's bias inside the activation, instead of in a pass of its own before it.

Megatron's MLP takes ``(output, bias)`` from fc1, writes ``output + bias``, and hands that to the
activation module. With `install`, a forward hook on fc1 keeps the bias back and the activation
adds it, so that ``f(output + bias)`` and the gradient of the bias come out of the kernel that
computes f anyway; the sum is not rounded in between. No class of Megatron is patched.

This is what ``--bias-gelu-fusion``, Megatron's default for its own activations, asks for.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_xielu.megatron_activations import Handover, mlps_of


def install(model: list) -> list:
    """Fuse the bias of fc1 in every MLP that has one of our activations.

    Args:
        model: model chunks of this rank, before or after wrapping.

    Returns:
        ``model``, so that this is one of Megatron's ``pre_wrap_hooks``.
    """
    for mlp in mlps_of(model):
        mlp.linear_fc1.register_forward_hook(partial(_keep_bias, mlp.activation_func.handover))
    return model


def _keep_bias(
    handover: Handover, fc1: torch.nn.Module, args: tuple, outputs: tuple
) -> tuple[Tensor, None]:
    """Forward hook of fc1, local or Transformer Engine's; both return (output, bias)."""
    output, handover.bias = outputs
    return output, None
