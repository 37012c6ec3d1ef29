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
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import random

from megatron_xielu.activations import Handover, TrainableActivation

FLAG = "--xielu-recompute-output"


def check(settings: Any) -> None:
    """Refuse what an output cannot be recomputed with, or what leaves none to free.

    Args:
        settings: Megatron's arguments or its ``TransformerConfig``, which share their names.

    Raises:
        ValueError: naming the flag to change.
    """

    def value(name: str) -> Any:
        return getattr(settings, name, None)

    excluded = {
        # These recompute the whole MLP from its input: y is freed with everything else in it.
        "--recompute-granularity full": value("recompute_granularity") == "full",
        **{
            f"--recompute-modules {module}": module in (value("recompute_modules") or ())
            for module in ("mlp", "moe", "shared_experts")
        },
        "--moe-layer-recompute": value("moe_layer_recompute"),
        # It runs shared experts in parts, on a stream of their own, among other modules.
        "--moe-shared-expert-overlap": value("moe_shared_expert_overlap"),
        # fc2 keeps a quantised copy of y and lets y itself go: nothing would be saved.
        "--fp8-format": value("fp8"),
        "--fp4-format": value("fp4"),
        "--te-precision-config-file": value("te_precision_config_file") or value("quant_recipe"),
        # It copies what fc2 saved to the host while we free it; Megatron refuses it with any
        # recomputation.
        "--cpu-offloading-num-layers": value("cpu_offloading_num_layers"),
        # It frees and restores memory of its own choice, on GPUs only: untested beside ours.
        "--fine-grained-activation-offloading": value("fine_grained_activation_offloading"),
        # fc2 would use y, and hold its memory, after the backward pass that brought it back.
        "--delay-wgrad-compute": value("delay_wgrad_compute"),
        # A graph replays the addresses of its capture, and `CheckpointWithoutOutput` does nothing
        # in Megatron's graph warm-up; Megatron handles that for the modules that it knows.
        "--cuda-graph-impl": value("cuda_graph_impl") not in (None, "none"),
        "--enable-cuda-graph": value("enable_cuda_graph"),
        "--external-cuda-graph": value("external_cuda_graph"),
    }
    for flag, given in excluded.items():
        if given:
            raise ValueError(f"{FLAG} does not work with {flag}; drop one of them")


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
    mlps = [
        module
        for chunk in model
        for module in chunk.modules()
        if isinstance(getattr(module, "activation_func", None), TrainableActivation)
    ]
    for mlp in mlps:
        check(mlp.config)
    build_extension()
    for mlp in mlps:
        mlp.activation_func.recompute_output = True
        mlp.linear_fc2.register_forward_hook(partial(_free_output, mlp.activation_func.handover))
    return model


def _free_output(handover: Handover, fc2: torch.nn.Module, args: tuple, outputs: tuple) -> None:
    """Forward hook of fc2, local or Transformer Engine's; both return (output, bias).

    From here on the checkpoint lives in the autograd graph alone.
    """
    checkpoint, handover.checkpoint = handover.checkpoint, None
    if checkpoint is not None:
        checkpoint.discard_output_and_register_recompute(outputs[0])
