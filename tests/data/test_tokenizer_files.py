"""Tokenisers that cannot be used, and special tokens that a text spells."""

import base64
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hostile import damaged, damaged_bytes
from hypothesis import HealthCheck, given, settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_xielu.data import command, estimate, tokenizer_files
from megatron_xielu.data.errors import DataError

EOD = "<|endoftext|>"


def byte_level(*, special: bool = True) -> Tokenizer:
    vocabulary = {x: i for i, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(EOD, special=special), AddedToken("<pad>", special=True)])
    return tokenizer


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tokeniser, and texts that spell its special tokens."""
    (tmp_path / "texts").mkdir()
    rows = [f"before {EOD} after {i}" for i in range(3)] + ["<pad>", "plain", EOD]
    (tmp_path / "texts" / "a.jsonl").write_text(
        "".join(json.dumps({"text": row}) + "\n" for row in rows)
    )
    (tmp_path / "tokenizer").mkdir()
    byte_level().save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOD}))
    return tmp_path


def prepare(folder: Path, output: str, *options: str) -> None:
    """The command; a later option replaces an earlier one."""
    command.main(
        [
            *("--source", str(folder / "texts"), "--output", str(folder / output)),
            *("--tokenizer", str(folder / "tokenizer"), "--valid-fraction", "0", *options),
        ]
    )


def refusal(folder: Path, *options: str, output: str = "data") -> str:
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as end:
        prepare(folder, output, *options)
    message = str(end.value)
    assert message.startswith("prepare_data.py: error: ") and "\n" not in message
    return message


CONFIGS = {
    "empty": (b"", "it is no JSON"),
    "list": (b"[]", "it is [], not an object"),
    "latin1": (b'{"eos_token": "\xe9"}', "it is no JSON: not UTF-8"),
    "object": (b'{"eos_token": {"text": 1}}', "eos_token is {'text': 1}, not text"),
    "number": (b'{"eos_token": 1}', "eos_token is 1, not text"),
    "of pad": (b'{"eos_token": null, "pad_token": ["a"]}', "pad_token is ['a'], not text"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_damaged_config_is_refused_by_its_field(name, folder):
    content, message = CONFIGS[name]
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_bytes(content)
    for option in ((), ("--eod-token", EOD)):
        assert f"{path}: {message}" in refusal(folder, *option)
    assert not (folder / "data").exists()


# The library panics at a prefix that is longer than what is merged.
_PANIC = {
    "vocab": {"a": 0, "b": 1, "ab": 2},
    "merges": [["a", "b"]],
    "continuing_subword_prefix": "xxxxx",
}


def _json(**model: object) -> bytes:
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model}).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no tokenizer.json"),
        (b"\xff", "is no tokenizer.json"),
        (_json(type="WordLevel", vocab={}, unk_token=EOD), "has no such token"),
        (None, "has no tokenizer.json"),  # a folder
        (
            _json(type="WordLevel", vocab={EOD: 2**32 - 1}, unk_token=EOD),
            "only few others below it",
        ),
        (
            _json(type="WordLevel", vocab={EOD: 0}, unk_token="?"),
            "cannot encode the text: WordLevel error: Missing",
        ),
        (_json(type="BPE", **_PANIC), "is no tokenizer.json: range end index"),
    ],
)
def test_a_damaged_tokenizer_json_is_refused(content, message, folder):
    path = folder / "tokenizer" / "tokenizer.json"
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    assert message in refusal(folder)


@pytest.fixture
def panics(folder) -> Path:
    """A tokeniser that loads, and whose damaged normalizer ends the library at the first word."""
    path = folder / "tokenizer" / "tokenizer.json"
    trie = struct.pack("<II", 4, 0xFFFFFFFF)
    charsmap = base64.b64encode(trie + b"a\0").decode()
    damaged = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"normalizer": damaged}))
    return folder


def test_a_tokenizer_that_panics(panics):
    assert "--tokenizer cannot encode the text: index out of bounds" in refusal(panics)


def test_a_tokenizer_that_panics_in_a_task(panics, monkeypatch):
    monkeypatch.setattr(estimate, "estimate", lambda *_: estimate.Estimate(1, 1))
    said = refusal(panics)
    assert "1 of 1 tasks failed" in said and "index out of bounds" in said


def test_a_tokenizer_that_encodes_at_random(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_bytes())
    content["model"]["dropout"] = 0.1
    path.write_text(json.dumps(content))
    assert f"{path} encodes at random" in refusal(folder)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "/none", "a/b/c"])
def test_a_name_that_cannot_be_one(name, folder):
    assert "--tokenizer" in refusal(folder, "--tokenizer", name)


def test_a_pipe_is_read_once(folder):
    os.mkfifo(folder / "pipe")
    said = refusal(folder, "--tokenizer", str(folder / "pipe"))
    assert f"--tokenizer {folder / 'pipe'}: it is no file" in said


@pytest.mark.parametrize("token", ["", "a\0b", "none"])
def test_an_end_of_document_token_that_it_lacks(token, folder):
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    assert "--eod-token" in refusal(folder, "--eod-token", token)


def test_what_is_kept_encodes_as_the_data_was_encoded(tmp_path):
    """Whatever class the source names, and whichever words it calls special."""
    transformers = pytest.importorskip("transformers")
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "auto_map": {"AutoTokenizer": ["a.B", None]},
        "eos_token": {"content": EOD, "lstrip": True, "special": True},
        "pad_token": "n",
        "additional_special_tokens": ["g"],
        "extra_special_tokens": ["go"],
        "added_tokens_decoder": {"300": {"content": "no go", "special": True}},
    }
    vocabulary = byte_level().get_vocab(with_added_tokens=False)
    split = Tokenizer(models.BPE({**vocabulary, "oĠ": 256}, [("o", "Ġ")]))
    split.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "merged_with_previous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    split.add_special_tokens([EOD])
    split.save(str(tmp_path / "tokenizer.json"))
    # With a byte-order mark.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8-sig")
    _, path, kept = tokenizer_files.inspect(str(tmp_path), None)
    tokenizer_files.keep(path, kept, tmp_path / "kept")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "kept")
    text = f"no go {EOD}"
    assert 256 in split.encode(text).ids
    assert loaded(text).input_ids == split.encode(text).ids
    assert loaded.eos_token == EOD


_GOOD = {
    "eos_token": {"content": EOD},
    "pad_token": EOD,
    "tokenizer_class": "GPT2Tokenizer",
    "added_tokens_decoder": {"0": {"content": EOD, "special": True}},
}


@pytest.mark.filterwarnings("ignore")
def test_any_damage_is_refused_in_one_line(folder):
    source = folder / "tokenizer"
    small = Tokenizer(models.WordLevel({EOD: 0, "a": 1}, unk_token=EOD))
    small.add_special_tokens([EOD])
    good = json.loads(small.to_str())

    def inspect() -> None:
        try:
            info, path, config = tokenizer_files.inspect(str(source), None)
            tokenizer_files.keep(path, config, source / "kept")
            assert info.eod_id < info.vocab_size
        except DataError as error:
            assert "\n" not in str(error)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged(_GOOD))
    def of_config(config):
        (source / "tokenizer.json").write_text(json.dumps(good))
        (source / "tokenizer_config.json").write_text(json.dumps(config))
        inspect()

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged(good))
    def of_tokenizer(content):
        (source / "tokenizer.json").write_text(json.dumps(content))
        inspect()

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged_bytes(json.dumps(good).encode()))
    def of_bytes(content):
        (source / "tokenizer.json").write_bytes(content)
        inspect()

    of_config()
    (source / "tokenizer_config.json").write_text(json.dumps(_GOOD))
    of_tokenizer()
    of_bytes()


def _without(path: Path, field: str) -> None:
    values = json.loads(path.read_text())
    del values[field]
    path.write_text(json.dumps(values))


def test_special_tokens_of_texts_are_counted(folder, capsys):
    prepare(folder, "data")
    found = {EOD: 4, "<pad>": 1}
    manifest = json.loads((folder / "data" / "manifest.json").read_text())
    assert manifest["special_tokens"] == found and not manifest["special_tokens_as_text"]
    printed = capsys.readouterr().out
    assert f"special tokens within documents: 1 of '<pad>', 4 of {EOD!r}; where" in printed
    ids = os.stat(folder / "data" / "train" / "00000.bin").st_size // 2
    assert manifest["train"]["tokens"] == ids

    other = "--special-tokens-as-text"
    assert f"{other}: the output folder was started with False" in refusal(folder, other)

    # A folder of before, unfinished: it goes on, and says that nobody counted.
    old = folder / "old"
    shutil.copytree(folder / "data", old)
    (old / "manifest.json").unlink()
    _without(old / "work" / "plan.json", "special_tokens_as_text")
    _without(old / "work" / "records" / "00000.json", "special_tokens")
    prepare(folder, "old")
    again = json.loads((old / "manifest.json").read_text())
    assert again.pop("special_tokens") is None
    assert again == {key: value for key, value in manifest.items() if key != "special_tokens"}


def test_special_tokens_of_texts_can_be_text(folder, capsys):
    prepare(folder, "data", "--special-tokens-as-text")
    manifest = json.loads((folder / "data" / "manifest.json").read_text())
    assert manifest["special_tokens"] == {} and manifest["special_tokens_as_text"]
    assert "special tokens" not in capsys.readouterr().out
    ids = np.fromfile(folder / "data" / "train" / "00000.bin", np.uint16).tolist()
    rows = (folder / "texts" / "a.jsonl").read_text().splitlines()
    tokenizer = byte_level()
    end = tokenizer.token_to_id(EOD)
    assert ids.count(end) == len(rows)
    for row in rows:
        place = ids.index(end)
        assert tokenizer.decode(ids[:place]) == json.loads(row)["text"]
        del ids[: place + 1]
    # Not where the tokeniser does not mark it as special.
    byte_level(special=False).save(str(folder / "tokenizer" / "tokenizer.json"))
    message = refusal(folder, "--special-tokens-as-text", output="other")
    assert "mark that token as special" in message


def test_unknown_words_are_counted(folder, capsys):
    """Of a model that has a token for them which no added token names."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, EOD: 1, "plain": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    prepare(folder, "data")
    manifest = json.loads((folder / "data" / "manifest.json").read_text())
    assert manifest["special_tokens"] == {"?": 10, EOD: 4}
    assert "within documents: 4 of '<|endoftext|>', 10 of '?'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("missing", "said"), [("", False), ("\u00c0\u00ff", False), ("\u0120", True)]
)
def test_a_tokenizer_that_leaves_characters_out(missing, said, folder, capsys):
    """As one of bytes does that was trained without all of them; 0xC0 and 0xFF are in no text."""
    vocabulary = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {*missing})
    tokenizer = byte_level()
    tokenizer.model = models.BPE({x: i for i, x in enumerate(vocabulary)}, [])
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    prepare(folder, "data")
    assert ("initial_alphabet" in capsys.readouterr().err) == said
