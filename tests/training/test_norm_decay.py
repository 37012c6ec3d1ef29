"""--apply-wd-to-norms: what Megatron's real optimizers decay then, and what a resume asks for."""

import shutil
import sys

import pytest
import torch
from launch import TINY_LLAMA, load_checkpoint, train

from megatron_xielu import arguments
from megatron_xielu.features import norm_decay

DECAYED = norm_decay.FLAG
SPLIT = "--bf16 --use-distributed-optimizer --tensor-model-parallel-size 2 --sequence-parallel"
SAVED = f"--xielu {DECAYED} {SPLIT} --save checkpoints --load checkpoints --save-interval 2"


def is_gain(key: str) -> bool:
    return key.endswith(("layernorm.weight", "layer_norm_weight"))  # the latter in checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Six iterations at TP 2, saved at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("saved")
    return train(folder, SAVED, ranks=2), folder / "checkpoints"


@pytest.mark.parametrize(
    ("flags", "undecayed"),
    [
        # The weights of all; biases, where there are any, stay without weight decay.
        ("--swiglu", set()),
        ("--xielu --optimizer muon --bf16 --qk-layernorm", {"alpha_p", "alpha_n"}),
        ("--xiprelu --normalization LayerNorm --add-qkv-bias", {"alpha_p", "alpha_n", "bias"}),
    ],
)
def test_groups(flags, undecayed, tmp_path):
    run = train(tmp_path, f"{flags} {DECAYED} --train-iters 2")
    decay = run.dumps[0]["decay"]
    assert {name.rpartition(".")[2] for name, times in decay.items() if not times} == undecayed
    assert all(times == 1 for name, times in decay.items() if is_gain(name))
    layers = 4 * (4 if "--qk-layernorm" in flags else 2)
    assert sum(map(is_gain, decay)) == layers + 1


def test_names_of_transformer_engine():
    """By Megatron's own keys, since its layers are not here to be trained."""
    from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides

    parameter = torch.nn.Parameter(torch.ones(4))
    ((key, override),) = norm_decay.decaying_norms(
        get_standard_config_overrides(OptimizerConfig())
    ).items()
    assert override == {"wd_mult": 0.0}
    layer = "module.decoder.layers.0"
    for gain in ("mlp.linear_fc1.layer_norm_weight", "self_attention.q_layernorm.weight"):
        assert not key.matches(parameter, f"{layer}.{gain}")
    for other in ("mlp.linear_fc1.layer_norm_bias", "mlp.activation_func.alpha_p", "mlp.fc1.bias"):
        assert key.matches(parameter, f"{layer}.{other}")


def test_groups_at_tp2(saved):
    for dump in saved[0].dumps:
        undecayed = {name for name, times in dump["decay"].items() if not times}
        assert undecayed == {name.removeprefix("0.") for name in dump["alphas"]}
        assert len(undecayed) == 8


def test_a_step_differs_by_the_decay_of_the_gains_alone(start_checkpoint, tmp_path):
    """lr × weight decay × a gain of 1 = 0.01 × 0.1; without the flag Megatron decays none."""
    train(tmp_path, f"--xielu {DECAYED} --save checkpoints --save-interval 1 --exit-interval 1")
    ours, plain = (
        load_checkpoint(folder / "iter_0000001")
        for folder in (tmp_path / "checkpoints", start_checkpoint)
    )
    for key in (key for key in plain if not key.startswith("optimizer.")):
        if is_gain(key):
            torch.testing.assert_close(ours[key], plain[key] - 0.01 * 0.1)
        else:
            assert torch.equal(ours[key], plain[key]), key


def test_resume_is_the_same_to_the_bit(saved, tmp_path):
    run, checkpoints = saved
    shutil.copytree(checkpoints / "iter_0000002", tmp_path / "checkpoints" / "iter_0000002")
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = train(tmp_path, SAVED, ranks=2)
    assert len(resumed.losses) == 4 and resumed.losses[0] == run.losses[2]
    one, other = (
        load_checkpoint(f / "iter_0000006") for f in (checkpoints, tmp_path / "checkpoints")
    )
    model = [key for key in one if not key.startswith("optimizer.")]
    assert [key for key in model if not torch.equal(one[key], other[key])] == []


def test_a_resume_has_the_same_choice(saved, start_checkpoint, monkeypatch):
    def parse(flags: str):
        from megatron.training.arguments import parse_args

        monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *TINY_LLAMA, *flags.split()])
        return parse_args(extra_args_provider=arguments.add_arguments)

    _, checkpoints = saved
    left_out = parse(f"--xielu {SPLIT} --load {checkpoints}")
    message = f"was trained with {DECAYED}.*; add it, or add --no-load-optim"
    with pytest.raises(ValueError, match=message):
        arguments.check_checkpoint(left_out)
    arguments.restore_from_checkpoint(left_out)  # --use-checkpoint-args
    arguments.check_checkpoint(left_out)
    added = f"--xielu {DECAYED} --load {start_checkpoint}"
    with pytest.raises(ValueError, match=f"was trained without {DECAYED}.*; drop it, or add"):
        arguments.check_checkpoint(parse(added))
    arguments.check_checkpoint(parse(f"{added} --no-load-optim"))
