"""--xielu-alpha-lr-mult and --xielu-alpha-weight-decay: what Megatron's optimizers step with, what
checkpoints keep of it, and what a resume asks for. More resumes: test_optimizer_checkpoints.py.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from launch import Run, load_checkpoint, train

from megatron_xielu import arguments

MULT, DECAY = "--xielu-alpha-lr-mult", "--xielu-alpha-weight-decay"
GROUP = f"{MULT} 3 {DECAY} 0.2"
LR = 0.01  # of TINY_LLAMA


def is_of_alphas(group: dict) -> bool:
    return "start_wd" in group  # which Megatron gives none of its own


def assert_rates(run: Run, alphas: int) -> None:
    """At every step of every rank: of as many alphas in all, and of the model."""
    for step in zip(*(dump["groups"] for dump in run.dumps), strict=True):
        groups = [group for of_rank in step for group in of_rank]
        (lr,) = {
            group["lr"] for group in groups if group["default_config"]
        }  # the one that is logged
        own = [group for group in groups if is_of_alphas(group)]
        assert sum(group["numel"] for group in own) == alphas
        for group in own:
            assert group["lr"] == pytest.approx(3 * lr, rel=1e-12)
            assert group["weight_decay"] == 0.2 and not group["default_config"]
            assert group["max_lr"] == 3 * LR


def test_rates_of_every_step(tmp_path):
    """Warm-up, then a cosine, while the model's weight decay increases."""
    run = train(
        tmp_path,
        f"--xielu {GROUP} --min-lr 1e-3 --lr-warmup-iters 2 --start-weight-decay 0 "
        "--end-weight-decay 0.1 --weight-decay-incr-style linear",
    )
    assert_rates(run, alphas=8)
    expected = [0, 0.5 * LR, LR]
    expected += [1e-3 + (LR - 1e-3) * (1 + math.cos(math.pi * n / 4)) / 2 for n in (1, 2, 3, 4)]
    (steps,) = (dump["groups"] for dump in run.dumps)
    logged = re.findall(r"learning rate: (\S+) \|", run.output)
    for step, groups in enumerate(steps):
        model, alphas = groups[0], next(filter(is_of_alphas, groups))
        assert model["lr"] == pytest.approx(expected[step]) == pytest.approx(alphas["lr"] / 3)
        assert model["weight_decay"] == pytest.approx(0.1 * step / 6)
        assert float(logged[step]) == pytest.approx(expected[step + 1], rel=1e-6)  # the next one


def test_first_step(start_checkpoint, tmp_path):
    """Adam's is lr · M in the direction of the gradient, and lr · M · W of the alpha towards 0; no
    other parameter moves otherwise."""
    train(tmp_path, f"--xielu {GROUP} --save checkpoints --save-interval 1 --exit-interval 1")
    ours, plain = (
        load_checkpoint(folder / "iter_0000001")
        for folder in (tmp_path / "checkpoints", start_checkpoint)
    )
    for key in (key for key in plain if not key.startswith("optimizer.")):
        if "alpha_" not in key:
            assert torch.equal(ours[key], plain[key]), key
            continue
        start = torch.full((4, 1), 0.2033823 if key.endswith("alpha_p") else -1.0502256)
        step = (plain[key] - start).sign() * LR
        torch.testing.assert_close(plain[key], start + step)
        torch.testing.assert_close(ours[key], start * (1 - 3 * LR * 0.2) + 3 * step)


@pytest.mark.parametrize(
    ("flags", "ranks", "alphas"),
    [
        ("--apply-wd-to-norms --decoupled-lr 0.02 --decoupled-min-lr 1e-3 --weight-decay 0", 1, 8),
        ("--bf16 --optimizer muon --use-distributed-optimizer", 2, 8),
        ("--optimizer sgd --xielu-shared-alphas", 1, 2),
        # On each rank: an expert of 4 layers, and the shared one and the prediction layer's.
        (
            "--num-experts 2 --expert-model-parallel-size 2 --mtp-num-layers 1 "
            "--moe-shared-expert-intermediate-size 32 --use-distributed-optimizer",
            2,
            2 * 5 * 2 + 2 * 5,
        ),
    ],
    ids=["decoupled", "muon", "sgd-shared", "experts"],
)
def test_with(flags, ranks, alphas, tmp_path):
    run = train(tmp_path, f"--xiprelu {GROUP} {flags} --train-iters 2", ranks=ranks)
    assert_rates(run, alphas)
    groups = [group for dump in run.dumps for group in dump["groups"][0]]
    own = [group for group in groups if is_of_alphas(group)]
    assert sum(g["numel"] for g in own if g["is_expert_parallel"]) == 20 * ("experts" in flags)
    if "muon" in flags:
        assert {group["optimizer"] for group in own} == {"adam"}
    if "--weight-decay 0" in flags:
        assert {g["weight_decay"] for g in groups if not is_of_alphas(g)} == {0}
        assert {g["max_lr"] for g in groups} == {LR, 0.02, 3 * LR}


TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
# In which no alpha is on the second stage.
STAGES = "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Etttt|L"
SAVED = (
    f"--xielu {GROUP} --bf16 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
    "--ddp-bucket-size 3000 --lr-decay-iters 6 --save checkpoints --save-interval 3"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Run, Path]:
    """Six iterations at TP 2, saved at 3 and 6: the run and its checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    return train(folder, f"{SAVED} {TP2}", ranks=2), folder / "checkpoints"


def differing(iteration: int, *folders: Path) -> list[str]:
    one, other = (load_checkpoint(folder / f"iter_{iteration:07}") for folder in folders)
    assert one.keys() == other.keys() and any("exp_avg_sq" in key for key in one)
    return [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.parametrize("layout", [TP2, STAGES], ids=["tp2", "stage-without-alphas"])
def test_resume(layout, saved, tmp_path):
    run, checkpoints = saved
    resumed = train(tmp_path, f"{SAVED} {layout} --load {checkpoints} --ckpt-step 3", ranks=2)
    assert_rates(resumed, alphas=8 * 2 if layout == TP2 else 8)
    if layout == TP2:  # to the bit
        assert resumed.losses[0] == run.losses[3] and resumed.losses[2] == run.losses[5]
        assert differing(6, checkpoints, tmp_path / "checkpoints") == []
    assert resumed.losses[::2] == pytest.approx(run.losses[3::2], rel=3e-3)


@pytest.mark.parametrize("layout", ["", STAGES], ids=["dp2", "stage-without-alphas"])
def test_reshard(layout, saved, tmp_path):
    """Loaded and saved again, the state is the same, bit for bit."""
    _, checkpoints = saved
    load = f"--load {checkpoints} --ckpt-step 3 --train-iters 3"
    load += " --save-interval 1000 --use-checkpoint-opt_param-scheduler"
    train(tmp_path, f"{SAVED} {layout} {load}", ranks=2)
    assert differing(3, checkpoints, tmp_path / "checkpoints") == []


def test_a_resume_has_the_same(saved, start_checkpoint, parse):
    """Megatron finds the groups of an optimizer by these numbers, and ends with a KeyError."""
    load = f"--use-distributed-optimizer --bf16 {TP2} --load {saved[1]}"
    with pytest.raises(ValueError, match=f"was trained with {MULT} 3, not 1, .*; give it, or add "):
        arguments.check_checkpoint(parse(f"--xielu {load}"))
    with pytest.raises(ValueError, match=f"was trained with {DECAY} 0.2, not 0, "):
        arguments.check_checkpoint(parse(f"--xielu {MULT} 3 {load}"))
    with pytest.raises(ValueError, match=f"was trained with {MULT} 1, not 10, "):
        arguments.check_checkpoint(parse(f"--xielu {MULT} 10 --load {start_checkpoint}"))
    stock = parse(f"--xielu {load}")
    del stock.xielu_alpha_lr_mult  # a script that does not know the flag
    with pytest.raises(ValueError, match=r"; train with python -m megatron_xielu\.pretrain_gpt, "):
        arguments.check_checkpoint(stock)
    for another in (f"{MULT} 10 {load} --no-load-optim", f"{MULT} 10 {load} --finetune"):
        arguments.check_checkpoint(parse(f"--xielu {another}"))
    arguments.check_checkpoint(parse(f"--xielu {GROUP} {load}"))

    restored = parse(load)
    arguments.restore_from_checkpoint(restored)  # --use-checkpoint-args
    assert (restored.xielu_alpha_lr_mult, restored.xielu_alpha_weight_decay) == (3, 0.2)
    for other, message in (
        (f"{MULT} 1", f"{MULT} 3, not 1"),
        (f"{DECAY} 0", f"{DECAY} 0.2, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments.restore_from_checkpoint(parse(f"{load} {other} --xielu"))
    kept = parse(f"{load} {MULT} 1 {DECAY} 0 --finetune")
    arguments.restore_from_checkpoint(kept)
    assert (kept.xielu_alpha_lr_mult, kept.xielu_alpha_weight_decay) == (1, 0)
    plain = parse(f"--load {start_checkpoint}")
    arguments.restore_from_checkpoint(plain)
    arguments.validate(plain)
    assert (plain.xielu_alpha_lr_mult, plain.xielu_alpha_weight_decay) == (1, 0)
