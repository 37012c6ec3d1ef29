"""Every parallel layout trains as one rank does: same weights, same data, same alphas.

All start from one checkpoint, which each layout reshards for itself, and train five iterations of
four micro-batches in fp32. Differences come from the order of summation alone.
"""

import pytest
import torch
from launch import load_checkpoint, train

TP2 = "--tensor-model-parallel-size 2"
TP4 = "--tensor-model-parallel-size 4"
SP = "--sequence-parallel"
# Reduces gradients and gathers parameters in pieces, while it computes.
OVERLAP = (
    "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
    "--overlap-grad-reduce --overlap-param-gather"
)
LAYOUTS = {
    "tp2": (2, TP2),
    "tp2-sp": (2, f"{TP2} {SP}"),
    # As pretrain.sh trains: attention is causal by itself.
    "tp2-no-mask": (2, f"{TP2} --no-create-attention-mask-in-dataloader"),
    "tp4": (4, TP4),
    "tp4-sp": (4, f"{TP4} {SP}"),
    "dp2-overlap": (2, f"{OVERLAP} --ddp-average-in-collective"),
    "tp2-dp2-overlap": (4, f"{TP2} {SP} {OVERLAP}"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2-virtual": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "cp2": (2, "--context-parallel-size 2"),
    "tp2-recompute-full": (
        2,
        f"{TP2} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "tp2-recompute-mlp": (
        2,
        f"{TP2} {SP} --recompute-granularity selective --recompute-modules mlp",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_as_one_rank(layout, tmp_path, request, one_rank):
    ranks, flags = LAYOUTS[layout]
    expected_run, expected = one_rank
    start_checkpoint = request.getfixturevalue(
        "start_checkpoint_distributed" if OVERLAP in flags else "start_checkpoint"
    )
    run = train(
        tmp_path,
        f"--xielu --load {start_checkpoint} --save checkpoints --xielu-check-tp-sync 1 {flags}",
        ranks=ranks,
    )

    # Of all pipeline stages.
    initial = "αp 0.8, αn 0.8 (or as loaded from a checkpoint)"
    assert run.output.count(f"megatron_xielu: xIELU in 4 MLPs, {initial}, β 0.5; ") == 1
    assert run.losses == pytest.approx(expected_run.losses, rel=2e-6)
    assert run.grad_norms == pytest.approx(expected_run.grad_norms, rel=1e-3)
    actual = load_checkpoint(tmp_path / "checkpoints" / "iter_0000006")
    alphas = [key for key in expected if key.endswith(("alpha_p", "alpha_n"))]
    assert {"decoder.layers.mlp.activation_func.alpha_p"} < set(alphas)
    for key in alphas:
        assert actual[key].dtype == torch.float32
        torch.testing.assert_close(actual[key], expected[key], rtol=2e-5, atol=1e-6)

    # The cost of complete gradients: one collective per MLP and micro-batch, none without TP.
    micro_batches = 5 * 4 // (2 if "dp2" in layout else 1)
    expected_calls = 4 * micro_batches if "tensor" in flags else 0
    assert run.dumps[0]["alpha_collectives"] == expected_calls

    if "pipeline" in flags:  # each rank has other layers
        return
    # The last step's gradients, as each rank holds them. With the distributed optimizer a rank
    # holds only its shard of them, and the alphas above speak for it.
    for dump in run.dumps if OVERLAP not in flags else ():
        for name, grad in dump["grads"].items():
            wanted = expected_run.dumps[0]["grads"][name]
            assert grad == pytest.approx(wanted, rel=2e-4, abs=1e-6), name
    # On every rank, all layers, bit for bit.
    for dump in run.dumps[1:]:
        assert dump["alphas"] == run.dumps[0]["alphas"]


def test_without_the_sum_ranks_drift_and_the_check_says_so(tmp_path, start_checkpoint, one_rank):
    """Takes the sum out: what others ship. So the tests above can fail."""
    flags = f"--xielu --load {start_checkpoint} {TP2}"
    broken = {"BREAK_TP_SUM": "1"}
    drifted = train(tmp_path / "drift", flags, ranks=2, environment=broken)
    first, second = (dump["alphas"] for dump in drifted.dumps)
    assert all(first[name] != second[name] for name in first)

    stopped = train(
        tmp_path / "check",
        f"{flags} --xielu-check-tp-sync 2",
        ranks=2,
        environment=broken,
        succeeds=False,
    )
    assert "--xielu-check-tp-sync: at iteration 2 alphas differ" in stopped.output
    assert "decoder.layers.0.mlp.activation_func.alpha_p: [" in stopped.output


def test_xiprelu_tp2_trains_as_one_rank(tmp_path):
    one = train(tmp_path / "one", "--xiprelu")
    two = train(tmp_path / "two", f"--xiprelu {TP2} {SP} --xielu-check-tp-sync 1", ranks=2)
    assert two.losses == pytest.approx(one.losses, rel=2e-6)
    assert two.dumps[0]["alphas"] == two.dumps[1]["alphas"]
    for name, value in one.dumps[0]["alphas"].items():
        assert two.dumps[0]["alphas"][name] == pytest.approx(value, rel=2e-5)
