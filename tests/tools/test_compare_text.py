"""The texts that tools/compare_activations.py trains on: by bytes, and of packages."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import socket
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import compare_activations as tool
import hub_server
import pyarrow.parquet
import pytest
from compare import bpe_text, byte_text, hub_text, package_text, settings, text

from megatron_xielu.common import files


def read_split(out: Path, split: str) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [document.tolist() for document in IndexedDataset(str(out / split))]


class TestByteText:
    def test_round_trip_through_megatrons_reader(self, library: Path, tmp_path: Path) -> None:
        made = byte_text.prepare(library, tmp_path / "text")
        paths = byte_text.find_documents(library)
        assert len(paths) == 81
        for split in text.SPLITS:
            documents = read_split(tmp_path / "text", split)
            expected = [
                [*(library / path).read_bytes(), byte_text.END_OF_DOCUMENT]
                for path in paths
                if text.split_of(path.encode()) == split
            ]
            assert documents == expected
            assert made.documents[split] == len(documents) > 0
            assert made.tokens[split] == sum(map(len, documents))

    def test_end_of_document_is_the_null_tokenizers(self) -> None:
        from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

        assert NullTokenizer(byte_text.VOCAB_SIZE).eod == byte_text.END_OF_DOCUMENT

    def test_split_of_a_file_does_not_depend_on_the_others(self, library: Path) -> None:
        def split() -> dict[str, str]:
            return {
                path: text.split_of(path.encode()) for path in byte_text.find_documents(library)
            }

        before = split()
        (library / "aaa.py").write_text("new")
        assert before.items() <= split().items()
        assert set(before.values()) == set(text.SPLITS)

    def test_is_written_once_and_again_when_the_source_changes(
        self, library: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "text"
        first = byte_text.prepare(library, out)
        (out / "cache").mkdir()
        written = (out / "train.bin").stat().st_mtime_ns
        assert byte_text.prepare(library, out) == first
        assert (out / "train.bin").stat().st_mtime_ns == written
        assert (out / "cache").exists()

        before = (out / "manifest.json").read_text()
        (library / "module_0.py").write_text("changed")
        byte_text.prepare(library, out)
        assert (out / "manifest.json").read_text() != before
        assert not (out / "cache").exists()  # Megatron's indices into the old text
        assert not list(out.glob("*.unfinished")) and not list(out.glob(".*"))

    def test_refuses_a_folder_without_text(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="no text in"):
            byte_text.prepare(tmp_path, tmp_path / "text")

    def test_the_running_pythons_library_has_enough(self) -> None:
        manifest = byte_text.describe(byte_text.stdlib_folder())
        for chosen in (settings.TINY, settings.OVERNIGHT):
            assert manifest.tokens["train"] > chosen.iterations * chosen.tokens_per_iteration
            validations = chosen.iterations // chosen.validate_every + 1
            held_out = validations * chosen.validation_batches * chosen.tokens_per_iteration
            assert manifest.tokens["valid"] > held_out


class TestBpeText:
    """The text of the GPU presets, of a folder in place of the packages."""

    def test_is_carried_without_its_source_and_without_a_network(
        self, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small = functools.partial(bpe_text.prepare, vocab_size=300)
        monkeypatch.setattr(bpe_text, "prepare", small)
        monkeypatch.setattr(
            package_text, "_read_packages", lambda _: package_text._read_folder(library)
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        here, there = tmp_path / "here", tmp_path / "there"
        tool.main(["minutes", "--prepare-text", "--out", str(here)])
        # Without settings.json, which names the machine that trains.
        assert {path.name for path in here.iterdir()} == {".lock", "corpus", "text"}
        assert (here / "text" / "SOURCES.md").is_file()  # the licences

        shutil.copytree(here / "text", there / "text")
        shutil.rmtree(here)
        for module in ("tokenizers", "datatrove", "nltk"):
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setattr(bpe_text, "_make", None)
        made = tool.prepare_text(settings.MINUTES, there / "text", None)
        for split, prefix in (("train", made.train), ("valid", made.valid)):
            documents = read_split(prefix.parent, prefix.name)
            assert made.documents[split] == len(documents) > 0
            assert made.tokens[split] == sum(map(len, documents))
            assert {document[-1] for document in documents} == {299}

        path = made.train.with_suffix(".bin")
        path.write_bytes(path.read_bytes()[:-2])
        with pytest.raises(SystemExit, match=r"00000\.bin is missing or damaged; copy it again"):
            tool.prepare_text(settings.MINUTES, there / "text", None)

    def test_of_another_source_nothing_stays(
        self, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def make(out: Path, *rest: object) -> None:
            found.append({path.relative_to(out).as_posix() for path in out.rglob("*.*")})
            raise SystemExit

        found: list[set[str]] = []
        monkeypatch.setattr(bpe_text, "_make", make)
        corpus = tmp_path / "corpus"
        corpus.mkdir()
        for folder in (library, library, None):
            with pytest.raises(SystemExit):
                bpe_text.prepare(folder, tmp_path / "text")
            for name in ("tokenizer.json", "train/train/00000.bin", "cache/index.npy"):
                path = tmp_path / "text" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        assert [len(names) for names in found] == [1, 4, 1]
        assert found[2] == {"source.json"}
        # Brought from elsewhere, it cannot be made again.
        corpus.rmdir()
        with pytest.raises(SystemExit, match="or of another text or vocabulary; give the --text"):
            bpe_text.prepare(library, tmp_path / "text")
        assert (tmp_path / "text/train/train/00000.bin").exists()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """As HF_ENDPOINT, which is read when the client is imported."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_text.HubFile]:
    """A Hub on this machine that has a small parquet file in the place of the pinned one."""
    path = tmp_path / "hub" / hub_text.SAMPLE.path
    path.parent.mkdir(parents=True)
    pages = [f"Page {number} of the web. " + "It says é. " * (20 + number) for number in range(90)]
    columns = {"id": [f"urn:{n}" for n in range(90)], "text": pages, "dump": ["x"] * 90}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    small = dataclasses.replace(
        hub_text.SAMPLE, sha256=files.sha256(path), most=sum(len(p.encode()) for p in pages[:80])
    )
    monkeypatch.setattr(hub_text, "SAMPLE", small)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with hub_server.serve(tmp_path / "hub", small.dataset, []) as endpoint:
        use_endpoint(monkeypatch, endpoint)
        yield small


class TestHubText:
    def test_is_the_default_and_stays_it(
        self, hub: hub_text.HubFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        small = functools.partial(bpe_text.prepare, vocab_size=300)
        monkeypatch.setattr(bpe_text, "prepare", small)
        monkeypatch.setattr(bpe_text, "choose", functools.partial(bpe_text.choose, vocab_size=300))
        monkeypatch.setattr(package_text, "fetch", lambda *rest: pytest.fail("a package"))
        command = ["minutes", "--prepare-text", "--out", str(tmp_path / "out")]
        tool.main(command)
        corpus = tmp_path / "out" / "corpus"
        lines = [
            json.loads(line) for split in text.SPLITS for line in (corpus / f"{split}.jsonl").open()
        ]
        # As many pages as the bytes allow.
        assert {line["id"] for line in lines} == {f"{hub.label}/urn:{n}" for n in range(80)}
        sources = (tmp_path / "out" / "text" / "SOURCES.md").read_text()
        assert f"{hub.label}, revision 87f09149ef47 | Hugging Face Hub | ODC-By-1.0 |" in sources
        # Begun so, it does not become another text where the Hub is not reached.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        capsys.readouterr()
        tool.main(command)
        assert "instead" not in capsys.readouterr().out

    def test_without_the_hub_packages_are_taken(
        self, hub: hub_text.HubFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        """One that takes a call and says nothing."""
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
            use_endpoint(monkeypatch, endpoint)
            begin = time.monotonic()
            assert bpe_text.choose(tmp_path / "text") is None
            assert time.monotonic() - begin < 10
        said = capsys.readouterr().out
        assert "text: packages of pip and npm instead, since the Hub does not give it: " in said
        # And stay, though the Hub is there again.
        described = {"vocab_size": 16_384, **package_text.describe(None)}
        text.write_json(tmp_path / "text" / "source.json", described)
        assert bpe_text.choose(tmp_path / "text") is None
        assert capsys.readouterr().out == ""

    def test_another_file_is_not_used(
        self, hub: hub_text.HubFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert bpe_text.choose(tmp_path / "text") is hub
        other = dataclasses.replace(hub, sha256="0" * 64)
        with pytest.raises(SystemExit, match=r"has sha256 .*, not 000000.*it is not used"):
            package_text.write_corpus(tmp_path / "corpus", other)
        gone = dataclasses.replace(hub, path="sample/10BT/none.parquet")
        with pytest.raises(SystemExit, match=r"the Hub does not give .*, with which this text was"):
            package_text.write_corpus(tmp_path / "corpus", gone)

    def test_texts_of_two_sources_are_two_settings(self, hub: hub_text.HubFile) -> None:
        machine = tool.Machine("cpu", 1)
        of_hub, of_packages = (
            tool.describe_run(settings.MINUTES, machine, source, {})["text"]
            for source in (hub, None)
        )
        assert of_hub == {hub.label: hub.sha256, "bytes": hub.most}
        assert not of_hub.keys() & of_packages.keys()


class TestPackageText:
    def test_a_folder_becomes_documents_without_copies(self, library: Path, tmp_path: Path) -> None:
        (library / "module_79_again.py").write_bytes(
            (library / "package/module_79.py").read_bytes()
        )
        (library / "latin.txt").write_bytes(b"\xe9" * 500)
        out = tmp_path / "corpus"
        package_text.write_corpus(out, library)
        documents = {
            split: [json.loads(line) for line in (out / f"{split}.jsonl").open()]
            for split in text.SPLITS
        }
        texts = [document["text"] for split in documents.values() for document in split]
        long_enough = [(library / p).read_bytes() for p in byte_text.find_documents(library)]
        expected = {t for t in long_enough if len(t) >= 200 and b"\xe9" * 2 not in t}
        assert {one.encode() for one in texts} == expected and len(texts) == len(expected)
        for split, found in documents.items():
            assert found and all(text.split_of(d["text"].encode()) == split for d in found)
        assert "--text" in (out / "SOURCES.md").read_text()

        written = (out / "train.jsonl").stat().st_mtime_ns
        package_text.write_corpus(out, library)
        assert (out / "train.jsonl").stat().st_mtime_ns == written

    @pytest.mark.parametrize(
        ("code", "good"),
        [
            ("def f():\n    return 1\n", True),
            ("// @generated by a tool\nint x;\n", False),
            ("# This file is auto-generated. Do not edit.\n", False),
            ("var a=1;" * 1000, False),
        ],
    )
    def test_code_of_people(self, code: str, good: bool) -> None:
        assert package_text._is_written(code) == good

    def test_every_package_is_pinned_and_has_a_licence(self) -> None:
        for package in package_text.PACKAGES:
            assert re.fullmatch("[0-9a-f]{64}", package.sha256)
            assert package.version and package.licence and re.compile(package.files)
            assert package.label in package_text.describe(None)
        assert {package.kind for package in package_text.PACKAGES} == {"prose", "code"}

    def test_documentation_of_an_interface(self) -> None:
        long = "A sentence of <code>f(x)</code> &amp; of y. " + "It is long enough to be kept. " * 2
        long = long.strip()
        node = {
            "a": {"documentation": f"<p>{long}</p><p>short</p>"},
            "b": [{"documentation": long}],
        }
        (found,) = package_text._documentation(node, set())
        assert found == long.replace("<code>", "").replace("</code>", "").replace("&amp;", "&")

    def test_another_file_of_the_same_name_and_no_network_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package = next(p for p in package_text.PACKAGES if p.name == "networkx")
        shelf = tmp_path / "shelf"
        shelf.mkdir()
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
        with pytest.raises(SystemExit, match=r"pip could not bring networkx-3.7: .*\n.*--text"):
            package_text.fetch(package, tmp_path / "packages")
        with zipfile.ZipFile(shelf / "networkx-3.7-py3-none-any.whl", "w") as wheel:
            wheel.writestr("networkx-3.7.dist-info/METADATA", "Name: networkx\nVersion: 3.7\n")
            wheel.writestr(
                "networkx-3.7.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
            )
        with pytest.raises(SystemExit, match=r"has sha256 .* it is not used"):
            package_text.fetch(package, tmp_path / "packages")
        assert not list((tmp_path / "packages").glob("networkx*"))

    def test_tokenizer_ends_with_the_end_of_a_document(self, tmp_path: Path) -> None:
        from tokenizers import Tokenizer

        corpus = tmp_path / "train.jsonl"
        source = Path(dataclasses.__file__).read_text()
        corpus.write_text(json.dumps({"text": source}) + "\n")
        bpe_text.train_tokenizer(corpus, tmp_path / "tokenizer.json", 400)
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert tokenizer.get_vocab_size() == 400
        assert tokenizer.token_to_id(bpe_text.END_OF_DOCUMENT) == 399
        assert tokenizer.decode(tokenizer.encode(source).ids) == source
        with pytest.raises(SystemExit, match="give more text"):
            bpe_text.train_tokenizer(corpus, tmp_path / "other.json", 1_000_000)
