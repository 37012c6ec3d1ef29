"""Routed experts in a report: their mean in each layer, and maps of all, however many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from report_runs import ARGUMENTS, write_checkpoint, write_events
from torch.utils.tensorboard import SummaryWriter

from megatron_xielu.report import depth
from megatron_xielu.report.__main__ import main
from megatron_xielu.report.load import load
from megatron_xielu.report.nonlinearity import Inputs, Shape, nonlinearity

STACKED = "decoder.layers.mlp.experts.experts.activation_func.alpha_"
PREDICTION = "mtp.layers.0.transformer_layer.mlp.experts.experts.activation_func.alpha_"
MAPS = {f"expert-{what}.png" for what in ("alpha-p", "alpha-n", "nonlinearity")}


def raw_alphas(layers: int, experts: int, spread: float = 1.0) -> dict[str, torch.Tensor]:
    """Of a model whose layers all have experts, and of a prediction layer with as many."""
    random = torch.Generator().manual_seed(0)
    return {
        key + side: spread * torch.randn(*shape, experts, 1, generator=random)
        for key, shape in ((STACKED, (layers,)), (PREDICTION, ()))
        for side in "pn"
    }


def effective(raw: torch.Tensor, floor: float = 0.0) -> np.ndarray:
    return (torch.nn.functional.softplus(raw.double()) + floor).squeeze(-1).numpy()


def write_run(folder: Path, tensors: dict[str, torch.Tensor], iterations: int = 400) -> Path:
    layers, experts = tensors[STACKED + "p"].shape[:2]
    sizes = {"num_layers": layers, "num_experts": experts, "moe_router_topk": 1}
    write_checkpoint(folder / "checkpoints", iterations, tensors, **sizes)
    return folder


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (24, 256), (60, 8)])
def test_maps_have_each_expert(tmp_path, layers, experts):
    tensors = raw_alphas(layers, experts)
    folder = write_run(tmp_path / "run", tensors)
    run = load(folder)
    assert run.experts is not None and run.experts.iteration == 400
    assert run.experts.layers == [*(f"layer_{i:02d}" for i in range(layers)), "mtp_0"]
    for found, side, floor in ((run.experts.alpha_p, "p", 0.0), (run.experts.alpha_n, "n", 0.5)):
        assert found.shape == (layers + 1, experts)
        np.testing.assert_allclose(found[:-1], effective(tensors[STACKED + side], floor))
        np.testing.assert_allclose(found[-1], effective(tensors[PREDICTION + side], floor))
    last = Shape("xielu", run.experts.alpha_p[-1, -1], run.experts.alpha_n[-1, -1], 0.5)
    expected = nonlinearity(last.value, Inputs.standard_normal())
    assert run.experts.nonlinearity[-1, -1] == pytest.approx(expected, abs=1e-9)

    # One row a layer, whose function is the mean of its experts'.
    assert run.alpha_names == [f"{layer}.experts" for layer in run.experts.layers]
    x, of = np.linspace(-3, 3, 7), run.experts
    shapes = [Shape("xielu", *pair, 0.5) for pair in zip(of.alpha_p[0], of.alpha_n[0], strict=True)]
    mean = np.mean([shape.value(x) for shape in shapes], axis=0)
    np.testing.assert_allclose(run.layers[0].shape.value(x), mean, atol=1e-12)

    main([str(folder), "--output", str(tmp_path / "out")])
    html = (tmp_path / "out" / "report.html").read_text()
    assert {path.name for path in (tmp_path / "out").glob("expert-*")} == MAPS
    assert f"αp of each expert: {experts} experts in {layers + 1} layers, from " in html
    assert "of a layer&#39;s routed experts their mean" in html


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("spread", [0.0, 40.0], ids=["all-alike", "far-apart"])
def test_maps_of_any_alphas(tmp_path, spread):
    folder = write_run(tmp_path, raw_alphas(3, 4, spread))
    main([str(folder)])
    assert {path.name for path in (tmp_path / "report").glob("expert-*")} == MAPS


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_alphas_that_are_none_are_left_out(tmp_path):
    tensors = raw_alphas(3, 4)
    tensors[STACKED + "p"][0], tensors[STACKED + "n"][1, 2] = torch.nan, torch.inf
    run = load(write_run(tmp_path / "some", tensors))
    assert run.experts is not None and run.experts.layers == ["layer_01", "layer_02", "mtp_0"]
    assert np.argwhere(np.isnan(run.experts.alpha_p)).tolist() == [[0, 2]]
    main([str(write_run(tmp_path / "some", tensors))])
    none = {key: torch.full_like(tensor, torch.nan) for key, tensor in tensors.items()}
    assert load(write_run(tmp_path / "all", none)).experts is None


def write_means(folder: Path, values: dict[str, float], iteration: int) -> None:
    """As the training does, of layer 0."""
    write_events(folder, range(1, 2), layers=0, arguments=ARGUMENTS | {"num_layers": 1})
    writer = SummaryWriter(str(folder), filename_suffix="means")
    for tag, value in values.items():
        writer.add_scalar(tag, value, iteration)
    writer.close()


def test_curves_and_checkpoint_must_agree(tmp_path):
    """Of the means, which event files have."""
    tensors = {k: v for k, v in raw_alphas(1, 4).items() if k.startswith(STACKED)}
    means = {
        f"alpha_{side}/layer_00.experts.{what}": float(
            getattr(effective(tensors[STACKED + side], floor), what)()
        )
        for side, floor in (("p", 0.0), ("n", 0.5))
        for what in ("mean", "std", "min", "max")
    }
    folder = write_run(tmp_path / "same", tensors)
    write_means(folder / "tensorboard", means, 400)
    run = load(folder)
    assert run.notes == [] and run.alpha_names == ["layer_00.experts"] and run.experts is not None
    assert run.alpha_p is not None and run.alpha_p.iterations.tolist() == [0, 400]

    folder = write_run(tmp_path / "other", tensors)
    wrong = means | {"alpha_p/layer_00.experts.mean": 1.01 * means["alpha_p/layer_00.experts.mean"]}
    write_means(folder / "tensorboard", wrong, 400)
    (note,) = load(folder).notes
    assert note.startswith("alpha_p at iteration 400 is another in the event files")

    write_means(tmp_path / "none" / "tensorboard", means, 400)
    run = load(tmp_path / "none")
    assert run.alpha_names == ["layer_00.experts"] and run.experts is None
    assert "no checkpoint has the alphas of each expert: no maps of them" in run.notes
    main([str(tmp_path / "none")])
    assert not list((tmp_path / "none" / "report").glob("expert-*"))


def test_no_trend_with_depth_is_said_of_means(tmp_path):
    tensors = {k: v for k, v in raw_alphas(4, 3).items() if k.startswith(STACKED)}
    runs = [load(write_run(tmp_path / "0", tensors))]
    assert len(runs[0].layers) == 4 and depth.of_runs(runs) == []
