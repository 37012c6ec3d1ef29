"""tools/prepare_data.py on the Python standard library's sources, without any network.

Every run here has its connections to other hosts fail, and what tried to connect written down.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path

import hub_server
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from launch import REPOSITORY, train
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models

from megatron_xielu.common import processes
from megatron_xielu.data import command, estimate, records, scheduler, sources, tokenise
from megatron_xielu.data.records import Record, Shard

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

EOD = "<|endoftext|>"
TASKS = 3
NO_NETWORK = """
import os, socket
real = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX:
        open(os.environ["NO_NETWORK"], "a").write(f"{address}\\n")
        raise OSError(f"no network in this test: {address}")
    return real(self, address)
socket.socket.connect = connect
def resolve(*arguments, **options):
    open(os.environ["NO_NETWORK"], "a").write(f"{arguments}\\n")
    raise OSError(f"no network in this test: {arguments}")
socket.getaddrinfo = resolve
"""


def write_parquet(path: Path, texts: list) -> None:
    columns = {"url": ["x"] * len(texts), "text": texts, "score": [1.5] * len(texts)}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()


class Corpus:
    """Texts in every format, a tokeniser trained on them, and the command that prepares them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        library = Path(sysconfig.get_path("stdlib"))
        paths = [*sorted(library.glob("*.py")), *sorted(library.glob("[a-z]*/*.py"))]
        self.texts = [t for path in paths if (t := _read(path)) and len(t) < 15_000][:260]
        self.input = folder / "texts"
        self.input.mkdir()
        write_parquet(self.input / "a.parquet", [*self.texts[0:60], None])
        write_parquet(self.input / "b.parquet", self.texts[60:100])
        half = [jsonl(self.texts[100:130]), jsonl(self.texts[130:160])]
        (self.input / "c.jsonl.zst").write_bytes(b"".join(map(zstd.compress, half)))  # two frames
        (self.input / "d.jsonl.gz").write_bytes(gzip.compress(jsonl(self.texts[160:210])))
        (self.input / "e.jsonl").write_bytes(jsonl(["", *self.texts[210:250]]))
        for index, text in enumerate(self.texts[250:]):
            (self.input / f"{index}.txt").write_text(text)
        trainer = ByteLevelBPETokenizer()
        trainer.train_from_iterator(self.texts[::5], vocab_size=1500, special_tokens=[EOD])
        # A file may carry these; neither must reach the data.
        trainer.enable_truncation(100)
        trainer.enable_padding(length=50)
        self.tokenizer_path = folder / "tokenizer.json"
        trainer.save(str(self.tokenizer_path))
        self.tokenizer = Tokenizer.from_file(str(self.tokenizer_path))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(NO_NETWORK)
        self.connections = folder / "connections"
        self.environment = {
            **{key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"},
            "PYTHONPATH": f"{folder / 'site'}:{REPOSITORY}",
            "NO_NETWORK": str(self.connections),
            "NLTK_DATA": str(folder / "nltk_data"),
            "HOME": str(folder),
            "PYTHONWARNINGS": "error:::megatron_xielu",
        }

    def command(self, output: Path, *options: str, source: Path | None = None) -> list[str]:
        """With two workers; later options replace earlier ones."""
        return [
            *(sys.executable, str(REPOSITORY / "tools" / "prepare_data.py"), "--workers", "2"),
            *("--output", str(output), "--source", str(source or self.input)),
            *("--tokenizer", str(self.tokenizer_path), "--eod-token", EOD, *options),
        ]

    def start(self, output: Path, *options: str, **more: Path) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(output, *options, **more),
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, output: Path, *options: str) -> str:
        """The command as a user types it, to its end; what it printed."""
        process = self.start(output, *options)
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 0, printed
        assert "Traceback" not in printed, printed
        return printed

    def prepare(self, output: Path, *options: str, fails: bool = False, **more: Path) -> str:
        """The same in this process and, unless told otherwise, with one worker: a fifth of the
        imports."""
        site, _ = self.environment["PYTHONPATH"].split(":")
        text = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(text), redirect_stderr(text):
            for name in ("NO_NETWORK", "NLTK_DATA", "HOME"):
                patch.setenv(name, self.environment[name])
            patch.delenv("HF_HUB_OFFLINE", raising=False)
            patch.syspath_prepend(site)  # of the processes that it starts, too
            for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo")):
                patch.setattr(owner, name, getattr(owner, name))  # so that they are put back
            exec(NO_NETWORK, {})
            error = None
            try:
                command.main(self.command(output, "--workers", "1", *options, **more)[2:])
            except SystemExit as end:
                error = end.code
        printed = f"{text.getvalue()}{error or ''}"
        assert (error == 1 or isinstance(error, str)) if fails else error is None, printed
        assert "Traceback" not in printed, printed
        return printed


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def prepared(corpus: Corpus, tmp_path_factory) -> Path:
    """The whole corpus, prepared in one go. Not to be written to."""
    output = tmp_path_factory.mktemp("prepared") / "data"
    corpus.run(output, *SAME)
    return output


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared data, as files with their times."""
    subprocess.run(["cp", "-a", str(prepared), str(tmp_path / "data")], check=True)
    return tmp_path / "data"


SAME = ("--tasks", str(TASKS), "--valid-fraction", "0.1")


def hashes(output: Path) -> dict[str, str]:
    """Of everything that is the result; data_args has the folder's own name in it."""
    found = {}
    for path in [*output.glob("*.*"), *output.glob("*/0*.bin"), *output.glob("*/0*.idx")]:
        content = path.read_bytes().replace(str(output).encode(), b"OUTPUT")
        found[str(path.relative_to(output))] = hashlib.sha256(content).hexdigest()
    return found


def documents(output: Path, split: str) -> list[list[int]]:
    """Tokens of every document, its sequences joined, through Megatron's reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    found = []
    manifest = json.loads((output / "manifest.json").read_text())
    for entry in manifest["shards"]:
        if entry["split"] == split:
            data = IndexedDataset(str(output / entry["prefix"]))
            ends = data.document_indices.tolist()
            for start, end in pairwise(ends):
                found.append([int(t) for i in range(start, end) for t in data[i]])
    return found


def is_valid(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


class TestResult:
    def test_every_document_once_with_its_end(self, corpus: Corpus, prepared: Path):
        eod = corpus.tokenizer.token_to_id(EOD)
        for split in records.SPLITS:
            texts = [t for t in corpus.texts if is_valid(t, 0.1) == (split == "valid")]
            expected = [(*corpus.tokenizer.encode(text).ids, eod) for text in texts]
            assert len(expected) > 10
            assert Counter(map(tuple, documents(prepared, split))) == Counter(expected)

    def test_manifest(self, corpus: Corpus, prepared: Path):
        manifest = json.loads((prepared / "manifest.json").read_text())
        both = [manifest[split] for split in records.SPLITS]
        assert sum(entry["documents"] for entry in both) == len(corpus.texts)
        size = sum(len(text.encode()) for text in corpus.texts)
        assert sum(entry["text_bytes"] for entry in both) == size
        assert manifest["empty_rows"] == 2 and manifest["bad_rows"] == 0
        content = corpus.tokenizer_path.read_bytes()
        assert manifest["tokenizer"]["sha256"] == hashlib.sha256(content).hexdigest()
        assert manifest["tokenizer"]["dtype"] == "uint16"
        assert manifest["sources"] == [str(corpus.input)]
        for entry in manifest["shards"]:
            path = prepared / f"{entry['prefix']}.bin"
            assert entry["bin"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            assert path.stat().st_size == entry["tokens"] * 2

    def test_estimate(self, corpus: Corpus, prepared: Path, tmp_path: Path):
        """Of tokens and bytes, from a sample; a dry run leaves no plan to be held to."""
        printed = corpus.prepare(tmp_path / "data", "--dry-run")
        found = re.search(r"about (\S+) training tokens .*, (\S+) MB to write", printed)
        tokens, size = found.groups()
        written = [f for f in prepared.glob("*/0*.*") if f.parent.name in records.SPLITS]
        manifest = json.loads((prepared / "manifest.json").read_text())
        assert 0.7 < float(tokens) / manifest["train"]["tokens"] < 1.4
        assert 0.7 < float(size) * 1e6 / sum(f.stat().st_size for f in written) < 1.4
        assert not (tmp_path / "data" / "work" / "plan.json").exists()

    def test_verify(self, corpus: Corpus, prepared: Path):
        printed = corpus.prepare(prepared, "--verify", "--workers", "2")
        assert "all as in the manifest" in printed
        sample = re.search(r"train/0000\d, document \d+: (.*)", printed)[1]
        assert any(sample.strip("'\"")[:12] in repr(text) for text in corpus.texts)

    def test_no_connection_was_tried(self, corpus: Corpus, prepared: Path):
        assert not corpus.connections.exists(), corpus.connections.read_text()
        done = subprocess.run(
            [sys.executable, "-c", "import socket; socket.create_connection(('localhost', 9))"],
            env={**corpus.environment, "NO_NETWORK": str(corpus.folder / "proof")},
            capture_output=True,
        )
        assert done.returncode and "localhost" in (corpus.folder / "proof").read_text()

    def test_trains(self, corpus: Corpus, prepared: Path, tmp_path: Path):
        """Both files for Megatron's flags, with the tokeniser beside the data."""
        common = (
            "--xielu --tokenizer-type HuggingFaceTokenizer --train-iters 3 --eval-iters 2 "
            f"--eval-interval 3 --tokenizer-model {prepared}/tokenizer --num-workers 0 "
        )
        model = _real_data()
        for flags in (
            f"--per-split-data-args-path {prepared}/per_split_data_args.json",
            f"--data-args-path {prepared}/data_args.txt --split 80,20,0",
        ):
            run = train(
                tmp_path / flags[2:6],
                common + flags,
                model=model,
                command=("-m", "megatron_xielu.pretrain_gpt"),
                environment={"HF_HUB_OFFLINE": "1"},
            )
            assert len(run.losses) == 3 and 5 < run.losses[0] < 9
            assert re.search(r"validation loss at iteration 3 .*lm loss value: \d", run.output)


def _real_data() -> list[str]:
    """The tests' model, for data that is not mocked."""
    from launch import TINY_LLAMA

    model = list(TINY_LLAMA)
    model.remove("--mock-data")
    for flag in ("--tokenizer-type", "--vocab-size", "--train-iters", "--eval-iters"):
        del model[model.index(flag) : model.index(flag) + 2]
    return model


class TestInterruptions:
    def test_killed_at_any_moment(self, corpus: Corpus, prepared: Path, tmp_path: Path):
        seed = time.time_ns() % 1000
        moments = random.Random(seed)
        output = tmp_path / "data"
        ends = []
        for when in ("the first attempt", "a record", "another moment"):
            process = self._until(corpus, output, when)
            if ends:
                time.sleep(moments.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            ends.append(process.wait())
        # All but the first may come too late on a busy machine, for what little is left to do.
        assert ends[0] == -signal.SIGKILL and set(ends) <= {-signal.SIGKILL, 0}
        corpus.prepare(output, *SAME)
        assert hashes(output) == hashes(prepared), f"seed {seed}"
        assert not list((output / "work" / "unfinished").iterdir())

    @staticmethod
    def _until(corpus: Corpus, output: Path, when: str) -> subprocess.Popen:
        process = corpus.start(output, *SAME)
        end = time.monotonic() + 60
        while process.poll() is None:
            assert time.monotonic() < end, f"never saw {when}"
            done = list((output / "work" / "records").glob("*.json"))
            begun = list((output / "work" / "unfinished").glob("*"))
            if (when == "a record" and done) or (when != "a record" and begun):
                break
            time.sleep(0.005)
        return process

    def test_killed_worker(self, corpus: Corpus, prepared: Path, tmp_path: Path):
        """Its task is done again, by the same command.

        So may be one that had not begun, when the new worker takes long to start.
        """
        output = tmp_path / "data"
        process = corpus.start(output, *SAME)
        killed = None
        while killed is None:
            assert process.poll() is None, process.communicate()[0]
            for seen in records.attempts(output):
                pid = int(seen.folder.name.rsplit("-", 1)[1])
                if seen.alive:
                    os.kill(pid, signal.SIGKILL)
                    while processes.is_alive(pid):
                        time.sleep(0.01)
                    if not records.path_of(output, seen.task).exists():
                        killed = seen.task
                        break
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 0, printed
        named = re.search(r"tasks ([\d, ]+) ended without a result", printed)
        assert named and str(killed) in named.group(1).split(", "), printed
        assert hashes(output) == hashes(prepared)

    def test_truncated_and_changed_shards(self, corpus: Corpus, prepared: Path, copy: Path):
        """--verify names both; the next run makes the two again, and nothing else."""
        tasks = [int(path.stem) for path in sorted((copy / "train").glob("*.bin"))]
        truncated, changed = (copy / "train" / f"{task:05d}.bin" for task in tasks[:2])
        untouched = records.shard_files(copy, "train", tasks[2])[0]
        inode = untouched.stat().st_ino
        os.truncate(truncated, truncated.stat().st_size - 10)
        with changed.open("r+b") as stream:
            stream.seek(100)
            stream.write(b"\x01\x00\x02")
        printed = corpus.prepare(copy, "--verify", fails=True)
        assert re.search(rf"train/{truncated.stem}: \.bin has [\d,]+ bytes instead of", printed)
        assert f"train/{changed.stem}: .bin has another checksum" in printed
        assert "2 of" in printed and untouched.stem not in printed
        corpus.prepare(copy, *SAME)
        assert hashes(copy) == hashes(prepared)
        assert untouched.stat().st_ino == inode

        truncated.unlink()  # what the sizes show is found without --verify
        assert f"{truncated} is missing: task" in corpus.prepare(copy, *SAME)
        assert hashes(copy) == hashes(prepared)

    def test_started_again_differently(self, corpus: Corpus, copy: Path, tmp_path: Path):
        other = tmp_path / "other.json"
        other.write_bytes(corpus.tokenizer_path.read_bytes() + b"\n")
        more = tmp_path / "more"
        subprocess.run(["cp", "-a", str(corpus.input), str(more)], check=True)
        (more / "new.txt").write_text("new")
        before = hashes(copy)
        for options, named in (
            (("--tokenizer", str(other)), "--tokenizer"),
            (("--tasks", "2"), "--tasks: the output folder was started with 3"),
            (("--valid-fraction", "0.2"), "--valid-fraction"),
            (("--text-key", "url"), "--text-key"),
            (("--source", str(more)), "--source"),
        ):
            assert named in _message(corpus, copy, *SAME, *options)
        assert hashes(copy) == before


class TestBudget:
    def test_first_documents_up_to_the_budget(self, corpus: Corpus, prepared: Path, tmp_path: Path):
        whole = documents(prepared, "train")
        total = sum(map(len, whole))
        budget = int(total * 0.45)
        output = tmp_path / "data"
        printed = corpus.prepare(output, *SAME, "--max-tokens", str(budget))
        kept = documents(output, "train")
        assert kept == whole[: len(kept)]
        assert sum(map(len, kept[:-1])) < budget <= sum(map(len, kept)) < total
        assert "the input has no more" not in printed
        first = hashes(output)

        # Other workers, another round's guess of what is needed, the same bytes.
        again = tmp_path / "again"
        corpus.prepare(again, *SAME, "--max-tokens", str(budget), "--workers", "4")
        assert hashes(again) == first

        # A larger budget goes on from there; one beyond the input says so.
        assert "the input has no more" in corpus.prepare(output, *SAME, "--max-tokens", "1e9")
        assert documents(output, "train") == whole

    def test_what_is_missing(self):
        """Tasks of 100 tokens, whatever is finished already: the same end."""

        class Plan:
            tasks, max_tokens = 10, 250

        def record(tokens: int, limit: int | None) -> Record:
            shard = Shard(tokens, 1, 1, 1, (0, 0), ("", ""))
            return Record({"train": shard, "valid": shard}, 0, 0, limit)

        for seed in range(200):
            chance = random.Random(seed)
            done = {
                task: record(100, None) if chance.random() < 0.7 else record(17, 17)
                for task in chance.sample(range(10), chance.randrange(6))
            }
            for _ in range(20):
                left = scheduler.missing(Plan, done, chance.choice([10, 1000, 1e5]))
                if not left.tasks:
                    break
                for task in left.tasks:
                    limit = left.limits.get(task)
                    stops = limit is not None and limit <= 100
                    done[task] = record(limit if stops else 100, limit if stops else None)
            assert left.used == 3
            assert [done[task].tokens for task in range(3)] == [100, 100, 50]


def _message(corpus: Corpus, output: Path, *options: str, source: Path | None = None) -> str:
    """The one message that the command ends with, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLTK_DATA", corpus.environment["NLTK_DATA"])
        patch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(SystemExit) as error:
            command.main(corpus.command(output, *options, source=source)[2:])
    message = str(error.value)
    assert message.startswith("prepare_data.py: error: ")
    return message


def _bad_zst() -> bytes:
    return zstd.compress(jsonl(["x" * 100] * 300) + os.urandom(20000).hex().encode())[:-9000]


def _bad_parquet(path: Path) -> None:
    good, bad = b"fine", b"\xff\xfe"
    binary = pyarrow.array([good, good, bad, good], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 4, binary.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)


BAD = {
    "empty.jsonl": (b"", "row 1: the file is empty"),
    "blank.jsonl": (b"\n\n", "row 1: the file has no rows"),
    "utf8.jsonl": (jsonl(["good", "good"]) + b'{"text": "\xff"}\n', "row 3: not UTF-8"),
    "json.jsonl": (jsonl(["good"]) + b"{'text': 1}\n", "row 2: not JSON"),
    "column.jsonl": (b'{"text": "a"}\n\n{"body": "a"}\n', "row 3: no column 'text'"),
    "number.jsonl": (b'{"text": 7}\n', "row 1: 'text' is not text but int"),
    "list.jsonl": (b'["text"]\n', "row 1: no column 'text'"),
    "cut.jsonl.zst": (_bad_zst(), "cannot be read: "),
    "cut.jsonl.gz": (gzip.compress(jsonl(["good"] * 9))[:-9], "cannot be read: "),
    "utf8.txt": (b"first line\nsecond \xff\n", "row 2: not UTF-8"),
    "broken.parquet": (b"PAR1 no parquet", "row 1: "),
    "column.parquet": ("column", "row 1: no column 'text' (--text-key); there are: ['body']"),
    "utf8.parquet": (_bad_parquet, "row 3: not UTF-8"),
}


class TestBadInput:
    def test_an_empty_text_is_none_and_a_folder_of_them_is_refused(
        self, corpus: Corpus, tmp_path: Path
    ):
        texts = tmp_path / "texts"
        texts.mkdir()
        (texts / "__init__.txt").touch()
        assert "its files are empty" in _message(corpus, tmp_path / "none", source=texts)
        (texts / "module.txt").write_text("x = 1")
        printed = corpus.prepare(tmp_path / "data", "--valid-fraction", "0", source=texts)
        assert "1 rows without text" in printed and "in 1 documents" in printed

    @pytest.mark.parametrize("name", BAD)
    def test_names_file_and_row(self, corpus: Corpus, tmp_path: Path, name: str):
        content, expected = BAD[name]
        path = tmp_path / "texts" / name
        path.parent.mkdir()
        if content == "column":
            pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
        elif callable(content):
            content(path)
        else:
            path.write_bytes(content)
        message = _message(corpus, tmp_path / "data", source=path.parent)
        assert str(path) in message and expected in message, message
        assert message.count("\n") == 0

    def test_found_by_a_worker(self, corpus: Corpus, tmp_path: Path, monkeypatch):
        """Far into a file, so that no sample sees it. The other tasks finish and stay finished."""
        monkeypatch.setattr(estimate, "_MOST", 100)  # characters
        texts = tmp_path / "texts"
        texts.mkdir()
        good = jsonl(corpus.texts[:20])
        for index in range(3):
            (texts / f"{index}.jsonl").write_bytes(good)
        late = jsonl(["some text"] * 400)
        (texts / "late.jsonl").write_bytes(late + b'{"text": \xff}\n' + late)
        output = tmp_path / "data"
        options = ("--tasks", "4", "--valid-fraction", "0.1")
        printed = corpus.prepare(output, *options, source=texts, fails=True)
        assert f"{texts / 'late.jsonl'}: row 401: not UTF-8" in printed
        assert "1 of 4 tasks failed; the others are finished and stay so" in printed
        done = {path: path.stat().st_ino for path in (output / "work/records").glob("*.json")}
        assert len(done) == 3

        left_out = tmp_path / "left_out"
        printed = corpus.prepare(left_out, *options, "--skip-bad-rows", source=texts)
        assert "1 bad rows left out" in printed

        (texts / "late.jsonl").write_bytes(late + late)
        corpus.prepare(output, *options, source=texts)
        assert all(path.stat().st_ino == inode for path, inode in done.items())
        assert len(documents(output, "train")) == len(documents(left_out, "train"))

    def test_replaced_input_is_read_again(self, corpus: Corpus, copy: Path, tmp_path: Path):
        """Only the task that reads the file."""
        texts = tmp_path / "texts"
        texts.mkdir()
        for index in range(3):
            (texts / f"{index}.txt").write_text(corpus.texts[index])
        output = tmp_path / "out"
        corpus.prepare(output, "--tasks", "3", "--valid-fraction", "0", source=texts)
        (texts / "1.txt").write_text("something else")
        printed = corpus.prepare(output, "--tasks", "3", "--valid-fraction", "0", source=texts)
        assert printed.count("its input was replaced") == 1
        assert "per_split_data_args.json   (training documents; none is held out)" in printed
        found = {corpus.tokenizer.decode(document) for document in documents(output, "train")}
        assert found == {corpus.texts[0], corpus.texts[2], "something else"}

    def test_tokenizer(self, corpus: Corpus, tmp_path: Path):
        output, wrong = tmp_path / "data", tmp_path / "wrong.json"
        wrong.write_text('{"model": 1}')
        assert f"{wrong} is no tokenizer.json" in _message(
            corpus, output, "--tokenizer", str(wrong)
        )
        assert "no such token" in _message(corpus, output, "--eod-token", "</s>")
        assert "no tokenizer.json" in _message(corpus, output, "--tokenizer", str(tmp_path))
        assert not output.exists()

    def test_source(self, corpus: Corpus, tmp_path: Path):
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "a.md").write_text("a")
        message = _message(corpus, tmp_path / "data", source=tmp_path / "texts")
        assert "--format" in message and ".parquet" in message
        assert "no such file" in _message(corpus, tmp_path / "data", source=tmp_path / "nothing")
        found = sources.find(str(tmp_path / "texts"), subset=None, format="text", glob=["**/*.md"])
        assert [file.path for file in found[0].files] == ["a.md"]

    def test_disk_too_small(self, corpus: Corpus, tmp_path: Path):
        """The source is larger than any disk here: as much as a sample takes, and then a hole."""
        texts = tmp_path / "texts"
        texts.mkdir()
        (texts / "big.jsonl").write_bytes(jsonl(corpus.texts[:50] * 30))
        os.truncate(texts / "big.jsonl", 8_000_000_000_000)
        message = _message(corpus, tmp_path / "data", source=texts)
        assert "the disk is too small" in message and "TB to write" in message
        assert not (tmp_path / "data" / "work" / "plan.json").exists()

    def test_two_at_a_time(self, corpus: Corpus, prepared: Path):
        code = (
            "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "print('locked', flush=True); sys.stdin.read()"
        )
        lock = str(prepared / "work" / "lock")
        with subprocess.Popen(
            [sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            other.stdout.readline()
            assert "another prepare_data.py works on it" in _message(corpus, prepared, *SAME)
            other.stdin.close()


def test_hub_names(corpus: Corpus, tmp_path: Path):
    """A dataset's subset and a tokeniser by name, through the Hub's own client.

    The Hub is not reachable here: hub_server.py speaks as much of it as that client asks for.
    """
    hub = tmp_path / "hub"
    (hub / "sample" / "10BT").mkdir(parents=True)
    (hub / "data").mkdir()
    (hub / "plain" / "train").mkdir(parents=True)  # where the Hub's own conversion has it
    write_parquet(hub / "plain" / "train" / "0.parquet", corpus.texts[:20])
    write_parquet(hub / "sample" / "10BT" / "0.parquet", corpus.texts[:30])
    write_parquet(hub / "data" / "0.parquet", corpus.texts)
    (hub / "tokenizer.json").write_bytes(corpus.tokenizer_path.read_bytes())
    (hub / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOD}))
    card = [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*"}]},
        {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]},
    ]
    command_line = [sys.executable, str(REPOSITORY / "tools" / "prepare_data.py")]
    command_line += ["--source", "owner/edu", "--tokenizer", "owner/edu"]
    command_line += ["--workers", "1", "--valid-fraction", "0", "--subset"]
    environment = {
        **corpus.environment,
        "PYTHONPATH": str(REPOSITORY),
        "HF_HOME": str(tmp_path / "cache"),
    }
    for configs, subset, expected in (
        (card, "sample-9BT", "--subset sample-9BT: owner/edu has default, sample-10BT"),
        (card, "sample-10BT", "training tokens in 30 documents"),
        ([], "plain", "training tokens in 20 documents"),
    ):
        with hub_server.serve(hub, "owner/edu", configs) as endpoint:
            done = subprocess.run(
                [*command_line, subset, "--output", str(tmp_path / subset)],
                env={**environment, "HF_ENDPOINT": endpoint},
                capture_output=True,
                text=True,
            )
        assert expected in done.stdout + done.stderr, done.stderr
    output = tmp_path / "sample-10BT"
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["tokenizer"]["name"] == "owner/edu"
    text = corpus.tokenizer.decode(documents(output, "train")[0])
    assert text in corpus.texts[:30]


class TestSentences:
    def test_without_punkt_data(self, corpus: Corpus, tmp_path: Path):
        message = _message(corpus, tmp_path, "--split-sentences", "--language", "klingon")
        assert f"{sys.executable} -m nltk.downloader punkt_tab" in message
        assert "NLTK_DATA" in message and "klingon" in message

    def test_a_sequence_a_sentence(self, corpus: Corpus, tmp_path: Path):
        """With a model that nltk's own trainer makes here: punkt_tab cannot be downloaded."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from nltk.tokenize.punkt import (
            PunktParameters,
            PunktSentenceTokenizer,
            PunktTrainer,
            save_punkt_params,
        )

        prose = [_source(name) for name in ("argparse", "json", "typing", "doctest")]
        parameters: PunktParameters = PunktTrainer(" ".join(prose)).get_params()
        place = Path(corpus.environment["NLTK_DATA"]) / "tokenizers" / "punkt_tab" / "english"
        place.parent.mkdir(parents=True)
        save_punkt_params(parameters, dir=str(place))
        texts = tmp_path / "texts"
        texts.mkdir()
        (texts / "a.jsonl").write_bytes(jsonl(prose))
        output = tmp_path / "data"
        corpus.prepare(output, "--split-sentences", "--valid-fraction", "0", source=texts)

        splitter = PunktSentenceTokenizer(parameters)
        data = IndexedDataset(str(output / "train" / "00000"))
        assert len(data.document_indices) - 1 == len(prose)
        eod = corpus.tokenizer.token_to_id(EOD)
        expected = []
        for text in prose:
            sentences = splitter.tokenize(text)
            assert len(sentences) > 1
            encoded = [one.ids for one in corpus.tokenizer.encode_batch(sentences)]
            expected += [*encoded[:-1], [*encoded[-1], eod]]
        assert [sequence.tolist() for sequence in data] == expected
        manifest = json.loads((output / "manifest.json").read_text())
        assert manifest["train"]["sequences"] == len(expected)
        assert manifest["punkt_sha256"]
        assert "all as in the manifest" in corpus.prepare(output, "--verify")


def _source(module: str) -> str:
    import importlib

    return Path(importlib.import_module(module).__file__).read_text()[:3000]


def test_large_vocabulary_needs_32_bits(corpus: Corpus, tmp_path: Path):
    """As the paper's 131,072; datatrove writes it, Megatron reads it."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    vocabulary = {f"w{index}": index for index in range(70_000)} | {EOD: 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOD))
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer.pre_tokenizer = WhitespaceSplit()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOD}))
    (tmp_path / "a.txt").write_text("w1 w69999 w65536")
    arguments = corpus.command(tmp_path / "data", "--valid-fraction", "0", "--workers", "1")[2:]
    index = arguments.index("--eod-token")
    del arguments[index : index + 2]  # tokenizer_config.json names it
    arguments += ["--tokenizer", str(folder), "--source", str(tmp_path / "a.txt")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        command.main(arguments)
    data = IndexedDataset(str(tmp_path / "data" / "train" / "00000"))
    assert data.index.dtype is np.int32
    assert data[0].tolist() == [1, 69_999, 65_536, 70_000]


def test_document_index_of_several_sequences(tmp_path: Path):
    """`write_document` against Megatron's own builder."""
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    texts = [[[1, 2], [3]], [[4]], [[5], [6], [7, 8, 9]]]
    ours = MegatronTokenizedFile(str(tmp_path), "ours", token_size=4)
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for text in texts:
        tokenise.write_document(ours, text)
        theirs.add_document(np.concatenate(text), list(map(len, text)))
    ours.close()
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        written = [(tmp_path / f"{name}.{ending}").read_bytes() for name in ("ours", "theirs")]
        assert written[0] == written[1]
