"""What of its own files a command finds damaged: a task done again, or one line with the fix."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
from hostile import damaged
from hypothesis import HealthCheck, given, settings
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_xielu.data import (
    blending,
    command,
    executors,
    manifest,
    merging,
    recipe,
    records,
    scheduler,
)
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


SHARDS = ("--shards", "2")  # of three tasks: the second of the last two


def contents(data: Path) -> dict[str, bytes]:
    """Of all that Megatron and --verify are given."""
    found = [*data.glob("*.*"), *data.glob("train/*"), *data.glob("valid/*")]
    return {str(path.relative_to(data)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def merged(prepared: Path) -> dict[str, bytes]:
    """The prepared data, merged as it is made."""
    prepare(prepared, *SHARDS, "--output", str(prepared / "merged" / "data"))
    expected = contents(prepared / "merged" / "data")
    # The data list names its own folder.
    place = str(prepared / "merged" / "data").encode()
    return {name: x.replace(place, str(prepared / "data").encode()) for name, x in expected.items()}


def test_merged(prepared: Path, merged: dict[str, bytes], tmp_path: Path):
    """As Megatron's own builder does it, and listed everywhere."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    assert {name for name in merged if name.startswith("train")} == {
        *("train/00000.bin", "train/00000.idx", "train/00001-00002.bin", "train/00001-00002.idx")
    }
    builder = IndexedDatasetBuilder(str(tmp_path / "0.bin"), dtype=np.uint16)
    for task in (1, 2):
        builder.add_index(str(prepared / "copy" / "train" / f"0000{task}"))
    builder.finalize(str(tmp_path / "0.idx"))
    for kind in ("bin", "idx"):
        assert merged[f"train/00001-00002.{kind}"] == (tmp_path / f"0.{kind}").read_bytes()
    assert merged["data_args.txt"].decode().split() == [
        *("14", str(prepared / "data" / "train" / "00000")),
        *("16", str(prepared / "data" / "train" / "00001-00002")),
    ]


@pytest.mark.parametrize("state", ["begun", "renamed", "recorded", "finished", "moved back"])
def test_merging_goes_on(folder: Path, merged: dict[str, bytes], state: str):
    """From wherever it was stopped, and without work that is done."""
    data, other = folder / "data", folder / "merged" / "data"
    shutil.copytree(folder / "copy", data, dirs_exist_ok=True)
    if state == "begun":
        (data / "work" / "merging" / "00001-00002").mkdir(parents=True)
        (data / "work" / "merging" / "00001-00002" / "train.bin").write_bytes(b"half")
        (data / "train" / "00000-00002.bin").write_bytes(b"of another budget")
    elif state != "moved back":
        for kind in ("bin", "idx"):
            shutil.copy(other / f"train/00001-00002.{kind}", data / "train")
    if state in ("recorded", "finished"):
        shutil.copytree(other / "work" / "merged", data / "work" / "merged")
    if state == "finished":
        for task in (1, 2):
            for kind in ("bin", "idx"):
                (data / "train" / f"0000{task}.{kind}").unlink()
    plan = data / "work" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"shards": 2}))
    times = [path.stat().st_mtime_ns for path in sorted((data / "work" / "records").iterdir())]
    prepare(folder)
    assert contents(data) == merged and not (data / "work" / "merging").exists()
    assert times == [x.stat().st_mtime_ns for x in sorted((data / "work" / "records").iterdir())]
    prepare(folder, "--verify")


def test_damage_of_what_is_merged(folder: Path, merged: dict[str, bytes], capsys):
    """Its tasks are done again; a shard that is not what it was is merged into nothing."""
    data = folder / "data"
    source = data / "train" / "00002.bin"
    source.write_bytes(bytes(source.stat().st_size))
    plan = data / "work" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"shards": 2}))
    said = message(folder)
    assert "train/00002.bin has another checksum than when it was written; remove it" in said
    assert (data / "train" / "00001.bin").exists() and not list(data.glob("train/*-*"))
    source.unlink()
    prepare(folder)
    assert contents(data) == merged

    path = data / "train" / "00001-00002.bin"
    path.write_bytes(bytes(path.stat().st_size))
    said = _damage_of(folder)
    assert "train/00001-00002: .bin has another checksum than in the manifest" in said
    capsys.readouterr()
    prepare(folder)
    assert contents(data) == merged and capsys.readouterr().err.count("is done again") == 2
    for name in ("train/00001-00002.idx", "work/merged/00001-00002.json"):
        (data / name).write_bytes(b"")
        prepare(folder)
        assert contents(data) == merged


def _damage_of(folder: Path) -> str:
    with pytest.raises(SystemExit) as end:
        prepare(folder, "--verify")
    return str(end.value.code)


def test_merged_to_a_budget_and_on(folder: Path, merged: dict[str, bytes]):
    """A budget that ends within a span, another, none."""
    shutil.rmtree(folder / "data")
    for tokens in ("25", "17"):
        prepare(folder, *SHARDS, "--max-tokens", tokens)
        prepare(folder, "--verify")
        made = manifest.load(folder / "data")
        assert int(tokens) <= made.train.tokens < int(tokens) + 8
        assert len(made.shards) == len(list((folder / "data" / "train").glob("*.bin")))
    prepare(folder, *SHARDS)
    assert contents(folder / "data").keys() == merged.keys()
    made = [json.loads(x["manifest.json"]) for x in (contents(folder / "data"), merged)]
    assert made[0] == made[1]


def test_other_shards_than_at_the_start(folder: Path, monkeypatch):
    """Data that an earlier release made stay as they are, unless the flag is given."""
    plan = folder / "data" / "work" / "plan.json"
    values = json.loads(plan.read_bytes())
    del values["shards"]
    plan.write_text(json.dumps(values))
    monkeypatch.setattr(command, "_SHARDS", 2)
    prepare(folder)
    assert (folder / "data" / "train" / "00002.bin").exists()
    prepare(folder, *SHARDS)
    assert (folder / "data" / "train" / "00001-00002.bin").exists()
    said = message(folder, "--shards", "1")
    assert "--shards: the output folder was started with 2, this is 1" in said
    with pytest.raises(DataError, match=r"--shards: the disk is too small .* start again"):
        merging._room(folder, [1, 10**18])


def test_merged_beyond_two_gigabytes(tmp_path: Path):
    """Of bytes and of tokens: offsets in .bin and ends of documents that need 64 bits."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    lengths = [[2**31 - 1, 2**30], [5, 3], [2**31 - 1, 4]]  # tokens of 2 bytes
    for i, each in enumerate(lengths):
        file = MegatronTokenizedFile(str(tmp_path), str(i), token_size=2)
        file.sequence_lengths, file.document_indices = each, [0, 1, 2]
        file.close()
        with (tmp_path / f"{i}.bin").open("wb") as stream:  # a hole, and the last document
            stream.seek(2 * each[0])
            stream.write(np.full(4, 7 + i, np.uint16).tobytes())
            stream.truncate(2 * sum(each))
    merging.join_indices(tmp_path / "all.idx", [tmp_path / f"{i}" for i in range(3)])
    with (tmp_path / "all.bin").open("wb") as stream:
        for i, each in enumerate(lengths):
            stream.seek(2 * sum(map(sum, lengths[:i])) + 2 * each[0])
            stream.write(np.full(4, 7 + i, np.uint16).tobytes())
        stream.truncate(2 * sum(map(sum, lengths)))
    data = IndexedDataset(str(tmp_path / "all"))
    assert data.sequence_lengths.tolist() == [length for each in lengths for length in each]
    assert data.document_indices.tolist() == list(range(7))
    assert [data.get(i, 0, 3).tolist() for i in (1, 3, 5)] == [[7] * 3, [8] * 3, [9] * 3]
    assert data.index.sequence_pointers[-1] == 2 * (sum(map(sum, lengths)) - 4) > 2**33


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
    "blend": (
        "manifest.json",
        lambda output: blending.blend(output.parent / "mix", [f"1:{output}"], 1.0),
    ),
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
