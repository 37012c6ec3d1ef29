"""tools/evaluate_suite.py: what it refuses before it begins, and its table. lm-eval itself runs on
trained models in test_compare.py."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections import namedtuple
from pathlib import Path

import evaluate_suite
import pytest
import torch
from compare import byte_tokenizer
from suite import runs, table
from suite.evaluation import Evaluation, Options, Result, Score
from suite.tasks import Task

from megatron_xielu.checkpoints import writer
from megatron_xielu.checkpoints.folder import RELEASE, TRACKER
from megatron_xielu.convert.architecture import Architecture
from megatron_xielu.convert.megatron_arguments import arguments_of
from megatron_xielu.convert.tensors import parts

TASKS = [Task("arc_easy", "acc_norm", "a"), Task("own", "acc", "b")]
OPTIONS = Options("cpu", "auto", "8", None, None, keep=False)


def make_run(folder: Path, activation: str = "relu2", seed: int = 1, **changes: object) -> Path:
    """A run's folder with a checkpoint of two small layers, and OUT/text/tokenizer beside it."""
    sizes = dict(layers=2, hidden=16, ffn=32, heads=2, groups=2, head_dim=8, vocabulary=264)
    rest = dict(positions=32, norm_epsilon=1e-5, rope_theta=1e4, rope_factor=None, tied=True)
    names = dict(qk_layernorm=False, activation=activation, beta=0.5, init_std=0.02)
    architecture = Architecture(**{**sizes, **rest, **names})
    chunks = []
    for part in parts(architecture):
        key = part.megatron if part.layer is None else f"decoder.layers.{part.megatron}"
        read = torch.ones(part.shape).clone
        chunks.append(writer.Chunk(key, part.layer, 2, part.shape, torch.float32, read))
    training = dict(seed=seed, seq_length=32, consumed_train_samples=10, **changes)
    arguments = Namespace(**{**vars(arguments_of(architecture, torch.float32)), **training})
    writer.write(folder / "checkpoints" / RELEASE, chunks, arguments)
    (folder / "checkpoints" / TRACKER).write_text(RELEASE)
    byte_tokenizer.write(folder.parent.parent / "text" / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "out"
    for seed in (1, 2):
        make_run(out / "relu2" / f"seed_{seed}", seed=seed)
    return out


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which it refuses them."""
    with pytest.raises(SystemExit) as end:
        evaluate_suite.main(list(map(str, words)))
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


class TestRefusals:
    def test_runs(self, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        first = out / "relu2" / "seed_1"
        other = tmp_path / "other"
        wrong = {
            "LayerNorm": make_run(other / "norm" / "seed_1", normalization="LayerNorm"),
            "is relu2, not gelu": make_run(other / "gelu" / "seed_1"),
            "differ in lr (None and 0.1)": make_run(other / "relu2" / "seed_2", seed=2, lr=0.1),
            "are both ReLU² with seed 1": shutil.copytree(first, other / "relu2" / "seed_1"),
            "neither .metadata nor mp_rank_*": other / "relu2",
            "is not a folder": tmp_path / "missing",
            "add --tokenizer": make_run(tmp_path / "elsewhere" / "a" / "run"),
        }
        shutil.rmtree(tmp_path / "elsewhere" / "text")
        for said, run in wrong.items():
            assert said in refusal(capsys, first, run, "--output", tmp_path / "o"), said
        assert not (tmp_path / "o").exists()

    def test_flags(self, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run, output = out / "relu2" / "seed_1", ["--output", tmp_path / "o"]
        for said, words in {
            "name runs and --output": [run],
            "--tokenizer /none: there is no such": [run, *output, "--tokenizer", "/none"],
            "--baseline xielu: not among the rows, relu2": [run, *output, "--baseline", "xielu"],
        }.items():
            assert said in refusal(capsys, *words), said
        for words in (["--tasks", ","], ["--batch-size", "0"], ["--limit", "x"]):
            with pytest.raises(SystemExit, match="2"):
                evaluate_suite.main([str(run), *map(str, output), *words])
            assert f"argument {words[0]}: " in capsys.readouterr().err
        if not torch.cuda.is_available():
            assert "PyTorch sees no GPU" in refusal(capsys, run, *output, "--device", "cuda")

    def test_a_damaged_result(self, out: Path, tmp_path: Path) -> None:
        (run,) = runs.read([out / "relu2" / "seed_1"], None)
        file = tmp_path / run.name / "result.json"
        file.parent.mkdir(parents=True)
        file.write_text('{"of": {}, "scores": {"own": 1}}')
        with pytest.raises(ValueError, match=r"scores\.own is 1, not an object; delete "):
            Evaluation(run, TASKS, tmp_path, OPTIONS)
        file.unlink()
        (file.parent / "model").mkdir()  # of an older checkpoint, it may be
        with pytest.raises(ValueError, match=r"model has no result\.json beside it"):
            Evaluation(run, TASKS, tmp_path, OPTIONS)

    def test_disk(self, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = runs.read([out / "relu2" / f"seed_{seed}" for seed in (1, 2)], None)
        evaluations = [Evaluation(run, TASKS, tmp_path, OPTIONS) for run in found]
        size = evaluations[0].needs
        assert size == found[0].size > 2**15
        usage = namedtuple("usage", "free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(size))
        evaluate_suite._check_disk(evaluations, tmp_path, 1, keep=False)
        for at_once, keep in ((2, False), (1, True)):
            with pytest.raises(ValueError, match="are free; name a folder on another disk"):
                evaluate_suite._check_disk(evaluations, tmp_path, at_once, keep=keep)


@pytest.mark.parametrize(
    ("count", "visible", "names"),
    [(0, None, []), (1, None, ["0"]), (2, None, ["0", "1"]), (2, "5,GPU-a", ["5", "GPU-a"])],
)
def test_a_run_on_each_gpu(
    count: int, visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    expected = [{"CUDA_VISIBLE_DEVICES": name} for name in names] or [{}]
    assert evaluate_suite._places(None) == expected
    assert evaluate_suite._places("cpu") == [{}]


def test_rows_without_a_folder_that_names_them(tmp_path: Path) -> None:
    """Of a cluster's runs, by what their checkpoints say."""
    tokenizer = tmp_path / "text" / "tokenizer"
    folders = [
        make_run(tmp_path / "runs" / "a", "xielu", seed=7, xielu_frozen_alphas=True),
        make_run(tmp_path / "runs" / "b", "swiglu"),
        make_run(
            tmp_path / "runs" / "c",
            "xielu",
            xielu_alpha_lr_mult=10.0,
            xielu_alpha_weight_decay=0.0,
            xielu_alpha_p_init=0.4,
        ),
    ]
    frozen, swiglu, fast = runs.read([folders[0] / "checkpoints", *folders[1:]], str(tokenizer))
    assert (frozen.name, frozen.label) == ("xielu-frozen/seed_7", "xIELU, alphas frozen")
    assert fast.name == "xielu-lr-10-init-p-0.4/seed_1"
    assert fast.label == "xIELU, learning rate of alphas × 10, αp from 0.4"
    assert (swiglu.name, swiglu.label) == ("swiglu/seed_1", "SwiGLU")
    assert frozen.tokens == 320


def test_a_folder_that_says_another_thing_than_its_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "out" / "xielu-lr-10" / "seed_1", "xielu")
    (run,) = runs.read([folder], None)
    assert (run.row, run.label) == ("xielu-lr-10", "xIELU")


def test_table(tmp_path: Path) -> None:
    """Against numbers by hand."""

    def result(easy: float, own: float) -> Result:
        metrics = {"acc": 0.1, "acc_norm": easy, "acc_norm_stderr": 0.03}
        other = {"acc": own, "acc_stderr": 0.04}
        return Result({}, {"arc_easy": Score(metrics, 9, "a"), "own": Score(other, 9, "b")})

    results = {
        "swiglu": {1: result(0.50, 0.20), 2: result(0.60, 0.30)},
        "xielu": {1: result(0.52, 0.20), 2: result(0.64, 0.30)},
    }
    folders = [make_run(tmp_path / "out" / row / "seed_1", row) for row in results]
    found = runs.read(folders, None)
    shown, content = table.summary(
        results, found, TASKS, "swiglu", ["Mind this."], {"date": "today"}
    )
    assert "**Mind this.**" in shown and "- date: today" in shown
    assert "| SwiGLU | 2 | 55.0 ± 7.1 | 25.0 ± 7.1 | 40.00 ± 7.07 |" in shown
    assert "| *standard error of a run* | | 3.0 | 4.0 | 2.50 |" in shown
    assert "| *guessing* | | 25 | – | – |" in shown
    assert (
        "| xIELU | +1.00, +2.00 | +1.50 | -4.85 to +7.85 | 0.205 | 0.205 | within noise |" in shown
    )
    assert content["rows"]["xielu"]["average"]["mean"] == pytest.approx(41.5)
    assert "| | arc_easy | own |" in shown
    assert "| xIELU | +3.0 (-9.7 to +15.7) | +0.0 (+0.0 to +0.0) |" in shown
    assert content["differences"]["arc_easy"]["xielu"]["mean"] == pytest.approx(3)
