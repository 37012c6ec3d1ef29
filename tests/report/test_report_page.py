"""The report in a browser: on a phone, on a desktop, on paper. Skipped where there is no Chromium;
``make test-cluster`` brings one.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import browser
import pytest
import report_runs
from PIL import Image
from report_runs import write_events

from megatron_xielu.report.command import main


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report of two runs, one with everything, one with a name as long as names get."""
    folder = tmp_path_factory.mktemp("runs")
    one, two = folder / "xielu", folder / ("swiglu_" + "with_a_long_name_" * 6)
    write_events(one / "tensorboard", range(1, 401))
    evaluation = {"iteration": 400, "loss": 2.2, "layers": report_runs.statistics()}
    (one / "evaluation.json").write_text(json.dumps(evaluation))
    gated = report_runs.ARGUMENTS | {"xielu": False, "swiglu": True}
    write_events(two / "tensorboard", range(1, 301), layers=0, arguments=gated, shift=0.05)
    main([str(one), str(two), "--output", str(folder / "out")])
    return folder / "out" / "report.html"


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium on PATH (Debian: chromium)")
def test_report_in_a_browser(page):
    with browser.Browser() as chromium:
        for width in (400, 1280):
            chromium.open(page, width=width)
            # A phone zooms out where something is too wide: both must be as asked.
            assert chromium.evaluate("innerWidth") == width
            assert chromium.evaluate("document.documentElement.scrollWidth") == width
            wide = "[...document.querySelectorAll('figure, .card, h1, h2')].filter("
            wide += f"e => e.getBoundingClientRect().right > {width}).length"
            assert chromium.evaluate(wide) == 0
            images = chromium.evaluate(
                "[...document.images].map(i => [i.complete && i.naturalWidth, i.width, i.alt])"
            )
            assert len(images) == 14
            for natural, shown, alt in images:
                assert natural >= 1000 and 300 < shown <= natural and alt
            columns = "getComputedStyle(document.querySelector('.pictures')).gridTemplateColumns"
            assert len(chromium.evaluate(columns).split()) == (1 if width == 400 else 2)
            assert chromium.requests() == [] and chromium.complaints() == []

            screenshot = Image.open(io.BytesIO(chromium.screenshot())).convert("RGB")
            assert screenshot.width == width
            height = chromium.evaluate("document.documentElement.scrollHeight")
            assert screenshot.height == height > 3000
            light = screenshot.convert("L").histogram()
            assert sum(light[220:]) > 0.8 * width * height  # a light page …
            assert sum(light[:128]) > 0.005 * width * height  # … with something on it
            # Okabe and Ito's blue and vermilion, of the two runs, are in the first picture.
            box = chromium.evaluate(
                "(({x, y, width, height}) => [x, y, x + width, y + height])"
                "(document.images[0].getBoundingClientRect())"
            )
            colours = screenshot.crop(tuple(map(int, box))).getcolors(2**24)
            for run in ((0, 114, 178), (213, 94, 0)):
                near = sum(
                    count
                    for count, pixel in colours
                    if all(abs(a - b) < 24 for a, b in zip(pixel, run, strict=True))
                )
                assert near > 30
        assert chromium.pdf().startswith(b"%PDF")
