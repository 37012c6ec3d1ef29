"""tools/compare_activations.py where its flags, its folder or a file in it are not as they should
be: one line that names them, before anything is trained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import compare_activations as tool
import pytest
import torch
import torch.distributed.checkpoint as dcp
from compare import bpe_text, byte_text, package_text, records, results, settings, text, training
from compare import variants as variants_of
from hostile import damaged
from hypothesis import given
from hypothesis import settings as examples
from test_compare import COSTS, SETUP, make_record
from torch.utils.tensorboard import SummaryWriter

from megatron_xielu.common.schema import Malformed

XIELU = variants_of.parse("xielu")


@pytest.fixture(autouse=True)
def signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay the tests' own."""
    monkeypatch.setattr(tool, "raise_on_stop_signals", lambda: None)


def refusal(words: list[str]) -> str:
    with pytest.raises(SystemExit) as end:
        tool.main(words)
    return str(end.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", ""], "'' says neither how many seeds nor which"),
        (["--seeds", ","], "',' says neither"),
        (["--seeds", "1,,2"], "says neither"),
        (["--seeds", "-1"], "says neither"),
        (["--seeds", "1,x"], "says neither"),
        (["--seeds", "١,٢"], "says neither"),
        (["--seeds", "9" * 5000], "says neither"),
        (["--seeds", "0,1"], "a seed is 1 or more"),
        (["--seeds", "999999999"], "more than 1000 seeds"),
        (["--ffn", "xielu=" + "9" * 5000], "is not NAME=WIDTH"),
        (["--ablation", "xielu-init-nan"], "'xielu-init-nan' is not a variant"),
        (["--ablation", "xielu-beta-inf"], "'xielu-beta-inf' is not a variant"),
        (["--ablation", "xielu-init-0"], "'xielu-init-0' is not a variant"),
        (["--ablation", "xielu-init-1001"], "'xielu-init-1001' is not a variant"),
        (
            ["--ablation", "xielu-beta-1e9"],
            "with numbers above 0, at most 1000, for P, N, B, M and W",
        ),
        (["--out", "\udcff"], "--out '\\udcff' is not UTF-8"),
    ],
)
def test_flags(options, message, capsys):
    with pytest.raises(SystemExit):
        tool.parse_options(["tiny", *options])
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (b"a.txt", os.mkfifo, "a.txt is no file"),
        (b"a.txt", lambda path: os.symlink(b"nowhere", path), "a.txt is no file"),
        (
            b"\xff.txt",
            lambda path: os.close(os.open(path, os.O_CREAT)),
            "'\\udcff.txt' is not UTF-8",
        ),
    ],
)
def test_a_file_of_a_text_that_cannot_be_read(preset, name, make, message, tmp_path):
    (tmp_path / "texts").mkdir()
    make(os.fsencode(tmp_path / "texts") + b"/" + name)
    words = [preset, *["--prepare-text"] * (preset == "small")]
    words += ["--text", str(tmp_path / "texts")]
    said = refusal([*words, "--out", str(tmp_path / "out")])
    assert said.startswith("compare: ") and message in said and said.isascii()


def test_the_command_of_one_seed_gives_one_seed():
    options = tool.parse_options(["tiny", "--seeds", "7,"])
    assert options.seeds == [7]
    assert tool.parse_options(tool._words(options)).seeds == [7]


@pytest.mark.parametrize("out", ["file", "file/out", "loop", "/proc/none"])
def test_a_folder_that_cannot_be_written(tmp_path, out):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for words in (["quick"], ["small", "--prepare-text"], ["quick", "--check-resume"]):
        line = refusal([*words, "--out", str(tmp_path / out)])
        assert line.startswith(f"compare: --out {tmp_path / out} cannot be written to: ")
        assert "\n" not in line


def test_a_folder_that_no_comparison_made(tmp_path):
    """Its results would be replaced, and what it has in resume/ removed."""
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / "me.pdf").touch()
    for words in (["quick"], ["small", "--prepare-text"], ["quick", "--check-resume"]):
        line = refusal([*words, "--out", str(tmp_path)])
        assert f"--out {tmp_path} has resume, which would be replaced, and no .lock" in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["me.pdf", "resume"]
    (tmp_path / ".lock").touch()
    os.close(tool.hold_lock(tmp_path))


@pytest.mark.parametrize("content", ["", "[1]", "{", "null"])
def test_settings_that_are_none(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(SystemExit) as error:
        tool.check_settings(tmp_path, {"settings": {}})
    assert str(error.value).startswith(f"compare: {tmp_path}/settings.json: it is ")
    assert "\n" not in str(error.value) and "delete that file" in str(error.value)


def write_record(out: Path, content: Any) -> Path:
    path = tool.folder_of(out, "xielu", 42) / "record.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 43}, "it is of xielu with seed 43"),
        ({"variant": "gelu"}, "it is of gelu with seed 42"),
        ({"train": []}, "no losses"),
        ({"valid": [[1, None]]}, "valid[0][1] is None, not a number"),
        ({"alphas": None}, "it has no alphas"),
        ({"alphas": {"iterations": [0], "positive": [[1]], "negative": []}}, "alphas"),
        ({"alphas": {"iterations": [0, 1], "positive": [[1], []], "negative": [[1], [1]]}}, "alph"),
        ({"memory": float("nan")}, "memory is nan"),
    ],
)
def test_records_are_checked_before_anything_is_trained(tmp_path, change, message):
    path = write_record(tmp_path, make_record("xielu").to_json() | change)
    words = ["quick", "--activations", "xielu", "--tensor-parallel", "1", "--out", str(tmp_path)]
    line = refusal(words)
    assert line.startswith(f"compare: {path}: ") and message in line and "\n" not in line
    assert not (tmp_path / "text").exists()


def test_any_damage_to_a_record_is_a_line(tmp_path):
    @examples(max_examples=150, deadline=None)
    @given(damaged(make_record("xielu").to_json()))
    def damage(content: Any) -> None:
        write_record(tmp_path, content)
        try:
            found = tool.finished_records(tmp_path, [XIELU], [42])
        except (SystemExit, Malformed) as error:
            assert "record.json" in str(error) and "\n" not in str(error)
        else:
            adapted = results.adaptations(found, [XIELU])
            assert "xIELU" in results.markdown(found, [XIELU], COSTS, [], adapted, SETUP)
            json.dumps(results._json(found, [XIELU], COSTS, [], adapted, SETUP))

    damage()


def alphas(steps: range) -> dict[str, list[tuple[int, float]]]:
    return {f"alpha_{side}/layer_00": [(step, 0.9) for step in steps] for side in "pn"}


CURVES = {tag: [(29, 3.0), (30, 2.0)] for tag in (records.TRAIN, records.VALID, "iteration-time")}


@pytest.mark.parametrize(
    ("curves", "iteration", "message"),
    [
        (CURVES | {records.VALID: [(29, 3.0)]}, 30, "no 'lm loss validation' at iteration 30"),
        ({tag: CURVES[tag] for tag in (records.TRAIN, records.VALID)}, 30, "no 'iteration-time'"),
        (CURVES, 30, "at no iteration are all alphas known"),
        (CURVES | {"alpha_p/layer_00": [(30, 1.0)]}, 30, "at no iteration are all alphas known"),
        (CURVES | alphas(range(1, 31)), 20, "no complete checkpoint of iteration 30"),
        (
            CURVES | alphas(range(1, 31)) | {records.VALID: [(30, float("inf"))]},
            30,
            "valid[0][1] is inf, not a number",
        ),
    ],
)
def test_trainings_that_left_too_little(tmp_path, curves, iteration, message):
    writer = SummaryWriter(str(tmp_path / "events"))
    for tag, curve in curves.items():
        for step, value in curve:
            writer.add_scalar(tag, value, step)
    writer.close()
    (tmp_path / "log.txt").touch()
    checkpoint = tmp_path / "checkpoints" / f"iter_{iteration:07d}"
    dcp.save({}, checkpoint_id=checkpoint, no_dist=True)
    torch.save({"args": Namespace()}, checkpoint / "common.pt")
    (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    with pytest.raises(SystemExit) as error:
        records.read_record(tmp_path, settings.QUICK, XIELU, 42, peak_rss=1, on_gpu=False)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert f"delete {tmp_path} and run the same command again" in str(error.value)


class TestText:
    @pytest.mark.parametrize("damage", ["", "[]", "missing index", "cut"])
    def test_of_bytes_is_written_again(self, library: Path, tmp_path: Path, damage: str) -> None:
        out = tmp_path / "text"
        byte_text.prepare(library, out)
        good = (out / "train.bin").read_bytes()
        if damage == "missing index":
            (out / "train.idx").unlink()
        elif damage == "cut":
            (out / "train.bin").write_bytes(good[:-2])
        else:
            (out / "manifest.json").write_text(damage)
        byte_text.prepare(library, out)
        assert (out / "train.bin").read_bytes() == good and (out / "train.idx").exists()
        assert json.loads((out / "manifest.json").read_text())["documents"]

    @pytest.fixture
    def carried(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """``OUT/text`` as it is brought from another machine, of the packages."""
        out = tmp_path / "text"
        for split in text.SPLITS:
            prefix = out / split / "train" / "00000"
            prefix.parent.mkdir(parents=True)
            shard = {"prefix": "train/00000"}
            for kind in ("bin", "idx"):
                prefix.with_suffix(f".{kind}").write_bytes(b"x")
                shard |= {kind: {"sha256": bpe_text.files.sha256(prefix.with_suffix(f".{kind}"))}}
            totals = {"tokens": 5, "documents": 2}
            text.write_json(out / split / "manifest.json", {"shards": [shard], "train": totals})
        described = {"vocab_size": 16_384, **package_text.describe(None)}
        text.write_json(out / "source.json", described)
        monkeypatch.setattr(package_text, "fetch", lambda *rest: pytest.fail("a download"))
        return out

    def test_is_taken_as_it_is(self, carried: Path) -> None:
        assert bpe_text.prepare(None, carried).tokens == {"train": 5, "valid": 5}

    @pytest.mark.parametrize(
        "name",
        ["source.json", "valid/manifest.json", "train/manifest.json", "train/train/00000.bin"],
    )
    def test_partly_copied(self, carried: Path, name: str) -> None:
        (carried / name).unlink()
        with pytest.raises(SystemExit) as error:
            bpe_text.prepare(None, carried)
        line = str(error.value)
        assert line.startswith(f"compare: {carried / name} is missing") and "copy it again" in line

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("source.json", "{", "source.json is damaged, or of another text"),
            ("source.json", "[]", "source.json is damaged, or of another text"),
            ("train/manifest.json", "[]", "train/manifest.json: it is [], not an object"),
            ("train/manifest.json", '{"shards": [], "train": {}}', "it has no train.tokens"),
            (
                "train/manifest.json",
                '{"shards": [], "train": {"tokens": 1, "documents": 1}}',
                "its shards are [], not train/00000",
            ),
        ],
    )
    def test_damaged(self, carried: Path, name: str, content: str, message: str) -> None:
        (carried / name).write_text(content)
        with pytest.raises((SystemExit, Malformed)) as error:
            bpe_text.prepare(None, carried)
        assert str(carried) in str(error.value) and message in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_corpus_without_its_parts_is_made_again(self, library: Path, tmp_path: Path) -> None:
        for name in ("train.jsonl", "SOURCES.md"):
            package_text.write_corpus(tmp_path / "corpus", library)
            (tmp_path / "corpus" / name).unlink()
        (tmp_path / "corpus" / "corpus.json").write_text("{")
        package_text.write_corpus(tmp_path / "corpus", library)
        assert len(list((tmp_path / "corpus").iterdir())) == 4

    @pytest.mark.parametrize("line", ["{", "[]", '{"text": 3}'])
    def test_a_damaged_corpus(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "train.jsonl").write_text('{"text": "a"}\n' + line)
        with pytest.raises((SystemExit, Malformed), match=r"train\.jsonl:2: "):
            list(bpe_text._texts(tmp_path / "train.jsonl"))


def test_a_training_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True)\n"
    code += "time.sleep(60)"
    children: list[subprocess.Popen] = []
    start = training.start

    def start_deaf(command: list[str], **rest: Any) -> subprocess.Popen:
        children.append(start([sys.executable, "-c", code], **rest))
        return children[0]

    def stop(self: object, log: str) -> None:
        if "up" in log:
            raise training.Stopped(signal.SIGTERM)

    monkeypatch.setattr(training, "start", start_deaf)
    monkeypatch.setattr(training._Progress, "read", stop)
    monkeypatch.setattr(training, "_GRACE_SECONDS", 0.5, raising=False)
    lock, begin = tool.hold_lock(tmp_path), time.monotonic()
    with pytest.raises(training.Stopped):
        training.train(
            *("deaf", []),
            **{"ranks": 1, "on_gpu": False, "tokens_per_iteration": 1, "keep_open": lock},
            log=tmp_path / "log.txt",
        )
    assert time.monotonic() - begin < 20 and children[0].returncode == -signal.SIGKILL
    os.close(lock)
    os.close(tool.hold_lock(tmp_path))  # nobody holds it any more
