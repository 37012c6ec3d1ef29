"""Nonlinearity by depth over seeds: what is said of numbers whose answer is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import report_runs
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

from megatron_xielu.report import depth
from megatron_xielu.report.__main__ import main
from megatron_xielu.report.depth import CANNOT_SAY, FALLS, RISES, Adaptation
from megatron_xielu.report.nonlinearity import Inputs, Shape, nonlinearity, trained

LAYERS = 5


def seeds(*slopes: float, noise: float = 0.0) -> Adaptation:
    """A training for each: all layers alike at the start, αp by depth at the end."""
    place = np.linspace(-0.5, 0.5, LAYERS)
    rng = np.random.default_rng(0)
    p = [
        [[0.8] * LAYERS, 0.8 + slope * place + noise * rng.standard_normal(LAYERS)]
        for slope in slopes
    ]
    n = [np.full((2, LAYERS), 0.8)] * len(slopes)
    found = depth.of_seeds("xIELU", "xielu", 0.5, [[0, 100]] * len(slopes), p, n)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["xielu", "xiprelu"])
def test_many_activations_at_once_are_each_of_them(name):
    p, n = np.array([[1e-6, 0.8], [3.0, 166.0]]), np.array([[0.6, 0.8], [2.0, 40.0]])
    normal = Inputs.standard_normal()
    found = trained(name, p, n, 0.5)
    for place in np.ndindex(p.shape):
        shape = Shape(name, p[place], n[place], 0.5)
        assert found[place] == pytest.approx(nonlinearity(shape.value, normal), abs=1e-9)


def test_intervals_are_students():
    for degrees in (*range(1, 40), 1000):
        assert depth.student(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-3)
    values = np.random.default_rng(0).standard_normal((3, 4000))
    mean, half = depth.over_seeds(values)
    assert (abs(mean) < half).mean() == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(
    ("slopes", "verdict"),
    [
        ((-0.3, -0.25, -0.35), FALLS),
        ((0.3, 0.25, 0.35), RISES),
        ((-0.3, 0.25, -0.35), CANNOT_SAY),
        ((-0.3, -0.05, -0.6), CANNOT_SAY),  # of one sign, but three are few
        ((-0.3,), CANNOT_SAY),
    ],
)
def test_verdicts(slopes, verdict):
    found = seeds(*slopes)
    assert found.verdict == verdict and verdict in found.sentence
    assert (found.trends[:, 0] == 0).all()
    assert np.sign(found.trends[:, 1]).tolist() == np.sign(slopes).tolist()
    assert ("one seed" in found.sentence) == (len(slopes) == 1)
    assert "-0.0000" not in found.sentence


@pytest.mark.parametrize("layers", [[0.8] * 3, [0.8, 0.7, 0.6]], ids=["flag", "file"])
def test_alphas_that_did_not_train_have_no_trend(layers):
    """Frozen: the start as the flag or file has it, later as float32 has it."""
    history = [layers, np.float32(layers), np.float32(layers)]
    assert depth.of_seeds("x", "xielu", 0.5, [[0, 1, 2]] * 2, [history] * 2, [history] * 2) is None


def test_one_pair_for_all_layers_has_no_trend():
    shared = [[0.8] * 3, [0.9] * 3]
    assert depth.of_seeds("x", "xielu", 0.5, [[0, 1]], [shared], [shared]) is None


def test_trend_and_changes_are_those_of_the_layers():
    found = seeds(-0.3, -0.4, noise=0.05)
    at_end = found.nonlinearity[0, 1]
    slope = np.polyfit(np.linspace(0, 1, LAYERS), at_end, 1)[0]
    assert found.trends[0, 1] == pytest.approx(slope, abs=1e-8)
    layer, start, end, change, interval = found.rows()[-1]
    changes = found.nonlinearity[:, 1, -1] - found.nonlinearity[:, 0, -1]
    low, high = stats.t.interval(0.95, 1, changes.mean(), stats.sem(changes))
    assert (layer, start, change) == ("4", "0.3834", f"{changes.mean():+.4f}")
    assert [float(x) for x in interval.split(" to ")] == pytest.approx([low, high], abs=1e-3)
    assert float(end) == pytest.approx(float(start) + float(change), abs=2e-4)


def test_without_a_depth():
    one = np.full((2, 1), 0.8)
    assert depth.of_seeds("x", "xielu", 0.5, [[0, 1]], [one], [one]) is None
    two = np.full((1, 2), 0.8)
    assert depth.of_seeds("x", "xielu", 0.5, [[1], [2]], [two, two], [two, two]) is None


def write_seed(folder: Path, seed: int, end: float = 2.0, **more: bool) -> str:
    """Four layers whose αp falls, the more the deeper."""
    values = report_runs.ARGUMENTS | {"seed": seed, "train_iters": 6, **more}
    report_runs.write_events(folder, range(1, 1), arguments=values)
    writer = SummaryWriter(str(folder), filename_suffix="later")
    for step in range(1, 7):
        writer.add_scalar("lm loss", end if step > 3 else 3.0, step)
        for layer in range(4):
            p = 0.8 - step * layer * (0.02 + 0.001 * seed)
            writer.add_scalar(f"alpha_p/layer_{layer:02d}", p, step)
            writer.add_scalar(f"alpha_n/layer_{layer:02d}", 0.8, step)
    writer.close()
    return str(folder)


def test_page_and_terminal_say_it(tmp_path, capsys):
    """Of the seeds that ended well."""
    folders = [write_seed(tmp_path / str(seed), seed) for seed in range(3)]
    folders.append(write_seed(tmp_path / "bad", 3, end=math.nan))
    main([*folders, "--output", str(tmp_path / "out")])
    line = f"xIELU, 3 seeds: nonlinearity {FALLS}: deeper layers are more linear. Trend from "
    assert line in capsys.readouterr().out
    html = (tmp_path / "out" / "report.html").read_text()
    assert line in html and "depth-1.png" in html and "depth-1-over-time.png" in html
    assert html.count("<td>0.3834</td>") == 5  # each layer's start, and the first one's end


def test_nothing_is_said_of_frozen_alphas(tmp_path, capsys):
    """By their flag, since a single checkpoint of them does not show it."""
    run = write_seed(tmp_path / "run", 0, xielu_frozen_alphas=True)
    main([run, "--output", str(tmp_path / "out")])
    assert "Trend" not in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("depth-*"))
