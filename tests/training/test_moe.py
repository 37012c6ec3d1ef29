"""Experts, shared experts and multi-token prediction: every layout trains as one rank does.

All start from the weights of one checkpoint, which each layout reshards for itself, and train in
fp32. Each routed expert has its own pair of alphas, shared experts one, the prediction layer its
own. Differences come from the order of summation alone.
"""

import pytest
import torch
from event_curves import alpha_curves
from experts import EP2, LAYERS, LAYOUTS, MOE, TP2, alphas_of
from launch import REPOSITORY, TINY_LLAMA, train

KINDS_OF_CURVES = ("alpha_p", "alpha_n", "alpha_p_raw", "alpha_n_raw", "alpha_grad_norm")


def test_every_mlp_trains_its_own_pair(moe_one, moe_start):
    """None has another activation (the audit), a fixed one, or one that is shared."""
    run, alphas, _ = moe_one
    names = [f"{layer}.activation_func.{a}" for layer in LAYERS for a in ("alpha_p", "alpha_n")]
    assert alphas.keys() == set(names)
    assert [tuple(alphas[name].shape) for name in names[::2]] == list(LAYERS.values())
    for alpha in ("alpha_p", "alpha_n"):
        values = torch.cat([alphas[name].flatten() for name in names if name.endswith(alpha)])
        assert len(values.unique()) == 3 + 2 * 4
    assert all(any(grad) for grad in run.dumps[0]["grads"].values())


def test_curves_are_of_all_experts_of_a_layer(moe_one):
    """And none is of a single expert; beside them, one a layer for each other pair."""
    run, alphas, curves = moe_one
    mlps = ("layer_00", "layer_01.shared_experts", "mtp_0.shared_experts")
    statistics = {
        "mean": torch.mean,
        "std": lambda values: values.std(correction=0),
        "min": torch.min,
        "max": torch.max,
    }
    expected = {f"{kind}/{mlp}" for mlp in mlps for kind in KINDS_OF_CURVES}
    layers = {"layer_01": "decoder.layers.1.mlp", "mtp_0": "mtp.layers.0.transformer_layer.mlp"}
    for label, layer in layers.items():
        for side, floor in (("alpha_p", 0.0), ("alpha_n", 0.5)):
            raw = alphas[f"{layer}.experts.experts.activation_func.{side}"].double()
            effective = floor + torch.nn.functional.softplus(raw)
            assert effective.std() > 1e-4
            for statistic, of in statistics.items():
                tag = f"{side}/{label}.experts.{statistic}"
                step, value = curves[tag][-1]
                assert (step, value) == (4, pytest.approx(of(effective).item(), rel=1e-5))
                expected.add(tag)
        tag = f"alpha_grad_norm/{label}.experts"
        gradients = [
            gradient
            for name, gradient in run.dumps[0]["grads"].items()
            if (".mtp." in f".{name}") == ("mtp" in label) and "local_experts" in name
        ]
        assert len(gradients) == 2 * 4
        norm = torch.tensor(gradients).norm().item()
        assert curves[tag][-1] == (4, pytest.approx(norm, rel=1e-5))
        expected.add(tag)
    assert curves.keys() == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_as_one_rank(layout, tmp_path, moe_start, moe_one):
    ranks, flags = LAYOUTS[layout]
    save = "--save checkpoints" if layout in ("tp2-etp2-ep2", "pp2") else ""  # it takes a while
    more = f"{save} --xielu-check-tp-sync 1 --tensorboard-dir events"
    run = train(tmp_path, f"{moe_start} {more} {flags}", ranks=ranks)
    assert run.output.count("megatron_xielu: xIELU in 3 MLPs and 8 experts, ") == 1
    assert_as_on_one_rank(run, moe_one, tmp_path, flags)


def assert_as_on_one_rank(run, one, folder, flags):
    """Losses, gradient norms, each alpha and its gradient, the curves, and what is saved, if it is.

    Args:
        one: of the fixture `moe_one`.
        folder: of the run.
        flags: of its layout.
    """
    expected_run, expected, curves = one
    assert run.losses == pytest.approx(expected_run.losses, rel=2e-6)
    assert run.grad_norms == pytest.approx(expected_run.grad_norms, rel=1e-3)

    wanted, seen = expected_run.dumps[0], set()
    for dump in run.dumps:
        alphas, grads = by_expert(dump["alphas"]), by_expert(dump["grads"])
        for name, alpha in alphas.items():
            same = as_on_one_rank(name, dump["ep_rank"], flags)
            assert alpha == pytest.approx(wanted["alphas"][same], rel=2e-5), name
            if "distributed-optimizer" not in flags:  # with it, a rank holds a shard of these
                grad = pytest.approx(wanted["grads"][same], rel=2e-4, abs=1e-6)
                assert grads[name] == grad, name
            seen.add(same)
    assert seen == wanted["alphas"].keys()
    assert_alike(alpha_curves(folder / "events"), curves)
    if (folder / "checkpoints").exists():
        actual = alphas_of(folder / "checkpoints" / "iter_0000004")
        assert actual.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(actual[key], expected[key], rtol=2e-5, atol=1e-6)


def by_expert(values):
    """What a rank dumped, with a name for each of its experts also where they are grouped."""
    found = {}
    for name, numbers in values.items():
        head, grouped, tail = name.partition(".mlp.experts.activation_func.")
        if grouped:
            found |= {
                f"{head}.mlp.experts.local_experts.{expert}.activation_func.{tail}": [number]
                for expert, number in enumerate(numbers)
            }
        else:
            found[name] = numbers
    return found


def assert_alike(curves, expected):
    """But for rounding, which the spread of alphas that are nearly alike has much of."""
    assert curves.keys() == expected.keys()
    for tag, curve in expected.items():
        tolerance = {"rel": 2e-4, "abs": 1e-6 if "grad" in tag else 2e-5}
        assert curves[tag] == [(step, pytest.approx(value, **tolerance)) for step, value in curve]


def as_on_one_rank(name, ep_rank, flags):
    """The name that a parameter of this rank has where one rank holds everything."""
    if EP2 in flags:
        head, found, tail = name.partition("local_experts.")
        if found:
            return f"{head}{found}{int(tail[0]) + 2 * ep_rank}{tail[1:]}"
    if "pipeline" in flags and name.startswith("0.decoder.layers.0.mlp."):
        is_moe = "experts" in name
        return name.replace("layers.0", "layers.1") if is_moe else name
    return name


def test_unmodified_script_trains_as_our_entry_does(tmp_path, moe_start, moe_one):
    """Megatron makes the spec of the prediction layer itself, and not from the one it was given."""
    spec = "--spec megatron_xielu.layer_specs xielu_layer_spec --use-te-activation-func"
    script = str(REPOSITORY / "tests/helpers/stock_script.py")
    run = train(
        tmp_path,
        f"{moe_start.replace('--xielu', spec)} --save checkpoints",
        command=["-m", "megatron_xielu.cpu", script],
    )
    assert run.losses == moe_one[0].losses
    actual = alphas_of(tmp_path / "checkpoints" / "iter_0000004")
    assert actual.keys() == moe_one[1].keys()
    assert all(torch.equal(actual[key], moe_one[1][key]) for key in actual)


def test_without_the_sum_expert_tensor_parallel_ranks_drift(tmp_path, moe_start):
    """Takes the sum out, so that the tests above can fail."""
    run = train(
        tmp_path,
        f"{moe_start} {TP2} --xielu-check-tp-sync 2",
        ranks=2,
        environment={"BREAK_TP_SUM": "1"},
        succeeds=False,
    )
    assert "--xielu-check-tp-sync: at iteration 2 alphas differ" in run.output
    for mlp in ("experts.local_experts.3", "shared_experts"):
        assert f"decoder.layers.1.mlp.{mlp}.activation_func.alpha_p: [" in run.output
        assert f"mtp.layers.0.mtp_model_layer.mlp.{mlp}.activation_func.alpha_p: [" in run.output


def test_resume_in_bf16_is_the_same_trajectory(tmp_path):
    """Experts have an optimizer of their own, and fp32 alphas in it."""
    flags = f"{MOE.replace('--no-save-optim', '')} {EP2} --bf16 --use-distributed-optimizer"
    whole = train(tmp_path / "whole", f"{flags} --save checkpoints --save-interval 2", ranks=2)
    assert set(whole.dumps[0]["dtypes"].values()) == {"torch.float32"}
    checkpoints = tmp_path / "whole" / "checkpoints"
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = train(tmp_path / "resumed", f"{flags} --load {checkpoints}", ranks=2)
    assert resumed.losses[0] == whole.losses[2]
    # The last gradients depend on every weight, and on the optimizer's state before.
    for expected, actual in zip(whole.dumps, resumed.dumps, strict=True):
        assert actual["alphas"] == expected["alphas"] and actual["grads"] == expected["grads"]


def test_recomputed_output_and_fused_bias(tmp_path):
    """Of experts too, whose output is scaled by the router between the activation and fc2.

    With so many experts that some have no token.
    """
    model = [word for word in TINY_LLAMA if word != "--disable-bias-linear"]
    flags = (
        f"{MOE} {EP2} --num-experts 16 --moe-router-topk 1 --moe-router-pre-softmax "
        "--num-layers 1 --moe-layer-freq 1 --micro-batch-size 1 --train-iters 2"
    ).replace("--moe-shared-expert-intermediate-size 32", "")  # Megatron's have no bias
    plain, recomputed = (
        train(tmp_path / more, f"{flags} {more}", ranks=2, model=model)
        for more in ("", "--xielu-recompute-output")
    )
    assert recomputed.losses == plain.losses and recomputed.grad_norms == plain.grad_norms
    assert sum(dump["empty_inputs"] for dump in plain.dumps) > 0
    for once, twice in zip(plain.dumps, recomputed.dumps, strict=True):
        assert once["fused_biases"] == once["formula_calls"] > 0
        assert twice["formula_calls"] == 2 * once["formula_calls"]
        assert once["alphas"] == twice["alphas"] and once["grads"] == twice["grads"]
