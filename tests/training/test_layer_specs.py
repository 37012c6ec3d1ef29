"""The spec walker on every form of spec, and the audit on really built models."""

import importlib.util
import json
from functools import partial
from pathlib import Path

import pytest
from launch import train
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import InferenceGroupedMLP, SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_xielu import workarounds
from megatron_xielu.activations import XIELU
from megatron_xielu.layer_specs import with_activation
from megatron_xielu.megatron_activations import ActivationBuilder


@pytest.fixture(autouse=True)
def leave_megatrons_optimizers_alone(monkeypatch):
    """`with_activation` mends them for good, and other tests look at their faults."""
    monkeypatch.setattr(workarounds, "mend_optimizers", lambda: None)


BUILDER = ActivationBuilder(XIELU)


def layer_with(mlp) -> ModuleSpec:
    return ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(mlp=mlp))


def test_partial_form():
    """Megatron 0.18 and later."""
    spec = get_gpt_layer_local_spec()
    copied = with_activation(spec, BUILDER)
    assert isinstance(copied.submodules.mlp, partial)
    assert copied.submodules.mlp.keywords["submodules"].activation_func is BUILDER
    assert copied.submodules.mlp.func == MLP.as_mlp_submodule
    assert spec.submodules.mlp.keywords["submodules"].activation_func is None  # a copy, not a patch
    assert copied.submodules.self_attention is spec.submodules.self_attention


def test_module_spec_form():
    """Megatron 0.17."""
    submodules = MLPSubmodules(linear_fc1=object, linear_fc2=object)
    spec = layer_with(ModuleSpec(module=MLP, submodules=submodules))
    copied = with_activation(spec, BUILDER)
    assert copied.submodules.mlp.submodules.activation_func is BUILDER
    assert copied.submodules.mlp.module is MLP
    assert submodules.activation_func is None


def test_block_form_and_layers_without_an_mlp():
    block = TransformerBlockSubmodules([get_gpt_layer_local_spec(), layer_with(IdentityOp)])
    first, second = with_activation(block, BUILDER).layer_specs
    assert first.submodules.mlp.keywords["submodules"].activation_func is BUILDER
    assert second.submodules.mlp is IdentityOp


def test_experts_and_shared_experts():
    spec = get_gpt_layer_local_spec(num_experts=2)
    moe = with_activation(spec, BUILDER).submodules.mlp.keywords["submodules"]
    assert moe.experts.func is SequentialMLP
    experts, shared = (
        part.keywords["submodules"].activation_func for part in (moe.experts, moe.shared_experts)
    )
    assert experts == ActivationBuilder(XIELU, is_expert=True) and shared is BUILDER
    untouched = spec.submodules.mlp.keywords["submodules"]
    assert untouched.experts.keywords["submodules"].activation_func is None


def test_experts_in_module_spec_form():
    mlp = MLPSubmodules(linear_fc1=object, linear_fc2=object)
    submodules = MoESubmodules(
        experts=ModuleSpec(SequentialMLP, submodules=mlp),
        shared_experts=ModuleSpec(SharedExpertMLP, params={"gate": False}, submodules=mlp),
    )
    filled = with_activation(layer_with(ModuleSpec(MoELayer, submodules=submodules)), BUILDER)
    moe = filled.submodules.mlp.submodules
    assert moe.experts.submodules.activation_func.is_expert
    assert moe.shared_experts.submodules.activation_func is BUILDER
    assert moe.shared_experts.params == {"gate": False}


def test_multi_token_prediction_form():
    layer = get_mtp_layer_spec(get_gpt_layer_local_spec(), use_transformer_engine=False)
    block = with_activation(MultiTokenPredictionBlockSubmodules([layer]), BUILDER)
    mlp = block.layer_specs[0].submodules.mtp_model_layer.submodules.mlp
    assert mlp.keywords["submodules"].activation_func is BUILDER


class FusedMLP(MLP):
    """Stands for Transformer Engine's fused MLP, which bakes the activation in."""


MLP_PARTS = MLPSubmodules(linear_fc1=object, linear_fc2=object)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            layer_with(
                partial(
                    MoELayer,
                    submodules=MoESubmodules(
                        experts=partial(InferenceGroupedMLP, submodules=MLP_PARTS)
                    ),
                )
            ),
            "InferenceGroupedMLP cannot be replaced; of experts those of SequentialMLP and",
        ),
        (
            layer_with(partial(FusedMLP.as_mlp_submodule, submodules=MLP_PARTS)),
            "FusedMLP cannot be replaced; drop --use-transformer-engine-op-fuser",
        ),
        (ModuleSpec(MLP, submodules=MLP_PARTS), "MLPSubmodules is not a spec of layers"),
    ],
    ids=["experts for inference", "op fuser", "no layer"],
)
def test_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        with_activation(spec, BUILDER)


def test_t5_bert_and_hybrid_models_train(tmp_path):
    train(tmp_path, "", model=(), command=[str(Path(__file__).with_name("other_model_cases.py"))])


def test_audit(tmp_path):
    run = train(tmp_path, "", model=(), command=[str(Path(__file__).with_name("audit_cases.py"))])
    cases = json.loads(run.output.split("CASES ", 1)[1].splitlines()[0])
    assert cases.pop("MLP.forward is Megatron's")
    assert cases.pop("ours") == 2
    assert cases.pop("block") == 2
    assert cases.pop("experts with ours") == 1 + 2 + 1
    assert cases.pop("grouped experts with ours") == 1 + 1 + 1
    assert cases.pop("mtp with ours") == 2 + 1
    expected = {
        "other activation": "not every MLP has MegatronXIPReLU: decoder.layers.0.mlp has "
        "MegatronXIELU",
        "untouched spec": "not every MLP has MegatronXIELU: decoder.layers.0.mlp has gelu",
        "slot ignored": "decoder.layers.1.mlp has gelu",
        "experts": "decoder.layers.1.mlp.experts.local_experts.0 has gelu",
        "grouped experts": "decoder.layers.1.mlp.experts has gelu",
        "shared experts": "decoder.layers.1.mlp.shared_experts has gelu",
        "mtp": "mtp.layers.0",
        "other replicas": "decoder.layers.0.mlp is reduced over other data-parallel ranks",
    }
    if importlib.util.find_spec("transformer_engine"):  # it builds on a CPU, and cannot run there
        assert cases.pop("transformer engine") == 2
        assert cases.pop("transformer engine, grouped experts") == 2
        expected["untouched transformer engine spec"] = "decoder.layers.0.mlp has "
        expected["op fuser"] = "the activation of TEFusedMLP cannot be replaced"
    assert cases.keys() == expected.keys()
    for case, message in expected.items():
        assert message in str(cases[case]), (case, cases[case])
