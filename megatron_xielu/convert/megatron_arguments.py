"""Megatron's saved arguments ↔ `Architecture`; refuses a model that Hugging Face has no class for.

Every argument that would change the function is compared with the one value that the Hugging Face
models imply. What no argument shows (a bias, a gate of a fork) shows as a tensor left over: see
`megatron_xielu.convert.tensors`.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from megatron_xielu.catalog import (
    DEFAULT_BETA,
    PER_LAYER,
    SPEC_MODULE,
    TRAINABLE,
    activation_of,
    activations_of,
)
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.convert.architecture import Architecture

# Argument: the values that Hugging Face's models imply; the first is what an import writes. An
# argument that a release does not have has its first value there.
IMPLIED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "no_rope_freq": (None,),
    "rope_type": (None, "rope"),
    "mrope_section": (None,),
    "num_experts": (None, 0),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (None,),
    "window_size": (None,),
    "qk_l2_norm": (False,),
    "use_mup": (False,),
    "is_hybrid_model": (False,),
    "hybrid_layer_pattern": (None, ""),
    "hybrid_override_pattern": (None, ""),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "quick_geglu": (False,),
    "openai_gelu": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "onnx_safe": (None, False),
}

_NEEDED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("max_position_embeddings", "rotary_base", "untie_embeddings_and_output_weights"),
)


def architecture_of(arguments: Namespace, vocabulary: int) -> Architecture:
    """The architecture that saved arguments describe.

    Args:
        arguments: of the checkpoint, as `megatron_xielu.checkpoints.saved_arguments` checks them.
        vocabulary: rows of its embedding.

    Raises:
        Refused: Hugging Face cannot express it; names the argument.
    """
    for name in _NEEDED:
        if not hasattr(arguments, name):
            raise Refused(f"the checkpoint's arguments have no {name}")
    _check_experts(arguments)
    for name, accepted in IMPLIED.items():
        value = getattr(arguments, name, accepted[0])
        if value not in accepted:
            raise Refused(
                f"the checkpoint has {name} = {value!r}, which no Hugging Face architecture that "
                f"this command writes has (only {' or '.join(map(repr, accepted))})"
            )
    qk_layernorm = bool(getattr(arguments, "qk_layernorm", False))
    activation = _activation(arguments)
    if qk_layernorm and activation == "swiglu":
        raise Refused(
            "the checkpoint has qk_layernorm = True with swiglu = True, which no Hugging Face "
            "architecture that this command writes has (Apertus has QK-norm and no gate)"
        )
    heads = arguments.num_attention_heads
    grouped = getattr(arguments, "group_query_attention", False)
    groups = getattr(arguments, "num_query_groups", None) if grouped else heads
    if groups is None or heads % groups:
        raise Refused(
            f"the checkpoint has num_query_groups = {groups}, which does not divide "
            f"num_attention_heads = {heads}"
        )
    theta = float(arguments.rotary_base)
    scaled = getattr(arguments, "use_rope_scaling", False)
    return Architecture(
        layers=arguments.num_layers,
        hidden=arguments.hidden_size,
        ffn=arguments.ffn_hidden_size,
        heads=heads,
        groups=groups,
        head_dim=arguments.kv_channels,
        vocabulary=vocabulary,
        positions=arguments.max_position_embeddings,
        norm_epsilon=_epsilon(arguments),
        rope_theta=theta,
        rope_factor=float(getattr(arguments, "rope_scaling_factor", 8.0)) if scaled else None,
        tied=not arguments.untie_embeddings_and_output_weights,
        qk_layernorm=qk_layernorm,
        activation=activation,
        beta=float(getattr(arguments, "xielu_beta", DEFAULT_BETA)),
        init_std=float(getattr(arguments, "init_method_std", 0.02)),
    )


def _check_experts(arguments: Namespace) -> None:
    """Those of our activations: why there is no class for them (read in transformers 5.23)."""
    experts, activation = getattr(arguments, "num_experts", None), activation_of(arguments)
    if experts and activation in TRAINABLE:
        raise Refused(
            f"the checkpoint has num_experts = {experts} and the activation {activation}: no "
            "language model with experts in transformers has a pair of alphas for each expert, and "
            "this command writes dense models alone"
        )


def _activation(arguments: Namespace) -> str:
    spec = getattr(arguments, "spec", None)
    if spec and spec[0] != SPEC_MODULE:
        raise Refused(f"the checkpoint has spec = {spec!r}: what is in it is not known")
    asked = activations_of(arguments)
    if len(asked) > 1:
        raise Refused(f"the checkpoint has two activations: {' and '.join(asked)}")
    return activation_of(arguments)


def _epsilon(arguments: Namespace) -> float:
    for name in ("layernorm_epsilon", "norm_epsilon"):  # renamed by Megatron at times
        if hasattr(arguments, name):
            return float(getattr(arguments, name))
    raise Refused("the checkpoint's arguments have no norm_epsilon")


def arguments_of(architecture: Architecture, dtype: torch.dtype) -> Namespace:
    """What Megatron reads from a checkpoint of this architecture, and `architecture_of` too."""
    a = architecture
    return Namespace(
        **{name: accepted[0] for name, accepted in IMPLIED.items()},
        num_layers=a.layers,
        hidden_size=a.hidden,
        ffn_hidden_size=a.ffn,
        num_attention_heads=a.heads,
        group_query_attention=a.groups != a.heads,
        num_query_groups=a.groups if a.groups != a.heads else None,
        kv_channels=a.head_dim,
        padded_vocab_size=a.vocabulary,
        max_position_embeddings=a.positions,
        add_position_embedding=True,
        use_rotary_position_embeddings=False,
        rotary_base=_whole(a.rope_theta),
        use_rope_scaling=a.rope_factor is not None,
        rope_scaling_factor=a.rope_factor or 8.0,
        layernorm_epsilon=a.norm_epsilon,
        norm_epsilon=a.norm_epsilon,
        untie_embeddings_and_output_weights=not a.tied,
        qk_layernorm=a.qk_layernorm,
        xielu=a.activation == "xielu",
        xiprelu=a.activation == "xiprelu",
        xielu_beta=a.beta,
        **dict.fromkeys(PER_LAYER),  # what its alphas began with is not known
        squared_relu=a.activation == "relu2",
        swiglu=a.activation == "swiglu",
        init_method_std=a.init_std,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        spec=None,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        params_dtype=dtype,
        no_save_optim=True,
        no_save_rng=True,
        ckpt_format="torch_dist",
    )


def flags_of(architecture: Architecture) -> list[str]:
    """What a command needs beside ``--load`` and ``--use-checkpoint-args``.

    Megatron 0.19 takes the rest of the architecture from the checkpoint, but not these.
    """
    a = architecture
    flags = [
        "--seq-length",
        str(a.positions),
        "--norm-epsilon",
        str(a.norm_epsilon),
        "--init-method-std",
        str(a.init_std),
    ]
    if a.qk_layernorm:
        flags.append("--qk-layernorm")
    if a.rope_factor is not None:
        flags += ["--use-rope-scaling", "--rope-scaling-factor", str(a.rope_factor)]
    return flags


def _whole(theta: float) -> int:
    if theta != int(theta):
        raise Refused(f"rope_theta = {theta}: Megatron's --rotary-base is a whole number")
    return int(theta)
