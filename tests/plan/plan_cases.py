"""Prints what one real transformer layer keeps for its backward pass in 16 bits, per token.

Run by test_plan.py in a process of its own, since CPU mode changes torch for good. Left out
are the scores of attention, which no fused attention keeps, the fp32 copies that PyTorch's norms
make of their input on a CPU, and rope's tables, which all layers share.
"""

import json

import torch

from megatron_xielu import cpu

SEQUENCE, BATCH, HIDDEN, HEADS, FFN = 24, 2, 64, 4, 160


def main() -> None:
    """Build, run forward, print one JSON object: case -> bytes per token."""
    cpu.activate()
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_xielu.activations import XIELU
    from megatron_xielu.layer_specs import with_activation
    from megatron_xielu.megatron_activations import ActivationBuilder

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        use_te_activation_func=True,
        apply_rope_fusion=False,
    )
    spec = with_activation(
        get_gpt_layer_local_spec(normalization="RMSNorm"), ActivationBuilder(XIELU)
    )
    layer = build_module(spec, config=config, layer_number=1).bfloat16()
    parameters = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).tril() < 0.5
    rope = RotaryEmbedding(HIDDEN // HEADS, 1.0)(SEQUENCE)

    def bytes_per_token(module=layer, **options) -> float:
        saved: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        x = torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(x, **options)
        kept = [
            tensor.untyped_storage().nbytes()
            for key, tensor in saved.items()
            if key not in parameters
            and tensor.dtype == torch.bfloat16
            and tensor.shape[-2:] != (SEQUENCE, SEQUENCE)
            and tensor.shape[1:3] != (1, 1)
        ]
        return sum(kept) / (SEQUENCE * BATCH)

    probabilities = torch.rand(SEQUENCE, BATCH, requires_grad=True)  # fp32: not counted
    cases = {
        "rope": bytes_per_token(attention_mask=mask, rotary_pos_emb=rope),
        "learned": bytes_per_token(attention_mask=mask),
        # An expert is the same MLP, whose output the router weights.
        "expert": bytes_per_token(layer.mlp, per_token_scale=probabilities),
    }
    print("CASES " + json.dumps(cases))


if __name__ == "__main__":
    main()
