"""Each fault of Megatron's optimizers is found, mended once, and left alone where it is not."""

from contextlib import nullcontext

import megatron_arguments
import pytest
from launch import TINY_LLAMA
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megatron_xielu import checkout
from megatron_xielu.workarounds import (
    distributed_optimizer_checkpoints,
    fp32_parameters,
    shifted_checkpoints,
)

METHODS = [
    (DistributedOptimizer, "_build_optimizer_group_ranges"),
    (DistributedOptimizer, "_set_main_param_and_optimizer_states"),
    (DistributedOptimizer, "get_parameter_state_dp_reshardable"),
    (DistributedOptimizer, "sharded_param_state_fully_reshardable"),
    (Float16OptimizerWithFloat16Params, "sharded_state_dict"),
]


@pytest.fixture
def methods(monkeypatch):
    """Returns them as they are; put back at the end."""
    for owner, name in METHODS:
        monkeypatch.setattr(owner, name, owner.__dict__[name])
    return lambda: [owner.__dict__[name] for owner, name in METHODS]


def test_found_mended_and_then_left_alone(methods):
    faults = (
        distributed_optimizer_checkpoints._saves_shifted,
        distributed_optimizer_checkpoints._fails_at_padding,
        fp32_parameters._misnumbers,
    )
    before = methods()
    assert [fault() for fault in faults] == [True] * 3  # in 0.17.1, 0.18.2 and 0.19.2
    for module in (fp32_parameters, distributed_optimizer_checkpoints, shifted_checkpoints):
        module.install()
    mended = methods()
    assert [fault() for fault in faults] == [False] * 3
    assert not any(one is other for one, other in zip(before, mended, strict=True))
    for module in (fp32_parameters, distributed_optimizer_checkpoints, shifted_checkpoints):
        module.install()
    assert all(one is other for one, other in zip(mended, methods(), strict=True))


@pytest.mark.parametrize(("factor", "refused"), [("3", True), ("8", False)])
def test_a_factor_of_rope_that_does_not_reach_the_model(factor, refused, monkeypatch):
    """In a patched checkout; through ``--spec`` it does, see test_stock_script.py."""
    monkeypatch.setattr(checkout, "_builder", None)
    words = ["--xielu", "--use-rope-scaling", "--rope-scaling-factor", factor]
    expected = pytest.raises(SystemExit, match="--rope-scaling-factor 3: Megatron does not hand")
    with expected if refused else nullcontext():
        checkout.validate(megatron_arguments.parse([*TINY_LLAMA, *words]))
