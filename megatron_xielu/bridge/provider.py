"""A GPT model with xIELU in Megatron-Bridge's terms: its provider, and the layer spec it uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.models.gpt_provider import (
    GPTModelProvider,
    default_layer_spec,
    local_layer_spec,
)
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_xielu.activation_slot import audit, with_activation
from megatron_xielu.activations import XIELU
from megatron_xielu.catalog import DEFAULT_BETA
from megatron_xielu.megatron_activations import ActivationBuilder


def activation_layer_spec(config: XIELUModelProvider) -> Any:
    """Bridge's layer spec with xIELU; Transformer Engine's layers if installed, else Megatron's
    local ones."""
    spec = default_layer_spec(config) if HAVE_TE else local_layer_spec(config)
    return with_activation(spec, ActivationBuilder(XIELU, beta=config.xielu_beta))


@dataclass
class XIELUModelProvider(GPTModelProvider):
    """A GPT model whose dense MLPs have xIELU.

    Args:
        xielu_beta: slope at 0.
    """

    xielu_beta: float = DEFAULT_BETA

    normalization: str = "RMSNorm"
    position_embedding_type: Any = "rope"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    add_bias_linear: bool = False
    gated_linear_unit: bool = False
    # Fills the activation slot of the layer spec, and rules out the fusion of a bias with GELU.
    use_te_activation_func: bool = True
    bias_activation_fusion: bool = False
    transformer_layer_spec: Any = field(default=activation_layer_spec)

    def provide(self, *args: Any, **kwargs: Any) -> GPTModel:
        """Build this rank's model, and check that every MLP has the activation."""
        model = super().provide(*args, **kwargs)
        audit([model], XIELU)
        return model
