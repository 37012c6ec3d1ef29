"""The text of the `small` preset: a corpus, a BPE tokenizer trained on it, Megatron's files.

`package_text` writes the corpus. Tokens are made by this project's own data preparation
(tools/prepare_data.py), which goes on where it was stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from compare import package_text
from compare.text import SPLITS, Text
from megatron_xielu.common import files

END_OF_DOCUMENT = "<|endoftext|>"
_TOOL = Path(__file__).resolve().parents[1] / "prepare_data.py"


def prepare(folder: Path | None, out: Path, *, vocab_size: int = 16_384) -> Text:
    """Have the corpus tokenised in ``out``, unless it is there already.

    Args:
        folder: text of the user's; None for the pinned packages.
        out: gets ``corpus/``, ``tokenizer.json`` and the data of each split.
        vocab_size: of the tokenizer, end-of-document token included.

    Raises:
        SystemExit: there is no text, or its preparation fails.
    """
    corpus = out / "corpus"
    package_text.write_corpus(corpus, folder)
    print((corpus / "SOURCES.md").read_text(), flush=True)
    tokenizer = out / "tokenizer.json"
    if not tokenizer.exists():
        train_tokenizer(corpus / "train.jsonl", tokenizer, vocab_size)
    totals = {}
    for split in SPLITS:
        manifest = out / split / "manifest.json"
        if not manifest.exists():
            _tokenise(corpus / f"{split}.jsonl", tokenizer, out / split)
        totals[split] = json.loads(manifest.read_text())["train"]
    return Text(
        train=out / "train" / "train" / "00000",
        valid=out / "valid" / "train" / "00000",
        cache=out / "cache",
        vocab_size=vocab_size,
        padded_vocab_size=vocab_size,
        unit="token",
        tokens={split: totals[split]["tokens"] for split in SPLITS},
        documents={split: totals[split]["documents"] for split in SPLITS},
    )


def train_tokenizer(corpus: Path, path: Path, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer; its last token ends a document.

    Raises:
        SystemExit: the text has too few different pairs for so many tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stdout.isatty(),
    )
    print(f"training a tokenizer of {vocab_size:,} tokens", flush=True)
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    tokenizer.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True)])
    if tokenizer.token_to_id(END_OF_DOCUMENT) != vocab_size - 1:
        raise SystemExit(
            f"compare: the text gives a tokenizer of {tokenizer.get_vocab_size():,} tokens, not "
            f"{vocab_size:,}; give more text, or compare with the preset tiny"
        )
    files.write(path, tokenizer.to_str(pretty=True))


def _texts(corpus: Path) -> Iterator[str]:
    with corpus.open() as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _tokenise(corpus: Path, tokenizer: Path, output: Path) -> None:
    command = [sys.executable, str(_TOOL), "--source", str(corpus), "--tokenizer", str(tokenizer)]
    command += ["--eod-token", END_OF_DOCUMENT, "--valid-fraction", "0", "--tasks", "1"]
    command += ["--output", str(output)]
    print(f"tokenising {corpus}", flush=True)
    if subprocess.run(command).returncode:
        raise SystemExit(f"compare: the corpus {corpus} could not be tokenised: see above")
