"""Prepared folders in one data list, by their share of the tokens that a run reads."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_xielu.common import data_lists, prepared_data
from megatron_xielu.data import command
from megatron_xielu.evaluate import data as evaluate_data


def prepare(folder: Path, name: str, rows: int, *options: str) -> None:
    """``rows`` documents of 1 to 9 words into a folder."""
    texts = folder / f"{name}-texts"
    texts.mkdir()
    for i in range(2):
        content = [json.dumps({"text": f"{name}{i}{j} " * (j % 9 + 1)}) for j in range(rows)]
        (texts / f"{i}.jsonl").write_text("\n".join(content))
    common = ["--tokenizer", str(folder / "tokenizer.json"), "--eod-token", "end", "--workers", "1"]
    output = ["--output", str(folder / name), "--tasks", "2", "--valid-fraction", "0.2"]
    command.main(["--source", str(texts), *common, *output, *options])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "end": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        prepare(folder, "a", 60)
        prepare(folder, "b", 20)
        prepare(folder, "c", 20, "--valid-fraction", "0")
        prepare(folder, "other", 20, "--eod-token", "?")
    return folder


@pytest.fixture
def folder(prepared: Path, monkeypatch) -> Iterator[Path]:
    monkeypatch.chdir(prepared)
    yield prepared
    shutil.rmtree(prepared / "mix", ignore_errors=True)


def blend(*words: str, output: str = "mix") -> None:
    command.main(["--output", output, "--blend", *words])


def tokens(folder: Path, name: str, split: str = "train") -> int:
    return json.loads((folder / name / "manifest.json").read_text())[split]["tokens"]


def test_shares_of_tokens(folder: Path):
    """Whatever each folder has; of each, shards by their tokens; in lists that Megatron takes."""
    from megatron.core.datasets.utils import get_blend_from_list

    blend("3:a", "1:b")
    listed = data_lists.of_splits(str(folder / "mix" / "per_split_data_args.json"))
    assert listed["train"] == (folder / "mix" / "data_args.txt").read_text().split()
    for split in ("train", "valid"):
        prefixes, weights = get_blend_from_list(listed[split])
        assert sum(weights) == pytest.approx(1)
        for name, share in (("a", 0.75), ("b", 0.25)):
            manifest = json.loads((folder / name / "manifest.json").read_text())
            for entry in manifest["shards"]:
                if entry["split"] == split:
                    place = prefixes.index(str(folder / name / entry["prefix"]))
                    part = entry["tokens"] / manifest[split]["tokens"]
                    assert weights[place] == pytest.approx(share * part)


def test_taken_as_prepared_data(folder: Path):
    """By the launcher, by a training's checks and by an evaluation."""
    blend("0.5:a", "0.5:b/manifest.json")
    path = str(folder / "mix" / "per_split_data_args.json")
    place, made_with = data_lists.prepared_with(path, [])
    assert prepared_data.is_one_of(str(folder / "mix" / "tokenizer"), made_with)
    assert place == folder / "a"
    args = Namespace(
        **dict.fromkeys(data_lists.ARGUMENTS), split=None, eval_iters=1, tokenizer_type=None
    )
    args.per_split_data_args_path, args.tokenizer_model = path, str(folder / "mix" / "tokenizer")
    assert data_lists.look(args, 2) == ([], [])
    found = evaluate_data._of_manifest(folder / "mix" / "manifest.json", "valid")
    assert len(found) == 4 and evaluate_data.described_text_bytes([Path(p) for p in found])


def test_how_often_it_is_read(folder: Path, capsys):
    many = 5 * tokens(folder, "b") / 0.5
    blend("0.5:a", "0.5:b", "--train-tokens", str(many))
    printed = capsys.readouterr()
    assert f"{folder / 'b'}: 50.0%, {tokens(folder, 'b'):,} training tokens, read 5 times" in (
        printed.out
    )
    assert printed.err.count("more than about 4 times") == 1 and str(folder / "b") in printed.err
    assert f"a run of at most {2 * tokens(folder, 'b'):,} tokens reads nothing" in printed.out


def test_a_folder_without_validation(folder: Path, capsys):
    blend("1:a", "1:c")
    assert f"{folder / 'c'} has no validation documents" in capsys.readouterr().err
    listed = data_lists.of_splits(str(folder / "mix" / "per_split_data_args.json"))
    assert len(listed["train"]) == 8 and len(listed["valid"]) == 4
    shutil.rmtree(folder / "mix")
    blend("1:c")
    assert json.loads((folder / "mix" / "per_split_data_args.json").read_text())["valid"] is None


REFUSED = {
    "a": "--blend a: not WEIGHT:FOLDER, such as 0.7:data/web",
    "0:a": "--blend 0:a: not WEIGHT:FOLDER",
    "inf:a": "--blend inf:a: not WEIGHT:FOLDER",
    "1:nothing": "--blend 1:nothing: no manifest.json in nothing; give a folder",
    "1:a-texts": "no manifest.json in a-texts",
    "1:a 1:./a": "is given twice; give it once, with both weights",
    "1:a 1:other": "were made with two tokenizers",
    "1:a 1:mix": "--blend 1:mix: it is a blend itself; give the folders that it is of",
    "1:a 2:b": "it is a blend of other folders, weights or data, and a run on it",
    "1:a --output b": "it holds data of its own; choose another --output",
    "1:lost": "train/00000.idx is missing or has not the",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(folder: Path, case: str):
    blend("1:a", "1:b")
    before = (folder / "mix" / "manifest.json").read_bytes()
    if case == "1:lost":
        shutil.copytree(folder / "a", folder / "lost")
        (folder / "lost" / "train" / "00000.idx").unlink()
    with pytest.raises(SystemExit) as end:
        blend(*case.split())
    assert REFUSED[case] in str(end.value.code) and "\n" not in str(end.value.code)
    assert (folder / "mix" / "manifest.json").read_bytes() == before


def test_a_blend_is_no_data_to_make_or_verify(folder: Path):
    blend("1:a", "1:b")
    source = ("--source", "a-texts", "--tokenizer", "tokenizer.json", "--eod-token", "end")
    for options, said in (
        (("--verify",), "a blend; verify the data of"),
        (source, "a blend; choose"),
    ):
        with pytest.raises(SystemExit, match=said):
            command.main(["--output", "mix", *options])
