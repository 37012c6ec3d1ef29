"""config.json of Hugging Face ↔ `Architecture`; refuses a model that Megatron cannot express."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_xielu.catalog import DEFAULT_BETA
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.convert.architecture import LLAMA3_ROPE, Architecture

_CLASSES = {
    "apertus": "ApertusForCausalLM",
    "arcee": "ArceeForCausalLM",
    "llama": "LlamaForCausalLM",
}
_REMOTE = "_xiprelu"  # suffix of the model types that megatron_xielu.hf adds
_ACTS = {"swiglu": "silu"}  # hidden_act, where it has another name than ours


def config_of(architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json that transformers 4.57 and 5 read alike.

    Args:
        architecture: the model.
        dtype: of its weights.
    """
    a = architecture
    rope: dict[str, Any] = {"rope_type": "default"}
    if a.rope_factor is not None:
        rope = {"rope_type": "llama3", "factor": a.rope_factor, **LLAMA3_ROPE}
    config = {
        "architectures": [_CLASSES[a.family]],
        "model_type": a.family,
        "vocab_size": a.vocabulary,
        "hidden_size": a.hidden,
        "intermediate_size": a.ffn,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.groups,
        "head_dim": a.head_dim,
        "hidden_act": _ACTS.get(a.activation, a.activation),
        "max_position_embeddings": a.positions,
        "initializer_range": a.init_std,
        "rms_norm_eps": a.norm_epsilon,
        "rope_parameters": {**rope, "rope_theta": a.rope_theta},
        # The names of transformers 4. Apertus' default there is a scaling, hence the null.
        "rope_theta": a.rope_theta,
        "rope_scaling": rope if a.rope_factor is not None else None,
        "tie_word_embeddings": a.tied,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if a.family != "apertus":
        config["mlp_bias"] = False
    if a.activation == "xiprelu":
        from megatron_xielu.hf import remote_code

        config |= remote_code.config_fields(qk_layernorm=a.qk_layernorm)
        config["xiprelu_beta"] = a.beta
    return config


def read(folder: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        Refused: there is none.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise Refused(f"{folder / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise Refused(f"{folder / 'config.json'} cannot be read")
    return config


def architecture_of(stored: dict[str, Any], beta: float | None) -> Architecture:
    """The architecture that a config.json describes, with transformers' defaults.

    Args:
        stored: its content.
        beta: of xIELU, which the weights' files hold; None where they do not.

    Raises:
        Refused: Megatron cannot express it; names the field.
    """
    import transformers

    model_type = str(stored.get("model_type"))
    family = model_type.removesuffix(_REMOTE)
    if family not in _CLASSES:
        raise Refused(
            f"config.json: model_type = {model_type}; only {', '.join(_CLASSES)} can be converted"
        )
    # Without auto_map and with a stock class: no code of the model's is run.
    plain = {k: v for k, v in stored.items() if k not in ("auto_map", "model_type")}
    config_class = getattr(transformers, _CLASSES[family].replace("ForCausalLM", "Config"))
    try:
        config = config_class(**plain)
    except (TypeError, ValueError) as error:
        raise Refused(f"config.json: {' '.join(str(error).split())}") from None
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if getattr(config, name, None):
            raise Refused(f"config.json: {name} is set, which an import does not support")
    activation = config.hidden_act
    if family == "llama":
        if activation != "silu":
            raise Refused(f"config.json: hidden_act = {activation} in a gated model (only silu)")
        activation = "swiglu"
    elif activation not in ("xielu", "xiprelu", "relu2", "gelu"):
        raise Refused(
            f"config.json: hidden_act = {activation}; only xielu, xiprelu, relu2 and gelu"
        )
    if activation == "xiprelu":
        beta = stored.get("xiprelu_beta", DEFAULT_BETA)
    theta, factor = _rope(stored, config)
    heads = config.num_attention_heads
    return Architecture(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=heads,
        groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        rope_theta=theta,
        rope_factor=factor,
        tied=config.tie_word_embeddings,
        qk_layernorm=family == "apertus",
        activation=activation,
        beta=DEFAULT_BETA if beta is None else beta,
        init_std=config.initializer_range,
    )


def _rope(stored: dict[str, Any], config: Any) -> tuple[float, float | None]:
    """(theta, llama3 factor or None); transformers 5 has both in one dictionary."""
    rope = dict(
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    theta = rope.pop("rope_theta", None) or getattr(config, "rope_theta", None) or 10000.0
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    partial = stored.get("partial_rotary_factor", rope.pop("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise Refused(f"config.json: partial_rotary_factor = {partial}, not 1")
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise Refused(f"config.json: rope_type = {kind}, which Megatron's GPT does not compute")
    for name, value in LLAMA3_ROPE.items():
        if rope.get(name) != value:
            raise Refused(
                f"config.json: {name} = {rope.get(name)} of the llama3 RoPE scaling; Megatron's "
                f"--use-rope-scaling has {value}"
            )
    return float(theta), float(rope["factor"])
