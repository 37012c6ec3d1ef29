"""--train-tokenizer: text without a tokeniser becomes data and one that everything here loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

from megatron_xielu.convert import tokenizer as convert_tokenizer
from megatron_xielu.data import command, sources, tokenizer_training
from megatron_xielu.data.errors import DataError

TEXTS = [
    "def f(x):\n\treturn {'a': x ** 2}  # trailing spaces   \n\n\n    if x:\r\n        pass\n",
    "  Größe, naïve, 東京の夜, שלום, e\u0301 and é, 👩\u200d💻, \u00a0\u2028\ufeff\x00\x7f end ",
    "<|endof text|> </s> [PAD] ## don't 1234567890 ...!?  \t\t",
    "".join(map(chr, range(1, 0x3000, 7))),
]
ENTRIES = 300


def prepare(folder: Path, *options: str) -> None:
    """In a folder that holds texts, into ``data``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        command.main(
            [
                *("--source", "texts", "--train-tokenizer", str(ENTRIES), "--output", "data"),
                *("--valid-fraction", "0", "--workers", "1", *options),
            ]
        )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "texts").mkdir()
    rows = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    for index in range(2):
        (folder / "texts" / f"{index}.jsonl").write_text("".join(rows[index::2]))
    prepare(folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    paths = [*folder.glob("data/tokenizer/*"), *folder.glob("data/train/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_every_text_comes_back(prepared: Path):
    """Through Megatron's reader of the data, and from what Megatron and transformers load."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer
    from transformers import AutoTokenizer

    folder = str(prepared / "data" / "tokenizer")
    theirs, megatrons = AutoTokenizer.from_pretrained(folder), HuggingFaceTokenizer(folder)
    assert len(theirs) == megatrons.vocab_size == ENTRIES
    assert theirs.eos_token_id == megatrons.eod == ENTRIES - 1
    tokens = [document.tolist() for document in IndexedDataset(str(prepared / "data/train/00000"))]
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert theirs.decode(ids) == text
        assert [*megatrons.text_to_ids(text), ENTRIES - 1] == [*ids, ENTRIES - 1]
        tokens.remove([*ids, ENTRIES - 1])
    assert not tokens
    arguments = SimpleNamespace(padded_vocab_size=384)
    assert convert_tokenizer.load(folder, arguments, 384, print)


def test_the_same_bytes_whatever_the_threads(prepared: Path, tmp_path: Path):
    (tmp_path / "texts").symlink_to(prepared / "texts")
    script = Path(command.__file__).parents[2] / "tools" / "prepare_data.py"
    for threads in ("1", "7"):
        done = subprocess.run(
            [
                *(sys.executable, str(script), "--source", "texts", "--output", f"of{threads}"),
                *("--train-tokenizer", str(ENTRIES), "--dry-run", "--valid-fraction", "0"),
            ],
            cwd=tmp_path,
            env={**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        output = tmp_path / f"of{threads}"
        assert not list((output / "tokenizer").iterdir())  # a dry run is held to nothing
        made = (output / "work" / "tokenizer" / "tokenizer.json").read_bytes()
        assert made == (prepared / "data" / "tokenizer" / "tokenizer.json").read_bytes()


def test_another_start(prepared: Path, capsys):
    before = content(prepared)
    kept = prepared / "data" / "tokenizer" / "tokenizer.json"
    for options, message in (
        (("--train-tokenizer", "299"), "--train-tokenizer: the output folder was started with 300"),
        (("--source", "texts/0.jsonl"), "--source: the output folder was started with texts, this"),
        (("--eod-token", "</s>"), "--eod-token '</s>': "),
    ):
        with pytest.raises(SystemExit, match=message):
            prepare(prepared, *options)
    assert content(prepared) == before
    capsys.readouterr()
    prepare(prepared)
    assert f"the tokeniser is there: {kept}\n" in capsys.readouterr().out
    kept.unlink()
    prepare(prepared)
    assert "training a tokeniser of 300 entries" in capsys.readouterr().out
    assert content(prepared) == before
    # Also where nothing was tokenised yet: one that is there is not replaced.
    for path in prepared.glob("data/work/records/*"):
        path.unlink()
    with pytest.raises(SystemExit, match="the output folder was started with 300, this is 299"):
        prepare(prepared, "--train-tokenizer", "299")
    (prepared / "data" / "work" / "plan.json").rename(prepared / "plan.json")
    with pytest.raises(SystemExit, match=r"plan\.json is lost"):
        prepare(prepared)
    (prepared / "plan.json").rename(prepared / "data" / "work" / "plan.json")
    assert content(prepared) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--train-tokenizer", "9999"),
            r"the text gives a tokeniser of [\d,]+ entries at most, not",
        ),
        (("--eod-token", "a"), "--eod-token 'a': the text has it as a word; choose one such as"),
        (("--text-key", "body"), r"texts/\d.jsonl: row 1: no column 'body'"),
    ],
)
def test_refused(prepared: Path, tmp_path: Path, options: tuple[str, str], message: str):
    (tmp_path / "texts").symlink_to(prepared / "texts")
    with pytest.raises(SystemExit, match=message) as end:
        prepare(tmp_path, *options)
    assert "\n" not in str(end.value.code)
    assert not list((tmp_path / "data" / "tokenizer").iterdir())


def sample(folder: Path, valid_fraction: float = 0.0) -> list[str]:
    groups = sources.find(str(folder), subset=None, format=None, glob=None)
    options = {"text_key": "text", "skip_bad_rows": False}
    return list(tokenizer_training.sample(groups, valid_fraction, **options))


def test_sample(tmp_path: Path, monkeypatch):
    """Of each group, of many files, and of large ones by their size; no documents held out."""
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text(f"{index:02d}" * 50)
    large = [f"{index:03d}" + "x" * 97 for index in range(100)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in large)
    (tmp_path / "large.jsonl").write_text(rows)
    assert sorted(sample(tmp_path)) == sorted(
        [*large, *((tmp_path / f"{index}.txt").read_text() for index in range(40))]
    )
    half = sample(tmp_path, 0.5)
    assert 30 < len(half) < 110 and set(half) < set(sample(tmp_path))
    monkeypatch.setattr(tokenizer_training, "_SAMPLE", 2000)
    taken = sample(tmp_path)
    assert 1950 <= sum(map(len, taken)) <= 2000
    of_large = [text for text in taken if "x" in text]
    assert of_large == [*large[: len(of_large) - 1], of_large[-1]] and 13 < len(of_large) < 17


def test_of_a_word_that_ends_documents(tmp_path: Path):
    with pytest.raises(DataError, match="at most, not 1,000"):
        tokenizer_training.train(["a b a b"], 1000, "end")
    made = tokenizer_training.train(["a b a b <|endoftext|>"], 258, "<|endoftext|>")
    assert isinstance(made, Tokenizer) and made.token_to_id("<|endoftext|>") == 257
