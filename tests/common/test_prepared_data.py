"""`common.prepared_data`: data that do not fit the vocabulary or the tokenizer are named."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
from dataset_files import write_dataset, write_prepared, write_tokenizer

from megatron_xielu.common import data_lists, prepared_data
from megatron_xielu.data import sources
from megatron_xielu.data.errors import DataError

WORDS = ["<eod>", "a", "b", "c"]


def look(prefix: Path, vocabulary: int | None, model: object, kind: str = "HuggingFaceTokenizer"):
    args = Namespace(tokenizer_type=kind, tokenizer_model=model and str(model))
    return prepared_data.look({str(prefix): "--data-path"}, args, vocabulary)


@pytest.mark.parametrize("place", [0, 150_000, 299_999])
def test_tokens_beyond_the_vocabulary_without_a_manifest(tmp_path, place):
    """Some of the beginning, the middle and the end are read."""
    write_dataset(tmp_path / "text", [300_000], {place: 256})
    [fault], doubts = look(tmp_path / "text", 256, None, "NullTokenizer")
    assert fault.startswith(
        f"--data-path {tmp_path}/text: {tmp_path}/text.bin has token 256, the model's vocabulary "
        "only 256 entries; give the data's tokenizer and --padded-vocab-size more"
    )
    assert doubts == [] and look(tmp_path / "text", 257, None) == look(tmp_path, None, None)
    write_dataset(tmp_path / "text", [300_000], {place: -1})
    assert "has token -1," in look(tmp_path / "text", 257, None)[0][0]


def test_the_vocabulary_of_a_manifest(tmp_path):
    write_prepared(tmp_path, WORDS)
    tokenizer = tmp_path / "tokenizer"
    [fault], _ = look(tmp_path / "train/00000", 3, tokenizer)
    assert fault == (
        f"--data-path {tmp_path}/train/00000: its tokens go up to 3 ({tmp_path}/manifest.json), "
        f"the model's vocabulary has 3 entries; give --tokenizer-model {tokenizer} and "
        "--padded-vocab-size 1024 (pretrain.sh takes both from the data where neither TOKENIZER "
        "nor PADDED_VOCAB_SIZE is given)"
    )
    assert look(tmp_path / "train/00000", 4, tokenizer) == ([], [])
    assert look(tmp_path / "train/00000", 4, None, "NullTokenizer") == ([], [])
    # One that does not name these data, or says nothing, or is no manifest.
    write_dataset(tmp_path / "train/00001", [3], {0: 9})
    assert "has token 9," in look(tmp_path / "train/00001", 4, tokenizer)[0][0]
    (tmp_path / "manifest.json").write_text("[]")
    assert look(tmp_path / "train/00000", 3, "some/other") == ([], [])


def test_another_tokenizer(tmp_path):
    """Certain where an id is another token; else to be looked at."""
    prefix, other = tmp_path / "data/train/00000", tmp_path / "other"
    write_prepared(tmp_path / "data", WORDS, name="who/name")
    write_tokenizer(other, ["<eod>", "b", "a", "c", "d"])
    [fault], doubts = look(prefix, 128, other)
    assert doubts == [] and fault == (
        f"--data-path {prefix}: token 1 is 'a' in these data, and 'b' in --tokenizer-model "
        f"{other}; give --tokenizer-model {tmp_path}/data/tokenizer (pretrain.sh takes it "
        "from the data where TOKENIZER is not given)"
    )
    write_tokenizer(other, WORDS[:3])
    assert "token 3 is 'c' in these data, and none in" in look(prefix, 128, other)[0][0]
    write_tokenizer(other, WORDS, normalizer=None)  # the same, in other bytes
    assert look(prefix, 128, other) == look(prefix, 128, other / "tokenizer.json") == ([], [])
    assert look(prefix, 128, "who/name") == ([], [])
    (other / "tokenizer.json").write_text("{}")
    for model, kind in (("who/else", None), (other, None), (None, "GPT2BPETokenizer")):
        faults, [doubt] = look(prefix, 128, model, kind or "HuggingFaceTokenizer")
        assert (
            faults == []
            and f"made with the tokenizer 'who/name', and trained with {model or kind}; "
        )
        assert f"if that gives other tokens, give --tokenizer-model {tmp_path}/data/tok" in doubt


def test_unigram_tokens_have_scores(tmp_path):
    write_prepared(tmp_path, WORDS)
    for second, score in (("b", -1.0), ("a", -1.0)):
        vocab = [["<eod>", 0.0], [second, score], ["b", -2.0], ["c", -3.0]]
        text = json.dumps({"model": {"vocab": vocab}, "added_tokens": []})
        (tmp_path / "unigram.json").write_text(text)
        found = look(tmp_path / "train/00000", 128, tmp_path / "unigram.json")
        said = "token 1 is 'a' in these data, and 'b' in" if second == "b" else "differ in scores"
        assert said in str(found)


@pytest.mark.parametrize(
    ("added", "parts", "what"),
    [
        ({"<s>": 4}, {"normalizer": {"type": "NFC"}}, "normalizer"),
        ({"<s>": 4}, {"pre_tokenizer": {"type": "Digits"}}, "pre_tokenizer"),
        ({"<s>": 4}, {"merges": [["a", "c"]]}, "merges"),
        ({"<s>": 4}, {"merges": ["a b"]}, None),  # as older files write them
        ({"<s>": 4, "<pad>": 9}, {"merges": [["a", "b"]]}, "added tokens"),
    ],
)
def test_the_same_tokens_from_other_rules(tmp_path, added, parts, what):
    """Text may become other ids: a doubt that says where they differ."""
    write_prepared(tmp_path / "data", WORDS, {"<s>": 4}, merges=[["a", "b"]])
    write_tokenizer(tmp_path / "run", WORDS, added, **{"merges": [["a", "b"]], **parts})
    faults, doubts = look(tmp_path / "data/train/00000", 128, tmp_path / "run")
    assert faults == [] and len(doubts) == bool(what)
    assert all(f"--tokenizer-model {tmp_path}/run differ in {what}; " in line for line in doubts)


def test_added_tokens(tmp_path):
    """One that the run lacks is no harm where the data need not contain it."""
    data, run = tmp_path / "data", tmp_path / "run"
    write_prepared(data, WORDS, {"<pad>": 9, "<s>": 4})
    prefix = data / "train/00000"
    write_tokenizer(run, WORDS, {"<s>": 4})
    faults, [doubt] = look(prefix, 128, run)
    assert faults == [] and "differ in added tokens; " in doubt
    for added, said in (
        ({"<pad>": 9}, "token 4 is '<s>' in these data, and none in"),  # ends their documents
        ({"<mask>": 9, "<s>": 4}, "token 9 is '<pad>' in these data, and '<mask>' in"),
        ({"<pad>": 8, "<s>": 4}, "token 9 is '<pad>' in these data, and none in"),
    ):
        write_tokenizer(run, WORDS, added)
        assert said in look(prefix, 128, run)[0][0]


def test_data_of_two_tokenizers(tmp_path):
    """A fault whatever the run's is; not where they differ in bytes only."""
    a, b, c = (tmp_path / name for name in "abc")
    write_prepared(a, WORDS)
    write_prepared(b, [*WORDS[::-1]])
    write_prepared(c, WORDS, normalizer=None)
    args = Namespace(tokenizer_type="NullTokenizer", tokenizer_model=None)
    flags = {f"{folder}/train/00000": "--data-path" for folder in (a, b)}
    assert prepared_data.look(flags, args, None) == (
        [
            f"--data-path {a}/train/00000 and {b}/train/00000 were made with two tokenizers "
            f"({a}/tokenizer and {b}/tokenizer); prepare one of them again"
        ],
        [],
    )
    args = Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=f"{a}/tokenizer")
    assert len(prepared_data.look(flags, args, 128)[0]) == 1
    flags = {f"{folder}/train/00000": "--data-path" for folder in (a, c)}
    assert prepared_data.look(flags, args, 128) == ([], [])
    (c / "tokenizer/tokenizer.json").unlink()
    assert "made with two tokenizers" in prepared_data.look(flags, args, 128)[0][0]


def test_one_tokenizer_of_two_names(tmp_path):
    for folder, name in (("a", "tokenizer.json"), ("b", "who/name")):
        write_prepared(tmp_path / folder, WORDS, name=name)
    prefixes = [f"{tmp_path}/{folder}/train/00000" for folder in "ab"]
    folder, tokenizers = data_lists.prepared_with("", prefixes)
    assert folder == tmp_path / "a" and len(tokenizers) == 2
    args = Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="who/name")
    assert prepared_data.look(dict.fromkeys(prefixes, "--data-path"), args, 128) == ([], [])


def test_what_data_were_prepared_with(tmp_path):
    for name, words in (("a", WORDS), ("b", [*WORDS, "d"])):
        (tmp_path / name).mkdir()
        write_prepared(tmp_path / name, words)
    write_dataset(tmp_path / "text", [3])
    for data_args, prefixes in (
        (f"{tmp_path}/a/per_split_data_args.json", []),
        (f"{tmp_path}/a/data_args.txt", []),
        ("", ["1", f"{tmp_path}/a/train/00000", "2", f"{tmp_path}/a/valid/00000"]),
    ):
        folder, [tokenizer] = data_lists.prepared_with(data_args, prefixes)
        assert (folder, tokenizer.vocab_size) == (tmp_path / "a", 4)
    for prefixes in (
        [],
        [f"{tmp_path}/text"],
        [f"{tmp_path}/a/train/00000", f"{tmp_path}/text"],
        [f"{tmp_path}/a/train/00000", f"{tmp_path}/b/train/00000"],
    ):
        assert data_lists.prepared_with("", prefixes) is None
    assert data_lists.prepared_with(f"{tmp_path}/absent.json", []) is None


def test_a_part_of_prepared_data_is_no_folder_of_texts(tmp_path):
    write_prepared(tmp_path, WORDS)
    part = tmp_path / "train"
    assert data_lists.what_takes(str(part)) == (
        "is a part of prepared data; give --per-split-data-args-path "
        f"{tmp_path}/per_split_data_args.json"
    )
    with pytest.raises(DataError, match="train is a part of the prepared data in "):
        sources.find(str(part), subset=None, format=None, glob=None)
    (tmp_path / "manifest.json").unlink()
    assert "prepare_data.py --source" in data_lists.what_takes(str(part))


def test_a_path_to_type_is_quoted(tmp_path):
    write_prepared(tmp_path / "my data", WORDS)
    whole = f"give --per-split-data-args-path '{tmp_path}/my data/per_split_data_args.json'"
    assert data_lists.what_takes(str(tmp_path / "my data")).endswith(whole)
    assert data_lists.what_takes(str(tmp_path / "my data" / "train")).endswith(whole)
    (tmp_path / "my data" / "manifest.json").unlink()
    texts = f"--source '{tmp_path}/my data' makes"
    assert texts in data_lists.what_takes(str(tmp_path / "my data"))
