"""What lies in a source: every row once or one line that names it; and the estimate of it."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import socket
import struct
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hostile import damaged, damaged_bytes
from hypothesis import HealthCheck, given, settings
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_xielu.data import command, estimate, sources
from megatron_xielu.data.errors import DataError
from megatron_xielu.data.readers import make_reader
from megatron_xielu.data.recipe import Recipe
from megatron_xielu.data.tokenizer_files import TokenizerInfo

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SKIPPABLE = struct.pack("<II", 0x184D2A50, 4) + b"\0\0\0\0"
BOM = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A token a word."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "end": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def rows(texts: list[str], *, ensure_ascii: bool = True) -> bytes:
    return b"".join(
        json.dumps({"text": text}, ensure_ascii=ensure_ascii).encode() + b"\n" for text in texts
    )


def find(source: Path, **options: Any) -> list[sources.Group]:
    return sources.find(str(source), **{"subset": None, "format": None, "glob": None, **options})


def read(source: Path, **options: Any) -> list[str]:
    found = []
    for group in find(source, **options):
        reader = make_reader(group, tasks=1, text_key="text", skip_bad_rows=False)
        found += [document.text for document in reader.run()]
    return found


def expect(source: Path, tokenizer: Tokenizer) -> estimate.Estimate:
    info = TokenizerInfo("t", "", 2, "end", 1, "uint16")
    groups = tuple(find(source))
    recipe = Recipe((), None, groups, 1, "text", info, 0.0, None, None, None, False)
    return estimate.estimate(recipe, tokenizer)


def parquet(texts: list[str], **options: int) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), stream, **options)
    return stream.getvalue()


def twice_in_parquet() -> bytes:
    stream = io.BytesIO()
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, stream)
    return stream.getvalue()


def zip_of_two() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.jsonl", rows(["a"]))
        archive.writestr("b.jsonl", rows(["b"]))
    return stream.getvalue()


def tar_of_text(mode: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return stream.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
A, B = rows(["a"]), rows(["b"])
READ: dict[str, tuple[str, bytes, list[str]]] = {
    "members": ("x.jsonl.gz", gzip.compress(A) + gzip.compress(b"") + gzip.compress(B), ["a", "b"]),
    "first member empty": ("x.jsonl.gz", gzip.compress(b"") + gzip.compress(A), ["a"]),
    "frames": ("x.jsonl.zst", zstd.compress(b"") + zstd.compress(A) + zstd.compress(B), ["a", "b"]),
    "skippable frames": ("x.jsonl.zst", (SKIPPABLE + zstd.compress(A)) * 2 + SKIPPABLE, ["a", "a"]),
    "mark": ("x.jsonl", BOM + A + B, ["a", "b"]),
    "files with marks joined": ("x.jsonl", BOM + A + BOM + B, ["a", "b"]),
    "mark and text": ("x.txt", BOM + b"plain text\n", ["plain text\n"]),
    "mark and no text": ("x.txt", BOM, []),
    "NaN": ("x.jsonl", b'{"text": "a", "x": NaN, "y": [-Infinity]}\n' + B, ["a", "b"]),
    "half a pair": ("x.jsonl", b'{"text": "a", "x": "\\ud800"}\n', ["a"]),
    "a value called text": ("x.jsonl", b'{"of": "text", "text": "a", "x": {"text": 1}}\n', ["a"]),
}
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "no member": ("x.jsonl.gz", gzip.compress(b""), "row 1: the file has no rows"),
    "no frame": ("x.jsonl.zst", SKIPPABLE + zstd.compress(b""), "row 1: the file has no rows"),
    "UTF-16": ("x.jsonl", A.decode().encode("utf-16"), "row 1: .*it is UTF-16; .*iconv"),
    "UTF-16, no mark": ("x.jsonl", A.decode().encode("utf-16-le"), "row 1: .*it is UTF-16"),
    "UTF-16 text": ("x.txt", "plain".encode("utf-16"), "row 1: .*it is UTF-16"),
    "UTF-16 text, no mark": ("x.txt", "plain".encode("utf-16-be"), "row 1: .*it is UTF-16"),
    "half a pair": ("x.jsonl", A + b'{"text": "\\udc00"}\n', "row 2: not JSON: .*surrogates"),
    "no such key": ("x.jsonl", b'{"a\\nb": 1}\n', "no column 'text' .* there are: .'a.*nb'"),
    "two keys": ("x.jsonl", b'{"text": "a", "text": "b"}\n', "row 1: two columns 'text'"),
    "two columns": ("x.parquet", twice_in_parquet(), "row 1: two columns 'text'"),
    "no parquet": ("x.parquet", b"PAR1" + bytes(90), "row 1: cannot be read: "),
    "tar": ("x.txt", tar_of_text("w"), "row 1: cannot be read: a tar archive; unpack it"),
    "tar, compressed": ("x.txt.gz", tar_of_text("w:gz"), "a tar archive; unpack it"),
    "Git LFS": ("x.txt", LFS, "row 1: cannot be read: a pointer of Git LFS; fetch .*git lfs pull"),
    "deep": ("x.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "row 1: not JSON"),
}


@pytest.mark.parametrize("case", READ)
def test_read(tmp_path: Path, case: str):
    name, content, expected = READ[case]
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path) == expected


CUT = {
    "lines": b"".join(rows([f"{i} äöü € 𝄞 {'x' * i}"], ensure_ascii=False) for i in range(9)),
    "a mark, CRLF": (BOM + rows(list("abcdef"))).replace(b"\n", b"\r\n"),
    "no line feed at the end": rows(["a", "b", "a line " * 20, "c"])[:-1],
    "empty lines, NaN": b"\n\n"
    + A
    + b"\n"
    + b'{"text": "c", "x": NaN}\n'
    + b"\r\n\n"
    + B
    + b"\n\n\n",
}


@pytest.mark.parametrize("case", [*CUT, "row groups"])
def test_parts(tmp_path: Path, monkeypatch, case: str):
    """However a file is cut: each of its rows once and in their order."""
    monkeypatch.setattr(sources, "_LARGE", 0)
    if case == "row groups":
        content = parquet([f"{i}" * 50 for i in range(40)], row_group_size=7)
        (tmp_path / "x.parquet").write_bytes(content)
    else:
        (tmp_path / "x.jsonl").write_bytes(content := CUT[case])
    whole = read(tmp_path)
    (group,) = find(tmp_path)
    assert len(whole) >= 3
    if case == "row groups":
        sizes = [len(content) // parts for parts in (2, 5, 30)]
    else:
        sizes = [*range(1, 30), *range(30, len(content), 41)]
    for size in sizes:
        options = {"text_key": "text", "skip_bad_rows": False, "part_bytes": size}
        reader = make_reader(group, tasks=3, **options)
        assert len(reader.parts) == -(-len(content) // size)
        found = {}
        for rank in range(3):
            for part in reader.parts[rank::3]:
                found[part.start] = [d.text for d in reader.read_files_shard([part])]
        assert [text for start in sorted(found) for text in found[start]] == whole, size


def test_row_of_a_part(tmp_path: Path, monkeypatch):
    """Named by the byte from which rows are counted."""
    monkeypatch.setattr(sources, "_LARGE", 0)
    good = rows(["text"]) * 50
    options = {"text_key": "text", "skip_bad_rows": False, "part_bytes": 100}
    (tmp_path / "x.jsonl").write_bytes(good + b"no row\n" + good)
    with pytest.raises(DataError, match=r"x.jsonl, from byte [\d,]+: row \d+: not JSON") as error:
        list(make_reader(find(tmp_path)[0], tasks=1, **options).run())
    first, row = re.search(r"byte ([\d,]+): row (\d+)", str(error.value)).groups()
    rest = (good + b"no row\n")[int(first.replace(",", "")) :]
    assert rest.splitlines()[int(row) - 1] == b"no row"


def test_what_is_cut(tmp_path: Path):
    """Plain .jsonl and .parquet of more than five parts; what others hold begins at their start."""
    for name in ("a.jsonl", "b.parquet", "c.jsonl.gz", "d.jsonl.zst", "e.txt"):
        (tmp_path / name).write_bytes(bytes(600))
    (tmp_path / "small.jsonl").write_bytes(bytes(500))
    parts = [part for group in find(tmp_path) for part in sources.parts(group, 100)]
    assert Counter(part.file.path for part in parts if part.start) == {"a.jsonl": 5, "b.parquet": 5}
    assert len(parts) == 6 + 10
    of_server = sources.Group("https://host", "jsonl", (sources.File("a.jsonl", 600, ""),))
    assert len(sources.parts(of_server, 100)) == 1


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, tokenizer: Tokenizer, case: str):
    """By the estimate, before the work, and by a task."""
    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    for use in (read, lambda source: expect(source, tokenizer)):
        with pytest.raises(DataError, match=message) as error:
            use(tmp_path)
        assert f"{tmp_path / name}: " in str(error.value) and "\n" not in str(error.value)


def test_zip_archive(tmp_path: Path):
    """fsspec reads the first file of one, and says nothing of the others."""
    (tmp_path / "x.zip").write_bytes(zip_of_two())
    with pytest.raises(DataError, match="row 1: cannot be read: a zip archive; unpack it"):
        read(tmp_path, format="jsonl")


def test_a_row_longer_than_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("megatron_xielu.data.readers._LONGEST", 100)
    for name, content, row in (("x.jsonl", A, 2), ("x.txt", b"", 1)):
        (tmp_path / name).write_bytes(content + bytes(1000))
        message = f"row {row}: cannot be read: longer than 100 bytes"
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)


GOOD = {
    "x.jsonl": A + B,
    "x.jsonl.gz": gzip.compress(A) + gzip.compress(B),
    "x.jsonl.zst": zstd.compress(A) + zstd.compress(B),
    "x.parquet": parquet(["a", "b"] * 5),
}


@pytest.mark.parametrize("name", GOOD)
def test_any_damage(tmp_path: Path, name: str):
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged_bytes(GOOD[name]))
    def damage(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        try:
            assert all(isinstance(text, str) for text in read(tmp_path))
        except DataError as error:
            assert str(tmp_path / name) in str(error) and "\n" not in str(error)

    damage()


CONFIGS = [
    {"config_name": "a", "data_files": [{"split": "train", "path": ["x/*", "y/*"]}, "z/*"]},
    {"config_name": "b", "data_files": {"train": "x/*", "test": ["y/*"]}},
    {"config_name": "c", "data_files": "x/*"},
]


@settings(max_examples=100, deadline=None)
@given(damaged(CONFIGS))
def test_any_damage_of_a_dataset_card(configs):
    info = SimpleNamespace(card_data={"configs": configs}, sha="1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name: info)
        for subset in (None, "b"):
            try:
                found = sources._hub_locations("owner/name", subset)
                assert all(isinstance(one, str) for _, patterns in found for one in patterns)
            except DataError as error:
                assert "\n" not in str(error)


class TestNames:
    def test_every_file_once(self, tmp_path: Path):
        folder = tmp_path / " odd :: [folder]"
        names = [
            " x",
            "x",
            "x ",
            "#x",
            "%41",
            "A",
            "[ab]*?",
            "a::b",
            "~",
            "file:x",
            "\u00a0é",
            "$x",
        ]
        for name in names:
            (folder / name).mkdir(parents=True)
            (folder / name / f"{name}.jsonl").write_bytes(rows([name]))
        assert sorted(read(folder)) == sorted(names)
        assert read(folder / " x" / " x.jsonl") == [" x"]

    @pytest.mark.parametrize("name", [b"a\nb", b"a\r", "a\u2028b".encode(), b"\xff"])
    def test_refused(self, tmp_path: Path, name: bytes):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name + b".jsonl")).write_bytes(A)
        with pytest.raises(DataError, match="rename it") as error:
            find(tmp_path)
        assert str(error.value).isascii() and "\n" not in str(error.value)

    def test_no_file(self, tmp_path: Path):
        folder = tmp_path / "texts"
        (folder / "b.jsonl").mkdir(parents=True)
        (folder / "b.jsonl" / "part.jsonl").write_bytes(A)  # as Spark writes
        assert read(folder) == ["a"]
        odd = folder / "x.jsonl"
        with socket.socket(socket.AF_UNIX) as server:
            for make, kind in (
                (lambda: odd.symlink_to("nowhere"), "a link to nothing"),
                (lambda: os.mkfifo(odd), "a pipe, socket or device"),
                (lambda: server.bind(os.path.relpath(odd)), "a pipe, socket or device"),
            ):
                make()
                for source in (folder, odd):
                    with pytest.raises(DataError, match=f"x.jsonl: it is {kind}"):
                        find(source)
                odd.unlink()

    def test_what_is_left_out_is_said(self, tmp_path: Path, capsys):
        """With the flags that take it, which do as they say."""
        (tmp_path / "deep").mkdir()
        for name in ("a.txt", "deep/b.txt.gz", "c.md", "deep/d.md", "e.rst", "Makefile"):
            text = name.encode()
            (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        assert len(read(tmp_path)) == 2
        said = capsys.readouterr().err
        assert said.startswith(
            f"{tmp_path}: 2 of 6 files are taken, not 2 .md, 1 without an ending, 1 .rst; as plain "
            "text: --format text --glob '"
        )
        patterns, _, rest = said.split("--glob ", 1)[1].replace("'", "").partition(" (")
        patterns = patterns.split()
        assert rest == "without --glob every file)\n"
        assert sorted(patterns) == ["**/*.md", "**/*.rst", "**/*.txt", "**/*.txt.gz"]
        taken = read(tmp_path, format="text", glob=patterns)
        assert sorted(taken) == ["a.txt", "c.md", "deep/b.txt.gz", "deep/d.md", "e.rst"]
        assert "5 of 6 files are taken, not 1 without an ending; --glob" in capsys.readouterr().err
        assert len(read(tmp_path, format="text")) == 6
        (tmp_path / "f.jsonl").write_bytes(A)
        find(tmp_path, glob=["*.jsonl", "*.rst"])
        said = capsys.readouterr().err
        assert (
            "1 of 7 files" in said
            and "of their own by this one's --tokenizer: --format text" in said
        )

    @pytest.mark.parametrize(
        ("name", "glob", "message"),
        [
            (None, None, "it has no files"),
            ("a.md", None, r"no files end in \.parquet, .*; there are 1 \.md; .*'\*\*/\*\.md'$"),
            ("a.md", ["*.py"], r"no files match \*\.py; there are 1 \.md; as plain text"),
            ("a.md", ["*.md"], r"no files that match \*\.md end in \.parquet, .* 1 \.md;"),
            ("a", None, "there are 1 without an ending; as plain text: --format text$"),
        ],
    )
    def test_nothing_is_taken(self, tmp_path: Path, name: str | None, glob: Any, message: str):
        if name:
            (tmp_path / name).write_bytes(b"text")
        with pytest.raises(DataError, match=message):
            find(tmp_path, glob=glob)

    def test_linked_folder(self, tmp_path: Path, capsys):
        (tmp_path / "other").mkdir()
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "a.jsonl").write_bytes(A)
        (tmp_path / "texts" / "more").symlink_to(tmp_path / "other")
        assert read(tmp_path / "texts") == ["a"]
        assert "texts/more: a linked folder is not read" in capsys.readouterr().err

    def test_folder_that_cannot_be_listed(self, tmp_path: Path, monkeypatch):
        """Root may list any: its denial is a mock."""
        (tmp_path / "deep" / "secret").mkdir(parents=True)
        (tmp_path / "a.jsonl").write_bytes(A)
        list_any = os.scandir

        def scandir(path: str):
            if str(path).endswith("secret"):
                raise PermissionError(13, "Permission denied", path)
            return list_any(path)

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(DataError, match=r"Permission denied: '.*deep/secret'"):
            find(tmp_path)

    def test_given_twice(self, tmp_path: Path, monkeypatch):
        for name in ("texts", "texts/deep", "other"):
            (tmp_path / name).mkdir()
        (tmp_path / "texts" / "a.jsonl").write_bytes(A)
        (tmp_path / "other" / "link.jsonl").symlink_to(tmp_path / "texts" / "a.jsonl")
        monkeypatch.chdir(tmp_path)
        first = find(tmp_path / "texts")
        sources.refuse_twice(first)
        for again in ("texts", "texts/", "other/../texts", "texts/a.jsonl", "other", "."):
            with pytest.raises(DataError, match=r"a\.jsonl|link\.jsonl") as error:
                sources.refuse_twice([*first, *find(Path(again))])
            assert "is given twice" in str(error.value)
        for again in ("file://texts", f"local://{tmp_path}/other"):
            more = sources.find(again, subset=None, format=None, glob=None)
            with pytest.raises(DataError, match="is given twice"):
                sources.refuse_twice([*first, *more])


def words(count: int, seed: int, *, of: str = "word{}", different: int = 1000) -> str:
    chance = random.Random(seed)
    return " ".join(of.format(chance.randrange(different)) for _ in range(count))


def short(count: int, **options) -> list[str]:
    """Documents of about 20 tokens."""
    return [words(random.Random(i).randint(10, 30), i, **options) for i in range(count)]


LONG = words(40_000, 1, of="w{}", different=9)  # shorter words than in other documents
SHORT = short(3000)
LARGE = {
    "members": {"x.jsonl.gz": b"".join(gzip.compress(rows([t] * 3)) for t in SHORT)},
    "frames": {"x.jsonl.zst": b"".join(zstd.compress(rows([t] * 3)) for t in SHORT)},
    "first member empty": {"x.jsonl.gz": gzip.compress(b"") + gzip.compress(rows(SHORT))},
    "skippable frame": {"x.jsonl.zst": SKIPPABLE + zstd.compress(rows(SHORT))},
    "few frames": {"x.jsonl.zst": zstd.compress(rows(SHORT)) + zstd.compress(rows(SHORT))},
    "one document": {"x.jsonl": rows([words(300_000, 2)])},
    "one document in gzip": {"x.jsonl.gz": gzip.compress(rows(["word " * 300_000]))},
    "first document": {"x.jsonl": rows([LONG, *SHORT])},
    "first document in gzip": {"x.jsonl.gz": gzip.compress(rows([LONG, *SHORT]))},
    "first document in parquet": {"x.parquet": parquet([LONG, *SHORT])},
    "row groups": {"x.parquet": parquet(SHORT, row_group_size=100)},
    "texts": {f"{i}.txt": t.encode() for i, t in enumerate([LONG * 9, *short(300)])},
    "small files": {
        "large.jsonl": rows(SHORT),
        **{f"{i}.jsonl": rows(["a b c d"]) for i in range(40)},
    },
    "two bytes": {"x.jsonl": rows(short(2000, of="wörtchen{}é"), ensure_ascii=False)},
    "escaped": {"x.jsonl": rows(short(2000, of="語語{}語"))},
    "first documents in two bytes": {
        "x.jsonl": rows([*short(50, of="wörtchen{}é"), *SHORT], ensure_ascii=False)
    },
}


@pytest.mark.parametrize("case", LARGE)
def test_estimate(tmp_path: Path, tokenizer: Tokenizer, monkeypatch, case: str):
    """Within a fifth, from samples as small beside these files as they are beside real ones."""
    monkeypatch.setattr(estimate, "_LEAST", (50, 20_000, 1 << 13), raising=False)
    monkeypatch.setattr(gzip, "READ_BUFFER_SIZE", 1 << 10)
    for name, content in LARGE[case].items():
        (tmp_path / name).write_bytes(content)
    found = expect(tmp_path, tokenizer)
    texts = read(tmp_path)
    tokens = sum(len(text.split()) + 1 for text in texts)
    assert found.train_tokens == pytest.approx(tokens, rel=0.2)
    assert found.output_bytes == pytest.approx(tokens * 2 + len(texts) * 20, rel=0.2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-tokens", "inf"), "--max-tokens: must be at most 1000000000000000000, not 'inf'"),
        (("--max-tokens", "nan"), "--max-tokens: must be a number, not 'nan'"),
        (("--max-tokens", "1e300"), "--max-tokens: must be at most 1000000000000000000"),
        (("--memory-gb", "9" * 30), "--memory-gb: must be at most 100000"),
        (("--workers", "9" * 30), "--workers: must be at most 1000000"),
        (("--tasks", "0"), "--tasks: must be 1 or more, not '0'"),
        (("--valid-fraction", "nan"), "--valid-fraction: must be a number"),
        (("--text-key", "\udcff"), "--text-key '\\udcff' is not UTF-8"),
        (("--eod-token", "\udcff"), "--eod-token '\\udcff' is not UTF-8"),
        (("--source", "x" * 5000), f"--source {'x' * 5000}: no such file or folder"),
        (("--output", "a b"), "choose a path without white space"),
        (("--output", "a::b"), "choose a path without white space"),
        (("--output", "a$b", "--executor", "slurm"), "choose a path without '$', for --executor"),
        (("--output", "a&b", "--executor", "slurm"), "choose a path without '&', for --executor"),
        (("--output", "a%j", "--executor", "slurm"), "choose a path without '%', for --executor"),
        (("--executor", "slurm"), "--executor slurm needs --slurm-partition; sinfo lists them"),
        (("--slurm-time", "5"), "--slurm-time is of --executor slurm, this is --executor local"),
        (("--slurm-partition", "a", "--executor", "ray"), "--slurm-partition is of --executor"),
        (("--slurm-option", "a=b"), "--slurm-option is of --executor slurm, this is --executor"),
        (("--memory-gb", "3"), "--memory-gb is of --executor slurm and ray, this is --executor"),
        (("--ray-address", "auto"), "--ray-address is of --executor ray, this is --executor local"),
        (("--train-tokenizer", "300"), "--train-tokenizer: not allowed with argument --tokenizer"),
        (("--output", "a.jsonl"), "--output"),
        (("--output", "a.jsonl/b"), "--output"),
        (("--output", "in", "--source", "."), "in and --source .: one is within the other"),
        (("--output", "link/new/in", "--source", "in"), "--source in: one is within the other"),
        (("--output", "in", "--source", "link"), "--source link: one is within the other"),
        (("--output", ".", "--source", "in"), "--source in: one is within the other"),
        (("--output", "in", "--tokenizer", "in/tokenizer"), "--tokenizer in/tokenizer: a part of"),
        (("--output", "old"), "old/valid/00000.bin is not of this command"),
        (
            ("--slurm-option", "export=A=b", "--executor", "slurm", "--slurm-partition", "a"),
            "--slurm-option export: jobs have this command's environment",
        ),
        (("--sauce", "https://me:pw@h/a?b"), "unrecognized arguments: --sauce https://h/a"),
    ],
)
def test_flags(tmp_path: Path, tokenizer: Tokenizer, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer.save("tokenizer.json")
    Path("a.jsonl").write_bytes(A)
    for folder in ("in/tokenizer", "old/valid"):
        Path(folder).mkdir(parents=True)
    Path("in/a.jsonl").write_bytes(A)
    Path("link").symlink_to("in")
    tokenizer.save("in/tokenizer/tokenizer.json")
    Path("old/valid/00000.bin").write_bytes(A)
    before = set(tmp_path.iterdir())
    arguments = ["--source", "a.jsonl", "--tokenizer", "tokenizer.json", "--eod-token", "end"]
    with pytest.raises(SystemExit) as end:
        command.main([*arguments, "--output", "data", "--dry-run", *flags])
    printed = capsys.readouterr().err.splitlines()[-1] if end.value.code == 2 else end.value.code
    assert message in printed and "\n" not in printed
    assert set(tmp_path.iterdir()) - {tmp_path / "data"} == before
    assert Path("a.jsonl").read_bytes() == A
