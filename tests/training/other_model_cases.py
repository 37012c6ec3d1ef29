"""Builds T5, BERT and hybrid models of Megatron on one CPU rank, with our activation, and trains.

Run by test_layer_specs.py in a process of its own, since CPU mode changes torch for good; a
case that fails ends it with an AssertionError.
"""

import dataclasses

import one_rank
import torch
from one_rank import config

from megatron_xielu import cpu

TOKENS = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(1))


def main() -> None:
    """Build, audit, and run a forward and a backward pass of each model."""
    cpu.activate()
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.models.T5.t5_model import T5Model
    from megatron.core.models.T5.t5_spec import (
        get_t5_decoder_with_local_block_spec,
        get_t5_encoder_with_local_block_spec,
    )
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.moe.experts import InferenceGroupedMLP
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_xielu.activations import XIPReLU
    from megatron_xielu.layer_specs import audit, with_activation
    from megatron_xielu.megatron_activations import ActivationBuilder

    one_rank.start()
    builder = ActivationBuilder(XIPReLU)

    def check(model, mlps, *inputs, **named) -> None:
        """It has that many MLPs, all with the activation, and all alphas get a gradient."""
        activations = audit([model], XIPReLU)
        assert len(activations) == mlps, model
        output = model(*inputs, **named)
        (output[0] if isinstance(output, tuple) else output).sum().backward()
        for activation in activations:
            for alpha in (activation.alpha_p, activation.alpha_n):
                assert alpha.grad.all(), model

    see_all = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    encoder, decoder = (
        with_activation(block(2), builder)
        for block in (get_t5_encoder_with_local_block_spec, get_t5_decoder_with_local_block_spec)
    )
    tied = {"share_embeddings_and_output_weights": True}
    t5 = T5Model(config(), config(), encoder, decoder, 32, 8, **tied)
    check(t5, 4, TOKENS, TOKENS, see_all, see_all, see_all, lm_labels=TOKENS)

    bert_spec = with_activation(bert_layer_local_spec, builder)
    bert = BertModel(config(), 0, bert_spec, 32, 8, add_binary_head=False)
    check(bert, 2, TOKENS, torch.ones(2, 8), lm_labels=TOKENS)

    # Megatron's hybrid stack is of Transformer Engine layers; this is the same one, of local layers
    # and without a final norm. Attention, MLP, experts with a shared expert.
    local = get_gpt_layer_local_submodules()
    no_mlp = {"mlp": IdentityOp, "mlp_bda": IdentityFuncOp, "pre_mlp_layernorm": IdentityOp}
    no_attention = {"self_attention": IdentityOp, "self_attn_bda": IdentityFuncOp}
    no_attention["input_layernorm"] = IdentityOp
    mlp = dataclasses.replace(local, **no_attention)
    moe = get_moe_module_spec(use_te=False, num_experts=2)
    stack = hybrid_stack_spec.submodules

    def with_moe(spec) -> ModuleSpec:
        layers = {
            "attention_layer": ModuleSpec(
                TransformerLayer, submodules=dataclasses.replace(local, **no_mlp)
            ),
            "mlp_layer": dataclasses.replace(stack.mlp_layer, submodules=mlp),
            "moe_layer": dataclasses.replace(
                stack.moe_layer, submodules=dataclasses.replace(mlp, mlp=spec)
            ),
        }
        return dataclasses.replace(
            hybrid_stack_spec,
            submodules=dataclasses.replace(stack, **layers),
            params={"post_layer_norm": False},
        )

    def hybrid(spec, pattern) -> HybridModel:
        experts = {"num_moe_experts": 2, "moe_ffn_hidden_size": 8, "ffn_hidden_size": 16}
        options = config(num_layers=len(pattern), moe_shared_expert_intermediate_size=8, **experts)
        return HybridModel(options, with_activation(spec, builder), 32, 8, pattern)

    mask = torch.ones(8, 8, dtype=torch.bool).triu(1)[None, None]
    check(hybrid(with_moe(moe), "*-*E"), 1 + 2 + 1, TOKENS, None, mask, labels=TOKENS)

    grouped = get_moe_module_spec(use_te=False, num_experts=2, moe_grouped_gemm=True)
    check(hybrid(with_moe(grouped), "*-*E"), 1 + 1 + 1, TOKENS, None, mask, labels=TOKENS)

    # Experts of another kind are refused where they are built, not where they are listed.
    experts = grouped.keywords["submodules"].experts.keywords["submodules"]
    others = dataclasses.replace(
        grouped.keywords["submodules"], experts=ModuleSpec(InferenceGroupedMLP, submodules=experts)
    )
    spec = with_moe(type(grouped)(grouped.func, submodules=others))
    check(hybrid(spec, "*-"), 1, TOKENS, None, mask, labels=TOKENS)
    try:
        hybrid(spec, "*E")
    except Exception as error:
        assert "InferenceGroupedMLP cannot be replaced" in str(error), error
    else:
        raise AssertionError("not refused")


if __name__ == "__main__":
    main()
