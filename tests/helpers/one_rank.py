"""Megatron on one CPU rank, for the scripts that build real models or layers in a process."""

from __future__ import annotations

from typing import Any

import torch


def start() -> None:
    """Make Megatron's process groups of one rank, and seed it; after `megatron_xielu.cpu.activate`.

    The environment is that of rank 0 of 1.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def config(**options: Any) -> Any:
    """A ``TransformerConfig`` of two tiny layers with Megatron's activation slot open."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = {
        "num_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "use_cpu_initialization": True,
        "use_te_activation_func": True,
        "add_bias_linear": False,
        **options,
    }
    return TransformerConfig(**settings)
