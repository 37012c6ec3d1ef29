"""`convert alphas`: what it takes, and what it refuses since no start would take it."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from small_models import small, write_hf

from megatron_xielu.checkpoints.alphas import read_alphas
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.convert import __main__ as cli
from megatron_xielu.kernels.reference import softplus

KEY = "decoder.layers.{}.mlp.activation_func.alpha_{}"


def of_layers(*layers: dict[str, float]) -> dict[str, torch.Tensor]:
    """Raw alphas of a checkpoint, 0 where ``layers`` does not say; None leaves one out."""
    return {
        KEY.format(layer, side): torch.tensor([raw])
        for layer, given in enumerate(layers)
        for side, raw in ({"p": 0.0, "n": 0.0} | given).items()
        if raw is not None
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], **arguments: object) -> Path:
    """A checkpoint of nothing but alphas."""
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    args = Namespace(**{"xielu": True, "num_layers": 2} | arguments)
    torch.save({"args": args, "iteration": 1}, folder / "common.pt")
    return folder


def test_the_flags_to_start_with_have_beta(tmp_path, capsys):
    model = write(tmp_path / "iter_0000001", of_layers({"p": 1.0}, {}), xielu_beta=0.3)
    out = tmp_path / "of a run.json"
    cli.main(["alphas", str(model), str(out)])
    floor = math.log(2)
    assert json.loads(out.read_text()) == {
        "alpha_p": [softplus(1.0).item(), floor],
        "alpha_n": [floor + 0.3] * 2,
        "beta": 0.3,
    }
    assert capsys.readouterr().out.splitlines() == [
        f"written: {out}",
        f"start with them: --xielu --xielu-beta 0.3 --xielu-alpha-p-init '{out}' "
        f"--xielu-alpha-n-init '{out}'",
    ]


@pytest.mark.parametrize(
    ("layers", "arguments", "message"),
    [
        ([{}, {"p": math.nan}], {}, "layer 1: --xielu-alpha-p-init must be a number, not nan"),
        ([{"n": math.inf}, {}], {}, "layer 0: --xielu-alpha-n-init must be at most 1000, not inf"),
        ([{"p": 1e30}, {}], {}, "layer 0: --xielu-alpha-p-init must be at most 1000, not 1.*e.30"),
        ([{}, {"n": -50.0}], {}, "layer 1: --xielu-alpha-n-init must be above 0.5, not 0.5"),
        ([{}, {}], {"xielu_beta": -1.0}, "--xielu-beta must be .* or more, not -1.0"),
        ([{"n": None}, {}], {}, "it has no alpha_n of layer_00"),
        ([{"p": None}, {"n": None}], {}, "it has no alpha_p of layer_00"),
        ([{"p": None, "n": None}, {}], {}, "it has no alphas of layer_00, and num_layers is 2"),
        ([{}], {}, "it has no alphas of layer_01, and num_layers is 2"),
        ([{}, {}, {}], {}, "it has alphas of layer_02, and num_layers is 2"),
        ([{}, {}], {"num_layers": None}, "its arguments have no num_layers"),
        ([{}, {}], {"xielu": False}, "its activation is gelu, which has no alphas"),
    ],
)
def test_of_no_use_to_a_start(layers, arguments, message, tmp_path):
    model = write(tmp_path / "iter_0000001", of_layers(*layers), **arguments)
    if arguments == {"num_layers": None}:
        torch.save({"args": Namespace(xielu=True)}, model / "common.pt")
    with pytest.raises(SystemExit, match=f"error: {model}: .*{message}") as error:
        cli.main(["alphas", str(model), str(tmp_path / "alphas.json")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "alphas.json").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_of_no_use_in_a_hugging_face_model(value, tmp_path):
    model = write_hf(tmp_path / "hf", small(activation="xiprelu"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.act_fn.alpha_n"].fill_(value)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(SystemExit, match=f"error: {model}: .*layer 1: --xielu-alpha-n-init must "):
        cli.main(["alphas", str(model), str(tmp_path / "alphas.json")])
    assert not (tmp_path / "alphas.json").exists()


def test_experts_have_no_pair_a_layer(tmp_path):
    key = "decoder.layers.mlp.experts.experts.activation_func.alpha_{}"
    tensors = {key.format(side): torch.zeros(2, 4, 1) for side in "pn"}
    model = write(tmp_path / "iter_0000001", tensors)
    with pytest.raises(SystemExit, match="it has not one pair of alphas in each layer"):
        cli.main(["alphas", str(model), str(tmp_path / "alphas.json")])


def test_a_report_has_no_half_pairs(tmp_path):
    """One side of each of two layers: as many of the one as of the other."""
    model = write(tmp_path / "iter_0000001", of_layers({"p": None}, {"n": None}))
    with pytest.raises(Refused, match="it has no alpha_p of layer_00"):
        read_alphas({1: model}, "xielu")
