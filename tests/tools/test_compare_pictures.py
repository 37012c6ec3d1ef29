"""The pictures of a comparison with few and many variants, of short and long labels: all text is
inside and nothing lies over it, and no axis makes a movement of rounding."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import paired, plots, records, results, scaling_fit, sweep, variants
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from test_compare import make_record

from megatron_xielu.checkpoints.alphas import Alphas
from megatron_xielu.report import depth_plots, layer_plots
from megatron_xielu.report.drawing import Drawing, wrapped

WIDEST, HIGHEST = 2200, 5200  # pixels
LONG = "xIELU, learning rate of alphas × 10, αp from 0.25, αn from 1.75"
OTHERS = {"caption": "12 collected runs, 8 or 16 or 32 or 64 GPUs a run, 2026-11-28 " * 2}
UNIT = {"unit": "token"}


@dataclasses.dataclass
class Drawn:
    """The last picture, and every text in it with its place in pixels."""

    drawing: Any = None
    places: dict[Text, Bbox] = dataclasses.field(default_factory=dict)

    @property
    def texts(self) -> list[tuple[str, Bbox]]:
        return [(text.get_text(), box) for text, box in self.places.items()]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Drawn]:
    found, draw, png = Drawn(), Text.draw, Drawing.png

    def with_extent(text: Text, renderer: Any, *args: Any, **options: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            found.places[text] = text.get_window_extent(renderer)
        draw(text, renderer, *args, **options)

    def kept(drawing: Drawing) -> bytes:
        found.drawing = drawing
        found.places.clear()
        return png(drawing)

    monkeypatch.setattr(Text, "draw", with_extent)
    monkeypatch.setattr(Drawing, "png", kept)
    yield found


def many(count: int, label: str) -> list[variants.Variant]:
    return [
        dataclasses.replace(variants.parse(f"xielu-lr-{number}"), label=f"{label} {number}")
        for number in range(1, count + 1)
    ]


def moving(of: list[variants.Variant], alphas: Any = None) -> records.Records:
    """Three seeds each; ``alphas`` of all, or alphas that move a little otherwise in each."""
    return {
        variant.name: {
            seed: dataclasses.replace(
                make_record(variant.name, seed, 3 + number / 100 + seed * (number % 4) / 1000),
                alphas=alphas or wandering(number, seed),
            )
            for seed in (1, 2, 3)
        }
        for number, variant in enumerate(of)
    }


def wandering(number: int, seed: int) -> Alphas:
    path = [
        [0.8 + step / 2000 * (number + 1) * (layer - seed / 5) for layer in range(4)]
        for step in range(25)
    ]
    return Alphas(list(range(0, 250, 10)), path, path)


def rounded(layers: int = 4) -> Alphas:
    """Frozen ones: the start is the flag's 0.8, the rest as float32 has it."""
    rows = [[0.8] * layers, *([[float(np.float32(0.8))] * layers] * 3)]
    return Alphas([0, 10, 20, 30], rows, rows)


def draw(picture: str, of: list[variants.Variant], path: Path) -> None:
    found = moving(of)
    losses = {
        name: {seed: one.valid_loss for seed, one in of_seed.items()}
        for name, of_seed in found.items()
    }
    if picture == "loss":
        plots.plot_losses(found, of, path, **OTHERS, **UNIT)
    elif picture == "differences":
        plots.plot_differences(paired.compare(losses, of[0].name), of, path, **OTHERS, **UNIT)
    elif picture == "alphas":
        plots.plot_alphas(found, of, path, **OTHERS)
    elif picture == "depth":
        plots.plot_depth(results.adaptations(found, of), path, **OTHERS)
    elif picture == "sweep":
        rates = {variant.name: {1e-3: 3.0, 2e-3: 2.9, 4e-3: 3.1} for variant in of}
        plots.plot_sweep(sweep.Sweep(rates, ""), of, path, **OTHERS, **UNIT)
    else:
        flops = [1e14, 1e15, 1e16]
        by_size = {name: [of_seed] * 3 for name, of_seed in losses.items()}
        lines = {
            name: scaling_fit.fit(flops, [list(one.values()) for one in sizes])
            for name, sizes in by_size.items()
        }
        gaps = {
            name: gap.line for name, gap in scaling_fit.gaps(flops, by_size, of[0].name).items()
        }
        sizes = {f"width {one}": flop for one, flop in zip((64, 128, 256), flops, strict=True)}
        plots.plot_scaling(sizes, lines, gaps, of, path, baseline=of[0].label, **OTHERS, **UNIT)


@pytest.mark.parametrize(
    ("count", "label"),
    [(2, LONG), (2, "xIELU 1234"), (6, LONG), (12, LONG), (12, "x" * 60)],
    ids=["2-long", "2-short", "6-long", "12-long", "12-one-word"],
)
@pytest.mark.parametrize("picture", ["loss", "differences", "alphas", "depth", "sweep", "scaling"])
def test_all_text_is_inside_and_apart(picture, count, label, tmp_path, drawn):
    path = tmp_path / "picture.png"
    draw(picture, many(count, label), path)
    width, height = Image.open(io.BytesIO(path.read_bytes())).size
    assert width <= WIDEST and height <= HIGHEST
    assert len(drawn.texts) > 5
    for text, box in drawn.texts:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{text!r} is cut off: {box}"
    # A pixel or two of their surroundings may touch.
    boxes = [(text, box.padded(-2)) for text, box in drawn.texts]
    for number, (text, box) in enumerate(boxes):
        for other, its in boxes[:number]:
            assert not box.overlaps(its), f"{text!r} lies over {other!r}"
    for axes in drawn.drawing.panels.flat:
        assert not axes.get_visible() or axes.get_window_extent().width > width / 5
    if picture == "differences":
        assert drawn.drawing.axes.get_window_extent().width > width / 2
        assert len(drawn.drawing.axes.get_xticks()) > 3


def test_an_axis_of_one_runs_alphas_is_not_of_rounding():
    drawing, values = Drawing("x", "iteration", "alpha"), np.array([0.8, 0.8 + 1e-8])
    drawing.axes.plot(values)
    layer_plots._alpha_scale(drawing, values)
    assert np.ptp(drawing.axes.get_ylim()) >= 0.01


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        ("loss", "bands: lowest to highest of 3 seeds"),
        ("alphas", "bands: lowest to highest of 3 seeds"),
        ("depth", "bands and bars: 95 % interval over 3 seeds"),
        ("differences", "bar: 95 % interval"),
        ("scaling", "bars: 95 % interval"),
    ],
)
def test_what_a_band_is_stands_above_all_panels(picture, said, tmp_path, drawn):
    draw(picture, many(2, "xIELU"), tmp_path / "picture.png")
    assert said in drawn.drawing.figure.get_suptitle().replace("\n", " ")


def test_rounding_fills_no_axis(tmp_path, drawn):
    """Alphas that did not train are a flat line at their number, and have no panel by depth."""
    of = many(2, "xIELU")
    found = moving(of, rounded())
    assert results.adaptations(found, of) == []
    plots.plot_alphas(found, of, tmp_path / "alphas.png", **OTHERS)
    for axes in drawn.drawing.panels.flat:
        assert np.ptp(axes.get_ylim()) >= 0.01
    assert not any("e-" in text for text, _ in drawn.texts)


def test_bands_by_depth_are_whole_and_panels_equally_high(tmp_path, drawn):
    of = many(5, "xIELU")
    adapted = results.adaptations(moving(of), of)
    plots.plot_depth(adapted, tmp_path / "depth.png", **OTHERS)
    shown = [axes for axes in drawn.drawing.panels.flat if axes.get_visible()]
    assert len(shown) == 10
    for axes in shown:
        low, high = axes.get_ylim()
        assert high - low == pytest.approx(np.ptp(shown[0].get_ylim()))
        assert low < axes.dataLim.y0 and axes.dataLim.y1 < high


def test_activations_far_apart_do_not_flatten_each_other():
    """Each around its own values; of one activation all on one axis."""
    of = [variants.parse(name) for name in ("xielu", "xiprelu")]
    (low, high), (other_low, other_high) = depth_plots.limits(results.adaptations(moving(of), of))
    assert high < other_low and high - low == pytest.approx(other_high - other_low)
    same = many(2, "xIELU")
    first, second = depth_plots.limits(results.adaptations(moving(same), same))
    assert first == second


def test_a_number_stays_with_its_word():
    assert (
        wrapped("xIELU, αp from 0.5, αn from 1.2", 28)
        == "xIELU, αp from\u00a00.5, αn\nfrom\u00a01.2"
    )
