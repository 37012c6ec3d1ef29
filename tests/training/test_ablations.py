"""--xielu-frozen-alphas and --xielu-shared-alphas, through real trainings and their checkpoints."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from launch import TINY_LLAMA, Run, load_checkpoint, train
from safetensors.torch import load_file

from megatron_xielu import arguments, checkout
from megatron_xielu.convert import __main__ as cli
from megatron_xielu.plan import checks as plan_checks
from megatron_xielu.plan.run import Plan
from megatron_xielu.report.events import read_events

LAYERS = 4  # of TINY_LLAMA
ALPHAS = ("alpha_p", "alpha_n")
KEY = "decoder.layers.mlp.activation_func.{}"
INITIAL = {"alpha_p": 0.2033823, "alpha_n": -1.0502256}  # raw, of 0.8 in both

RESHARDABLE = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
FROZEN = f"--xielu --xielu-frozen-alphas --bf16 {RESHARDABLE}"
SHARED = "--xielu --xielu-shared-alphas"
SAVE = "--save checkpoints --save-interval 3 --load checkpoints"


def saved(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint of the run in ``folder``."""
    return load_checkpoint(folder / "checkpoints" / f"iter_{iteration:07d}")


def of_alphas(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of alphas, and of their optimizer state."""
    return {key: tensor for key, tensor in tensors.items() if "alpha_" in key}


def copy_start(run: Path, folder: Path) -> None:
    """Give ``folder`` the checkpoint of iteration 3 of another run, to go on from."""
    name = "checkpoints/iter_0000003"
    shutil.copytree(run / name, folder / name)
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")


# Frozen alphas


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> tuple[Run, Path]:
    """Six iterations in bf16 at TP=2, saved at 3 and 6: the run and its folder."""
    folder = tmp_path_factory.mktemp("frozen")
    run = train(
        folder,
        f"{FROZEN} {SAVE} --tensor-model-parallel-size 2 --sequence-parallel "
        "--xielu-check-tp-sync 1 --xielu-recompute-output --tensorboard-dir events",
        ranks=2,
    )
    return run, folder


def assert_initial(tensors: dict[str, torch.Tensor]) -> None:
    """Alphas are saved as ever, with their initial values and without optimizer state."""
    found = of_alphas(tensors)
    assert set(found) == {KEY.format(alpha) for alpha in ALPHAS}
    for alpha in ALPHAS:
        tensor = found[KEY.format(alpha)]
        assert tensor.dtype == torch.float32 and tensor.shape == (LAYERS, 1)
        assert tensor.flatten().tolist() == pytest.approx([INITIAL[alpha]] * LAYERS, rel=1e-6)
        assert tensor.unique().numel() == 1


def test_frozen_alphas_keep_their_values(frozen):
    run, folder = frozen
    assert run.losses[-1] < run.losses[0]
    assert_initial(saved(folder, 6))
    # No gradient, and no collective for it.
    assert run.dumps[0]["grads"] == {} and run.dumps[0]["alpha_collectives"] == 0
    curves = read_events(folder / "events")
    steps = range(1, 7)
    for layer in range(LAYERS):
        for alpha, value in INITIAL.items():
            values = dict(curves[f"{alpha}_raw/layer_{layer:02d}"])
            assert values == {step: pytest.approx(value, rel=1e-6) for step in steps}
        assert dict(curves[f"alpha_grad_norm/layer_{layer:02d}"]) == dict.fromkeys(steps, 0)


def test_frozen_at_tp2_goes_on_at_pp2(frozen, tmp_path):
    whole, folder = frozen
    copy_start(folder, tmp_path)
    layout = "--pipeline-model-parallel-size 2 --overlap-grad-reduce"
    run = train(tmp_path, f"{FROZEN} --load checkpoints {layout}", ranks=2)
    for step in (0, -1):  # the one between is a mean of two
        assert run.losses[step] == pytest.approx(whole.losses[step or 3], rel=3e-3)
    assert [len(dump["alphas"]) for dump in run.dumps] == [LAYERS, LAYERS]  # two layers, two alphas
    for dump in run.dumps:
        for name, value in dump["alphas"].items():
            assert value == pytest.approx([INITIAL[name.rpartition(".")[2]]], rel=1e-6)


def test_frozen_then_trained(frozen, tmp_path):
    """The optimizer starts anew: it has no state of the alphas."""
    whole, folder = frozen
    copy_start(folder, tmp_path)
    flags = FROZEN.replace("--xielu-frozen-alphas", "--no-load-optim")
    run = train(tmp_path, f"{flags} --load checkpoints")
    assert len(run.losses) == 3
    assert run.losses[0] == pytest.approx(whole.losses[3], rel=3e-3)
    trained = run.dumps[0]["alphas"]
    assert len(trained) == 2 * LAYERS
    for name, value in trained.items():
        assert value != pytest.approx([INITIAL[name.rpartition(".")[2]]], rel=1e-4)


# One pair for all layers


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[Run, Path]:
    """Six iterations of one rank in fp32, saved at 3 and 6: the run and its folder."""
    folder = tmp_path_factory.mktemp("shared")
    return train(folder, f"{SHARED} {SAVE} --tensorboard-dir events"), folder


def test_shared_alphas_are_one_pair(shared):
    run, folder = shared
    (dump,) = run.dumps
    assert {name: len(value) for name, value in dump["alphas"].items()} == {
        f"0.decoder.layers.0.mlp.activation_func.{alpha}": 1 for alpha in ALPHAS
    }
    tensors = saved(folder, 6)
    for alpha in ALPHAS:
        (value,) = dump["alphas"][f"0.decoder.layers.0.mlp.activation_func.{alpha}"]
        assert value != pytest.approx(INITIAL[alpha], rel=1e-3)
        assert tensors[KEY.format(alpha)].double().tolist() == [[value]] * LAYERS
        assert tensors[f"optimizer.state.exp_avg.shared_activation.{alpha}"].shape == (1,)
    # Once in the count, which the plan agrees with.
    (counted,) = re.findall(r"parallel rank \(0, 0, 0\): (\d+)", run.output)
    flags = [*TINY_LLAMA, *SHARED.split()]
    assert Plan(flags).parameters_on(0) == Plan(flags).model.parameters() == int(counted)


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ("", 1),
        # With recomputation the gradient of the pair comes in parts, one from each layer.
        (
            f"--bf16 {RESHARDABLE} --overlap-grad-reduce --overlap-param-gather "
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            2,
        ),
    ],
    ids=["fp32", "bf16-distributed-dp2"],
)
def test_shared_alphas_resume_exactly(flags, ranks, shared, tmp_path):
    whole, folder = shared
    if flags:
        folder = tmp_path / "whole"
        expected, whole = whole, train(folder, f"{SHARED} {SAVE} {flags}", ranks=ranks)
        assert whole.losses == pytest.approx(expected.losses, rel=3e-3)
    copy_start(folder, tmp_path / "resumed")
    resumed = train(tmp_path / "resumed", f"{SHARED} {SAVE} {flags}", ranks=ranks)
    assert resumed.losses[0] == whole.losses[3] and len(resumed.losses) == 3
    one, other = (saved(run, 6) for run in (folder, tmp_path / "resumed"))
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    for alpha in ALPHAS:
        assert one[KEY.format(alpha)].unique().numel() == 1
        assert f"optimizer.state.exp_avg_sq.shared_activation.{alpha}" in one


def test_shared_alphas_at_tp2_are_those_of_one_rank(shared, tmp_path):
    one, _ = shared
    flags = "--tensor-model-parallel-size 2 --sequence-parallel --xielu-check-tp-sync 1"
    two = train(tmp_path, f"{SHARED} {flags} --xielu-recompute-output", ranks=2)
    assert two.losses == pytest.approx(one.losses, rel=2e-6)
    first, second = (dump["alphas"] for dump in two.dumps)
    assert first == second and set(first) == set(one.dumps[0]["alphas"])
    for name, value in one.dumps[0]["alphas"].items():
        assert first[name] == pytest.approx(value, rel=2e-5)
        for dump in two.dumps:
            assert dump["grads"][name] == pytest.approx(one.dumps[0]["grads"][name], rel=2e-4)


def test_gradient_of_the_pair_is_the_sum_over_layers(shared, tmp_path):
    own = train(tmp_path, "--xielu --train-iters 1 --clip-grad 1e9 --tensorboard-dir events")
    (own_norm,) = dict(read_events(tmp_path / "events")["grad-norm"]).values()
    gradients = own.dumps[0]["grads"]
    assert len(gradients) == 2 * LAYERS
    sums = [sum(g for name, (g,) in gradients.items() if name.endswith(a)) for a in ALPHAS]
    pair = sum(g**2 for g in sums) ** 0.5
    # Each layer's curve is that of the pair, as clipped to a norm of 1.
    curves = read_events(shared[1] / "events")
    norm = dict(curves["grad-norm"])[1]
    for layer in range(LAYERS):
        logged = dict(curves[f"alpha_grad_norm/layer_{layer:02d}"])[1]
        assert logged * norm == pytest.approx(pair, rel=1e-5)
    # The norm of all gradients has the pair once.
    expected = own_norm**2 - sum(g**2 for (g,) in gradients.values()) + pair**2
    assert norm**2 == pytest.approx(expected, rel=1e-6)
    assert norm**2 != pytest.approx(own_norm**2, rel=1e-5)


def test_shared_alphas_to_hugging_face(shared, tmp_path):
    run, folder = shared
    cli.main(["to-hf", str(folder / "checkpoints"), str(tmp_path / "hf")])
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for alpha in ALPHAS:
        value = run.dumps[0]["alphas"][f"0.decoder.layers.0.mlp.activation_func.{alpha}"]
        for layer in range(LAYERS):
            assert tensors[f"model.layers.{layer}.mlp.act_fn.{alpha}"].tolist() == value


# Flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--squared-relu --xielu-frozen-alphas", "--xielu-frozen-alphas needs --xielu or"),
        ("--squared-relu --xielu-shared-alphas", "--xielu-shared-alphas needs --xielu or"),
        ("--swiglu --xielu-alpha-lr-mult 3", "--xielu-alpha-lr-mult needs --xielu or --xiprelu"),
        (
            "--xielu --xielu-frozen-alphas --xielu-alpha-lr-mult 3",
            "--xielu-alpha-lr-mult 3 with --xielu-frozen-alphas: .* or give .* 1$",
        ),
        (
            "--xielu --xielu-frozen-alphas --xielu-alpha-weight-decay 0.1",
            "--xielu-alpha-weight-decay 0.1 with --xielu-frozen-alphas: .* or give .* 0$",
        ),
        (
            "--xielu --xielu-alpha-lr-mult 3 --use-mup --optimizer sgd",
            "--xielu-alpha-lr-mult does not go with --use-mup and --optimizer sgd",
        ),
        (
            "--xielu --xielu-shared-alphas --pipeline-model-parallel-size 2",
            "--xielu-shared-alphas does not work with --pipeline-model-parallel-size above 1",
        ),
        ("--xielu --xielu-shared-alphas --num-experts 2", "does not work with --num-experts"),
        ("--xielu --xielu-shared-alphas --mtp-num-layers 1", "with --mtp-num-layers"),
    ],
)
def test_refused(parse, flags, message):
    with pytest.raises(ValueError, match=message):
        arguments.validate(parse(flags))
    if any(flag in flags for flag in ("--num-experts", "--mtp", "mup")):  # the plan knows none
        return
    problems = plan_checks.problems(Plan([*TINY_LLAMA, *flags.split()]), environment={})
    assert any(re.search(message, problem) for problem in problems), problems


@pytest.mark.parametrize(
    "flag",
    ["--xielu-shared-alphas", "--xielu-alpha-lr-mult 3", "--xielu-alpha-weight-decay 0.1"],
)
def test_a_patched_checkout_has_not(flag, parse):
    message = rf"{flag.split()[0]} .*needs? python -m megatron_xielu\."
    with pytest.raises(SystemExit, match=message):
        checkout.validate(parse(f"--xielu {flag}"))


@pytest.mark.parametrize(
    ("flag", "other"),
    [
        ("--xielu-frozen-alphas", "--xielu-shared-alphas"),
        ("--xielu-shared-alphas", "--xielu-frozen-alphas"),
    ],
)
def test_other_alphas_in_the_checkpoint(flag, other, parse, frozen, shared):
    _, folder = frozen if flag == "--xielu-frozen-alphas" else shared
    checkpoints = folder / "checkpoints"
    load = f"--load {checkpoints}"
    if flag == "--xielu-frozen-alphas":  # trained with it
        load += " --use-distributed-optimizer"
    arguments.check_checkpoint(parse(f"--xielu {flag} {load}"))

    left_out = parse(f"--xielu {load}")
    with pytest.raises(ValueError, match=f"was trained with {flag}.*; add it, or add --no-load"):
        arguments.check_checkpoint(left_out)
    pretrained = f"--pretrained-checkpoint {checkpoints}"
    for anew in (f"{load} --no-load-optim", f"{load} --finetune", pretrained):
        arguments.check_checkpoint(parse(f"--xielu {anew}"))
    arguments.restore_from_checkpoint(left_out)  # --use-checkpoint-args
    arguments.check_checkpoint(left_out)
    assert getattr(left_out, flag[2:].replace("-", "_"))

    added = f"--xielu {flag} {other} {load}"
    if other == "--xielu-shared-alphas":
        message = f"has a pair of alphas for each layer; drop {other}"
        with pytest.raises(ValueError, match=message):
            arguments.check_checkpoint(parse(f"{added} --no-load-optim"))
    else:
        message = f"was trained without {other}.*; drop it, or add --no-load-optim"
        arguments.check_checkpoint(parse(f"{added} --no-load-optim"))
    for check in (arguments.check_checkpoint, arguments.restore_from_checkpoint):
        with pytest.raises(ValueError, match=message):
            check(parse(added))
