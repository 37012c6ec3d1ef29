"""The report in a browser: on a phone, on a desktop, on paper. Skipped where there is no Chromium;
``make test-cluster`` brings one.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import report_runs
from PIL import Image
from playwright.sync_api import sync_playwright
from report_runs import write_events

from megatron_xielu.report.__main__ import main
from megatron_xielu.report.drawing import ACTIVATION_COLOURS

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in _NAMES if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report of two runs, one with everything, one with a name as long as names get."""
    folder = tmp_path_factory.mktemp("runs")
    one, two = folder / "xielu", folder / ("swiglu_" + "with_a_long_name_" * 6)
    write_events(one / "tensorboard", range(1, 401))
    evaluation = {"iteration": 400, "loss": 2.2, "layers": report_runs.statistics()}
    (one / "evaluation.json").write_text(json.dumps(evaluation))
    other = {"seed": 7, "lr": 0.1, "data_path": ["a/folder/of/texts"], "global_batch_size": 16}
    gated = report_runs.ARGUMENTS | {"xielu": False, "swiglu": True} | other
    write_events(two / "tensorboard", range(1, 301), layers=0, arguments=gated, shift=0.05)
    main([str(one), str(two), "--output", str(folder / "out")])
    main([str(two), "--output", str(folder / "out" / "long")])
    named = [folder / f"xielu-decay-0.{number}" / "seed_42" for number in (1, 2)]
    for run in named:
        write_events(run, range(1, 11), layers=0)
    main([*map(str, named), "--output", str(folder / "out" / "named")])
    return folder / "out" / "report.html"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: chromium)")
def test_report_in_a_browser(page):
    with sync_playwright() as playwright:
        # Root in a container has no sandbox, and /dev/shm may be small there.
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        for width in (360, 1280):
            size = {"width": width, "height": 900}
            tab = chromium.new_page(viewport=size, is_mobile=width < 700)
            requests, complaints = [], []
            tab.on("request", lambda request, urls=requests: urls.append(request.url))
            tab.on("console", lambda message, said=complaints: said.append(message.text))
            tab.on("pageerror", lambda error, said=complaints: said.append(str(error)))
            tab.goto(page.as_uri())
            # A phone zooms out where something is too wide: both must be as asked.
            assert tab.evaluate("innerWidth") == width
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            wide = "[...document.querySelectorAll('figure, .card, h1, h2')].filter("
            wide += f"e => e.getBoundingClientRect().right > {width}).length"
            assert tab.evaluate(wide) == 0
            images = tab.evaluate(
                "[...document.images].map(i => [i.complete && i.naturalWidth, i.width, i.alt])"
            )
            assert len(images) == 16
            for natural, shown, alt in images:
                assert natural >= 1000 and 300 < shown <= natural and alt
            columns = "getComputedStyle(document.querySelector('.pictures')).gridTemplateColumns"
            assert len(tab.evaluate(columns).split()) == (1 if width == 360 else 2)
            asked = [url for url in requests if not url.startswith("data:")]
            assert asked == [page.as_uri()] and complaints == []

            screenshot = Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("RGB")
            assert screenshot.width == width
            height = tab.evaluate("document.documentElement.scrollHeight")
            assert screenshot.height == height > 3000
            light = screenshot.convert("L").histogram()
            assert sum(light[220:]) > 0.8 * width * height  # a light page …
            assert sum(light[:128]) > 0.005 * width * height  # … with something on it
            # The colours of the two runs are in the first picture.
            box = tab.evaluate(
                "(({x, y, width, height}) => [x, y, x + width, y + height])"
                "(document.images[0].getBoundingClientRect())"
            )
            colours = screenshot.crop(tuple(map(int, box))).getcolors(2**24)
            for run in ("xielu", "swiglu"):
                colour = bytes.fromhex(ACTIVATION_COLOURS[run][1:])
                near = sum(
                    count
                    for count, pixel in colours
                    if all(abs(a - b) < 24 for a, b in zip(pixel, colour, strict=True))
                )
                assert near > 30
            tables = "[...document.querySelectorAll('.table')].map(e => [e.clientHeight, "
            tables += "getComputedStyle(e).overflow])"
            assert all(high < 900 and flow == "auto" for high, flow in tab.evaluate(tables))
            cells = "[...document.querySelectorAll('.unlike td')].map(e => e.clientWidth)"
            assert min(tab.evaluate(cells)) > 100  # not a letter a line
            # The letters of a picture, 11.5 points at 180 a inch, are not much smaller than text.
            assert all(11.5 / 72 * 180 * shown / natural > 8 for natural, shown, _ in images)
        assert tab.pdf().startswith(b"%PDF")
        tab = chromium.new_page(viewport={"width": 360, "height": 900}, is_mobile=True)
        tab.goto((page.parent / "long" / "report.html").as_uri())
        assert tab.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        tab.goto((page.parent / "named" / "report.html").as_uri())
        lines = "document.querySelector('.runs td').innerText"
        rows = "[...document.querySelectorAll('.runs td:first-child .part')].map(e => "
        rows += "[e.innerText, e.getClientRects().length, e.offsetTop])"
        assert tab.evaluate(lines) == "xielu-decay-0.1/seed_42"
        (first, _, above), (second, _, below) = tab.evaluate(rows)[:2]
        assert (first, second) == ("xielu-decay-0.1/", "seed_42") and above < below
        chromium.close()
