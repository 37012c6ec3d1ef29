"""The speed of data preparation on one core, side by side with the tokenizers library alone.

    python tools/bench/bench_data.py                            # the standard library's sources

All take turns, one thread each, on the same slice of about 1 MB, and are compared on it:

    library     tokenizers.encode_batch_fast of texts in memory, and the ids as a list: nothing
                is read, nothing written
    datatrove   its parquet reader and Megatron step with their own defaults
    ours        tools/prepare_data.py's readers and step: reads parquet, splits by the hash of each
                text, writes both shards and their checksums

Time is the process's CPU time, so that a busy machine does not change the figures.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

import pyarrow
import pyarrow.parquet
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
from datatrove.utils.logging import logger
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tqdm import tqdm

from megatron_xielu.common.flags import Limits
from megatron_xielu.common.text import ready_output
from megatron_xielu.data import sources
from megatron_xielu.data.readers import make_reader
from megatron_xielu.data.tokenise import SplitTokenizer

EOD = "<|endoftext|>"
TARGET = 0.8
VOCABULARY = 32_000
TRAINED_ON = 8_000_000  # characters, which is enough for a benchmark's tokeniser
BATCH = 100


def standard_library(limit: float) -> list[str]:
    """Sources of this Python's standard library, up to ``limit`` bytes."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if size > limit:
            break
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        if text:
            texts.append(text)
            size += len(text.encode())
    return texts


def train_tokenizer(texts: list[str], path: Path) -> None:
    """A byte-level BPE of `VOCABULARY` entries."""
    tokenizer = ByteLevelBPETokenizer()
    total = sum(map(len, texts))
    step = max(1, total // TRAINED_ON)
    tokenizer.train_from_iterator(
        texts[::step], vocab_size=VOCABULARY, special_tokens=[EOD], show_progress=False
    )
    tokenizer.save(str(path))


def library(tokenizer: Tokenizer, texts: list[str]) -> int:
    """The library alone; returns the tokens."""
    tokens = 0
    for start in range(0, len(texts), BATCH):
        for one in tokenizer.encode_batch_fast(texts[start : start + BATCH]):
            tokens += len(one.ids) + 1
    return tokens


class Datatrove:
    """datatrove as it comes."""

    def __init__(self, folder: Path) -> None:
        self.step = MegatronDocumentTokenizer(
            str(folder / "datatrove"), None, str(folder / "tokenizer" / "tokenizer.json"), EOD
        )

    def __call__(self, slice_folder: Path) -> int:
        before = self.step.stats["tokens"].total
        self.step.run(ParquetReader(str(slice_folder)).run())
        return self.step.stats["tokens"].total - before


class Ours:
    """This package's task, in this process."""

    def __init__(self, folder: Path) -> None:
        self.step = SplitTokenizer(
            folder,
            eod_token=EOD,
            valid_fraction=0.01,
            language=None,
            limits={},
            readers=[],
            raise_errors=True,
        )

    def __call__(self, slice_folder: Path) -> int:
        before = self.step.stats["tokens"].total
        (group,) = sources.find(str(slice_folder), subset=None, format=None, glob=None)
        reader = make_reader(group, tasks=1, text_key="text", skip_bad_rows=False)
        self.step.run(reader.run())
        return self.step.stats["tokens"].total - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=Limits(2, 10_000).read, default=20, help="of text [20]")
    options = parser.parse_args()
    logger.remove()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer").mkdir()
        texts = standard_library(options.megabytes * 1e6)
        slices = [texts[i :: options.megabytes] for i in range(options.megabytes)]
        for index, part in enumerate(slices):
            (folder / f"{index}").mkdir()
            pyarrow.parquet.write_table(
                pyarrow.table({"text": part}), folder / f"{index}/0.parquet"
            )
        train_tokenizer(texts, folder / "tokenizer" / "tokenizer.json")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
        providers: dict[str, Callable[[Path], int]] = {
            "library": lambda path: library(tokenizer, slices[int(path.name)]),
            "datatrove": Datatrove(folder),
            "ours": Ours(folder),
        }
        for provider in providers.values():  # loads the tokeniser
            provider(folder / "0")
        seconds: dict[str, list[float]] = {name: [] for name in providers}
        tokens = 0
        for index in tqdm(range(len(slices)), desc="slices"):
            turn = list(providers)[index % 3 :] + list(providers)[: index % 3]
            counts = set()
            for name in turn:
                start = time.process_time()
                counts.add(providers[name](folder / f"{index}"))
                seconds[name].append(time.process_time() - start)
            assert len(counts) == 1, f"not the same tokens: {counts}"
            tokens += counts.pop()
    report(seconds, texts, tokens)


def report(seconds: dict[str, list[float]], texts: list[str], tokens: int) -> None:
    """Print the table."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    packages = ", ".join(f"{p} {version(p)}" for p in ("datatrove", "tokenizers", "pyarrow"))
    print(f"{platform.machine()}, Python {platform.python_version()}, {packages}")
    print(
        f"{len(texts)} documents, {megabytes:.1f} MB, {tokens:,} tokens, vocabulary {VOCABULARY}\n"
    )
    print(f"{'':10}  {'MB/s':>6}  {'tokens/s':>9}  of the library: median (quartiles) of slices")
    for name, values in seconds.items():
        shares = [one / two for one, two in zip(seconds["library"], values, strict=True)]
        low, share, high = statistics.quantiles(shares, n=4)
        total = sum(values)
        print(
            f"{name:10}  {megabytes / total:6.2f}  {tokens / total:9,.0f}  "
            f"{share:.2f} ({low:.2f} to {high:.2f})"
        )
    print(f"\ntarget: at least {TARGET} of the library: {'met' if share >= TARGET else 'MISSED'}")


if __name__ == "__main__":
    ready_output()
    main()
