"""The arguments that ``--use-checkpoint-args`` of Megatron 0.19 leaves out, though what the model
computes depends on them: without them it goes on with another model, and says nothing.

Megatron's own list (``load_args_from_checkpoint``) has the sizes, the embeddings and the kinds of
norm; not the norm's epsilon, QK-norm, the scaling of RoPE, the attention window and others.

In 0.19.2. No upstream change that ends it is known.
"""

from __future__ import annotations

from argparse import Namespace

_MODEL_ARGUMENTS = (
    # Norms and the residual stream.
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "apply_residual_connection_post_layernorm",
    "fp32_residual_connection",
    # Attention.
    "qk_layernorm",
    "qk_l2_norm",
    "softmax_type",
    "window_size",
    "window_attn_skip_freq",
    "attention_output_gate",
    "experimental_attention_variant",
    "dsa_indexer_n_heads",
    "dsa_indexer_head_dim",
    "dsa_indexer_topk",
    "linear_attention_freq",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    # Positions.
    "use_rope_scaling",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    "rope_type",
    "no_rope_freq",
    "mrope_section",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    # The MLP's activation.
    "quick_geglu",
    "openai_gelu",
    "onnx_safe",
    "glu_linear_offset",
    "activation_func_clamp_value",
    # Multi-latent attention.
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    # Multipliers of the maximal update parametrisation.
    "use_mup",
    "mup_width_mult",
    "mup_embedding_mult",
    "mup_output_mult",
    "mup_base_hidden_size",
    "mup_base_head_dim",
    "mup_attn_scale_power",
    # Which experts a token goes to, and with what weight.
    "moe_shared_expert_gate",
    "moe_router_load_balancing_type",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_dtype",
    "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity",
    "moe_token_drop_policy",
    "moe_apply_probs_on_input",
)

# What older releases call them.
_OLDER_NAMES = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
}


def restore(args: Namespace, saved: Namespace) -> None:
    """Set these arguments as the checkpoint has them, whatever the command line says.

    So does Megatron with those of its own list.

    Args:
        args: of this run; changed.
        saved: of the checkpoint. What it lacks, as older releases do, stays as it is.
    """
    for name in _MODEL_ARGUMENTS:
        saved_name = name if hasattr(saved, name) else _OLDER_NAMES.get(name, name)
        if not hasattr(saved, saved_name) or not hasattr(args, name):
            continue
        value = getattr(saved, saved_name)
        if value != getattr(args, name):
            if args.rank == 0:
                print(f"Setting {name} to {value} from checkpoint", flush=True)
            setattr(args, name, value)
