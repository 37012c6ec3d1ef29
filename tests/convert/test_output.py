"""The folder that a conversion writes: whole or not at all, and nothing of a user's is lost."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest
from small_models import small, write_hf

from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.convert import from_hf, output, to_hf


def write(out: Path, text: str, *, force: bool = False, meanwhile=lambda: None) -> None:
    with output.written(out, force=force, content=to_hf.CONTENT) as folder:
        (folder / to_hf.MARKER).write_text(text)
        meanwhile()


def model(folder: Path, text: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / to_hf.MARKER).write_text(text)
    return folder


def files_in(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_force_replaces_nothing_but_a_model(tmp_path, monkeypatch):
    source = tmp_path / "checkpoint"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(Refused, match="not a conversion's output"):
        output.check(tmp_path / "home", source, force=True, content=to_hf.CONTENT)
    (tmp_path / "empty").mkdir()
    output.check(tmp_path / "empty", source, force=False, content=to_hf.CONTENT)
    for content in (to_hf.CONTENT, from_hf.CONTENT):  # with what training, or a user, added to it
        old = tmp_path / content[0] / "old"
        old.mkdir(parents=True)
        for name in (content[0], "iter_0000020"):
            (old / name).touch()
        with pytest.raises(Refused, match="old has iter_0000020, which no conversion wrote"):
            output.check(old, source, force=True, content=content)
    out = model(tmp_path / "out")
    with pytest.raises(Refused, match="--force"):
        output.check(out, source, force=False, content=to_hf.CONTENT)
    for inside in (out, out / "megatron", tmp_path / "out.incomplete" / "new"):
        with pytest.raises(Refused, match="would be lost"):
            output.check(out, inside, force=True, content=to_hf.CONTENT)
    monkeypatch.chdir(tmp_path / "empty")
    for place in (tmp_path / "empty", Path("."), Path("/proc")):
        with pytest.raises(Refused, match="cannot be replaced"):
            output.check(place, source, force=True, content=to_hf.CONTENT)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_appears_at_the_output_meanwhile_is_kept(tmp_path, what, force):
    out = tmp_path / "out"

    def appear() -> None:
        if what == "folder":
            out.mkdir()
            (out / "thesis.tex").write_text("a user's")
        elif what == "file":
            out.write_text("a user's")
        else:
            out.symlink_to(model(tmp_path / "elsewhere", "a user's"))

    with pytest.raises(Refused, match=r"\(the finished output is .*/out.incomplete/finished:"):
        write(out, "new", force=force, meanwhile=appear)
    assert "a user's" in files_in(tmp_path).values() and out.is_symlink() == (what == "link")
    assert files_in(tmp_path / "out.incomplete") == {"finished/config.json": "new"}
    with pytest.raises(Refused, match="is in the way"):  # nor does the next one remove it
        write(out, "newer", force=force)
    assert files_in(tmp_path / "out.incomplete") == {"finished/config.json": "new"}


@pytest.mark.parametrize("suffix", ["incomplete", "replaced"])
@pytest.mark.parametrize("content", [None, "config.json", "thesis.tex"])
def test_names_beside_the_output_may_be_a_users(tmp_path, suffix, content):
    beside = tmp_path / f"out.{suffix}"
    if content is None:
        beside.write_text("a user's")
    else:
        beside.mkdir()
        (beside / content).write_text("a user's")
    before = files_in(tmp_path)
    if suffix == "incomplete":
        with pytest.raises(Refused, match=r"out\.incomplete is in the way"):
            output.check(tmp_path / "out", tmp_path / "hf", force=False, content=to_hf.CONTENT)
        with pytest.raises(Refused, match=r"out\.incomplete is in the way"):
            write(tmp_path / "out", "new")
        assert files_in(tmp_path) == before
    else:
        for text in ("new", "newer"):
            output.check(tmp_path / "out", tmp_path / "hf", force=True, content=to_hf.CONTENT)
            write(tmp_path / "out", text, force=True)
            assert files_in(tmp_path) == before | {"out/config.json": text}


def test_one_of_two_at_once_is_refused_before_it_begins(tmp_path):
    def second() -> None:
        with pytest.raises(Refused, match="another conversion is writing it"):
            output.check(tmp_path / "out", tmp_path / "hf", force=True, content=to_hf.CONTENT)
        with pytest.raises(Refused, match="another conversion is writing it"):
            write(tmp_path / "out", "second", force=True)

    write(tmp_path / "out", "first", meanwhile=second)
    assert files_in(tmp_path) == {"out/config.json": "first"}


def left(working: Path, *, host: str = "", pid: int = 0) -> Path:
    """What a killed conversion leaves."""
    model(working / "new", "half")
    ended = subprocess.Popen(["true"])
    ended.wait()
    mark = f"{host or socket.gethostname()} {pid or ended.pid}\n"
    (working / output._MARK).write_text(mark)
    return working


def test_a_killed_conversion_is_cleared_away(tmp_path, monkeypatch):
    out, working = tmp_path / "out", tmp_path / "out.incomplete"
    left(working)
    write(out, "new")
    assert files_in(tmp_path) == {"out/config.json": "new"}
    # Killed between the two renames of --force: the old one is put back.
    out.rename(left(working) / "old")
    with pytest.raises(Refused, match="--force"):
        output.check(out, tmp_path / "hf", force=False, content=to_hf.CONTENT)
    assert files_in(tmp_path) == {"out/config.json": "new"}
    # Meanwhile there is another.
    out.rename(left(working) / "old")
    model(out, "a user's")
    with pytest.raises(Refused, match="old is what --force was to replace"):
        output.check(out, tmp_path / "hf", force=True, content=to_hf.CONTENT)
    assert files_in(working / "old") == {"config.json": "new"}


def test_a_conversion_of_another_host_may_still_run(tmp_path, monkeypatch):
    working = left(tmp_path / "out.incomplete", host="elsewhere")
    with pytest.raises(Refused, match=r"on elsewhere, process \d+; if that is no more, remove"):
        write(tmp_path / "out", "new")
    # Nor does a file system without locks tell.
    (working / output._MARK).write_text(f"{socket.gethostname()} {os.getppid()}\n")
    monkeypatch.setattr(output, "_lock", lambda *args, **named: False)
    with pytest.raises(Refused, match="if that is no more, remove"):
        write(tmp_path / "out", "new")
    assert (working / "new" / to_hf.MARKER).read_text() == "half"


def test_the_old_one_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out, rename = model(tmp_path / "out"), Path.rename

    def fails(self: Path, target: Path) -> Path:
        if target == out and self.name == "new":
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(Refused, match=r"Permission denied \(the finished output is"):
        write(out, "new", force=True)
    assert files_in(out) == {"config.json": "old"}


def test_a_full_disk_is_told_by_name(tmp_path):
    def fill() -> None:
        with open("/dev/full", "wb") as full:
            full.write(b"x")

    with pytest.raises(OSError, match=r"/out'$"):
        write(tmp_path / "out", "", meanwhile=fill)
    assert not any(tmp_path.iterdir())


def test_a_conversion_beside_names_of_a_user(tmp_path):
    (tmp_path / "out.replaced").write_text("of another program")
    hf = write_hf(tmp_path / "hf", small())
    from_hf.convert(hf, tmp_path / "out", from_hf.Options())
    from_hf.convert(hf, tmp_path / "out", from_hf.Options(force=True))
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out", "out.replaced"}
