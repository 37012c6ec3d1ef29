"""Apertus and Arcee with xIELU: their configurations and tensors, Hugging Face's and Megatron's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    QKVMapping,
    ReplicatedMapping,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from transformers import ApertusForCausalLM, ArceeForCausalLM

from megatron_xielu.bridge.provider import XIELUModelProvider
from megatron_xielu.catalog import DEFAULT_BETA
from megatron_xielu.convert import hf_config
from megatron_xielu.convert.architecture import LLAMA3_ROPE
from megatron_xielu.convert.tensors import XIELU_EPS

_ACTIVATION = "model.layers.{}.mlp.act_fn"


class _Bridge(MegatronModelBridge):
    """What both share; a subclass names its layers' norms, and whether it has QK-norm."""

    norms = ("input_layernorm", "post_attention_layernorm")
    qk_layernorm = False

    @classmethod
    def hf_to_megatron_activation(cls, hidden_act: str) -> Callable[..., Tensor]:
        """GELU, which Megatron requires beside an activation module and never calls."""
        if hidden_act != "xielu":
            raise ValueError(
                f"hidden_act is {hidden_act!r}: megatron_xielu.bridge converts {cls.SOURCE_NAME} "
                "with 'xielu' only"
            )
        return torch.nn.functional.gelu

    @classmethod
    def megatron_to_hf_activation(cls, activation_func: Callable[..., Tensor]) -> str:
        """The name in Hugging Face's configuration."""
        return "xielu"

    def provider_bridge(self, hf_pretrained: Any) -> XIELUModelProvider:
        """The provider of a Hugging Face model.

        Raises:
            ValueError: an activation, bias or RoPE scaling that Megatron or this package lacks.
        """
        config = hf_pretrained.config
        for name in ("attention_bias", "mlp_bias"):
            if getattr(config, name, False):
                raise ValueError(f"{name} is set: megatron_xielu.bridge converts no biases")
        provider = super().provider_bridge(hf_pretrained)
        provider.xielu_beta = self._beta(hf_pretrained)
        provider.qk_layernorm = self.qk_layernorm
        provider.hidden_dropout = 0.0
        provider.add_bias_linear = False
        provider.rotary_base, factor = _rope(config)
        provider.rope_scaling = factor is not None
        if factor is not None:
            provider.rope_scaling_factor = factor
        return provider

    def _beta(self, hf_pretrained: Any) -> float:
        """β as the model's first layer stores it; the default where only a configuration is."""
        key = f"{_ACTIVATION.format(0)}.beta"
        state = getattr(hf_pretrained, "state", None)
        if state is None or key not in set(state.keys()):
            return DEFAULT_BETA
        return float(state[key])

    @classmethod
    def megatron_to_hf_config(cls, provider: XIELUModelProvider) -> dict[str, Any]:
        """config.json of a provider."""
        config = super().megatron_to_hf_config(provider)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": provider.rotary_base}
        if provider.rope_scaling:
            rope |= {"rope_type": "llama3", "factor": provider.rope_scaling_factor, **LLAMA3_ROPE}
        return {**config, "rope_parameters": rope}

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Megatron's names (Transformer Engine's and local layers') and Hugging Face's."""
        attention_norm, mlp_norm = (f"model.layers.*.{name}.weight" for name in self.norms)
        layer = "decoder.layers.*"
        automatic = {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "output_layer.weight": "lm_head.weight",
            "decoder.final_layernorm.weight": "model.norm.weight",
            f"{layer}.self_attention.linear_qkv.layer_norm_weight": attention_norm,
            f"{layer}.input_layernorm.weight": attention_norm,
            f"{layer}.self_attention.linear_proj.weight": "model.layers.*.self_attn.o_proj.weight",
            f"{layer}.mlp.linear_fc1.layer_norm_weight": mlp_norm,
            f"{layer}.pre_mlp_layernorm.weight": mlp_norm,
            f"{layer}.mlp.linear_fc1.weight": "model.layers.*.mlp.up_proj.weight",
            f"{layer}.mlp.linear_fc2.weight": "model.layers.*.mlp.down_proj.weight",
        }
        if self.qk_layernorm:
            automatic |= {
                f"{layer}.self_attention.{x}_layernorm.weight": (
                    f"model.layers.*.self_attn.{x}_norm.weight"
                )
                for x in "qk"
            }
        projections = {x: f"model.layers.*.self_attn.{x}_proj.weight" for x in "qkv"}
        return MegatronMappingRegistry(
            *(AutoMapping(megatron_param=ours, hf_param=hf) for ours, hf in automatic.items()),
            QKVMapping(megatron_param=f"{layer}.self_attention.linear_qkv.weight", **projections),
            *(
                ReplicatedMapping(
                    megatron_param=f"{layer}.mlp.activation_func.{alpha}",
                    hf_param=f"{_ACTIVATION.format('*')}.{alpha}",
                )
                for alpha in ("alpha_p", "alpha_n")
            ),
        )

    def maybe_modify_converted_hf_weight(
        self,
        task: Any,
        converted_weights_dict: dict[str, Tensor],
        hf_state_dict: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Add the buffers of Hugging Face's xIELU, which Megatron's model has no tensors for."""
        added = {}
        for name, value in converted_weights_dict.items():
            prefix, _, last = name.rpartition(".")
            if last == "alpha_p":
                for buffer, default in (("beta", DEFAULT_BETA), ("eps", XIELU_EPS)):
                    key = f"{prefix}.{buffer}"
                    stored = hf_state_dict.get(key)
                    added[key] = value.new_tensor(default) if stored is None else stored
        return {**converted_weights_dict, **added}


def _rope(config: Any) -> tuple[float, float | None]:
    """(theta, factor of the llama3 scaling or None) of transformers' configuration of a model.

    Raises:
        ValueError: Megatron has no such RoPE, or transformers 5 misread what 4 wrote.
    """
    name = config.name_or_path
    rope = hf_config.rope_of(hf_config.check(config.to_dict(), "config.json"))
    if not name:
        return rope
    stored, _ = type(config).get_config_dict(name)
    meant = hf_config.rope_of(hf_config.check(stored, f"{name}: config.json"))
    if rope != meant:
        raise ValueError(
            f"{name}: config.json means rope_theta {meant[0]:g} and the llama3 factor {meant[1]}, "
            f"but this transformers reads {rope[0]:g} and {rope[1]}; write them as rope_parameters"
        )
    return rope


_register = partial(
    MegatronModelBridge.register_bridge, target=GPTModel, provider=XIELUModelProvider
)


@_register(source=ArceeForCausalLM, model_type="arcee")
class ArceeXIELUBridge(_Bridge):
    """Arcee with xIELU: the Llama of the xIELU paper."""


@_register(source=ApertusForCausalLM, model_type="apertus")
class ApertusBridge(_Bridge):
    """Apertus: xIELU and QK-norm."""

    norms = ("attention_layernorm", "feedforward_layernorm")
    qk_layernorm = True
