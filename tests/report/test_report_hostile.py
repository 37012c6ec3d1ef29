"""What the report reads, damaged: shown as far as it can be, with a note, or refused in a line."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_runs
import torch
from hostile import damaged, damaged_bytes
from hypothesis import given, settings
from matplotlib.colors import to_hex
from PIL import Image
from report_runs import statistics, write_checkpoint, write_events
from torch.utils.tensorboard import SummaryWriter

from megatron_xielu.report import events, layer_plots, page, run_plots, terminal
from megatron_xielu.report.__main__ import main
from megatron_xielu.report.drawing import ACTIVATION_COLOURS, RUN_COLOURS, Drawing, Picture
from megatron_xielu.report.load import load
from megatron_xielu.report.ranking import rank
from megatron_xielu.report.run import Run, name_apart

EVALUATION = {"iteration": 4, "loss": 2.5, "bits_per_byte": 0.75, "layers": statistics(2)}
for entry in EVALUATION["layers"]:
    entry["histogram"] = {"edges": [-1.0, 0.0, 2.0], "counts": [5, 7]}


def show(*folders: Path) -> list[Run]:
    """All of the report but its pictures."""
    runs = [load(folder) for folder in folders]
    name_apart(runs)
    page.render(runs, [], [[] for _ in runs]).encode(errors="replace")
    terminal.render(runs, colours=True)
    assert not any("\n" in note for run in runs for note in run.notes)
    return runs


def write_scalars(folder: Path, scalars: dict[str, list[tuple[int, float]]], suffix: str = "x"):
    writer = SummaryWriter(str(folder), filename_suffix=suffix)
    for name, value in report_runs.ARGUMENTS.items():
        writer.add_text(name, str(value), global_step=0)
    for tag, curve in scalars.items():
        for step, value in curve:
            writer.add_scalar(tag, value, step)
    writer.close()


LOSS = [(1, 3.0), (2, 2.5), (3, 2.0)]
ALPHA = [(1, 0.8), (2, 0.9), (3, 1.0)]


@pytest.mark.parametrize(
    ("scalars", "iterations", "note"),
    [
        ({"alpha_p/layer_00": ALPHA}, None, "only one alpha of layer_00"),
        ({"alpha_n/layer_00": ALPHA}, None, "only one alpha of layer_00"),
        ({"alpha_p/layer_00": ALPHA, "alpha_n/layer_01": ALPHA}, None, "layer_00, layer_01"),
        ({"alpha_p/layer_00": ALPHA[:1], "alpha_n/layer_00": ALPHA[1:]}, None, "at no iteration"),
        (
            {f"alpha_{side}/layer_{row}": ALPHA[:row] for side in "pn" for row in (1, 3)},
            [0, 1],
            None,
        ),
        ({"alpha_p/layer_00": ALPHA, "alpha_n/layer_00": ALPHA[:2]}, [0, 1, 2], None),
        (
            {"alpha_p/layer_00": [*ALPHA, (4, math.nan)], "alpha_n/layer_00": [*ALPHA, (4, 1.0)]},
            [0, 1, 2, 3],
            "below 0 or not finite from iteration 4",
        ),
        (
            {"alpha_p/layer_00": [*ALPHA, (4, 1.0)], "alpha_n/layer_00": [*ALPHA, (4, -1.0)]},
            [0, 1, 2, 3],
            "below 0 or not finite from iteration 4",
        ),
        (
            {f"alpha_{side}/layer_00": [(1, math.inf)] for side in "pn"},
            None,
            "below 0 or not finite from iteration 1",
        ),
        ({f"alpha_{side}/layer_00": [(1, 3e38), (2, 0.0)] for side in "pn"}, [0, 1, 2], None),
        ({f"alpha_{side}/layer_{'9' * 5000}": ALPHA for side in "pn"}, [0, 1, 2, 3], None),
        ({f"alpha_{side}/layer_٣": ALPHA for side in "pn"}, [0, 1, 2, 3], None),
        ({f"alpha_{side}/layer_²": ALPHA for side in "pn"}, [0, 1, 2, 3], None),
    ],
)
def test_alphas_that_are_no_pairs(tmp_path, scalars, iterations, note):
    write_scalars(tmp_path, {"lm loss": LOSS, **scalars})
    (run,) = show(tmp_path)
    assert run.train is not None and len(run.train.steps) == 3
    assert (run.alpha_p is None) == (iterations is None) == (not run.layers)
    if iterations is not None:
        assert run.alpha_p.iterations.tolist() == run.alpha_n.iterations.tolist() == iterations
    assert note is None or any(note in line for line in run.notes), run.notes


NO_NUMBERS: list[dict[str, list[tuple[int, float]]]] = [
    {"consumed samples": [(1, math.nan)], "lm loss": [(0, 1e38), (2**52, math.inf)]},
    {"lm loss": [(1, math.nan)], "lm loss validation": [(2, -math.inf)]},
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_page_of_numbers_that_are_none(tmp_path):
    for number, scalars in enumerate(NO_NUMBERS):
        write_scalars(tmp_path / str(number), scalars)
    folders = [str(tmp_path / str(number)) for number in range(len(NO_NUMBERS))]
    main([*folders, "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_a_tag_that_is_text_once_and_a_number_once(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    for tag in ("lm loss", "grad-norm", "alpha_p/layer_00"):
        writer.add_text(tag, "x", 1)
        writer.add_scalar(tag, 1.0, 2)
        writer.add_histogram(tag, np.ones(3), 3)
    writer.close()
    (run,) = show(tmp_path)
    assert run.train is not None and run.train.steps.tolist() == [2]


@pytest.mark.parametrize("step", [-1, 2**60])
def test_iterations_that_are_none(tmp_path, step):
    write_scalars(tmp_path, {"lm loss": [*LOSS, (step, 1.0)]})
    (run,) = show(tmp_path)
    assert run.iterations == 3 and "is damaged after byte" in "".join(run.notes)


def test_event_files_that_cannot_be_read(tmp_path):
    write_scalars(tmp_path, {"lm loss": LOSS})
    (tmp_path / "a.tfevents.folder").mkdir()
    (tmp_path / "a.tfevents.loop").symlink_to("a.tfevents.loop")
    (tmp_path / "tensorboard").symlink_to("tensorboard")
    (run,) = show(tmp_path)
    assert run.iterations == 3
    assert sum("cannot be read: " in note for note in run.notes) == 2


def test_checkpoints_of_other_layers(tmp_path):
    key = "decoder.layers.mlp.activation_func.alpha_{}"
    for iteration, layers in ((10, 2), (20, 3)):
        tensors = {key.format(side): torch.ones(layers, 1) for side in "pn"}
        write_checkpoint(tmp_path, iteration, tensors)
    (run,) = show(tmp_path)
    assert any("of different layers" in note for note in run.notes)


@pytest.mark.parametrize("shape", [(4, 2), (), (4, 1, 1)])  # (4,) is the fork's old layout
def test_alphas_of_another_shape(tmp_path, shape):
    key = "decoder.layers.mlp.activation_func.alpha_{}"
    write_checkpoint(tmp_path, 10, {key.format(side): torch.ones(shape) for side in "pn"})
    (run,) = show(tmp_path)
    assert any("alphas of checkpoints are left out: " in note for note in run.notes)


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ([], "it is [], not an object"),
        ({"loss": "2"}, "loss is '2', not a number"),
        ({"iteration": -1}, "iteration must be 0 or more, not -1"),
        ({"layers": {"layer": 1}}, "layers is {'layer': 1}, not a list"),
        (
            {"layers": [{"layer": -1, "negative_share": 0.5}]},
            "layers[0].layer must be 0 or more, not -1",
        ),
        (
            {"layers": [{"layer": n, "negative_share": 0.5} for n in (1, 2)]},
            "its layers count from 1, as those of older versions did",
        ),
        (
            {"layers": [{"layer": 1, "negative_share": 5}]},
            "layers[0].negative_share must be at most 1, not 5",
        ),
        (
            {
                "layers": [
                    {"layer": 1, "negative_share": 1, "histogram": {"edges": [], "counts": []}}
                ]
            },
            "n + 1 rising edges",
        ),
    ],
)
def test_evaluations(tmp_path, content, note):
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    (run,) = show(tmp_path)
    assert run.evaluation is None and not run.measured
    assert any(f"{tmp_path}/evaluation.json" in n and note in n for n in run.notes), run.notes


def test_any_damage_to_an_evaluation_is_a_note(tmp_path):
    write_events(tmp_path, [1, 2], layers=2)

    @settings(max_examples=30, deadline=None)
    @given(damaged(EVALUATION))
    def damage(content: Any) -> None:
        (tmp_path / "evaluation.json").write_text(json.dumps(content))
        show(tmp_path)

    damage()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_damage_to_event_files_is_a_note(tmp_path):
    write_events(tmp_path, [1, 2, 3], layers=2, arguments={})
    (path,) = tmp_path.glob(events.PATTERN)
    write_events(tmp_path / "events", [2, 3], layers=2)

    @settings(max_examples=30, deadline=None)
    @given(damaged_bytes(path.read_bytes()))
    def damage(content: bytes) -> None:
        path.write_bytes(content)
        show(tmp_path)

    damage()


def test_names_of_folders(tmp_path):
    """Digits that `int` does not take, a name that is no text, and line ends."""
    folders = [tmp_path / name for name in ("iter_²", "iter_١٢", os.fsdecode(b"\xff"), "a\nb")]
    write_events(tmp_path / "events", [1, 2], layers=0, arguments={})
    for folder in folders:
        shutil.copytree(tmp_path / "events", folder)
        (folder / "checkpoints" / "iter_²").mkdir(parents=True)
    main([*map(str, folders), "--output", str(tmp_path / os.fsdecode(b"out\xfe"))])
    assert list(tmp_path.glob("out*/report.html"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/file"], "{tmp}/file is not a folder"),
        (["{tmp}/loop"], "{tmp}/loop is not a folder"),
        (["{tmp}/a\nb"], "{tmp}/a b is not a folder"),
        (["{tmp}/" + "x" * 300], "File name too long"),
        (["{tmp}/run", "--output", "{tmp}/loop"], "--output {tmp}/loop cannot be written to: "),
        (["{tmp}/run", "--output", "{tmp}/file/out"], "--output {tmp}/file/out cannot be written"),
        (["{tmp}/run", "--output", "/proc/none"], "--output /proc/none cannot be written to: "),
        (
            ["{tmp}/run", "--output", "{tmp}"],
            "--output {tmp}: report.html there is not of a",
        ),
    ],
)
def test_refused_before_anything_is_written(tmp_path, words, message):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "report.html").mkdir()
    write_events(tmp_path / "run", [1])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as refusal:
        main([word.format(tmp=tmp_path) for word in words])
    line = str(refusal.value)
    assert line.startswith("megatron_xielu.report: error: ") and "\n" not in line
    assert message.format(tmp=tmp_path) in line
    assert sorted(tmp_path.rglob("*")) == before


def test_files_that_no_report_wrote_stay(tmp_path):
    """A page of another program, pictures of a user's, also those that an old page names."""
    run, out = tmp_path / "run", tmp_path / "out"
    write_events(run, [1, 2, 3], layers=0)

    def refused(name: str) -> None:
        before = {path: path.read_bytes() for path in sorted(out.iterdir())}
        with pytest.raises(SystemExit, match=f"--output {out}: {name} there is not of a report"):
            main([str(run), "--output", str(out)])
        assert {path: path.read_bytes() for path in sorted(out.iterdir())} == before

    out.mkdir()
    (out / "report.html").write_text("<p>of another program</p>")
    refused("report.html")
    (out / "report.html").unlink()
    (tmp_path / "thesis.tex").write_text("a user's")
    (out / "train-loss-tokens.png").symlink_to(tmp_path / "thesis.tex")
    refused("train-loss-tokens.png")
    (out / "train-loss-tokens.png").unlink()
    main([str(run), "--output", str(out)])

    page = out / "report.html"
    names = ["holiday.png", "gone.png", "../above.png", f"{tmp_path}/above.png"]
    page.write_text(page.read_text() + "".join(f'<img data-file="{name}">' for name in names))
    (out / "holiday.png").write_bytes(b"\x89PNG")
    for name in ("above.png", "out/old.png"):
        shutil.copy(out / "train-loss-tokens.png", tmp_path / name)
    page.write_text(page.read_text() + '<img data-file="old.png">')
    main([str(run), "--output", str(out)])
    assert (out / "holiday.png").exists() and (tmp_path / "above.png").exists()
    assert not (out / "old.png").exists()


def write_run(folder: Path, losses: list[float], *, layers: int = 0, **arguments: object) -> Path:
    """A run of these losses, in validation, too."""
    values = report_runs.ARGUMENTS | {"seed": 1, "data_path": ["d"]} | arguments
    write_events(folder, range(1, 1), arguments=values)
    writer = SummaryWriter(str(folder), filename_suffix="later")
    for step, loss in enumerate(losses, 1):
        writer.add_scalar("lm loss", loss, step)
        writer.add_scalar("grad-norm", loss, step)
        writer.add_scalar("lm loss validation", loss, step)
        for layer in range(layers):
            for side in "pn":
                writer.add_scalar(f"alpha_{side}/layer_{layer:02d}", 0.8 + layer / 100, step)
    writer.close()
    return folder


def rise(picture: Picture, colour: str) -> float:
    """Which share of a picture's height has this colour."""
    pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"), int)
    wanted = np.array(list(bytes.fromhex(colour[1:])))
    rows = np.flatnonzero((np.abs(pixels - wanted) < 24).all(axis=2).any(axis=1))
    return (rows.max() - rows.min()) / len(pixels) if len(rows) else 0.0


FALLING = [5 - 0.1 * step for step in range(30)]
GATED, SQUARED = {"xielu": False, "swiglu": True}, {"xielu": False, "squared_relu": True}


@pytest.mark.parametrize("end", [math.nan, math.inf, 1e30])
def test_a_run_that_diverged(tmp_path, end):
    """It is named, comes last, and its axes are those of losses."""
    write_run(tmp_path / "good", FALLING)
    write_run(tmp_path / "bad", [loss - 0.1 for loss in FALLING[:20]] + [end] * 10, **GATED)
    write_run(tmp_path / "late", [loss + 1 for loss in FALLING], **SQUARED)
    runs = show(tmp_path / "good", tmp_path / "bad", tmp_path / "late")
    assert [run.diverged for run in runs] == [None, 21, None]
    assert rank(runs).rows == ["xIELU: 2.1000", "ReLU²: 3.1000", "SwiGLU: diverged"]
    assert "30 of 400, diverged at 21" in terminal.render(runs, colours=False)
    made = {picture.file: picture for picture in run_plots.pictures(runs)}
    assert "diverged: bad at 21." in made["train-loss-tokens.png"].caption
    for name in ("train-loss-tokens", "train-loss-flops", "validation-loss", "gradient-norm"):
        # Of the falling curve, under a key of one line for each.
        assert rise(made[f"{name}.png"], ACTIVATION_COLOURS["relu2"]) > 0.25, name


def test_a_spike_that_passed(tmp_path):
    losses = [*FALLING[:20], 1e30, math.nan, *FALLING[20:]]
    write_run(tmp_path / "one", losses)
    (run,) = show(tmp_path / "one")
    assert run.diverged is None and "not finite in 1 logged iterations" in "".join(run.notes)
    made = {picture.file: picture for picture in run_plots.pictures([run])}
    assert rise(made["train-loss-tokens.png"], to_hex(RUN_COLOURS[0])) > 0.4


def test_a_seed_that_diverged(tmp_path):
    for seed in range(3):
        losses = [loss + 1 for loss in FALLING]
        write_run(tmp_path / f"other_{seed}", losses, **GATED, seed=seed)
        end = math.nan if seed == 1 else 2.1 + 0.1 * seed
        write_run(tmp_path / str(seed), [*FALLING, *[end] * 10], seed=seed)
    folders = [tmp_path / f"{other}{seed}" for seed in range(3) for other in ("", "other_")]
    found = rank(show(*folders))
    first, last = found.rows
    assert first.startswith("SwiGLU")
    assert last.endswith(": 1 of 3 seeds diverged; the others 2.2000 ± 0.1414 (2 seeds)")
    found = rank(show(*folders[:4]))
    assert found.rows[1].endswith(": 1 of 2 seeds diverged; the others 2.1000")
    assert "Of xIELU one run alone ended well: whether" in found.certainty


def test_single_slow_steps_do_not_hide_the_others(tmp_path):
    """Of a disk, or of validation: the picture is of medians."""
    steps = [(step, 9.0 if step % 7 == 0 else 1.0) for step in range(1, 201)]
    write_scalars(tmp_path, {"lm loss": LOSS, "iteration-time": steps})
    made = {picture.file: picture for picture in run_plots.pictures(show(tmp_path))}
    assert "The axis ends" not in made["step-time.png"].caption
    assert made["step-time.png"].alt.endswith("medians: test_single_slow_steps_do_not_0 1.000")


def test_flops_of_a_token_are_told_once(tmp_path):
    for name, size in (("a", 32), ("b", 32), ("c", 64)):
        write_run(tmp_path / name, FALLING, hidden_size=size)
    for names, told in (
        ("ab", r"tion\), (\S+) per token\. "),
        ("bc", "per token: b with .*; c with "),
    ):
        made = run_plots.pictures(show(*(tmp_path / name for name in names)))
        (caption,) = [one.caption for one in made if one.file == "train-loss-flops.png"]
        assert re.search(told, caption)


def test_one_step_and_one_layer(tmp_path):
    run = show(write_run(tmp_path, [3.0], layers=1))[0]
    made = [*run_plots.pictures([run]), *layer_plots.pictures(run, "")]
    shown = next(picture for picture in made if picture.file == "train-loss-tokens.png")
    assert rise(shown, to_hex(RUN_COLOURS[0])) > 0.005  # a dot
    drawing = Drawing("x", "layer", "y")
    drawing.axes.plot([0], [1])
    drawing.layers_below()
    drawing.depth_bar(0)
    low, high = drawing.axes.get_xlim()
    assert [tick for tick in drawing.axes.get_xticks() if low <= tick <= high] == [0]
    assert len(drawing.figure.axes) == 1


def test_layers_are_in_order(tmp_path):
    """Of 101, in event files and in checkpoints."""
    write_run(tmp_path / "a", [3.0], layers=101, num_layers=101)
    key = "decoder.layers.mlp.activation_func.alpha_{}"
    tensors = {key.format(side): torch.arange(101.0)[:, None] / 100 for side in "pn"}
    write_checkpoint(tmp_path / "b", 10, tensors, num_layers=101)
    for run in show(tmp_path / "a", tmp_path / "b"):
        assert [layer.depth for layer in run.layers] == list(range(101))
        assert (np.diff(run.alpha_p.values[-1]) > 0).all()


def test_many_runs_in_one_page(tmp_path):
    """Activations are named, not runs; layer by layer is one of each; a note stands once."""
    names = [f"{'x' * 100}{number}{'y' * 100}" for number in range(14)]
    for number, name in enumerate(names):
        more = GATED if number % 2 else {}
        write_run(tmp_path / name, FALLING, layers=1 - number % 2, seed=number, **more)
    main([*(str(tmp_path / name) for name in names), "--output", str(tmp_path / "out")])
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("no complete checkpoint in the torch_dist format") == 1
    assert len(list((tmp_path / "out").glob("*-alphas-by-depth.png"))) == 1
    assert "6 more have alphas" in html and all(name in html for name in names)
    assert max(len(alt) for alt in re.findall(r'alt="([^"]*)"', html)) < 1000
    runs = show(*(tmp_path / name for name in names))
    assert len({run.short for run in runs}) == 14 and len(runs[0].short) < 60
    for files in run_plots.pictures(runs):
        assert files.height < files.width


def test_names_of_a_legend_leave_the_curves_room(tmp_path):
    drawing = Drawing("x", "x", "y")
    for number in range(12):
        drawing.axes.plot([0, 1], label=f"{number}{'x' * 43}")
    drawing.legend()
    drawing.png()
    assert drawing.axes.get_window_extent().height / drawing.figure.dpi > 2.5


def test_losses_of_other_tokenizers_have_other_pictures(tmp_path):
    """Or are in bits per byte: by the manifest of the data, or by evaluation.json."""
    for name in "ab":
        write_run(
            tmp_path / name, FALLING, tokenizer_model=name, data_path=[f"data_{name}/train/x"]
        )
    one, two = runs = show(tmp_path / "a", tmp_path / "b")
    assert one.bytes_per_token is two.bytes_per_token is None
    made = [picture.file for picture in run_plots.pictures(runs)]
    assert made[0] == "train-loss-tokens-1.png" and "validation-perplexity-2.png" in made

    of = {"loss": 2.0 * math.log(2), "bits_per_byte": 0.5}
    (tmp_path / "a" / "evaluation.json").write_text(json.dumps(of))
    (tmp_path / "data_b" / "train").mkdir(parents=True)
    for suffix in (".bin", ".idx"):
        (tmp_path / "data_b" / "train" / f"x{suffix}").touch()
    shard = {"prefix": "train/x", "split": "train", "text_bytes": 300, "tokens": 100}
    tokenizer = {"name": "b", "sha256": "0", "vocab_size": 9, "eod_id": 1}
    manifest = {"shards": [shard], "tokenizer": tokenizer}
    (tmp_path / "data_b" / "manifest.json").write_text(json.dumps(manifest))
    one, two = runs = show(tmp_path / "a", tmp_path / "b")
    assert (one.bytes_per_token, two.bytes_per_token) == (pytest.approx(4), 3)
    made = {picture.file: picture for picture in run_plots.pictures(runs)}
    assert not any("perplexity" in name or "-1" in name for name in made)
    assert "bytes per token: a 4.000; b 3.000." in made["train-loss-tokens.png"].caption
    # ln 2 times the bytes of a token are the nats of a bit per byte.
    in_bits = 2.55 / math.log(2)
    alt = f"a {in_bits / 4:.3f}; b {in_bits / 3:.3f}"
    assert made["train-loss-tokens.png"].alt.endswith(alt)
