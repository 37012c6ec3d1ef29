"""Builds real GPT models on one CPU rank and prints what `layer_specs.audit` says of each.

Run by test_layer_specs.py in a process of its own, since CPU mode changes torch for good.
"""

import contextlib
import json

import one_rank

from megatron_xielu import cpu


def main() -> None:
    """Build, audit, print one JSON object: case -> message, or the number of activations."""
    with contextlib.suppress(ModuleNotFoundError):
        import transformer_engine.pytorch  # noqa: F401  (before torch.cuda is redirected)
    cpu.activate()
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    forward = MLP.forward

    from megatron_xielu.activations import XIELU, XIPReLU
    from megatron_xielu.layer_specs import audit, with_activation
    from megatron_xielu.megatron_activations import ActivationBuilder

    one_rank.start()
    xielu = ActivationBuilder(XIELU)

    def build(spec, mtp_layer=None, **options):
        config = one_rank.config(**options)
        spec = spec if isinstance(spec, ModuleSpec) else spec(config)
        mtp = None
        if config.mtp_num_layers:
            mtp = get_gpt_mtp_block_spec(config, mtp_layer, False)
        return GPTModel(config, spec, 32, 16, mtp_block_spec=mtp, position_embedding_type="rope")

    def outcome(spec, activation=XIELU, **options):
        try:
            return len(audit([build(spec, **options)], activation))
        except (RuntimeError, ValueError) as error:
            return str(error)

    ours = with_activation(get_gpt_layer_local_spec(), xielu)
    mixed = {"num_moe_experts": 2, "moe_layer_freq": [0, 1], "moe_ffn_hidden_size": 8}
    shared = {**mixed, "moe_shared_expert_intermediate_size": 8}

    def experts_keep_gelu(config):
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        block.layer_specs[0] = with_activation(block.layer_specs[0], xielu)
        return block

    def other_replicas():
        model = build(ours)
        model.decoder.layers[0].mlp.activation_func.alpha_p.allreduce = False
        try:
            audit([model], XIELU)
        except RuntimeError as error:
            return str(error)

    def block_of_layers(config):
        return with_activation(get_gpt_decoder_block_spec(config, False), xielu)

    cases = {
        "ours": outcome(ours),
        "block": outcome(block_of_layers, moe_layer_freq=[0, 0]),
        "experts with ours": outcome(block_of_layers, **shared),
        "grouped experts with ours": outcome(block_of_layers, **shared, moe_grouped_gemm=True),
        "mtp with ours": outcome(ours, mtp_layer=ours, mtp_num_layers=1),
        "other replicas": other_replicas(),
        "other activation": outcome(ours, XIPReLU),
        "untouched spec": outcome(get_gpt_layer_local_spec()),
        "slot ignored": outcome(ours, use_te_activation_func=False),
        "experts": outcome(experts_keep_gelu, **mixed),
        "grouped experts": outcome(experts_keep_gelu, **mixed, moe_grouped_gemm=True),
        "shared experts": outcome(experts_keep_gelu, **shared),
        "mtp": outcome(ours, mtp_layer=get_gpt_layer_local_spec(), mtp_num_layers=1),
        "MLP.forward is Megatron's": MLP.forward is forward,
    }
    if HAVE_TE:
        te = with_activation(get_gpt_layer_with_transformer_engine_spec(), xielu)
        cases["transformer engine"] = outcome(te, normalization="RMSNorm")
        grouped = get_gpt_layer_with_transformer_engine_spec(
            num_experts=2, moe_grouped_gemm=True, use_te_activation_func=True
        )
        cases["transformer engine, grouped experts"] = outcome(
            with_activation(grouped, xielu),
            normalization="RMSNorm",
            num_moe_experts=2,
            moe_ffn_hidden_size=8,
            moe_grouped_gemm=True,
        )
        cases["untouched transformer engine spec"] = outcome(
            get_gpt_layer_with_transformer_engine_spec(use_te_activation_func=True)
        )
        try:
            with_activation(get_gpt_layer_with_transformer_engine_spec(use_te_op_fuser=True), xielu)
        except ValueError as error:
            cases["op fuser"] = str(error)
    print("CASES " + json.dumps(cases))


if __name__ == "__main__":
    main()
