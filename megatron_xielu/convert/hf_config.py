"""config.json of Hugging Face ↔ `Architecture`; refuses a model that Megatron cannot express."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from megatron_xielu.catalog import DEFAULT_BETA
from megatron_xielu.checkpoints.saved_arguments import Size
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common import schema
from megatron_xielu.common.flags import Limits
from megatron_xielu.common.schema import Malformed
from megatron_xielu.convert.architecture import LLAMA3_ROPE, Architecture

_CLASSES = {
    "apertus": "ApertusForCausalLM",
    "arcee": "ArceeForCausalLM",
    "llama": "LlamaForCausalLM",
}
_REMOTE = "_xiprelu"  # suffix of the model types that megatron_xielu.hf adds
_ACTS = {"swiglu": "silu"}  # hidden_act, where it has another name than ours

_Theta = Annotated[float, Limits(1, 1e18, whole=False)]  # a whole number of 64 bits in Megatron


@dataclass(frozen=True)
class _Rope:
    """``rope_scaling`` of transformers 4, ``rope_parameters`` of 5."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Theta | None = None
    partial_rotary_factor: float | None = None
    factor: Annotated[float, Limits(1, whole=False)] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: Size | None = None


# Where one is missing, transformers has a default.
_DEFAULTED: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), Size),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), Size),
    "max_position_embeddings": Size,
    "hidden_act": str,
    "rms_norm_eps": Annotated[float, Limits(0, 1, whole=False)],
    "initializer_range": Annotated[float, Limits(0, whole=False)],
    "tie_word_embeddings": bool,
}
_DTYPES = Literal["float32", "bfloat16", "float16", "auto"]
_KINDS: dict[str, Any] = {
    **_DEFAULTED,
    **dict.fromkeys(("num_key_value_heads", "head_dim"), Size | None),
    **dict.fromkeys(("attention_bias", "mlp_bias"), bool),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _Rope | None),
    **dict.fromkeys(("dtype", "torch_dtype"), _DTYPES | None),
    "rope_theta": _Theta,
    "partial_rotary_factor": float | None,
    "transformers_version": str | None,
    "xiprelu_beta": float,
}
_Config = make_dataclass(
    "_Config", [("model_type", str), *((name, kind, None) for name, kind in _KINDS.items())]
)


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
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if a.family == "apertus":  # which released models have, and mlx-lm asks for
        config |= {"post_norm": False, "qk_norm": True}
    if a.activation == "xiprelu":
        from megatron_xielu.hf import remote_code

        config |= remote_code.config_fields(qk_layernorm=a.qk_layernorm)
        config["xiprelu_beta"] = a.beta
    return config


def read(folder: Path) -> dict[str, Any]:
    """A model's config.json, as `check` has it.

    Raises:
        Refused: there is none, or a field is wrong; names it.
    """
    path = folder / "config.json"
    try:
        return check(schema.read_json(path), path)
    except FileNotFoundError:
        raise Refused(
            f"{path} is not there: from-hf reads a model of transformers; a checkpoint of "
            "Megatron's is for to-hf"
        ) from None
    except (OSError, Malformed) as error:
        raise Refused(str(error)) from None


def check(stored: Any, file: Path | str) -> dict[str, Any]:
    """The content of a config.json, whose fields that are used here are of the right types.

    Args:
        stored: the content.
        file: its name, for messages.

    Raises:
        Refused: one is not; names it.
    """
    try:
        schema.check(_Config, stored, file)
    except Malformed as error:
        raise Refused(str(error)) from None
    return stored


def architecture_of(stored: dict[str, Any], beta: float | None) -> Architecture:
    """The architecture that a config.json describes, with transformers' defaults.

    Args:
        stored: its content, as `read` has it.
        beta: of xIELU, which the weights' files hold; None where they do not.

    Raises:
        Refused: Megatron cannot express it; names the field.
    """
    import transformers

    model_type = stored["model_type"]
    family = model_type.removesuffix(_REMOTE)
    if family not in _CLASSES:
        raise Refused(
            f"config.json: model_type = {model_type!r}; only {', '.join(_CLASSES)} can be converted"
        )
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if stored.get(name):
            raise Refused(f"config.json: {name} is set, which an import does not support")
    theta, factor = rope_of(stored)
    # A stock class's, without code of the model's. Arcee's ids lie beyond its vocabulary, of which
    # transformers 5 warns.
    of_class = getattr(transformers, _CLASSES[family].replace("ForCausalLM", "Config"))
    defaults = of_class(bos_token_id=None, eos_token_id=None)
    config = Namespace(**{name: stored.get(name, getattr(defaults, name)) for name in _DEFAULTED})
    activation = config.hidden_act
    if family == "llama":
        if activation != "silu":
            raise Refused(f"config.json: hidden_act = {activation!r} in a gated model (only silu)")
        activation = "swiglu"
    elif activation not in ("xielu", "xiprelu", "relu2", "gelu"):
        raise Refused(
            f"config.json: hidden_act = {activation!r}; only xielu, xiprelu, relu2 and gelu"
        )
    if activation == "xiprelu":
        beta = stored.get("xiprelu_beta", DEFAULT_BETA)
    heads = config.num_attention_heads
    groups = stored.get("num_key_value_heads") or heads
    head_dim = stored.get("head_dim") or config.hidden_size // heads
    if heads % groups:
        raise Refused(
            f"config.json: num_key_value_heads = {groups} does not divide num_attention_heads = "
            f"{heads}"
        )
    if not stored.get("head_dim") and config.hidden_size % heads:
        raise Refused(
            f"config.json: num_attention_heads = {heads} does not divide hidden_size = "
            f"{config.hidden_size}, and there is no head_dim"
        )
    return Architecture(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=heads,
        groups=groups,
        head_dim=head_dim,
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


def rope_of(stored: dict[str, Any]) -> tuple[float, float | None]:
    """(theta, factor of the llama3 scaling or None) of a config.json.

    Transformers 4 and 5 read the same file differently: the one that wrote it counts.

    Args:
        stored: as `read` has it.

    Raises:
        Refused: Megatron's GPT has no such RoPE, or the fields of 4 and of 5 contradict.
    """
    four, five = _rope_of_4(stored), _rope_of_5(stored)
    version = str(stored.get("transformers_version") or "4")
    if "rope_parameters" not in stored and version.split(".")[0] in ("2", "3", "4"):
        rope = four
    elif four != five and not stored.keys().isdisjoint(("rope_theta", "rope_scaling")):
        raise Refused(
            f"config.json: transformers 4 reads rope_theta and rope_scaling as {four}, 5 reads "
            f"rope_parameters and them as {five}; write the one that is meant as rope_parameters "
            "and drop the others"
        )
    else:
        rope = five
    partial = stored.get("partial_rotary_factor", rope.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise Refused(f"config.json: partial_rotary_factor = {partial}, not 1")
    kind, theta = rope.get("rope_type"), float(rope["rope_theta"])
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise Refused(f"config.json: rope_type = {kind!r}; only default and llama3 are converted")
    for name, value in LLAMA3_ROPE.items():
        if rope.get(name) != value:
            raise Refused(
                f"config.json: {name} = {rope.get(name)} of the llama3 RoPE scaling; Megatron's "
                f"--use-rope-scaling has {value}"
            )
    if "factor" not in rope:
        raise Refused("config.json: the llama3 RoPE scaling has no factor")
    return theta, float(rope["factor"])


def _rope_of_4(stored: dict[str, Any]) -> dict[str, Any]:
    """As 4.57.6 reads it: configuration_{apertus,arcee,llama}.py, where a missing argument of the
    constructor has its default, and null is no scaling (ApertusRotaryEmbedding)."""
    theta, scaling = _default_rope(stored)
    rope = stored.get("rope_scaling", scaling)
    rope = {"rope_type": "default"} if rope is None else dict(rope)
    if "type" in rope:
        rope["rope_type"] = rope["type"]
    return _without_nulls({**rope, "rope_theta": stored.get("rope_theta", theta)})


def _rope_of_5(stored: dict[str, Any]) -> dict[str, Any]:
    """As 5.23.0 reads it: configuration_apertus.py, where null is the default too, and
    convert_rope_params_to_dict of modeling_rope_utils.py."""
    theta, scaling = _default_rope(stored)
    rope = stored.get("rope_parameters")
    if rope is None and scaling is not None:
        rope = {**scaling, "rope_theta": theta}
    rope = stored.get("rope_scaling") or rope or {}
    defaults = {
        "rope_type": rope.get("type", "default"),
        "rope_theta": stored.get("rope_theta", theta),
    }
    return _without_nulls(defaults | rope)


def _default_rope(stored: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    if stored["model_type"].removesuffix(_REMOTE) != "apertus":
        return 10_000.0, None
    return 12_000_000.0, {"rope_type": "llama3", "factor": 8.0, **LLAMA3_ROPE}


def _without_nulls(rope: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in rope.items() if x is not None and name != "type"}
