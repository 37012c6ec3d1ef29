"""Grouped experts (``--moe-grouped-gemm``) train as experts with MLPs of their own do.

Megatron's `TEGroupedMLP` itself, with linear layers for a CPU. All start from the weights of one
checkpoint of the others, in fp32, and each layout is compared with one rank of the others.
"""

from pathlib import Path

import pytest
import torch
from experts import EP2, ETP1, LAYERS, LAYOUTS, MOE, TP2, alphas_of
from launch import REPOSITORY, TINY_LLAMA, load_checkpoint, train
from test_moe import assert_as_on_one_rank

GROUPED = "--moe-grouped-gemm"
MOE_ACT = "--recompute-granularity selective --recompute-modules moe_act"
GROUPED_LAYOUTS = {
    **LAYOUTS,
    "one": (1, ""),
    "dp2": (2, "--use-distributed-optimizer"),
    "tp2-etp2": (2, f"{TP2} {MOE_ACT}"),
    "pp2": (2, f"--pipeline-model-parallel-size 2 {MOE_ACT}"),
}


@pytest.mark.parametrize("layout", GROUPED_LAYOUTS)
def test_trains_as_experts_of_their_own(layout, tmp_path, moe_start, moe_one):
    ranks, flags = GROUPED_LAYOUTS[layout]
    save = "--save checkpoints" if layout in ("tp2-etp2-ep2", "ep2-overlap") else ""
    flags += " --tensorboard-dir events --xielu-check-tp-sync 1"
    run = train(tmp_path, f"{moe_start} {GROUPED} {save} {flags}", ranks=ranks)
    assert run.output.count("megatron_xielu: xIELU in 3 MLPs and 8 grouped experts, ") == 1
    assert_as_on_one_rank(run, moe_one, tmp_path, flags)
    if save:
        actual = alphas_of(tmp_path / "checkpoints" / "iter_0000004")
        assert [
            tuple(actual[f"{layer}.activation_func.alpha_p"].shape) for layer in LAYERS
        ] == list(LAYERS.values())


def test_alphas_are_not_decayed_and_stay_fp32(tmp_path):
    run = train(tmp_path, f"{MOE} {GROUPED} {EP2} --bf16 --train-iters 1", ranks=2)
    for dump in run.dumps:
        alphas = {name: times for name, times in dump["decay"].items() if "alpha_" in name}
        assert any(".mlp.experts.activation_func." in name for name in alphas)
        assert set(alphas.values()) == {0.0}
        assert set(dump["dtypes"].values()) == {"torch.float32"}


def test_without_the_sum_expert_tensor_parallel_ranks_drift(tmp_path, moe_start):
    """Takes the sum out, so that the tests above can fail."""
    run = train(
        tmp_path,
        f"{moe_start} {GROUPED} {TP2} --xielu-check-tp-sync 2",
        ranks=2,
        environment={"BREAK_TP_SUM": "1"},
        succeeds=False,
    )
    assert "--xielu-check-tp-sync: at iteration 2 alphas differ" in run.output
    assert "decoder.layers.1.mlp.experts.activation_func.alpha_p[3]: [" in run.output


@pytest.mark.parametrize(
    "more",
    [
        "--moe-expert-capacity-factor 0.5",  # tokens are dropped
        "--moe-expert-capacity-factor 1.5 --moe-pad-expert-input-to-capacity",
        "--num-experts 16 --moe-router-topk 1 --moe-router-pre-softmax",  # some have no token
        "--moe-router-topk 1 --moe-router-pre-softmax --moe-apply-probs-on-input",
    ],
)
def test_dropped_padded_and_absent_tokens(more, tmp_path):
    flags = f"{MOE} {EP2} --moe-router-load-balancing-type aux_loss {more}"
    train(
        tmp_path / "start",
        f"{flags} --save checkpoints --exit-interval 1 --save-interval 1",
        ranks=2,
    )
    flags += f" --no-load-optim --load {tmp_path / 'start' / 'checkpoints'}"
    own, grouped = (
        train(tmp_path / str(len(group)), f"{flags} {group} --save checkpoints", ranks=2)
        for group in ("", GROUPED)
    )
    assert grouped.losses == pytest.approx(own.losses, rel=2e-6)
    assert grouped.grad_norms == pytest.approx(own.grad_norms, rel=1e-3)
    a, b = (alphas_of(tmp_path / str(n) / "checkpoints/iter_0000004") for n in (0, len(GROUPED)))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=2e-5, atol=1e-6)


def test_xiprelu(tmp_path):
    flags = MOE.replace("--xielu", "--xiprelu")
    train(tmp_path / "start", f"{flags} --save checkpoints --exit-interval 1 --save-interval 1")
    flags += f" --no-load-optim --load {tmp_path / 'start' / 'checkpoints'}"
    own = train(tmp_path / "own", flags)
    grouped = train(tmp_path / "grouped", f"{flags} {GROUPED} {EP2}", ranks=2)
    assert grouped.losses == pytest.approx(own.losses, rel=2e-6)


@pytest.mark.parametrize("more", [MOE_ACT, "--xielu-recompute-output"])
def test_recomputed_outputs_change_nothing(more, tmp_path):
    """With micro-batches in flight, so that fc1 tells of other rows before the backward pass."""
    flags = (
        f"{MOE} {GROUPED} --pipeline-model-parallel-size 2 --train-iters 2 "
        "--micro-batch-size 1 --moe-router-topk 1 --moe-router-pre-softmax"
    )
    plain = train(tmp_path / "plain", flags, ranks=2)
    recomputed = train(tmp_path / "recomputed", f"{flags} {more}", ranks=2)
    assert recomputed.losses == plain.losses and recomputed.grad_norms == plain.grad_norms
    for once, twice in zip(plain.dumps, recomputed.dumps, strict=True):
        assert once["alphas"] == twice["alphas"] and once["grads"] == twice["grads"]
    # The last stage's experts, of the last layer and of the prediction.
    calls = [run.dumps[1]["formula_calls"] for run in (plain, recomputed)]
    assert calls[1] >= calls[0] + 2 * (2 * 8)


@pytest.mark.parametrize(
    "optimizer", ["", "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"]
)
def test_checkpoints_are_those_of_experts_of_their_own(optimizer, tmp_path):
    """Bit for bit in both directions, the optimizer's state with them, and on to another layout."""
    flags = f"{MOE.replace('--no-save-optim', '')} --train-iters 2 --bf16 {optimizer}"

    def saved(name, more, load=None, ranks=2):
        folder = tmp_path / name / "checkpoints"
        source = f"--load {tmp_path / load / 'checkpoints'}" if load else ""
        train(tmp_path / name, f"{flags} {more} --save {folder} {source}", ranks=ranks)
        return load_checkpoint(folder / "iter_0000002")

    grouped = saved("grouped", f"{GROUPED} {EP2}")
    # Loaded at its last iteration, a run saves what it has loaded.
    own = saved("own", EP2, load="grouped")
    back = saved("back", f"{GROUPED} {EP2}", load="own")
    layouts = [own, back]
    if optimizer:  # Megatron has another number of optimizers without EP, and refuses their state
        layouts.append(saved("again", f"{EP2} {TP2} {ETP1}", load="back"))
    for other in layouts:
        assert other.keys() == grouped.keys()
        assert sum("activation_func" in key and "exp_avg" in key for key in other) >= 4
        for key, value in grouped.items():
            assert other[key].dtype == value.dtype and torch.equal(other[key], value), key


@pytest.mark.parametrize(("then", "now", "fix"), [("", GROUPED, "drop"), (GROUPED, "", "add")])
def test_other_experts_are_refused_in_the_format_torch(then, now, fix, tmp_path):
    """Where Megatron would leave the experts as they were initialised, and train on."""
    flags = f"{MOE} --train-iters 1 --ckpt-format torch"
    train(tmp_path / "then", f"{flags} {then} --save checkpoints")
    flags += f" --no-load-optim --load {tmp_path / 'then' / 'checkpoints'}"
    run = train(tmp_path / "now", f"{flags} {now}", succeeds=False)
    assert f"other experts cannot be loaded; {fix} --moe-grouped-gemm, or start from" in run.output
    train(tmp_path / "again", f"{flags} {then}")


@pytest.mark.parametrize("optimizer", ["", "--dist-ckpt-optim-fully-reshardable"])
def test_resume_in_bf16_is_the_same_trajectory(optimizer, tmp_path):
    flags = (
        f"{MOE.replace('--no-save-optim', '')} {GROUPED} {EP2} --bf16 --use-distributed-optimizer "
        f"{optimizer}"
    )
    whole = train(tmp_path / "whole", f"{flags} --save checkpoints --save-interval 2", ranks=2)
    checkpoints = tmp_path / "whole" / "checkpoints"
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = train(tmp_path / "resumed", f"{flags} --load {checkpoints}", ranks=2)
    assert resumed.losses[0] == whole.losses[2]
    for expected, actual in zip(whole.dumps, resumed.dumps, strict=True):
        assert actual["alphas"] == expected["alphas"] and actual["grads"] == expected["grads"]


def test_gates_at_another_size_of_tensor_parallelism(tmp_path):
    """Of SwiGLU, whose grouped experts CPU mode builds, too: each rank has a slice of both halves.
    What one size saves the other goes on from."""
    flags = MOE.replace("--xielu", "--swiglu --no-bias-swiglu-fusion --no-load-optim")
    own, grouped = tmp_path / "own", tmp_path / "grouped"
    save = "--save checkpoints --save-interval 1 --exit-interval"
    train(own, f"{flags} {save} 1")
    whole = train(own, f"{flags} --load checkpoints")
    load = f"--load {own / 'checkpoints'}"
    first = train(grouped, f"{flags} {GROUPED} {TP2} {load} {save} 2", ranks=2)
    assert first.losses[0] == pytest.approx(whole.losses[0], rel=2e-6)
    second = train(own, f"{flags} --load checkpoints {save} 2")
    assert second.losses == pytest.approx(first.losses, rel=2e-6)
    third = train(own, f"{flags} --load checkpoints")
    other = train(tmp_path / "other", f"{flags} --load {grouped / 'checkpoints'}")
    assert other.losses == pytest.approx(third.losses, rel=2e-5)


def test_biases_of_fc1(tmp_path):
    """Which the grouped GEMM adds itself."""
    model = [word for word in TINY_LLAMA if word != "--disable-bias-linear"]
    # Megatron's own experts cannot add the bias of fc2 to what one rank has alone.
    flags = MOE.replace("--moe-shared-expert-intermediate-size 32", EP2) + " --train-iters 3"
    first = f"{flags} --save checkpoints --exit-interval 1 --save-interval 1"
    train(tmp_path / "start", first, ranks=2, model=model)
    flags += f" --no-load-optim --load {tmp_path / 'start' / 'checkpoints'}"
    own = train(tmp_path / "own", flags, ranks=2, model=model)
    grouped = train(tmp_path / "grouped", f"{flags} {GROUPED}", ranks=2, model=model)
    assert grouped.losses == pytest.approx(own.losses, rel=2e-6)


def test_unmodified_script_trains_as_our_entry_does(tmp_path, moe_start):
    spec = "--spec megatron_xielu.layer_specs xielu_layer_spec --use-te-activation-func"
    script = str(REPOSITORY / "tests/helpers/stock_script.py")
    ours = train(tmp_path / "ours", f"{moe_start} {GROUPED} --save checkpoints")
    run = train(
        tmp_path / "script",
        f"{moe_start.replace('--xielu', spec)} {GROUPED} --save checkpoints",
        command=["-m", "megatron_xielu.cpu", script],
    )
    assert run.losses == ours.losses
    a, b = (alphas_of(tmp_path / n / "checkpoints/iter_0000004") for n in ("ours", "script"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_padding_of_fp8_reaches_no_gradient(tmp_path):
    """The padding of a stand-in, full of NaN; and what `connect` and a forward pass refuse."""
    train(tmp_path, "", model=(), command=[str(Path(__file__).with_name("grouped_cases.py"))])
