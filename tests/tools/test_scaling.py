"""compare_activations.py scaling: the line and its intervals, refusals, a real ladder of two."""

from __future__ import annotations

import contextlib
import io
import json
import math
import platform
import random
import re
import signal
import time
from pathlib import Path

import compare_activations as tool
import launch
import pytest
from compare import (
    equal_cost,
    runs,
    scaling,
    scaling_fit,
    scaling_results,
    settings,
    training,
    variants,
)
from compare.text import Text
from matplotlib import image
from test_compare import make_record, process_state, warm_trainings  # noqa: F401

import megatron_xielu
from megatron_xielu.checkpoints.folder import read_tracker

FLOPS = [1e10, 1e11, 1e12]
SEEDS = (1, 2, 3)


def with_noise(draw: random.Random, level: float, slope: float, sd: float = 0.0) -> list[dict]:
    """Losses on a line, by size and seed."""
    return [
        {seed: level + slope * math.log10(one / FLOPS[0]) + draw.gauss(0, sd) for seed in SEEDS}
        for one in FLOPS
    ]


class TestFit:
    def test_a_line_is_found(self) -> None:
        draw = random.Random(0)
        losses = {
            "swiglu": with_noise(draw, 3.0, -0.4),
            "xielu": with_noise(draw, 3.1, -0.5),
            "gelu": with_noise(draw, 3.2, -0.45),
        }
        line = scaling_fit.fit(FLOPS, [list(of_seed.values()) for of_seed in losses["xielu"]])
        assert line.slope.value == pytest.approx(-0.5)
        assert line.fitted == pytest.approx([3.1, 2.6, 2.1])
        assert line.off == pytest.approx(0)
        found = scaling_fit.gaps(FLOPS, losses, "swiglu")
        assert [mean.value for mean in found["xielu"].line.means] == pytest.approx([0.1, 0, -0.1])
        assert found["gelu"].line.slope.value == pytest.approx(-0.05)

    def test_a_curve_shows_in_what_is_off(self) -> None:
        line = scaling_fit.fit(FLOPS, [[3.0], [2.4], [2.1]])
        assert line.slope.value == pytest.approx(-0.45)
        assert line.off == pytest.approx(0.1)

    def test_one_size_has_the_paired_interval(self) -> None:
        """Student's of 1908, as in test_compare's TestPaired."""
        sleep = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
        first = scaling_fit.fit(FLOPS, [sleep, sleep, sleep]).means[0]
        assert first.interval == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
        assert first.p == pytest.approx(0.002833, abs=1e-6)

    def test_two_sizes_have_welchs_interval(self) -> None:
        """Through two points the slope is a difference: scipy's test of unequal variances."""
        from scipy.stats import ttest_ind

        small, large = [1.0, 1.3, 0.9], [2.0, 2.9, 2.2, 2.6]
        slope = scaling_fit.fit([1e10, 1e12], [small, large]).slope
        expected = ttest_ind(large, small, equal_var=False)
        low, high = expected.confidence_interval(0.95)
        assert slope.interval == pytest.approx((low / 2, high / 2))
        assert slope.p == pytest.approx(expected.pvalue)

    @pytest.mark.parametrize(
        ("spread", "shared", "most"),
        [((1, 1, 1), 0, 0.99), ((1, 1, 3), 0, 0.99), ((1, 1, 1), 1, 1)],
    )
    def test_intervals_hold_the_truth_as_often_as_they_say(
        self, spread: tuple[int, ...], shared: int, most: float
    ) -> None:
        """With three seeds, also where one size is noisier; more often where a seed moves all sizes
        alike. A bootstrap's intervals would in three of four."""
        draw, held, times = random.Random(1), 0, 500
        for _ in range(times):
            common = [draw.gauss(0, 0.01 * shared) for _ in SEEDS]
            values = [
                [-0.3 * place + draw.gauss(0, 0.01 * sd) + one for one in common]
                for place, sd in enumerate(spread)
            ]
            low, high = scaling_fit.fit(FLOPS, values).slope.interval
            held += low <= -0.3 <= high
        assert 0.93 <= held / times <= most

    @pytest.mark.parametrize(
        ("level", "slope", "verdict"),
        [
            (0.1, 0.05, scaling_fit.GROWS),
            (-0.1, -0.05, scaling_fit.GROWS),
            (0.2, -0.05, scaling_fit.SHRINKS),
            (-0.2, 0.05, scaling_fit.SHRINKS),
            (0.1, 0.0, scaling_fit.UNCLEAR),
            (-0.2, 0.2, scaling_fit.TURNS),
        ],
    )
    def test_verdict(self, level: float, slope: float, verdict: str) -> None:
        draw = random.Random(2)
        losses = {
            "swiglu": with_noise(draw, 3, -0.4, 1e-3),
            "xielu": with_noise(draw, 3 + level, -0.4 + slope, 1e-3),
        }
        gap = scaling_fit.gaps(FLOPS, losses, "swiglu")["xielu"]
        assert gap.verdict == verdict
        low, high = gap.line.slope.interval
        assert low < slope < high

    def test_the_verdict_knows_of_the_other_gaps(self) -> None:
        draw = random.Random(3)
        losses = {name: with_noise(draw, 3, -0.4, 0.01) for name in ("swiglu", "relu2", "gelu")}
        losses["xielu"] = with_noise(draw, 3, -0.38, 0.01)
        alone = scaling_fit.gaps(
            FLOPS, {name: losses[name] for name in ("swiglu", "xielu")}, "swiglu"
        )
        among = scaling_fit.gaps(FLOPS, losses, "swiglu")
        assert alone["xielu"].line == among["xielu"].line
        assert alone["xielu"].p_holm < 0.05 < among["xielu"].p_holm
        assert alone["xielu"].verdict == scaling_fit.GROWS != among["xielu"].verdict

    def test_one_seed_cannot_say(self) -> None:
        losses = {
            name: [{7: loss} for loss in of_size]
            for name, of_size in {"swiglu": (3.0, 2.5, 2.2), "xielu": (3.1, 2.5, 2.0)}.items()
        }
        gap = scaling_fit.gaps(FLOPS, losses, "swiglu")["xielu"]
        assert (gap.line.slope.interval, gap.p_holm) == (None, None)
        assert gap.verdict == "one seed: cannot say"

    def test_equal_to_the_bit(self) -> None:
        same = [{1: 3.0, 2: 3.1}, {1: 2.0, 2: 2.1}, {1: 1.5, 2: 1.4}]
        gap = scaling_fit.gaps(FLOPS, {"a": same, "b": same}, "a")["b"]
        assert (gap.line.slope.interval, gap.verdict) == ((0, 0), scaling_fit.UNCLEAR)


@pytest.mark.parametrize("name", scaling.LADDERS)
class TestLadder:
    def test_is_of_one_shape_at_equal_cost(self, name: str, tmp_path: Path) -> None:
        ladder = scaling.LADDERS[name]
        options = scaling.parse_options(["--ladder", name])
        size = 257 if ladder.preset.tokenizer == "bytes" else 16_384
        text = Text(Path("t"), Path("v"), Path("c"), size, size, "token", {}, {})
        tokens = []
        for width, chosen in options.sizes.items():
            trainings = runs.plan_runs(options, tmp_path, chosen, runs.Machine("cpu", 1), text)
            costs = equal_cost.costs({run.variant.name: run.flags for run in trainings})
            equal_cost.check(costs, "swiglu")
            matrices = 16 * chosen.layers * width**2
            without = costs["relu2"].model.parameters(embeddings=False)
            assert 0 < without - matrices < 0.01 * without  # norms
            tokens.append(chosen.iterations * chosen.tokens_per_iteration / matrices)
            assert chosen.hidden / chosen.layers == ladder.head
            assert chosen.iterations >= chosen.warmup + chosen.decay
            # Once, on the same text whatever the size: a second time is of other batches.
            assert chosen.validate_every > chosen.iterations
            assert chosen.init_std * math.sqrt(width) == pytest.approx(0.98, abs=0.001)
        assert tokens == pytest.approx([ladder.tokens_per_parameter] * len(tokens), rel=0.01)

    def test_learning_rates_are_those_of_the_presets(self, name: str) -> None:
        for preset in (settings.TINY, settings.SMALL):
            found = scaling.LADDERS[name].settings(preset.hidden, 1).learning_rate
            assert found == preset.learning_rate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "32"], "--sizes: a line needs two at least"),
        (["--sizes", "32", "40"], "--sizes 40: not a multiple of 16"),
        (["--sizes", "32", "x"], "'x' is no width of a model"),
        (["--ladder", "gpu", "--sizes", "64", "96"], "--sizes 96: not a multiple of 64"),
        (
            ["--tokens-per-parameter", "0.1"],
            "--sizes 32: 6 iterations at --tokens-per-parameter 0.1, 10 at least; raise one or",
        ),
        (["--tokens-per-parameter", "0.0"], "'0.0' is no number above 0"),
        (["--tokens-per-parameter", "nan"], "'nan' is no number above 0"),
        (["--activations", "relu"], "'relu': no such activation; there are"),
        (["--activations", "xielu", "--baseline", "gelu"], "--baseline gelu: not among what is"),
        (["--seeds", "0"], "one seed at least"),
        (["--text", "/nowhere"], "--text /nowhere: no such folder"),
        (["--out", "\udcff"], "--out '\\udcff' is not UTF-8"),
    ],
)
def test_flags(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tool.main(["scaling", *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_record_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    path = runs.folder_of(tmp_path / "width_64", "gelu", 44) / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(SystemExit, match=f"compare: {path}: it is no JSON: .* delete it, and"):
        tool.main(["scaling", "--out", str(tmp_path)])
    assert not (tmp_path / "text").exists()


def write(out: Path, seeds: tuple[int, ...], names: tuple[str, ...]) -> tuple[str, dict]:
    """The results of records whose gap to SwiGLU grows by 0.2 from the first size to the last."""
    options = scaling.parse_options(["--activations", *names])
    size = Text(Path("t"), Path("v"), Path("c"), 257, 264, "byte", {"train": 10**6}, {})
    sizes, made = [], []
    for place, (_, chosen) in enumerate(options.sizes.items()):
        (run, *_) = runs.plan_runs(options, out, chosen, runs.Machine("cpu", 1), size)
        cost = equal_cost.costs({"swiglu": run.flags})["swiglu"]
        sizes.append(scaling_results.Size(chosen, cost))
        made.append(
            {
                name: {
                    seed: make_record(name, seed, 3 - place / 2 + number * place / 10 + seed / 1e3)
                    for seed in seeds
                }
                for number, name in enumerate(names)
            }
        )
    shown = scaling_results.write(
        out,
        sizes,
        made,
        options.variants,
        "swiglu",
        text=size,
        notes=["A note."],
        context={"device": "2 CPU cores", "date": "2026-01-01"},
    )
    return shown, json.loads((out / "scaling.json").read_text())


class TestResults:
    def test_files_and_tables(self, tmp_path: Path) -> None:
        shown, content = write(tmp_path, (1, 2, 3), ("swiglu", "xielu"))
        assert shown == (tmp_path / "scaling.md").read_text()
        assert "**A note.**" in shown
        assert "| 32 | 2 | 41,376 | 32,928 | 49,152 | 0.049 | 96 | 0.004 |" in shown
        assert "| SwiGLU | 3.0020 ± 0.0010 | 2.5020 ± 0.0010 | 2.0020 ± 0.0010 |" in shown
        assert re.search(r"\| xIELU \| \+0\.0000 \[.*\| \+0\.2000 \[.*\| grows \|", shown)
        assert content["gaps"]["xielu"]["line"]["slope"]["value"] == pytest.approx(0.1155, abs=1e-4)
        assert content["sizes"][2]["parameters_without_embeddings"] == 262_720
        assert content["sizes"][2]["flops"] == pytest.approx(6.97e11, rel=0.001)
        picture = image.imread(tmp_path / "scaling.png")
        assert len(set(map(tuple, picture.reshape(-1, picture.shape[-1])))) > 20

    def test_one_seed_has_no_intervals(self, tmp_path: Path) -> None:
        shown, content = write(tmp_path, (1,), ("swiglu", "xielu"))
        assert "| +0.0000 | +0.1000 | +0.2000 | +0.1155 | – | one seed: cannot say |" in shown
        assert content["lines"]["xielu"]["slope"]["interval"] is None
        assert "interval" not in shown and "over seeds" not in shown

    def test_the_baseline_alone_has_no_gaps(self, tmp_path: Path) -> None:
        shown, content = write(tmp_path, (1, 2), ("swiglu",))
        assert "Gap to" not in shown and content["gaps"] == {}


def test_one_that_diverges_ends_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def train(label: str, flags: list[str], **rest: object) -> int:
        started.append(label)
        if "width 32, xIELU" in label:
            raise training.Diverged(f"compare: {label} diverged")
        return 0

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(
        runs, "read_record", lambda _, of, variant, seed, **more: make_record(variant.name, seed)
    )
    options = [*OPTIONS, "--text", str(Path(megatron_xielu.__file__).parent)]
    options += ["--out", str(tmp_path)]
    said = (
        r"1 of 4 runs diverged \(width 32, xIELU, seed 42\), and there are no results without "
        "them; leave them out with --sizes, --seeds or --activations"
    )
    with pytest.raises(SystemExit, match=said):
        tool.main(options)
    assert len(started) == 4
    tool.main([*options, "--activations", "swiglu"])
    assert len(started) == 4 and "what to open: " in capsys.readouterr().out


NAMES = ("xielu", "swiglu")
LABELS = [variants.parse(name).label for name in NAMES]
OPTIONS = ["scaling", "--sizes", "48", "32", "--tokens-per-parameter", "0.5", "--seeds", "1"]
OPTIONS += ["--activations", *NAMES]


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int, str]:
    """A real one, ended by SIGTERM in its first run, and run again to its end.

    Returns:
        OUT, what the first printed, the iteration where it stopped, what the second printed.
    """
    out = tmp_path_factory.mktemp("ladder")
    options = [*OPTIONS, "--out", str(out)]
    folder = runs.folder_of(out / "width_32", "xielu", 42)
    log, first_log = folder / "log.txt", out / "first.txt"
    (first,) = launch.start(options, ranks=1, log=first_log, command=[tool.__file__])
    deadline = time.monotonic() + 240
    while not (log.exists() and "lm loss:" in log.read_text()):
        assert first.poll() is None and time.monotonic() < deadline, first_log.read_text()
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    launch.wait([first], timeout=120)
    assert first.returncode == 128 + signal.SIGTERM
    assert not (folder / "record.json").exists()
    stopped_at = read_tracker(folder / "checkpoints")
    with warm_trainings(), contextlib.redirect_stdout(io.StringIO()) as second:
        tool.main(options)
    return out, first_log.read_text(), stopped_at, second.getvalue()


class TestRealLadder:
    def test_says_what_it_takes_then_goes_on_where_it_stopped(self, ladder: tuple) -> None:
        _, first, stopped_at, second = ladder
        assert first.index("4 runs, 0 of them finished") < first.index("[1/4]")
        assert "run the same command again to resume" in first
        assert f"xIELU, seed 42: resumes from iteration {stopped_at}" in second
        places = re.findall(r"\[(\d)/4\] (width \d+, \w+, seed \d+): .* done", second)
        widths = [f"width {width}, {name}, seed 42" for width in (32, 48) for name in LABELS]
        assert places == [(str(number), what) for number, what in enumerate(widths, 1)]

    def test_losses_fall_and_are_held_out_once(self, ladder: tuple) -> None:
        out, *_ = ladder
        content = json.loads((out / "results" / "scaling.json").read_text())
        for name in NAMES:
            small, large = (of_seed["42"] for of_seed in content["losses"][name])
            assert large < small < 5.6  # log 257
            assert content["lines"][name]["slope"]["value"] < 0
        for width, iterations in ((32, 32), (48, 108)):
            records = runs.finished_records(
                out / f"width_{width}", [variants.parse(name) for name in NAMES], [42]
            )
            for name in NAMES:
                assert [step for step, _ in records[name][42].valid] == [iterations]
                flags = [one["tokens"] for one in content["sizes"] if one["hidden"] == width]
                assert [records[name][42].tokens] == flags

    def test_results(self, ladder: tuple) -> None:
        out, _, _, second = ladder
        names = {path.name for path in (out / "results").iterdir()}
        assert names == {"scaling.md", "scaling.json", "scaling.png"}
        shown = (out / "results" / "scaling.md").read_text()
        assert "one seed: cannot say" in shown and "no evidence" in shown
        command = re.search(r"- command: tools/compare_activations.py (.*)", shown)[1].split()
        there, again = (scaling.parse_options(words[1:]) for words in (OPTIONS, command))
        for name in ("sizes", "variants", "seeds", "baseline", "ladder"):
            assert getattr(again, name) == getattr(there, name)
        said = f"standard library of Python {platform.python_version()} (sha256 "
        assert f"- text: {said}" in shown
        context = json.loads((out / "results" / "scaling.json").read_text())["context"]
        assert context["command"].split()[1:] == command and context["text"].startswith(said)
        assert "no evidence" in second

    def test_again_trains_nothing(
        self, ladder: tuple, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, *_ = ladder
        before = (out / "results" / "scaling.json").read_text()
        monkeypatch.setattr(training, "start", None)
        tool.main([*OPTIONS, "--out", str(out)])
        assert "4 runs, 4 of them finished" in capsys.readouterr().out
        assert (out / "results" / "scaling.json").read_text() == before

    def test_another_ratio_is_refused(self, ladder: tuple) -> None:
        out, *_ = ladder
        options = [*OPTIONS, "--tokens-per-parameter", "0.6", "--out", str(out)]
        with pytest.raises(SystemExit, match=r"settings\.iterations: 32 there, 38 now"):
            tool.main(options)

    def test_text_alone(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = ["--text", str(Path(megatron_xielu.__file__).parent)]
        tool.main([*OPTIONS, *text, "--prepare-text", "--out", str(tmp_path)])
        assert "4 runs, 0 of them finished" in capsys.readouterr().out
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "text"]
