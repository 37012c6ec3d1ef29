"""Hugging Face transformers: importing this registers xIPReLU models with the Auto classes.

Afterwards ``AutoModelForCausalLM.from_pretrained`` loads them without ``trust_remote_code``.
`use_fused_activation` makes a loaded xIELU or xIPReLU model compute it with this package's kernels.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from megatron_xielu.hf import modeling_xiprelu as _modeling
from megatron_xielu.hf.fused import use_fused_activation

__all__ = ["use_fused_activation"]

for _config, _model in (
    (_modeling.ArceeXIPReLUConfig, _modeling.ArceeXIPReLUForCausalLM),
    (_modeling.ApertusXIPReLUConfig, _modeling.ApertusXIPReLUForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
