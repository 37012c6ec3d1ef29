"""``--spec`` from a script that does not know this package.

With ``MEGATRON_LM_DIR`` set to a Megatron-LM checkout, its own ``pretrain_gpt.py`` is tested too.
"""

import os
from pathlib import Path

import pytest
from event_curves import alpha_curves
from launch import REPOSITORY, load_checkpoint, train

from megatron_xielu import catalog

SCRIPTS = [str(REPOSITORY / "tests/helpers/stock_script.py")]
if "MEGATRON_LM_DIR" in os.environ:
    SCRIPTS.append(str(Path(os.environ["MEGATRON_LM_DIR"], "pretrain_gpt.py")))

SPEC = "--spec megatron_xielu.layer_specs {}_layer_spec"
# With a base of 20,000 a factor of 3 shows in the losses.
TP2 = (
    "--tensor-model-parallel-size 2 --sequence-parallel --use-rope-scaling --rope-scaling-factor 3 "
    "--rotary-base 20000"
)


WRITE = "--save checkpoints --tensorboard-dir events"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: Path(script).name)
@pytest.mark.parametrize("activation", ["xielu", "xiprelu"])
def test_trains_as_our_entry_does(script, activation, tmp_path):
    ours = train(tmp_path / "ours", f"--{activation} {TP2} {WRITE}", ranks=2)
    stock = train(
        tmp_path / "stock",
        f"{SPEC.format(activation)} --use-te-activation-func {TP2} {WRITE}",
        ranks=2,
        command=["-m", "megatron_xielu.cpu", script],
    )
    assert stock.losses == ours.losses
    name = catalog.ACTIVATIONS[activation].label
    settings = "αp 0.8, αn 0.8, β 0.5; alphas fp32, summed over TP=2"
    for run in (ours, stock):
        assert run.output.count(f"megatron_xielu: {name} in 4 MLPs, {settings}\n") == 1
    curves = alpha_curves(tmp_path / "stock" / "events")
    assert len(curves) == 5 * 4 and curves == alpha_curves(tmp_path / "ours" / "events")
    saved = load_checkpoint(tmp_path / "stock" / "checkpoints" / "iter_0000006")
    for name, value in ours.dumps[0]["alphas"].items():
        layer, alpha = int(name.split(".")[3]), name.rsplit(".", 1)[1]
        key = f"decoder.layers.mlp.activation_func.{alpha}"
        assert saved[key][layer].double().tolist() == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "add --use-te-activation-func"),
        (
            "--use-te-activation-func --num-experts 2 --moe-router-topk 2 --moe-use-upcycling "
            "--save x",
            "--moe-use-upcycling does not work with xIELU",
        ),
        (
            "--use-te-activation-func --optimizer soap --use-distributed-optimizer --save x",
            "--optimizer soap cannot be resumed with --ckpt-format torch_dist",
        ),
    ],
)
def test_refused(flags, message, tmp_path):
    run = train(
        tmp_path,
        f"{SPEC.format('xielu')} {flags}",
        succeeds=False,
        command=["-m", "megatron_xielu.cpu", SCRIPTS[0]],
    )
    assert message in run.output
