"""Megatron's saved arguments: those that this package reads, of what type and in what range.

A checkpoint holds Megatron's whole command line as it was after its own checks, event files the
same as texts. Whoever reads an argument of another run names it here, and can then rely on it;
all others stay as they are (among them enumerations, for which `inert` objects stand in).
An older release lacks some: each may be missing.
"""

from __future__ import annotations

import ast
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import make_dataclass
from typing import Annotated, Any

from megatron_xielu.catalog import PER_LAYER
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common import schema
from megatron_xielu.common.flags import Limits
from megatron_xielu.common.schema import Count, Malformed

Size = Annotated[int, Limits(1, 2**31 - 1)]

# Of these, Megatron's checks leave none unset.
_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("max_position_embeddings", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("context_parallel_size", "make_vocab_size_divisible_by"),
)
_SIZES_OR_NONE = (
    *("num_query_groups", "seq_length", "vocab_size", "padded_vocab_size"),
    *("micro_batch_size", "global_batch_size", "eval_global_batch_size"),
)
_COUNTS_OR_NONE = (
    *("num_experts", "mtp_num_layers", "train_iters", "train_samples", "eval_interval"),
    *("start_eval_at_iter", "consumed_valid_samples", "vocab_extra_ids"),
    *("tiktoken_num_special_tokens", "num_dataset_builder_threads"),
)
_NUMBERS = (
    *("xielu_beta", "glu_linear_offset", "xielu_alpha_lr_mult", "xielu_alpha_weight_decay"),
)
_NUMBERS_OR_NONE = (
    *("softmax_scale", "activation_func_clamp_value", "rotary_seq_len_interpolation_factor"),
    "mid_level_dataset_surplus",
)
_WHOLE_OR_NONE = ("seed", "null_tokenizer_eod_id", "null_tokenizer_pad_id")
_SWITCHES = (
    *("xielu", "xiprelu", "xielu_frozen_alphas", "xielu_shared_alphas", "xielu_recompute_output"),
    *("swiglu", "squared_relu", "quick_geglu", "openai_gelu", "add_bias_linear", "add_qkv_bias"),
    *("layernorm_zero_centered_gamma", "apply_layernorm_1p", "qk_layernorm", "qk_l2_norm"),
    *("apply_residual_connection_post_layernorm", "rotary_interleaved", "use_rope_scaling"),
    *("use_rotary_position_embeddings", "group_query_attention", "multi_latent_attention"),
    *("attention_output_gate", "untie_embeddings_and_output_weights", "use_mup"),
    *("is_hybrid_model", "no_pad_vocab_size", "finetune", "bf16", "fp16"),
    *("attention_softmax_in_fp32", "reset_position_ids", "reset_attention_mask"),
    "dataloader_inter_document_masking",
    *("eod_mask_loss", "mock_data", "full_validation", "multiple_validation_sets"),
    # Of the research fork: see `fork`.
    *("xiprelup", "attn_layernorm", "mlp_layernorm", "final_layernorm", "post_layer_norm"),
)
_TEXTS = ("position_embedding_type", "normalization", "softmax_type")
_TEXTS_OR_NONE = (
    *("rope_type", "experimental_attention_variant", "hybrid_layer_pattern"),
    *("hybrid_override_pattern", "heterogeneous_layers_config_path"),
    *("heterogeneous_layers_config_encoded_json", "pretrained_checkpoint", "split"),
    *("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "data_cache_path"),
    *("data_args_path", "per_split_data_args_path", "per_dataset_sequences_path"),
    "dataloader_type",
)
_LISTS_OR_NONE = ("data_path", "train_data_path", "valid_data_path", "test_data_path")

_KINDS: dict[str, Any] = {
    **dict.fromkeys(_SIZES, Size),
    **dict.fromkeys(_SIZES_OR_NONE, Size | None),
    **dict.fromkeys(_COUNTS_OR_NONE, Count | None),
    **dict.fromkeys(_NUMBERS, float),
    **dict.fromkeys(_NUMBERS_OR_NONE, float | None),
    **dict.fromkeys(_WHOLE_OR_NONE, int | None),
    **dict.fromkeys(_SWITCHES, bool),
    **dict.fromkeys(_TEXTS, str),
    **dict.fromkeys(_TEXTS_OR_NONE, str | None),
    **dict.fromkeys(_LISTS_OR_NONE, list[str] | None),
    **dict.fromkeys(PER_LAYER, list[float] | float | None),
    "spec": list[str] | None,
    "norm_epsilon": Annotated[float, Limits(0, 1, whole=False)],
    "layernorm_epsilon": Annotated[float, Limits(0, 1, whole=False)],
    "init_method_std": Annotated[float, Limits(0, whole=False)],
    "rotary_base": Annotated[float, Limits(1, whole=False)],
    "rotary_percent": Annotated[float, Limits(0, 1, whole=False)],
    "rope_scaling_factor": Annotated[float, Limits(1, whole=False)],
    "input_embeddings_multiplier": float,
    "eval_iters": Count | list[Count | None] | None,  # a list: of several validation sets in full
    "onnx_safe": bool | None,
    "no_rope_freq": int | list[int] | str | None,
    "linear_attention_freq": int | list[int] | str | None,
    "mrope_section": list[int] | None,
    "window_size": list[int] | int | None,
    "rampup_batch_size": list[int] | list[str] | None,
}
# Whose modules may be imported because a checkpoint says so.
_KNOWN_CODE = ("megatron", "megatron_xielu")

_Saved = make_dataclass("_Saved", [(name, kind, None) for name, kind in _KINDS.items()])


def check(arguments: Namespace, where: str) -> Namespace:
    """The same arguments.

    Args:
        arguments: of a checkpoint.
        where: it is, for messages.

    Raises:
        Refused: one has another type, or no value of use; names it.
    """
    try:
        schema.check(_Saved, vars(arguments), where)
    except Malformed as error:
        raise Refused(str(error)) from None
    layers = getattr(arguments, "num_layers", None)
    for name in PER_LAYER:
        value = getattr(arguments, name, None)
        if isinstance(value, list) and len(value) != layers:
            raise Refused(f"{where}: {name} is of {len(value)} layers, not {layers}")
    return arguments


def check_spec(saved: Namespace, given: Sequence[str] | None, folder: str) -> None:
    """Refuse to import what only a checkpoint asks for: Megatron takes ``--spec`` from it.

    Args:
        saved: of the checkpoint.
        given: the words of this run's ``--spec``.
        folder: of the checkpoint.

    Raises:
        ValueError: naming the module.
    """
    words = [*map(str, getattr(saved, "spec", None) or ())]
    if words and words != given and words[0].partition(".")[0] not in _KNOWN_CODE:
        asked = f"--spec {' '.join(words)}"
        raise ValueError(
            f"the checkpoint in {folder} was trained with {asked}, code that is neither Megatron's "
            f"nor this package's, and was not imported; if you trust it, give {asked}"
        )


def of_texts(texts: Mapping[str, str], where: str) -> Namespace:
    """Arguments that are kept as ``str(value)`` each, as Megatron writes them to event files.

    Args:
        texts: by argument.
        where: they are, for messages.

    Raises:
        Refused: as `check`.
    """
    values: dict[str, Any] = {}
    for name, text in texts.items():
        is_text = name in _TEXTS or (name in _TEXTS_OR_NONE and text != "None")
        values[name] = text if is_text else _value(text)
    return check(Namespace(**values), where)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
