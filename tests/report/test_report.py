"""The report, on a real training and on run folders of every other kind."""

from __future__ import annotations

import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import report_runs
import torch
from compare import variants
from launch import REPOSITORY, train
from matplotlib.colors import to_rgb
from report_runs import statistics, write_checkpoint, write_events
from torch.utils.tensorboard import SummaryWriter

from megatron_xielu import catalog
from megatron_xielu.activations import ACTIVATIONS
from megatron_xielu.catalog import DEFAULT_ALPHA_INIT, DEFAULT_BETA
from megatron_xielu.checkpoints.alphas import beta, initial_alphas, read_alphas
from megatron_xielu.checkpoints.folder import complete_checkpoints
from megatron_xielu.plan import flags as plan_flags
from megatron_xielu.plan.model import Model
from megatron_xielu.report import events, page, terminal
from megatron_xielu.report.__main__ import main
from megatron_xielu.report.description import differences, unlike
from megatron_xielu.report.drawing import ACTIVATION_COLOURS, run_styles
from megatron_xielu.report.load import find, load
from megatron_xielu.report.nonlinearity import FIXED, Inputs, Shape, nonlinearity
from megatron_xielu.report.ranking import groups, rank
from megatron_xielu.report.run import name_apart


class Page(HTMLParser):
    """What a test asks of a page: pictures, links to elsewhere, scripts, text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.text = ""
        self.titles: dict[str, str] = {}  # of what is shown, where the mouse is on it
        self._title: str | None = None
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        self._title = dict(attrs).get("title")
        for name, value in attrs:
            if name in ("src", "href") and not (value or "").startswith("data:"):
                self.outside.append(str(value))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._title:
            self.titles.setdefault(data, self._title)


def report(folders: list[Path], output: Path) -> Page:
    """Run the command; the page, after what every page must be."""
    main([*map(str, folders), "--output", str(output)])
    page = Page(output / "report.html")
    assert page.images and not page.outside and "script" not in page.tags
    for image in page.images:
        assert image["alt"] and str(image["src"]).startswith("data:image/png;base64,")
        assert (output / str(image["data-file"])).read_bytes()[:4] == b"\x89PNG"
    files = {path.name for path in output.iterdir()}
    assert files == {"report.html", *(str(image["data-file"]) for image in page.images)}
    return page


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[float]]:
    """A run over two pipeline stages, with validation and asynchronous checkpoints; its losses."""
    folder = tmp_path_factory.mktemp("run")
    done = train(
        folder,
        "--xielu --pipeline-model-parallel-size 2 --save checkpoints --save-interval 3 "
        "--tensorboard-dir tensorboard --eval-interval 3 --eval-iters 1 --async-save",
        ranks=2,
    )
    return folder, done.losses


def test_a_real_run(trained, tmp_path, capsys):
    folder, losses = trained
    run = load(folder)
    saved = read_alphas(complete_checkpoints(folder / "checkpoints"), "xielu")
    assert saved.iterations == [3, 6]
    assert saved.names == run.alpha_names == [f"layer_{layer:02d}" for layer in range(4)]
    for history, expected in ((run.alpha_p, saved.positive), (run.alpha_n, saved.negative)):
        assert history is not None and history.iterations.tolist() == list(range(7))
        np.testing.assert_allclose(history.values[[3, 6]], expected, rtol=1e-6)
    assert [layer.shape.alpha_p for layer in run.layers] == pytest.approx(saved.positive[-1])

    model = Model.of(
        plan_flags.parse(
            "--num-layers 4 --hidden-size 32 --ffn-hidden-size 96 --num-attention-heads 4 "
            "--seq-length 32 --position-embedding-type rope --normalization RMSNorm "
            "--disable-bias-linear --untie-embeddings-and-output-weights --padded-vocab-size 128 "
            "--xielu".split()
        )
    )
    assert run.model is not None and run.parameters == model.parameters()
    assert run.total_tokens == 6 * 8 * 32
    assert run.total_flops == 6 * 8 * 32 * model.flops_per_token()
    assert run.train is not None and run.train.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert run.train.values[-1] == pytest.approx(losses[-1], rel=1e-5)
    assert run.validation[""].steps.tolist() == [3, 6]
    assert run.notes == []
    assert "Megatron-core 0" in run.arguments.xielu_made_with
    assert find(folder / "checkpoints") == find(folder) == folder

    page = report([folder / "checkpoints"], tmp_path / "out")
    files = {image["data-file"] for image in page.images}
    assert files == {
        f"{name}.png"
        for name in (
            "train-loss-tokens train-loss-flops validation-loss validation-perplexity "
            "gradient-norm step-time alphas-by-depth alpha-p-over-time alpha-n-over-time "
            "activation gradient nonlinearity alpha-gradient-norm depth-1 depth-1-over-time"
        ).split()
    }
    assert "--activation-statistics" in page.text
    assert str(tmp_path / "out" / "report.html") in capsys.readouterr().out


def test_experts_and_prediction_layers_have_the_names_of_the_curves(tmp_path):
    """A layer's experts are one row, of their means; the checkpoint has each."""
    train(
        tmp_path,
        "--xiprelu --num-layers 2 --num-experts 2 --moe-router-topk 2 --moe-layer-freq [0,1] "
        "--moe-shared-expert-intermediate-size 32 --mtp-num-layers 1 --train-iters 1 "
        "--save checkpoints --tensorboard-dir events",
    )
    run = load(tmp_path)
    assert run.alpha_names == [
        *("layer_00", "layer_01.experts", "layer_01.shared_experts"),
        *("mtp_0.experts", "mtp_0.shared_experts"),
    ]
    assert [layer.depth for layer in run.layers if layer.name.startswith("mtp_0")] == [2, 2]
    assert run.experts and run.experts.layers == ["layer_01", "mtp_0"]
    saved = read_alphas(complete_checkpoints(tmp_path / "checkpoints"), "xiprelu")
    of = dict(zip(saved.names, saved.positive[-1], strict=True))
    each = [[of[f"{layer}.experts.{e:03d}"] for e in range(2)] for layer in run.experts.layers]
    assert (
        run.experts.alpha_p.tolist() == each and len({alpha for row in each for alpha in row}) == 4
    )
    # The curves agree with the checkpoint, or a note would say so.
    assert run.alpha_p is not None and run.alpha_p.iterations.tolist() == [0, 1]
    assert run.notes == []
    assert run.model and run.model.parameters() == run.parameters
    assert run.parameters and run.activation == "xiprelu"
    assert run.alpha_grad_norm is not None and run.alpha_grad_norm.values.shape == (1, 5)


def test_attempts_of_a_resumed_run(tmp_path):
    """What an attempt wrote after the checkpoint from which the next one started is gone."""
    write_events(tmp_path / "tensorboard", range(1, 31))
    write_events(tmp_path / "tensorboard", range(21, 26), shift=1.0)
    run = load(tmp_path)
    assert run.train is not None and run.train.steps.tolist() == list(range(1, 26))
    assert (run.train.values[20:] > 3.5 + 0.5).all() and run.iterations == 25
    assert run.tokens(np.array([0, 10, 25, 50])).tolist() == [0, 2560, 6400, 12800]
    curve = events.read_events(tmp_path / "tensorboard")["lm loss"]
    assert [step for step, _ in curve] == list(range(1, 26))


def test_attempts_whose_clocks_are_wrong(tmp_path, monkeypatch):
    """Of a node whose clock was set back, or is behind the other's: nothing goes in silence."""
    clock = itertools.count(10_000)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    write_events(tmp_path / "a", range(1, 31))
    clock = itertools.count(1_000)
    write_events(tmp_path / "a", range(21, 41), shift=1.0)
    run = load(tmp_path / "a")
    assert run.train is not None and run.train.steps.tolist() == list(range(1, 41))
    assert (run.train.values[20:] > 3.5).all() and (run.train.values[:20] < 5.1).all()
    assert any("goes on from about iteration 20, which no file" in note for note in run.notes)
    # Begun anew within the time of the first, which cannot be.
    clock = itertools.count(10_000)
    write_events(tmp_path / "b", range(1, 31))
    clock = itertools.count(10_010)
    write_events(tmp_path / "b", range(1, 11), shift=1.0)
    run = load(tmp_path / "b")
    assert run.iterations == 10
    assert any("are of the same time by their clocks" in note for note in run.notes)


def test_validations_of_a_dropped_attempt(tmp_path):
    """The later attempt has its own, and none where it has not come to."""
    write_events(tmp_path, range(1, 121))
    write_events(tmp_path, range(71, 112), shift=1.0, validate_every=100)
    validation = load(tmp_path).validation[""]
    assert validation.steps.tolist() == [50, 100]
    assert validation.values[-1] > 3
    write_events(tmp_path, range(61, 71), shift=1.0)
    assert load(tmp_path).validation[""].steps.tolist() == [50]
    write_events(tmp_path, range(41, 46), shift=1.0)
    assert not load(tmp_path).validation


def test_the_test_set_is_not_the_validation_set(tmp_path):
    """Megatron writes both under one tag, at one iteration."""
    write_events(tmp_path, [50])
    writer = SummaryWriter(str(tmp_path), filename_suffix="later")
    for value in (1.5, 9.9):
        writer.add_scalar("lm loss validation", value, 60)
    writer.close()
    assert load(tmp_path).validation[""].values[-1] == 1.5


def test_few_of_many_alphas_are_read_and_the_last(tmp_path):
    write_events(tmp_path, range(1, 501), layers=24, arguments={})
    found = events.read(list(tmp_path.glob(events.PATTERN)), wide_limit=50, keep={123})
    steps = found.scalars["alpha_p/layer_23"].steps.tolist()
    assert steps == sorted({*range(1, 501, 10), 123, 500})
    assert len(found.scalars["lm loss"].steps) == 500
    everything = events.read(list(tmp_path.glob(events.PATTERN)))
    assert len(everything.scalars["alpha_p/layer_23"].steps) == 500


@pytest.mark.parametrize("damage", ["cut", "zeros", "noise"])
def test_damaged_event_files(tmp_path, damage):
    """The end of a file that is being written is no damage."""
    write_events(tmp_path, range(1, 101))
    (path,) = tmp_path.glob(events.PATTERN)
    content = bytearray(path.read_bytes())
    if damage == "noise":
        content[len(content) // 2 :] = b"\xff" * (len(content) // 2)
    content += b"\0" * 100 if damage == "zeros" else b""
    path.write_bytes(content[:-7] if damage == "cut" else content)
    run = load(tmp_path)
    assert run.train is not None
    assert len(run.train.steps) == (100 if damage == "zeros" else pytest.approx(99, abs=60))
    assert any("damaged after byte" in note for note in run.notes) == (damage == "noise")


def test_runs_of_every_kind_together(tmp_path, capsys):
    """Names that collide, names that are HTML; with and without alphas, events, checkpoints."""
    (awkward := tmp_path / "a" / "<b>&'$x$").mkdir(parents=True)
    write_events(awkward / "tensorboard", range(1, 401))
    (awkward / "evaluation.json").write_text(
        json.dumps({"iteration": 400, "loss": 2.2, "bits_per_byte": 0.75, "layers": statistics()})
    )
    gated = report_runs.ARGUMENTS | {"xielu": False, "swiglu": True, "train_iters": 500}
    write_events(tmp_path / "b" / "run" / "events", range(1, 301), layers=0, arguments=gated)
    raw = torch.tensor([[1.0], [2.0]])
    key = "decoder.layers.mlp.activation_func.alpha_{}"
    for iteration in (10, 20):
        write_checkpoint(
            tmp_path / "c" / "run" / "checkpoints",
            iteration,
            {key.format("p"): raw * iteration, key.format("n"): -raw},
            num_layers=2,
        )
    unknown = tmp_path / "d"
    write_events(unknown, range(1, 20), arguments={})
    writer = SummaryWriter(str(unknown), filename_suffix="later")
    writer.add_scalar("lm loss", math.nan, 20)
    writer.close()
    only_evaluated = tmp_path / "e"
    only_evaluated.mkdir()
    (only_evaluated / "evaluation.json").write_text('{"loss": 2.5, "iteration": 7}')

    folders = [awkward, tmp_path / "b/run", tmp_path / "c/run", unknown, only_evaluated]
    page = report(folders, tmp_path / "out")
    for text in ("<b>&'$x$", "b/run", "c/run", "SwiGLU", "300 of 500", "0.7500", "was not finite"):
        assert text in page.text
    assert "b" not in page.tags  # the name is text
    shown = {str(image["data-file"]) for image in page.images}
    assert {"3-c-run-activation.png", "negative-share.png", "4-d-alphas-by-depth.png"} <= shown
    assert "4-d-activation.png" not in shown  # nothing says which activation
    out = capsys.readouterr().out
    assert "\x1b" not in out and "c/run: nonlinearity by layer" in out

    report([tmp_path / "b/run"], tmp_path / "out")  # old pictures go
    assert len(list((tmp_path / "out").iterdir())) == 7

    saved = load(tmp_path / "c/run")
    assert saved.alpha_p is not None and saved.alpha_p.iterations.tolist() == [0, 10, 20]
    assert saved.alpha_p.values[:, 1].tolist() == pytest.approx([0.8, 20.0, 40.0])
    measured = load(awkward)
    assert measured.measured["layer_03"].negative_share == pytest.approx(0.788, abs=1e-3)
    assert measured.layers[0].by_measured != measured.layers[0].by_normal


TOKENS = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "a/tokenizer"}


def write_runs(folder: Path, **arguments: dict[str, object]) -> list[Path]:
    """A run for each of these, with the arguments on top of the usual ones; later, the worse."""
    for number, (name, more) in enumerate(arguments.items()):
        values = report_runs.ARGUMENTS | TOKENS | {"data_path": ["d"], "seed": 42} | more
        write_events(folder / name, range(1, 51), shift=0.1 * number, arguments=values)
    return [folder / name for name in arguments]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            {"tokenizer_model": "b/tokenizer"},
            "differ in tokenizer or vocabulary (one: HuggingFaceTokenizer a/tokenizer, 128 entries "
            "with padding; two: HuggingFaceTokenizer b/tokenizer, 128 entries with padding): their "
            "losses cannot be compared",
        ),
        ({"padded_vocab_size": 640}, "two: HuggingFaceTokenizer a/tokenizer, 640 entries"),
        ({"data_path": ["e"]}, "differ in data (one: d; two: e): "),
        ({"split": "9,1,0"}, "differ in data (one: d; two: d, split 9,1,0): "),
        ({"seq_length": 64}, "differ in sequence length (one: 32; two: 64): "),
        ({"global_batch_size": 16}, "differ in batch (one: 8; two: 16): "),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_runs_differ_in_is_said(tmp_path, capsys, more, line):
    page = report(write_runs(tmp_path, one={}, two=more), tmp_path / "out")
    (said,) = [row for row in capsys.readouterr().out.splitlines() if line in row]
    assert said.removeprefix("note: ") in page.text
    ranked = "Which is best cannot be said" not in page.text
    assert ranked == ("global_batch_size" in more)


def test_other_padding_is_no_other_vocabulary(tmp_path):
    """Of another tensor-parallel size."""
    divisible = {"make_vocab_size_divisible_by": 16}
    five = {"tensor_model_parallel_size": 5, "padded_vocab_size": 160}
    folders = write_runs(tmp_path, one=divisible, two=divisible | five)
    assert not differences([load(folder) for folder in folders])


def test_the_best_run_comes_first_and_how_sure_that_is(tmp_path, capsys):
    gated = {"xielu": False, "swiglu": True}
    of_gated = {f"g{seed}": gated | {"seed": seed} for seed in (1, 2)}
    folders = write_runs(tmp_path, **of_gated, a={"seed": 1}, b={"seed": 2})
    page = report(folders[::-1], tmp_path / "out")
    for text in (capsys.readouterr().out, page.text):
        assert "Best first, by the last validation loss during training" in text
        best = text.index("SwiGLU: 3.4538 ± 0.0707 (2 seeds)")
        assert best < text.index("xIELU: 3.6538 ± 0.0707 (2 seeds)")
        assert "Mean ± sample standard deviation" in text and "cannot be said" not in text

    folders = folders[1:]
    for folder, loss, size in zip(folders, (2.35, 2.4, 2.3), (9, 9, 9), strict=True):
        of = {"loss": loss, "iteration": 50, "bits_per_byte": loss, "bytes": size, "data": ["x"]}
        (folder / "evaluation.json").write_text(json.dumps(of))
    found = rank([load(folder) for folder in folders])
    assert found is not None and "the loss of megatron_xielu.evaluate" in found.title
    assert found.rows == ["xIELU: 2.3000", "SwiGLU: 2.3500"]  # of seed 2
    assert "With one run each" in found.certainty

    # Of other tokenizers, on the same text.
    of["data"] = ["y"]
    (folders[2] / "evaluation.json").write_text(json.dumps(of))
    found = rank([load(folder) for folder in folders])
    assert found is not None and "bits per byte" in found.title
    of["bytes"] = 8
    (folders[2] / "evaluation.json").write_text(json.dumps(of))
    found = rank([load(folder) for folder in folders])
    assert found is not None and "validation loss during training" in found.title


def test_entries_are_ranked_by_the_seeds_that_all_have(tmp_path):
    """Seed 3 is a bad one, and one entry alone has it."""
    gated = {"xielu": False, "swiglu": True}
    ours, others = {f"x{seed}": {"seed": seed} for seed in (1, 2)}, {"g2": gated | {"seed": 2}}
    folders = write_runs(tmp_path, **others, **ours, g3=gated | {"seed": 3})
    found = rank([load(folder) for folder in folders])
    assert found is not None and found.rows == ["SwiGLU: 3.4038", "xIELU: 3.6038"]
    assert found.certainty.endswith(
        "Ranked by seed 2 alone, which all entries have; left out: SwiGLU: seed 3; xIELU: seed 1."
    )
    found = rank([load(tmp_path / name) for name in ("x1", "x2", "g3")])
    assert found is not None and not found.rows and "cannot be said" in found.title
    assert found.certainty == (
        "There is no seed that all entries have (xIELU: seeds 1, 2; SwiGLU: seed 3): train them "
        "with the same seeds."
    )


def rows(folders: list[Path]) -> list[str]:
    """Of the ranking."""
    found = rank([load(folder) for folder in folders])
    assert found is not None
    return found.rows


@pytest.mark.parametrize(
    ("more", "apart"),
    [
        ({"qk_layernorm": True}, ("qk_layernorm –", "qk_layernorm True")),
        ({"adam_beta2": 0.99}, ("adam_beta2 –", "adam_beta2 0.99")),
        (
            {"load": "other", "a": 1, "b": 1, "c": 1, "d": 1},
            ("load –; a –; b –; 2 more", "load other; a 1; b 1; 2 more"),
        ),
        ({"seed": 42}, ("one of 2 runs of seed 42",) * 2),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_only_seeds_of_one_training_are_averaged(tmp_path, more, apart):
    folders = write_runs(tmp_path, one={}, two={"seed": 1} | more)
    one, two = (name for name, _ in groups([load(folder) for folder in folders]))
    assert one == f"xIELU, one ({apart[0]})"
    assert two == f"xIELU, two ({apart[1]})"


def test_what_was_changed_of_ours_has_one_word_everywhere(tmp_path):
    """Of a comparison's variants, in its label and in the report; in the ranking, too."""
    changes: dict[str, dict[str, object]] = {
        "xielu": {},
        "xielu-frozen": {"xielu_frozen_alphas": True},
        "xielu-shared": {"xielu_shared_alphas": True},
        "xielu-recompute": {"xielu_recompute_output": True},
        "xielu-beta-0.3": {"xielu_beta": 0.3},
        "xielu-lr-10": {"xielu_alpha_lr_mult": 10.0},
        "xielu-decay-0.1": {"xielu_alpha_weight_decay": 0.1},
        "xielu-init-0.4-1.2": {"xielu_alpha_p_init": 0.4, "xielu_alpha_n_init": 1.2},
    }
    folders = write_runs(tmp_path, **changes)
    labels = [variants.parse(name).label for name in changes]
    assert [load(folder).label for folder in folders] == labels
    assert [row.rpartition(":")[0] for row in rows(folders)] == labels


def test_settings_of_ours_that_differ_are_in_the_table(tmp_path):
    """Files of other numbers do not look alike; what runs have of others' flags does not count."""
    one, other = [0.46123456789, 0.7, 0.7, 0.89], [0.89, 0.7, 0.7, 0.46123456789]
    folders = write_runs(
        tmp_path,
        a={"xielu_alpha_p_init": one, "xielu_frozen_alphas": True},
        b={"xielu_alpha_p_init": other, "xielu_alpha_lr_mult": 10.0},
        c={"xielu_alpha_p_init": 0.4, "xielu_alpha_weight_decay": 0.1},
        d={"xielu": False, "swiglu": True, "xielu_beta": 0.3},
    )
    runs = [load(folder) for folder in folders]
    heads, cells = unlike(runs)
    assert heads == [
        *("--xielu-frozen-alphas", "--xielu-alpha-p-init", "--xielu-alpha-lr-mult"),
        "--xielu-alpha-weight-decay",
    ]
    by_layer = "0.461235 to 0.89 by layer, no. {} of 2 such"
    assert cells == [
        ["yes", by_layer.format(1), "1.0", "0.0"],
        ["no", by_layer.format(2), "10.0", "0.0"],
        ["no", "0.4", "1.0", "0.1"],
        ["–"] * 4,
    ]
    folders = write_runs(
        tmp_path / "files", a={"xielu_alpha_p_init": one}, b={"xielu_alpha_p_init": other}
    )
    start = "αp from 0.461235 to 0.89 by layer"
    assert rows(folders) == [
        f"xIELU, {start}, a ({start}, no. 1 of 2 such): 3.4038",
        f"xIELU, {start}, b ({start}, no. 2 of 2 such): 3.5038",
    ]


def test_runs_of_other_lengths_are_not_averaged(tmp_path):
    folders = write_runs(tmp_path, one={}, two={"seed": 1}, three={"seed": 2})
    arguments = report_runs.ARGUMENTS | TOKENS | {"data_path": ["d"], "seed": 1}
    write_events(tmp_path / "short", range(1, 31), arguments=arguments, validate_every=30)
    first, second = rows([*folders, tmp_path / "short"])
    told = "xIELU, one, two, three (iterations 50; last validation 50): 3.5038"
    assert first == told
    assert second == "xIELU, short (iterations 30; last validation 30): 3.9196"


def test_seeds_are_averaged_whatever_their_folders_and_layout(tmp_path):
    """Checkpoints have enumerations among the arguments, event files texts of them."""
    more = {
        **{"save": "b/checkpoints", "load": "b/checkpoints", "data_cache_path": "b/cache"},
        **{"eval_interval": 50, "log_interval": 10, "xielu_made_with": "y", "world_size": 2},
        **{"tensor_model_parallel_size": 1, "micro_batch_size": 2, "consumed_train_samples": 9},
    }
    folders = write_runs(tmp_path, one={"save": "a/checkpoints"}, two={"seed": 1} | more)
    assert rows(folders) == ["xIELU: 3.4538 ± 0.0707 (2 seeds)"]
    experts = {"num_experts": 4}  # whose balance is that of a micro-batch
    apart = write_runs(tmp_path, three=experts, four=experts | {"seed": 1} | more)
    assert len(groups([load(folder) for folder in apart])) == 2
    for seed, folder in enumerate(folders):
        arguments = {"seed": seed, "data_path": ["d"], "cuda_graph_modules": [signal.SIGTERM]}
        write_checkpoint(folder / "checkpoints", 50, {"x": torch.ones(1)}, **TOKENS, **arguments)
    assert rows(folders) == ["xIELU: 3.4538 ± 0.0707 (2 seeds)"]


def test_one_file_by_two_paths_is_no_difference(tmp_path):
    """As long as it is found: from the run's folder or one above."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text.bin").touch()
    (tmp_path / "linked").symlink_to("data")
    (tmp_path / "a" / "tokenizer").mkdir(parents=True)
    (tmp_path / "a" / "tokenizer" / "tokenizer.json").touch()
    other = {"tokenizer_model": f"{tmp_path}/a/tokenizer", "seed": 1}
    folders = write_runs(
        tmp_path,
        one={"data_path": ["data/text"]},
        two=other | {"data_path": [f"{tmp_path}/linked/text"]},
    )
    assert not differences([load(folder) for folder in folders])
    assert rows(folders) == ["xIELU: 3.4538 ± 0.0707 (2 seeds)"]
    for folder, data in zip(folders, ("data/text", f"{tmp_path}/data/text"), strict=True):
        of = {"loss": 2.5, "iteration": 50, "data": [data]}
        (folder / "evaluation.json").write_text(json.dumps(of))
    assert rows(folders)[0].startswith("xIELU: 2.5000 ± ")


def test_runs_whose_arguments_are_not_known_are_not_ranked_by_loss(tmp_path, capsys):
    folders = write_runs(tmp_path, one={}, two={"seed": 1})
    write_events(tmp_path / "unknown", range(1, 51), arguments={})
    folders.append(tmp_path / "unknown")
    page = report(folders, tmp_path / "out")
    for text in (capsys.readouterr().out, page.text):
        assert "Which is best cannot be said" in text
        assert "the arguments of unknown are not known: whether the losses can be compared" in text
        assert "xIELU: seeds 1, 42; unknown: a seed that is not known)" in text
    assert not differences([load(tmp_path / "unknown")])
    folders = write_runs(tmp_path, one={}, two={"xielu": False, "vocab_size": 100})
    for folder in folders:
        of = {"loss": 2.5, "iteration": 50, "bits_per_byte": 0.5, "bytes": 9, "data": ["x"]}
        (folder / "evaluation.json").write_text(json.dumps(of))
    found = rank([load(folder) for folder in folders])
    assert found is not None and "bits per byte" in found.title
    assert [row.partition(":")[0] for row in found.rows] == ["xIELU", "GELU"]


def test_a_column_has_its_losses_from_one_place(tmp_path, capsys):
    one, two = write_runs(tmp_path, one={}, two={})
    (two / "evaluation.json").write_text('{"loss": 9.5, "iteration": 50, "bits_per_byte": 3.5}')
    report([one, two], tmp_path / "out")
    head, _, first, second = capsys.readouterr().out.splitlines()[:4]
    assert re.search(r"validation loss +validation PPL +evaluate: loss +evaluate: bits/byte", head)
    assert re.search(r" 3\.40\d+ .* 30\.\d+ +– +– ", first)
    assert re.search(r" 3\.50\d+ .* 33\.\d+ +9\.5000 +3\.5000 ", second)


def test_the_page_says_what_each_run_was(tmp_path):
    arguments = {"lr": 0.002, "seed": 7, "xielu_made_with": "megatron_xielu 0.1.0 (commit abc)"}
    page = report(write_runs(tmp_path, one=arguments), tmp_path / "out")
    for text in (
        *("4 layers × 32, 4 heads", "8 sequences of 32 tokens", "lr 0.002", "TP 2", "data", "d"),
        *("HuggingFaceTokenizer a/tokenizer", "seed", "7", "commit abc"),
    ):
        assert text in page.text
    two = report(write_runs(tmp_path, one=arguments, two={"lr": 0.1}), tmp_path / "both")
    assert "Mean over the last 1 %" in two.titles["training loss"]
    assert "Where they differ" in two.text and "lr 0.1" in two.text
    assert two.text.count("4 layers × 32") == 1  # what is alike stands once


def test_activations_keep_their_colours():
    """And any two can be told apart, also by eyes without one kind of cones (Machado 2009)."""
    styles = run_styles(["xielu", "gelu", "xielu", None])
    assert styles[0]["color"] == styles[2]["color"] == ACTIVATION_COLOURS["xielu"]
    assert styles[0]["linestyle"] != styles[2]["linestyle"]
    assert run_styles(["gelu", "xielu"])[1] == styles[0]
    assert len({style["color"] for style in run_styles(["xielu"] * 5)}) == 5
    assert set(ACTIVATION_COLOURS) == set(catalog.ACTIVATIONS)

    red_blind = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
    green_blind = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    to_xyz = np.array([[0.434, 0.376, 0.190], [0.213, 0.715, 0.072], [0.018, 0.109, 0.873]])
    for eye in (np.eye(3), np.array(red_blind), np.array(green_blind)):
        seen = []
        for colour in ACTIVATION_COLOURS.values():
            rgb = np.array(to_rgb(colour))
            linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
            x, y, z = np.cbrt(to_xyz @ np.clip(eye @ linear, 0, 1))
            seen.append((116 * y - 16, 500 * (x - y), 200 * (y - z)))  # CIELAB
        apart = [math.dist(a, b) for a, b in itertools.combinations(seen, 2)]
        assert min(apart) > 25  # 2.3 is a just noticeable difference


def test_colours_only_where_asked(tmp_path):
    write_events(tmp_path, range(1, 11))
    run = load(tmp_path)
    name_apart([run])
    plain, coloured = (terminal.render([run], colours=colours) for colours in (False, True))
    assert "\x1b" not in plain and "\x1b[48;2;" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    run.name = "\x1b[2J\x9b\u202e"  # a folder's, which a terminal would obey
    coloured = terminal.render([run, run], colours=True)
    html = page.render([run], [], [[]])
    assert r"<h1>Training report: \x1b[2J\x9b\u202e</h1>" in html and "default-src 'none'" in html
    assert r"\x1b[2J\x9b\u202e" in coloured
    assert not set("\x9b\u202e") & set(coloured) and "\x1b[2J" not in coloured


def test_curves_and_checkpoint_of_different_runs_are_told_apart(tmp_path):
    write_events(tmp_path / "events", range(1, 11))
    key = "decoder.layers.mlp.activation_func.alpha_{}"
    tensors = {key.format(side): torch.ones(4, 1) for side in "pn"}
    write_checkpoint(tmp_path / "checkpoints", 10, tensors)
    notes = "\n".join(load(tmp_path).notes)
    assert "alpha_p at iteration 10 is another" in notes and "alpha_n" in notes


def test_a_converted_model_has_no_start(tmp_path):
    """convert writes a ``release``; its alphas are those it came with, not initial ones."""
    key = "decoder.layers.mlp.activation_func.alpha_{}"
    write_checkpoint(tmp_path, 0, {key.format(side): torch.ones(4, 1) for side in "pn"})
    (tmp_path / "iter_0000000").rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    run = load(tmp_path)
    assert run.parameters == 8 and run.alpha_p.iterations.tolist() == [0]
    assert run.alpha_p.values == pytest.approx(math.log1p(math.e))
    assert all(layer.start is None for layer in run.layers)


def test_unreadable_parts_are_notes(tmp_path):
    write_events(tmp_path, range(1, 11))
    write_checkpoint(tmp_path, 10, {"x": torch.ones(1)})
    (tmp_path / "iter_0000010" / ".metadata").write_bytes(b"none")
    (tmp_path / "evaluation.json").write_text("{")
    run = load(tmp_path)
    assert run.activation == "xielu" and run.layers  # of the event files
    notes = "\n".join(run.notes)
    assert ".metadata cannot be read" in notes and "evaluation.json cannot be read" in notes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{tmp}/none"], "{tmp}/none is not a folder"),
        (["{tmp}/empty"], "{tmp}/empty is no run: it has neither event files"),
        (["{tmp}/many"], "{tmp}/many holds runs but is none; name them: {tmp}/many/one"),
        (["{tmp}/many/one", "--output", "{tmp}/file"], "--output {tmp}/file is a file"),
    ],
)
def test_refusals(tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    write_events(tmp_path / "many" / "one" / "events", [1])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as refusal:
        main([word.format(tmp=tmp_path) for word in arguments])
    line = str(refusal.value)
    assert line.startswith(f"megatron_xielu.report: error: {message.format(tmp=tmp_path)}")
    assert "\n" not in line and sorted(tmp_path.rglob("*")) == before


def test_without_plotting_libraries(tmp_path):
    """As a command, where Matplotlib is missing."""
    (tmp_path / "matplotlib.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'matplotlib'\", name='matplotlib')"
    )
    done = subprocess.run(
        [sys.executable, "-m", "megatron_xielu.report", str(tmp_path)],
        env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "pip install 'megatron_xielu[plots]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# The number for "how far from linear"


def gaussian_moments(alpha_p: float, alpha_n: float) -> float:
    """Nonlinearity of xIPReLU on a standard normal in closed form; β = 0.5."""
    third = math.sqrt(2 / math.pi)  # E[x³; x > 0]
    covariance = 0.5 + (alpha_p - alpha_n) * third
    mean = (alpha_p + alpha_n) / 2
    square = 1.5 * (alpha_p**2 + alpha_n**2) + 0.25 + 2 * 0.5 * (alpha_p - alpha_n) * third
    return 1 - covariance**2 / (square - mean**2)


def test_nonlinearity_against_closed_forms():
    normal = Inputs.standard_normal()
    relu = 1 - 0.25 / (0.5 - 1 / (2 * math.pi))
    assert nonlinearity(FIXED["ReLU"], normal) == pytest.approx(relu, abs=1e-6)
    assert nonlinearity(FIXED["ReLU²"], normal) == pytest.approx(1 - (2 / math.pi) / 1.25, abs=1e-6)
    assert nonlinearity(lambda x: 3 * x - 1, normal) == pytest.approx(0, abs=1e-12)
    assert nonlinearity(lambda x: 0 * x, normal) == 0
    for alphas in ((0.8, 0.8), (2.0, 0.3), (166.0, 40.0), (1e-3, 1e-3)):
        shape = Shape("xiprelu", *alphas, 0.5)
        assert nonlinearity(shape.value, normal) == pytest.approx(
            gaussian_moments(*alphas), abs=1e-6
        )
    # The nearer to linear its alphas, the nearer to linear the activation.
    values = [
        nonlinearity(Shape("xielu", alpha_p, 0.5001, 0.5).value, normal)
        for alpha_p in (0.01, 0.1, 1.0, 10.0)
    ]
    assert values == sorted(values)


def test_nonlinearity_on_a_histogram_of_normal_inputs():
    entry = statistics(1)[0]
    inputs = Inputs.histogram(**entry["histogram"])
    shape = Shape("xielu", 0.8, 0.8, 0.5)
    normal = Inputs.standard_normal()
    shifted = Inputs(normal.x + entry["mean"], normal.weights)
    assert nonlinearity(shape.value, inputs) == pytest.approx(
        nonlinearity(shape.value, shifted), abs=2e-3
    )
    with pytest.raises(ValueError, match="rising edges"):
        Inputs.histogram([0, 1], [0])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_shapes_are_the_activation(name):
    module = ACTIVATIONS[name](alpha_p_init=1.7, alpha_n_init=0.9).double()
    x = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    y = module(x)
    y.sum().backward()
    shape = Shape(name, 1.7, 0.9, 0.5)
    at = x.detach().numpy()
    np.testing.assert_allclose(shape.value(at), y.detach().numpy(), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(shape.slope(at), x.grad.numpy(), rtol=1e-6)
    assert beta(None) == DEFAULT_BETA
    assert initial_alphas(None, ["layer_00"]) == ([DEFAULT_ALPHA_INIT],) * 2
