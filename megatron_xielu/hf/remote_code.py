"""What an exported xIPReLU model carries so that transformers finds its classes.

``from_pretrained(folder, trust_remote_code=True)`` follows ``auto_map`` in config.json to
``modeling_xiprelu.py`` beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_xielu.hf import modeling_xiprelu


def config_fields(*, qk_layernorm: bool) -> dict[str, Any]:
    """Fields of config.json that replace those of the stock architecture.

    Args:
        qk_layernorm: Apertus instead of Arcee.
    """
    config, model = (
        (modeling_xiprelu.ApertusXIPReLUConfig, modeling_xiprelu.ApertusXIPReLUForCausalLM)
        if qk_layernorm
        else (modeling_xiprelu.ArceeXIPReLUConfig, modeling_xiprelu.ArceeXIPReLUForCausalLM)
    )
    file = Path(modeling_xiprelu.__file__).stem
    return {
        "model_type": config.model_type,
        "architectures": [model.__name__],
        "auto_map": {
            "AutoConfig": f"{file}.{config.__name__}",
            "AutoModelForCausalLM": f"{file}.{model.__name__}",
        },
        "hidden_act": "xiprelu",
    }


def files() -> list[Path]:
    """Files to copy into the model's folder."""
    return [Path(modeling_xiprelu.__file__)]
