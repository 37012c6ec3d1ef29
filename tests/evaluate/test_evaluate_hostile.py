"""What `megatron_xielu.evaluate` reads, damaged: it works, or is refused in a line."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_files import write_prepared, write_tokenizer
from hostile import damaged, damaged_bytes
from hypothesis import given, settings
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_xielu.evaluate import checkpoint, data, result, run

MANIFEST = {
    "tokenizer": {"name": "tokenizer.json", "sha256": "0", "vocab_size": 12, "eod_id": 0},
    "shards": [
        {"prefix": "train/00000", "split": "train", "text_bytes": 9, "task": 0},
        {"prefix": "valid/00000", "split": "valid", "text_bytes": 5, "task": 0},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """As tools/prepare_data.py leaves it: two shards of 12 tokens, and the manifest."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "valid"):
        (folder / split).mkdir()
        write_tokens(folder / split / "00000", range(12))
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    return folder


def write_tokens(prefix: Path, tokens: Any, dtype: type = np.int32) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    builder.add_document(np.array([*tokens]), [5, 7])
    builder.finalize(f"{prefix}.idx")


def find(**flags) -> list[Path]:
    names = ("data_path", "data_args_path", "per_split_data_args_path", "data_split")
    return data.find(Namespace(**{**dict.fromkeys(names), **flags}))


@pytest.mark.parametrize(
    ("content", "split", "message"),
    [
        ("", "valid", "{path} is no JSON"),
        ("[]", "valid", "{path} is not a JSON object of lists"),
        ('{"valid": 3}', "valid", "{path}: 'valid' is 3, not a list"),
        ('{"valid": [["a"]]}', "all", "{path}: 'valid': ['a'] is no prefix of files"),
        ('{"train": "a"}', "valid", "no data in it, or not in this --data-split"),
        ("{}", "valid", "no data in it, or not in this --data-split"),
        ('{"valid": null}', "valid", "no data in it, or not in this --data-split"),
        ('{"valid": ""}', "valid", "{path}: 'valid' is [], not a list"),
        ('{"valid": "a\\u0000b"}', "valid", "{path}: 'valid': 'a\\x00b' is no prefix of files"),
    ],
)
def test_files_by_split(tmp_path, content, split, message):
    path = tmp_path / "splits.json"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        find(per_split_data_args_path=path, data_split=split)
    assert str(error.value).startswith("--per-split-data-args-path")
    assert message.format(path=path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "it is [], not an object"),
        ({"shards": {}}, "shards is {}, not a list"),
        ({"shards": [{"prefix": 3, "split": "valid", "text_bytes": 1}]}, "shards[0].prefix is 3"),
        (
            {"shards": [{"prefix": "a", "split": "valid", "text_bytes": -1}]},
            "shards[0].text_bytes must be 0 or more, not -1",
        ),
        ({"shards": []}, "it has no tokenizer"),
    ],
)
def test_manifests(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        find(data_path=[str(tmp_path)])
    assert f"--data-path: {tmp_path}/manifest.json: {message}" in str(error.value)


def test_any_damage_to_json_is_a_line(folder, tmp_path):
    by_split = {"train": "1 " + str(folder / "train/00000"), "valid": [0.5, "a"], "test": None}
    path = tmp_path / "manifest.json"

    def try_it(**flags) -> None:
        try:
            assert find(**flags)
        except ValueError as error:
            assert str(error).startswith("--")
        except OSError as error:  # a name that is too long
            assert str(error)

    @settings(max_examples=100, deadline=None)
    @given(damaged(MANIFEST), damaged(by_split))
    def damage(manifest: Any, splits: Any) -> None:
        path.write_text(json.dumps(manifest))
        try_it(data_path=[str(path)], data_split="all")
        data.described_text_bytes([tmp_path / "valid" / "00000"])
        path.write_text(json.dumps(splits))
        try_it(per_split_data_args_path=path, data_split="all")

    damage()


def test_any_damage_to_an_index_is_a_line(folder, tmp_path):
    good = (folder / "valid" / "00000.idx").read_bytes()
    (tmp_path / "a.bin").write_bytes((folder / "valid" / "00000.bin").read_bytes())

    @settings(max_examples=100, deadline=None)
    @given(damaged_bytes(good))
    def damage(content: bytes) -> None:
        (tmp_path / "a.idx").write_bytes(content)
        try:
            tokens = data.Tokens([tmp_path / "a"], 4)
        except ValueError as error:
            assert str(tmp_path / "a") in str(error) and "\n" not in str(error)
        else:
            tokens.least_and_largest(0, 1)
            tokenizer = Namespace(eod=11, detokenize=lambda ids: "x" * len(ids))
            tokens.decoded_bytes(tokenizer, 0, 1)

    damage()


@pytest.mark.parametrize(
    ("tokens", "dtype", "least"),
    [([-1, *range(11)], np.int32, -1), ([math.nan, *range(11)], np.float32, -(2**63))],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_tokens_that_are_none(tmp_path, tokens, dtype, least):
    write_tokens(tmp_path / "a", tokens, dtype)
    found = data.Tokens([tmp_path / "a"], 4)
    assert found.least_and_largest(0, 1) == (least, 10)


def test_data_of_another_tokenizer(tmp_path, capsys):
    write_prepared(tmp_path, ["a", "b"])
    write_tokenizer(tmp_path / "other", ["b", "a"])
    args = Namespace(rank=0, tokenizer_type="HuggingFaceTokenizer", tokenizer_model="who/name")
    run._check_data(args, [tmp_path / "valid/00000"])
    assert "made with the tokenizer 'tokenizer.json'" in capsys.readouterr().err
    args.tokenizer_model = str(tmp_path / "other")
    with pytest.raises(ValueError, match="token 0 is 'a' in these data, and 'b' in --tokenizer-mo"):
        run._check_data(args, [tmp_path / "valid/00000"])


def test_a_result_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "evaluation.json").mkdir()
    with pytest.raises(ValueError, match=r"evaluation\.json is a folder; name a file in it"):
        result.output_file(None, tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="cannot be written: File name too long; name another"):
        result.output_file(tmp_path / ("x" * 255), tmp_path / "checkpoints")
    found = result.Evaluation(
        *("c", 1, "xielu", 1e6, 10, 10, "", ["a"], None, 4, None),
    )
    assert json.loads(json.dumps(found.to_json()))["perplexity"] > 1e300
    with pytest.raises(OSError):
        result.report(found, tmp_path / "evaluation.json")
    assert "1000000.000000 nats per token" in capsys.readouterr().out  # hours of work

    def closed(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        result.report(found, tmp_path / "written.json")
    assert json.loads((tmp_path / "written.json").read_text())["loss"] == 1e6


def test_a_folder_to_type_is_quoted(tmp_path):
    folder = tmp_path / "my run"
    (folder / "iter_0000002").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("nan")
    with pytest.raises(ValueError, match=f"megatron_xielu.checkpoints '{folder}' repair"):
        checkpoint.find(folder, None)
    (folder / "iter_0000002" / ".metadata").touch()
    with pytest.raises(ValueError, match=f"give --load '{folder}' --ckpt-step 2"):
        checkpoint.find(folder / "iter_0000002", None)
