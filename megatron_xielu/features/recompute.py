"""Frees the activation's output once fc2 has used it, and computes it again in backward.

    forward     y = f(x), z = fc2(y); then the memory of y is freed, x is kept
    backward    dL/dz arrives: y = f(x) again; then the backward of fc2, and of f

An ungated MLP keeps two tensors of the ffn width for its backward: x for the activation, y for
fc2. Since y costs one elementwise pass over x, ``--xielu-recompute-output`` keeps x alone.

Megatron's own `CheckpointWithoutOutput` does it, as it does for layer norms: y keeps its place in
the autograd graph and gets its values back before fc2's backward asks for them. `install` tells the
activation module to run under it, and a forward hook on fc2 frees y. No class of Megatron is
patched. The raw alphas enter the checkpoint as arguments, so the sum of their gradients over
tensor-parallel ranks stays outside of it and runs once, as ever.
"""

from __future__ import annotations

import textwrap
from typing import Any

from megatron.core.tensor_parallel import random

from megatron_xielu.catalog import WITH_RECOMPUTE_OUTPUT
from megatron_xielu.megatron_activations import mlps_of, recompute_output_of

FLAG = "--xielu-recompute-output"


def check(settings: Any) -> None:
    """Refuse what an output cannot be recomputed with, or what leaves none to free.

    Args:
        settings: Megatron's arguments or its ``TransformerConfig``, which share their names.

    Raises:
        ValueError: naming the flag to change.
    """
    for refusal in WITH_RECOMPUTE_OUTPUT:
        if refusal.is_given(settings):
            raise ValueError(refusal.with_(FLAG))


def build_extension() -> None:
    """Build, or load from PyTorch's cache, the C++ extension that gives y its memory back.

    Megatron would do so in the first backward pass, where a missing compiler ends the training.

    Raises:
        ValueError: it cannot be built.
    """
    try:
        random._get_share_storage()
    except (RuntimeError, OSError, ImportError) as error:  # the last where another rank built it
        raise ValueError(
            f"{FLAG} needs a C++ compiler and ninja, with which PyTorch builds an extension of "
            f"Megatron's; install them or drop the flag ({textwrap.shorten(str(error), 200)})"
        ) from error


def install(model: list) -> list:
    """Free and recompute the activation's output in every MLP that has one of our activations.

    Args:
        model: model chunks of this rank, before or after wrapping.

    Returns:
        ``model``, so that this is one of Megatron's ``pre_wrap_hooks``.

    Raises:
        ValueError: the model's configuration does not allow it (see `check`), or the extension
            cannot be built (see `build_extension`).
    """
    mlps = mlps_of(model)
    for mlp in mlps:
        check(mlp.config)
    build_extension()
    for mlp in mlps:
        recompute_output_of(mlp)
    return model
