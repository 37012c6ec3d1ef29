"""Checkpoints: exact resume, resharding, alphas in full precision, and what must be refused."""

import shutil
import signal
import time

import pytest
import torch
from launch import TINY_LLAMA, load_checkpoint, start, train, wait

# Megatron's mixed-precision set-up with the fp32 alphas in it.
BF16_TP2 = (
    "--xielu --bf16 --use-distributed-optimizer --tensor-model-parallel-size 2 "
    "--sequence-parallel --save checkpoints --load checkpoints --save-interval 2"
)


def assert_same_model(one, other):
    """Weights and alphas after the last iteration are the same, bit for bit.

    They are so only if the optimizer's state was, too. Its own tensors are not compared: in
    Megatron's default format they are whole buffers, with uninitialised memory between parameters.
    """
    one, other = (load_checkpoint(folder / "iter_0000006") for folder in (one, other))
    model = {key for key in one if not key.startswith("optimizer.")}
    assert {"decoder.layers.mlp.activation_func.alpha_n", "output_layer.weight"} < model
    assert [key for key in model if not torch.equal(one[key], other[key])] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Six iterations in bf16 at TP=2, saved at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = train(folder, BF16_TP2, ranks=2)
    return run, folder / "checkpoints"


def test_alphas_are_fp32_and_keyed_as_megatron_does(uninterrupted):
    run, checkpoints = uninterrupted
    tensors = load_checkpoint(checkpoints / "iter_0000006")
    for alpha in ("alpha_p", "alpha_n"):
        saved = tensors[f"decoder.layers.mlp.activation_func.{alpha}"]
        assert saved.shape == (4, 1) and saved.dtype == torch.float32
        assert not torch.equal(saved, saved.bfloat16().float())  # it did train in fp32
        in_memory = [
            run.dumps[0]["alphas"][f"0.decoder.layers.{layer}.mlp.activation_func.{alpha}"]
            for layer in range(4)
        ]
        assert saved.double().tolist() == in_memory
    assert tensors["decoder.layers.mlp.linear_fc1.weight"].dtype == torch.bfloat16
    assert set(run.dumps[0]["dtypes"].values()) == {"torch.float32"}


def test_resume_is_the_same_trajectory(uninterrupted, tmp_path):
    run, checkpoints = uninterrupted
    shutil.copytree(checkpoints / "iter_0000002", tmp_path / "checkpoints" / "iter_0000002")
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = train(tmp_path, BF16_TP2, ranks=2)
    assert len(resumed.losses) == 4 and resumed.losses[0] == run.losses[2]
    assert_same_model(tmp_path / "checkpoints", checkpoints)


def test_resume_from_the_reshardable_format(uninterrupted, tmp_path):
    flags = f"{BF16_TP2} --dist-ckpt-optim-fully-reshardable"
    train(tmp_path, f"{flags} --exit-interval 2", ranks=2)
    train(tmp_path, flags, ranks=2)
    assert_same_model(tmp_path / "checkpoints", uninterrupted[1])


def test_resume_in_fp16(tmp_path):
    flags = BF16_TP2.replace("--bf16", "--fp16 --initial-loss-scale 1024")
    whole = train(tmp_path / "whole", flags, ranks=2)
    assert set(whole.dumps[0]["dtypes"].values()) == {"torch.float32"}
    for more in ("--exit-interval 2", ""):
        train(tmp_path / "parts", f"{flags} {more}", ranks=2)
    assert_same_model(tmp_path / "parts" / "checkpoints", tmp_path / "whole" / "checkpoints")


def test_killed_rank_then_resume(uninterrupted, tmp_path):
    log = tmp_path / "log.txt"
    processes = start([*TINY_LLAMA, *BF16_TP2.split()], ranks=2, log=log)
    tracker = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    while not tracker.exists():
        assert all(p.poll() is None for p in processes), log.read_text()[-3000:]
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    returncodes = wait(processes)
    assert returncodes[1] == -signal.SIGKILL and returncodes[0] != 0
    assert not (tmp_path / "checkpoints" / "iter_0000006").exists()

    resumed = train(tmp_path, BF16_TP2, ranks=2)
    assert 1 <= len(resumed.losses) < 6  # it did not start over
    assert_same_model(tmp_path / "checkpoints", uninterrupted[1])


def test_reshard_on_the_way(tmp_path, start_checkpoint, one_rank):
    """TP=2, then PP=2, then one rank: where one rank gets in a single run."""
    expected_run, expected = one_rank
    load = start_checkpoint
    for begin, stop, ranks, layout in (
        (1, 3, 2, "--tensor-model-parallel-size 2"),
        (3, 5, 2, "--pipeline-model-parallel-size 2"),
        (5, 6, 1, ""),
    ):
        save = tmp_path / f"until_{stop}"
        run = train(
            tmp_path / f"run_{stop}",
            f"--xielu --load {load} --save {save} --exit-interval {stop} {layout}",
            ranks=ranks,
        )
        assert run.losses[0] == pytest.approx(expected_run.losses[begin - 1], rel=2e-6)
        load = save
    actual = load_checkpoint(load / "iter_0000006")
    for key in (k for k in expected if "activation_func" in k):
        torch.testing.assert_close(actual[key], expected[key], rtol=2e-5, atol=1e-6)


def test_use_checkpoint_args_restores_the_activation(tmp_path):
    settings = "--xiprelu --xielu-alpha-p-init 0.3 --xielu-alpha-n-init 0.1 --xielu-beta 0.25"
    train(tmp_path, f"{settings} --save checkpoints --save-interval 1 --exit-interval 2")
    train(tmp_path, "--load checkpoints --use-checkpoint-args")  # the activation is not named
    run = train(tmp_path, f"{settings} --load checkpoints")
    restored = train(tmp_path, "--load checkpoints --use-checkpoint-args")
    assert restored.losses == run.losses and restored.dumps[0]["alphas"] == run.dumps[0]["alphas"]
