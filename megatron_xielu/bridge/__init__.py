"""Megatron-Bridge: importing this lets ``AutoBridge`` convert and train Apertus and Arcee models.

    import megatron_xielu.bridge
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained("swiss-ai/Apertus-8B-2509")
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    provider.finalize()
    model = provider.provide_distributed_model(ddp_config=…)

The provider puts `megatron_xielu.megatron_activations` into the layer spec, so alphas are float32
and their gradients whole under tensor parallelism; the built model is audited.
``docs/huggingface.md`` says how far this is tested.
"""

from __future__ import annotations

try:
    import megatron.bridge  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "megatron.bridge":
        raise  # Bridge is there, and lacks something of its own
    raise ModuleNotFoundError(
        "megatron_xielu.bridge needs Megatron-Bridge: pip install megatron-bridge",
        name="megatron.bridge",
    ) from error

from megatron_xielu.bridge.models import ApertusBridge, ArceeXIELUBridge
from megatron_xielu.bridge.provider import XIELUModelProvider, activation_layer_spec

# The last by its name here is in configurations that Bridge has saved.
__all__ = ["ApertusBridge", "ArceeXIELUBridge", "XIELUModelProvider", "activation_layer_spec"]
