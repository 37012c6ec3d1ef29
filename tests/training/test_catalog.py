"""The catalog says of activations what Megatron does, and every room gives its answer."""

import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from launch import TINY_LLAMA
from megatron.training.arguments import core_transformer_config_from_args, parse_args

from megatron_xielu import arguments, catalog
from megatron_xielu.hf import modeling_xiprelu
from megatron_xielu.plan import flags as plan_flags
from megatron_xielu.plan.model import Model

REPOSITORY = Path(__file__).parents[2]

FUNCTIONS = {
    "swiglu": torch.nn.functional.silu,
    "relu2": lambda x: torch.relu(x) ** 2,
    "quick_geglu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": torch.nn.functional.gelu,
}


@pytest.fixture
def parse(monkeypatch):
    """Megatron's parser with our flags, on a tiny Llama."""

    def parse(*flags: str) -> Namespace:
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *TINY_LLAMA, *flags])
        return parse_args(extra_args_provider=arguments.add_arguments)

    return parse


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_megatrons_activation(name, parse):
    activation = catalog.ACTIVATIONS[name]
    args = parse(*filter(None, [activation.flag]))
    # As its `validate_args` has them without Transformer Engine.
    args.params_dtype, args.kv_channels = torch.float32, 8
    args.apply_rope_fusion = args.bias_gelu_fusion = False
    config = core_transformer_config_from_args(args)
    x = torch.linspace(-3, 3, 25)
    torch.testing.assert_close(config.activation_func(x), FUNCTIONS[name](x))
    assert config.gated_linear_unit == activation.gated


@pytest.mark.parametrize("name", catalog.ACTIVATIONS)
def test_every_room_gives_the_same_name(name, parse):
    flags = [flag for flag in [catalog.ACTIVATIONS[name].flag] if flag]
    args = parse(*flags)
    assert catalog.activation_of(args) == name
    assert Model.of(plan_flags.parse([*TINY_LLAMA, *flags])).activation == name
    assert arguments.activation_name(args) == (name if name in catalog.TRAINABLE else None)


def test_a_spec_names_it(parse):
    args = parse("--spec", "megatron_xielu.layer_specs", "xiprelu_layer_spec")
    assert catalog.activation_of(args) == "xiprelu"
    args.xielu = True
    assert catalog.activations_of(args) == ["xielu", "xiprelu"]


@pytest.mark.parametrize(
    "spec", [None, "", "module", [], ["megatron_xielu.layer_specs"], ["other", "xielu_layer_spec"]]
)
def test_arguments_of_any_origin(spec):
    assert catalog.activation_of(Namespace(spec=spec)) == "gelu"
    assert catalog.activation_of(Namespace(spec=spec, squared_relu=True)) == "relu2"
    assert catalog.activation_of(Namespace()) == "gelu"


def test_copies_that_must_stand_alone_agree():
    """Files that travel without this package: a model's remote code, and a shell script."""
    assert modeling_xiprelu._ALPHA_INIT == catalog.DEFAULT_ALPHA_INIT
    assert modeling_xiprelu._BETA == catalog.DEFAULT_BETA
    script = (REPOSITORY / "examples" / "command.sh").read_text()
    chosen = dict(re.findall(r"^    (\w+)\) activation=\((\S*)\)", script, re.MULTILINE))
    assert set(chosen) == {"relu2", "gelu", "swiglu"}
    for name, flag in chosen.items():
        assert flag == (catalog.ACTIVATIONS[name].flag or "")
