"""--log-activation-inputs: the same in every layout, and as large as the initial weights say."""

import math

import pytest
import torch
from event_curves import curves
from launch import TINY_LLAMA, train

from megatron_xielu.catalog import INPUTS_FLAG
from megatron_xielu.catalog import INPUTS_TAG as TAG
from megatron_xielu.features.activation_inputs import activation_inputs, standard_deviation

FLAGS = f"{INPUTS_FLAG} 4 --tensorboard-dir events"
# Behind an RMSNorm: std × √hidden, of TINY_LLAMA.
EXPECTED = 0.2 * math.sqrt(32)

SAME_WEIGHTS = {
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel --xielu"),
    # Every forward pass runs twice.
    "recomputed": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --xielu",
    ),
}
OTHER_WEIGHTS = {
    "pp2-virtual": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    "dp2": "--use-distributed-optimizer --xielu",
    "swiglu-tp2": "--swiglu --tensor-model-parallel-size 2",
}


def written(folder, flags, *, ranks=1, model=TINY_LLAMA):
    train(folder, f"{FLAGS} {flags}", ranks=ranks, model=model)
    found = {tag: curve for tag, curve in curves(folder / "events").items() if tag.startswith(TAG)}
    assert sorted(found) == [f"{TAG}/layer_{layer:02d}" for layer in range(4)]
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return written(tmp_path_factory.mktemp("plain"), "--xielu")


def test_follow_from_the_initial_weights(plain):
    for curve in plain.values():
        assert [step for step, _ in curve] == [1, 4]
        assert curve[0][1] == pytest.approx(EXPECTED, rel=0.05)
        assert curve[1][1] != curve[0][1]


@pytest.mark.parametrize("layout", SAME_WEIGHTS)
def test_are_the_same_in_every_layout(layout, plain, tmp_path):
    ranks, flags = SAME_WEIGHTS[layout]
    for tag, curve in written(tmp_path, flags, ranks=ranks).items():
        assert curve == [(step, pytest.approx(value, rel=1e-4)) for step, value in plain[tag]]


@pytest.mark.parametrize("layout", OTHER_WEIGHTS)
def test_are_as_large_with_other_weights(layout, tmp_path):
    for curve in written(tmp_path, OTHER_WEIGHTS[layout], ranks=2).values():
        assert curve[0] == (1, pytest.approx(EXPECTED, rel=0.05))


def test_a_bias_that_the_activation_adds_counts(tmp_path):
    """Of which the first step, at this rate, makes 0.3 or −0.3."""
    model = [word for word in TINY_LLAMA if word != "--disable-bias-linear"]
    flags = "--xielu --lr 0.3 --lr-decay-style constant --exit-interval 2 --log-activation-inputs 2"
    fused = written(tmp_path / "fused", flags, model=model)
    apart = written(tmp_path / "apart", f"{flags} --no-bias-gelu-fusion", model=model)
    for tag, curve in fused.items():
        assert curve == [(step, pytest.approx(value, rel=1e-3)) for step, value in apart[tag]]


@pytest.mark.parametrize("gated", [False, True])
def test_inputs_of_an_output(gated):
    output, bias = torch.randn(700, 2, 6000).bfloat16(), torch.randn(6000).bfloat16()
    parts = list(activation_inputs(output, bias, gated=gated))
    assert len(parts) > 1
    columns = 3000 if gated else 6000
    found = torch.cat(parts)
    assert torch.equal(found, (output.float() + bias.float())[..., :columns].reshape(-1, columns))
    exact = found.double()
    std = standard_deviation(found.numel(), exact.sum().item(), exact.square().sum().item())
    assert std == pytest.approx(exact.std(correction=0).item())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tensorboard-dir events --num-experts 2", "does not work with --num-experts"),
        ("", "writes to TensorBoard: give --tensorboard-dir FOLDER"),
        ("--log-activation-inputs -1", "must be 0 or more, not -1"),
    ],
)
def test_refusals(flags, said, tmp_path):
    run = train(tmp_path, f"{INPUTS_FLAG} 4 {flags}", succeeds=False)
    assert f"megatron_xielu: error: {INPUTS_FLAG}" in run.output and said in run.output
