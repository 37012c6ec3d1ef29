"""What of its own files a command finds damaged: a task done again, or one line with the fix."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import damaged
from hypothesis import HealthCheck, given, settings
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_xielu.data import command, executors, manifest, recipe, records, scheduler
from megatron_xielu.data.errors import DataError
from megatron_xielu.data.verify import verify

RESULT = ("manifest.json", "train/00000.bin", "train/00001.bin", "train/00002.idx")


def prepare(folder: Path, *options: str) -> None:
    """In a folder that holds texts and a tokeniser, into ``data``."""
    common = ["--source", "texts", "--tokenizer", "tokenizer.json", "--eod-token", "end"]
    small = ["--tasks", "3", "--valid-fraction", "0", "--workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        command.main([*common, *small, "--output", "data", *options])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "end": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "texts").mkdir()
    for index in range(3):
        rows = json.dumps({"text": "a text " * (index + 1)}) + "\n"
        (folder / "texts" / f"{index}.jsonl").write_text(rows * 2)
    prepare(folder)
    shutil.copytree(folder / "data", folder / "copy")
    return folder


@pytest.fixture
def folder(prepared: Path) -> Iterator[Path]:
    """The same, whatever tests before have done to it."""
    yield prepared
    shutil.rmtree(prepared / "data")
    shutil.copytree(prepared / "copy", prepared / "data")


def message(folder: Path, *options: str) -> str:
    with pytest.raises(SystemExit) as end:
        prepare(folder, *options)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"train": 1}', None])
def test_manifest(folder: Path, content: bytes | None):
    path = folder / "data" / "manifest.json"
    path.write_bytes(content) if content is not None else path.unlink()
    said = message(folder, "--verify")
    assert "manifest.json" in said and ("without --verify" in said or "not finished" in said)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"tasks": "3"}', None])
def test_plan(folder: Path, content: bytes | None):
    path = folder / "data" / "work" / "plan.json"
    path.write_bytes(content) if content is not None else path.unlink()
    said = message(folder)
    assert str(path) in said and "bring it back, choose another --output, or start over" in said


def test_everything_else(folder: Path, capsys):
    """One start mends it: damaged records are of tasks to do again, the rest is of no meaning."""
    before = [(folder / "data" / name).read_bytes() for name in RESULT]
    work = folder / "data" / "work"
    for index, content in enumerate((b"", b"[]", b'{"shards": {}}')):
        (work / "records" / f"{index:05d}.json").write_bytes(content)
    for name in ("request.json", "slurm_job", "logs/completions/odd", "failures/0odd"):
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_bytes(b"\xff")
    for name in ("0-0-0", "00001-here-1", "00002-here-99999999999999999999"):
        (work / "unfinished" / name).mkdir(parents=True)
        (work / "unfinished" / name / "progress.json").write_bytes(b"[1e999]")
    prepare(folder)
    printed = capsys.readouterr().err
    for task in range(3):
        assert (
            printed.count(f"{task:05d}.json: ") == printed.count(f"task {task} is done again") == 1
        )
    after = [(folder / "data" / name).read_bytes() for name in RESULT]
    assert before == after


def test_folders_of_earlier_releases(folder: Path):
    path = folder / "data" / "work" / "plan.json"
    values = json.loads(path.read_bytes())
    for name in ("punkt_sha256", "skip_bad_rows", "part_bytes"):
        del values[name]
    path.write_text(json.dumps(values | {"from a later release": 1}))
    prepare(folder)


def test_parts_of_a_large_file(folder: Path, tmp_path: Path, monkeypatch, capsys):
    """A task each; only what reads a replaced file is done again, and cut as at the start."""
    monkeypatch.setattr(command, "_LEAST_TASK_BYTES", 1)
    (texts := tmp_path / "texts").mkdir()
    rows = [json.dumps({"text": "a " * (i % 7 + 1)}) + "\n" for i in range(60)]
    (texts / "large.jsonl").write_text("".join(rows))
    options = ("--source", str(texts), "--output", str(tmp_path / "data"))
    (texts / "large.jsonl.gz").write_bytes(gzip.compress("".join(rows).encode(), 0))
    prepare(folder, *options)
    assert "1 files are larger than a task's share" in capsys.readouterr().err
    made = manifest.load(tmp_path / "data")
    assert made.train.documents == 120 and {entry.task for entry in made.shards} == {0, 1, 2}
    assert made.train.tokens == 2 * sum(i % 7 + 2 for i in range(60))
    records = {path: path.stat().st_ino for path in (tmp_path / "data/work/records").glob("*.json")}
    (texts / "large.jsonl.gz").write_bytes(gzip.compress("".join(rows[:9]).encode(), 0))
    monkeypatch.undo()
    prepare(folder, *options)
    same = [path for path, inode in records.items() if path.stat().st_ino == inode]
    assert len(same) == 2 and manifest.load(tmp_path / "data").train.documents == 69


@pytest.mark.parametrize("name", ["data_args.txt", "per_split_data_args.json"])
def test_verify_reads_what_megatron_is_given(folder: Path, name: str):
    path = folder / "data" / name
    for content in (path.read_bytes()[:-20], None):
        path.write_bytes(content) if content is not None else path.unlink()
        said = message(folder, "--verify")
        assert f"{name} does not list the shards of manifest.json" in said
    prepare(folder)
    prepare(folder, "--verify")


def test_a_long_path_for_temporary_files(folder: Path, tmp_path: Path, monkeypatch):
    """Workers talk by sockets there, whose names are short."""
    (place := tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    shutil.rmtree(folder / "data")
    prepare(folder)


PRINTED = {
    "Submitted batch job 71": "71",
    "Submitted batch job 71 on cluster c2": "71",  # where SLURM_CLUSTERS names one
    "Welcome to node 5\n--> OK\nSubmitted batch job 71\nlimit: 9": "71",
    "71": "71",
    "": None,
    "no job": None,
}


@pytest.mark.parametrize("printed", PRINTED)
def test_job_of_which_sbatch_speaks(folder: Path, tmp_path: Path, monkeypatch, printed: str):
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\ncat << END\n{printed}\nEND\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    shutil.rmtree(folder / "data" / "work" / "logs" / "completions")
    request = executors.Request("slurm", workers=1, tasks=3, slurm_partition="cpu")
    executor = executors.make_executor(folder / "data", request)
    if (expected := PRINTED[printed]) is None:
        with pytest.raises(DataError, match=f"no number of a job: '{printed}'"):
            executor.run()
    else:
        executor.run()
        assert executor.job_id == expected


@pytest.mark.parametrize(("printed", "waits"), [("71\n71", True), ("CLUSTER: c2", False)])
def test_a_job_that_squeue_knows(tmp_path: Path, monkeypatch, printed: str, waits: bool):
    """Where SLURM_CLUSTERS names a cluster, it prints that, too."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{printed}'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert scheduler._in_queue("71") == waits


def test_no_budget_any_more(folder: Path):
    """A task that an earlier budget has cut is not finished."""
    before = [(folder / "data" / name).read_bytes() for name in RESULT]
    shutil.rmtree(folder / "data")
    prepare(folder, "--max-tokens", "1")
    assert (folder / "data" / "train" / "00000.bin").stat().st_size < len(before[1])
    prepare(folder)
    assert before == [(folder / "data" / name).read_bytes() for name in RESULT]


def test_another_format_than_at_the_start(folder: Path):
    said = message(folder, "--format", "text")
    assert said.startswith("prepare_data.py: error: --format: the output folder was started with")


def test_verify_of_a_folder_that_can_only_be_read(folder: Path, monkeypatch):
    (folder / "data" / "train" / "00000.bin").write_bytes(b"")

    def unlink(path: Path, **_: Any) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(DataError, match=r"train/00000: \.bin has 0 bytes"):
        verify(folder / "data", workers=1)


def _attempts(output: Path) -> None:
    assert all(seen.tokens >= 0 for seen in records.attempts(output))


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "manifest": ("manifest.json", manifest.load),
    "verify": ("manifest.json", lambda output: verify(output, workers=1)),
    "plan": (
        "work/plan.json",
        lambda output: recipe.changed_tasks(recipe.load(output), recipe.load(output)),
    ),
    "record": ("work/records/00000.json", lambda output: records.damage(output, 0)),
    "loaded record": ("work/records/00000.json", lambda output: records.load_all(output, 3)),
    "progress": ("work/unfinished/00000-here-1/progress.json", _attempts),
}


@pytest.mark.parametrize("reader", READERS)
def test_any_damage(folder: Path, reader: str):
    name, read = READERS[reader]
    path = folder / "data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    good = json.loads(path.read_bytes()) if path.exists() else [1]

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged(good))
    def damage(content: Any) -> None:
        path.write_text(json.dumps(content))
        try:
            read(folder / "data")
        except DataError as error:
            assert path.name in str(error) or "shards are damaged" in str(error)

    damage()
