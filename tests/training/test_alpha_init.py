"""Initial alphas of each layer: from the command line or a file, in any layout, and into a file."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
from launch import TINY_LLAMA, Run, load_checkpoint, train

from megatron_xielu import arguments
from megatron_xielu.checkpoints.alphas import initial_alphas
from megatron_xielu.checkpoints.reader import open_source
from megatron_xielu.convert import __main__ as convert
from megatron_xielu.kernels.reference import softplus
from megatron_xielu.plan import checks as plan_checks
from megatron_xielu.plan.flags import PlanError
from megatron_xielu.plan.run import Plan
from megatron_xielu.report.load import load

POSITIVE, NEGATIVE = [0.4, 1.5, 3.0, 174.0], [0.51, 0.8, 1.2, 0.9]
P, N = "--xielu-alpha-p-init", "--xielu-alpha-n-init"
FROZEN = f"--xielu --xielu-frozen-alphas --train-iters 1 --save checkpoints {P} 0.4,1.5,3,174"


def effective(checkpoint: Path, key: str, floor: float) -> list:
    return (softplus(load_checkpoint(checkpoint)[key]) + floor).squeeze(-1).tolist()


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> tuple[Run, Path]:
    """One step on two stages of two virtual ones, in bf16: the run and its folder."""
    folder = tmp_path_factory.mktemp("frozen")
    (folder / "alphas.json").write_text(json.dumps({"alpha_p": [9] * 4, "alpha_n": NEGATIVE}))
    stages = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --bf16"
    return train(folder, f"{FROZEN} {N} alphas.json {stages}", ranks=2), folder


def test_layers_of_all_stages(frozen):
    run, folder = frozen
    assert "αp 0.4 to 174 by layer, αn 0.51 to 1.2 by layer, β 0.5" in run.output
    checkpoint = folder / "checkpoints/iter_0000001"
    for side, values, floor in (("p", POSITIVE, 0), ("n", NEGATIVE, 0.5)):
        key = f"decoder.layers.mlp.activation_func.alpha_{side}"
        assert effective(checkpoint, key, floor) == pytest.approx(values, rel=1e-6)
    # Numbers, whatever becomes of the file.
    saved = open_source(checkpoint).arguments
    assert (saved.xielu_alpha_p_init, saved.xielu_alpha_n_init) == (POSITIVE, NEGATIVE)
    assert initial_alphas(saved, ["layer_01", "layer_03.experts.001", "mtp_0"]) == (
        [1.5, 174, 174],
        [0.8, 0.9, 0.9],
    )


def test_experts_and_prediction_layers(tmp_path):
    experts = "--num-experts 2 --moe-shared-expert-intermediate-size 32 --mtp-num-layers 1"
    train(tmp_path, f"{FROZEN} {experts}")
    tensors = load_checkpoint(tmp_path / "checkpoints/iter_0000001")
    keys = [key for key in tensors if key.endswith("alpha_p") and not key.startswith("optimizer.")]
    for key in keys:
        values = softplus(tensors[key]).flatten().tolist()
        expected = [174.0] if key.startswith("mtp") else POSITIVE
        times = len(values) // len(expected)  # the experts of a layer stand together
        assert values == pytest.approx([one for one in expected for _ in range(times)], rel=1e-6)
    assert len(keys) == 4


@pytest.mark.parametrize("kind", ["megatron", "hugging-face"])
def test_from_a_model_to_another(kind, frozen, tmp_path, capsys):
    model = frozen[1] / "checkpoints"
    if kind == "hugging-face":
        convert.main(["to-hf", str(model), str(tmp_path / "hf")])
        model = tmp_path / "hf"
    file = tmp_path / "alphas.json"
    convert.main(["alphas", str(model), str(file)])
    assert f"written: {file}" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["alpha_p"] == pytest.approx(POSITIVE, rel=1e-6)
    assert found["alpha_n"] == pytest.approx(NEGATIVE, rel=1e-6)
    flags = f"--xielu {P} {file} {N} {file} --train-iters 1 --xielu-frozen-alphas"
    run = train(tmp_path / "run", f"{flags} --save checkpoints")
    assert "αp 0.4 to 174 by layer" in run.output
    for side in "pn":  # to the bit
        key = f"decoder.layers.mlp.activation_func.alpha_{side}"
        one, other = (
            load_checkpoint(folder / "checkpoints/iter_0000001")[key]
            for folder in (frozen[1], tmp_path / "run")
        )
        assert one.tolist() == other.tolist()


def test_no_alphas_to_write(tmp_path):
    for model, message in (
        (tmp_path, "is not a checkpoint"),
        (tmp_path / "none", "is not a folder"),
    ):
        with pytest.raises(SystemExit, match=f"megatron_xielu.convert: error: .*{message}"):
            convert.main(["alphas", str(model), str(tmp_path / "alphas.json")])
    assert not (tmp_path / "alphas.json").exists()


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--xielu --xielu-frozen-alphas", (POSITIVE, NEGATIVE)),  # forgotten
        ("--use-checkpoint-args", (POSITIVE, NEGATIVE)),
        ("--use-checkpoint-args --finetune --no-load-optim", (None, None)),
    ],
)
def test_a_resume_keeps_what_alphas_began_with(flags, kept, frozen, tmp_path):
    start = f"{flags} --load {frozen[1] / 'checkpoints'} --bf16 --save checkpoints"
    train(tmp_path, f"{start} --train-iters 2 --override-opt_param-scheduler")
    saved = open_source(tmp_path / "checkpoints").arguments
    assert (saved.xielu_alpha_p_init, saved.xielu_alpha_n_init) == kept
    (layer, *_) = load(tmp_path).layers
    assert layer.start == ((POSITIVE[0], NEGATIVE[0]) if kept[0] else None)


def test_a_resume_refuses_others(parse):
    def kept(flags: str, **saved: object) -> object:
        args = parse(f"--xielu {flags}")
        arguments.validate(args)
        arguments._keep_initial_alphas(args, Namespace(**saved), "F")
        return args.xielu_alpha_p_init

    assert kept("") == 0.8  # of a script without the flags
    assert kept(f"{P} 0.4,1.5,3,174", xielu_alpha_p_init=POSITIVE) == POSITIVE
    assert kept("", xielu_alpha_p_init=None) is None  # a converted model
    drop = f"^{P}: this run takes its alphas from the checkpoint in F"
    for flags, saved, message in (
        (f"{P} 3", {}, f"{drop}, which began with 0.8; drop {P}$"),
        (f"{P} 3", {"xielu_alpha_p_init": POSITIVE}, f"{drop}, .* 0.4,1.5,3.0,174.0; drop"),
        (f"{P} 3", {"xielu_alpha_p_init": None}, f"{drop}; drop"),
        (f"{P} 3 --finetune", {"xielu_alpha_p_init": 3.0}, f"{drop}; drop"),
    ):
        with pytest.raises(ValueError, match=message):
            kept(flags, **saved)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (f"{P} 1,2,3", f"^{P} 1,2,3 has 3 layers, and --num-layers is 4"),
        (f"{P} three.json", f"^{P} .*three.json has 3 layers, and --num-layers is 4"),
        (f"{N} three.json", f"^{N} .*three.json: alpha_n\\[1\\] is 'x', not a number"),
        (f"{P} one.json", f"^{P} .*one.json: it has no alpha_n"),
        (f"{P} no.json", f"^{P} .*no.json: it is no JSON"),
        (
            f"{P} 0.8x",
            f"^{P} 0.8x: neither a number, nor one for each layer .*, nor a file: .*No s",
        ),
        (f"{P} 1,2,,3", f"^{P} 1,2,,3: neither a number"),
        (f"{P} 1,2,3,1001", f"^{P} must be at most 1000, not .1.0, 2.0, 3.0, 1001.0"),
        (f"{N} 1,2,3,0.5", f"^{N} of (XIELU|--xielu) must be .*above 0.5"),
        (
            f"{P} beta.json",
            f"^{P} beta.json: its alphas are of a model with β 0.3, .* 0.5; give .* 0.3$",
        ),
        (f"{N} beta.json --xielu-beta 0.4", f"^{N} beta.json: .* 0.4; give --xielu-beta 0.3$"),
        (f"{P} beta_0.json", f"^{P} beta_0.json: beta must be above 0, not 0"),
        (f"{P} 1,2,3,4 --xielu-shared-alphas", f"^--xielu-shared-alphas: .* give {P} a number"),
    ],
)
def test_refused(flags, message, parse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("three.json").write_text('{"alpha_p": [1, 2, 3], "alpha_n": [1, "x"]}')
    if flags.startswith(P):
        Path("three.json").write_text('{"alpha_p": [1, 2, 3], "alpha_n": []}')
    Path("one.json").write_text('{"alpha_p": [1]}')
    Path("no.json").write_text("0.8 0.9")
    for name, beta in (("beta", 0.3), ("beta_0", 0)):
        four = {"alpha_p": [1] * 4, "alpha_n": [1] * 4, "beta": beta}
        Path(f"{name}.json").write_text(json.dumps(four))
    with pytest.raises(ValueError, match=message):
        arguments.validate(parse(f"--xielu {flags}"))
    try:
        problems = plan_checks.problems(
            Plan([*TINY_LLAMA, "--xielu", *flags.split()]), environment={}
        )
    except PlanError as error:
        problems = error.problems
    assert any(re.search(message, problem) for problem in problems), problems


@pytest.mark.parametrize("beta", [0.3, 0.30000001192092896])
def test_of_the_same_beta(beta, parse, tmp_path):
    """Of Megatron's; and of Hugging Face's, which is of float32."""
    file = tmp_path / "alphas.json"
    file.write_text(json.dumps({"alpha_p": [1] * 4, "alpha_n": [2] * 4, "beta": beta}))
    args = parse(f"--xielu {P} {file} {N} {file} --xielu-beta 0.3")
    arguments.validate(args)
    assert (args.xielu_alpha_p_init, args.xielu_alpha_n_init) == ([1] * 4, [2] * 4)
