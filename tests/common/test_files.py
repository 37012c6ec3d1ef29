"""Files are there whole or not at all; an error names the file, and leaves the old content."""

import os

import pytest

from megatron_xielu.common import files


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for content in ("first", "α".encode()):
        files.write(path, content)
    assert path.read_text() == "α"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("fails_at", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch, fails_at):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, fails_at, fail)
        with pytest.raises(OSError, match=rf"^\[Errno 28\] No space left on device: '{path}'$"):
            files.write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


def test_a_result_that_cannot_be_kept_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*Is a directory.*; what it was to hold is"):
        files.keep(tmp_path, "result")


def test_a_link_that_lies_where_it_writes_is_not_followed(tmp_path):
    """In a folder where others may write, they could have it overwrite any file of ours."""
    (tmp_path / "precious").write_text("precious")
    files._places(tmp_path / "file.txt")[1].symlink_to(tmp_path / "precious")
    files.try_to_write(tmp_path / "file.txt")
    files._places(tmp_path / "file.txt")[1].symlink_to(tmp_path / "precious")
    files.write(tmp_path / "file.txt", "content")
    assert (tmp_path / "precious").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["file.txt", "precious"]


def test_what_raises_within_the_block_writes_nothing(tmp_path):
    path = tmp_path / "file.txt"
    with pytest.raises(ValueError, match="half"), files.whole(path) as beside:
        beside.write_text("half")
        raise ValueError("half")
    assert not os.listdir(tmp_path)


def test_a_pipe_is_written_to_and_a_link_kept(tmp_path):
    """As root, ``--evaluation-output /dev/null`` would make a file of the device for everybody."""
    pipe, target, link = tmp_path / "pipe", tmp_path / "target", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(target)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, link, link):
        files.write(path, "content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert target.read_text() == "content"
