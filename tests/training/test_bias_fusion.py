"""The bias of fc1 inside the activation: the same training as with Megatron's addition."""

import pytest
import torch
from launch import TINY_LLAMA, load_checkpoint, train

WITH_BIAS = [word for word in TINY_LLAMA if word != "--disable-bias-linear"]
FLAGS = "--tensor-model-parallel-size 2 --sequence-parallel --save checkpoints"


@pytest.mark.parametrize("activation", ["--xielu --xielu-recompute-output", "--xiprelu"])
def test_trains_as_with_the_bias_added_before(tmp_path, activation):
    flags = f"{activation} {FLAGS}"
    fused = train(tmp_path / "fused", flags, ranks=2, model=WITH_BIAS)
    plain = train(tmp_path / "plain", f"{flags} --no-bias-gelu-fusion", ranks=2, model=WITH_BIAS)
    assert fused.losses == pytest.approx(plain.losses, rel=1e-5)
    assert fused.grad_norms == pytest.approx(plain.grad_norms, rel=1e-3)
    assert fused.dumps[0]["alphas"] == fused.dumps[1]["alphas"]
    for name, value in plain.dumps[0]["alphas"].items():
        assert fused.dumps[0]["alphas"][name] == pytest.approx(value, rel=2e-5)
    calls = 4 * 6 * 4  # layers, iterations, micro-batches
    again = 2 if "recompute" in activation else 1
    assert fused.dumps[0]["fused_biases"] == again * calls
    assert plain.dumps[0]["fused_biases"] == 0
    # Biases start at 0; each of fc1's has been trained, by the kernel's gradient.
    ours, theirs = (
        load_checkpoint(tmp_path / run / "checkpoints" / "iter_0000006")
        for run in ("fused", "plain")
    )
    bias = "decoder.layers.mlp.linear_fc1.bias"
    assert ours[bias].abs().min() > 0
    torch.testing.assert_close(ours[bias], theirs[bias], rtol=1e-3, atol=1e-5)
