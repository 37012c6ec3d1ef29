"""Which checkpoint a save folder means: every reader has the rule of Megatron itself."""

from argparse import Namespace
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_xielu.checkpoints import optimizer_format, reader
from megatron_xielu.checkpoints.__main__ import verify
from megatron_xielu.checkpoints.folder import (
    TRACKER,
    NoCheckpoint,
    checkpoints,
    complete_checkpoints,
    find,
    run_folder,
    save_folder,
)
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.evaluate import checkpoint as evaluate

THERE = ("iter_0000000", "iter_0000002", "iter_0000004", "iter_12345678", "release")


@pytest.fixture(scope="module")
def save_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("save")
    for name in THERE:
        dcp.save({name: torch.ones(1)}, checkpoint_id=folder / name, no_dist=True)
    (folder / "iter_0000003").mkdir()  # as a killed save leaves it
    return folder


def by_find(folder, step):
    with suppress(NoCheckpoint):
        return find(folder, step).name


def by_megatron(folder, step):
    from megatron.training.checkpointing import get_load_checkpoint_path_by_args

    with suppress(SystemExit, AssertionError):
        path = get_load_checkpoint_path_by_args(Namespace(load=str(folder), ckpt_step=step))
        return path.removeprefix(f"{folder}/").replace("iter_-000001", "") or None


def by_evaluate(folder, step):
    with suppress(ValueError):
        return evaluate.find(folder, step).name


def by_resume(folder, step):
    """The check of an optimizer state, before Megatron loads it."""
    return next(iter(optimizer_format._tensors(Namespace(ckpt_step=step), str(folder))), None)


def by_convert(folder, step):
    with suppress(Refused):
        return reader._find(folder).name


def by_report(folder, step):
    return max((path.name for path in complete_checkpoints(folder).values()), default=None)


TAKE_A_STEP = (by_find, by_megatron, by_evaluate, by_resume)
READERS = (*TAKE_A_STEP, by_convert, by_report)

CASES = [  # the tracker (None: none), --ckpt-step, the checkpoint that is meant
    ("4", None, "iter_0000004"),
    ("4\n", None, "iter_0000004"),
    (" 0004\r\n", None, "iter_0000004"),
    ("+4", None, "iter_0000004"),
    ("0", None, "iter_0000000"),
    ("12345678", None, "iter_12345678"),
    ("release", None, "release"),
    ("release\n", None, "release"),
    (None, None, None),
    ("", None, None),
    ("four", None, None),
    ("-4", None, None),
    ("4.0", None, None),
    ("²", None, None),
    ("Release", None, None),
    ("4", 2, "iter_0000002"),
    ("4", 0, "iter_0000004"),
    (None, 2, "iter_0000002"),
    (None, 0, None),
    ("four", 2, None),
    ("release", 2, "release"),
]


@pytest.mark.parametrize(("tracker", "step", "expected"), CASES)
def test_which_checkpoint_is_meant(save_dir, tracker, step, expected):
    (save_dir / TRACKER).unlink(missing_ok=True)
    if tracker is not None:
        (save_dir / TRACKER).write_text(tracker)
    for of_reader in TAKE_A_STEP if step is not None else READERS:
        assert of_reader(save_dir, step) == expected, of_reader.__name__


def test_one_that_is_not_there(save_dir):
    """Nobody takes another in its place; the report shows what the tracker vouches for."""
    for tracker in ("3", "9"):  # unfinished, and none
        (save_dir / TRACKER).write_text(tracker)
        meant = f"iter_{int(tracker):07d}"
        assert by_find(save_dir, None) == by_megatron(save_dir, None) == meant
        assert by_convert(save_dir, None) == meant
        assert by_evaluate(save_dir, None) is by_resume(save_dir, None) is None
        with pytest.raises(Refused, match=f"{meant} is not a checkpoint: neither"):
            reader.open_source(save_dir)
        expected = [0, 2, 4] if tracker == "9" else [0, 2]
        assert list(complete_checkpoints(save_dir)) == expected


def test_a_checkpoint_itself(save_dir):
    """convert takes one of the ``iter_…`` folders, too; Megatron does not."""
    assert by_convert(save_dir / "iter_0000002", None) == "iter_0000002"
    assert by_find(save_dir / "iter_0000002", None) is None


@pytest.mark.parametrize("name", ["iter_2", "iter_00000002", "iter_0000002.old", "iter_000000²"])
def test_what_is_no_name_of_a_checkpoint(tmp_path, name):
    (tmp_path / name).mkdir()
    assert checkpoints(tmp_path) == {}


def test_a_run_folder_is_as_good_as_its_checkpoints_folder(tmp_path, monkeypatch):
    """As examples/pretrain.sh makes it, before the first checkpoint and after."""
    run, inside = tmp_path / "run", tmp_path / "run" / "checkpoints"
    inside.mkdir(parents=True)
    for _ in range(2):
        assert save_folder(run) == save_folder(inside) == inside
        assert run_folder(run) == run_folder(inside) == run
        (inside / "iter_0000002").mkdir(exist_ok=True)
        (inside / TRACKER).write_text("2")
    monkeypatch.chdir(inside)
    assert run_folder(Path()) == run
    dcp.save({"x": torch.ones(1)}, checkpoint_id=inside / "iter_0000002", no_dist=True)
    assert reader._find(run) == reader._find(inside) == inside / "iter_0000002"


def test_a_save_folder_of_another_name_is_its_own(tmp_path):
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "checkpoints").mkdir()
    assert save_folder(tmp_path) == run_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("room", ["checkpoints", "convert", "evaluate", "report"])
def test_two_save_folders_in_one_another(tmp_path, room, monkeypatch, capsys):
    """None of them can be meant for certain: one line, and nothing is written."""
    for folder in (tmp_path, tmp_path / "checkpoints"):
        (folder / "iter_0000002").mkdir(parents=True)
    words = {
        "checkpoints": [str(tmp_path), "verify"],
        "convert": ["to-hf", str(tmp_path), str(tmp_path / "out")],
        "evaluate": ["--load", str(tmp_path), "--data-path", "x"],
        "report": [str(tmp_path)],
    }[room]
    monkeypatch.setattr("sys.argv", [room, *words])
    with pytest.raises(SystemExit) as ended:
        import_module(f"megatron_xielu.{room}.__main__").main()
    said = f"{ended.value}{capsys.readouterr().err}"
    assert f"{tmp_path} holds checkpoints, and so does {tmp_path / 'checkpoints'}" in said
    assert ended.value.code and "Traceback" not in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "report").exists()


def test_verify_of_a_run_folder(tmp_path, monkeypatch, capsys):
    inside = tmp_path / "checkpoints"
    dcp.save({"x": torch.ones(1)}, checkpoint_id=inside / "iter_0000002", no_dist=True)
    (inside / TRACKER).write_text("2")
    for folder in (tmp_path, inside):
        monkeypatch.setattr("sys.argv", ["checkpoints", str(folder), "verify"])
        with pytest.raises(SystemExit):
            import_module("megatron_xielu.checkpoints.__main__").main()
        assert capsys.readouterr().out.startswith("iter 2 ")


def test_a_folder_without_a_checkpoint_is_not_verified(tmp_path, capsys):
    """A wrong path in `verify … && train`."""
    assert not verify(tmp_path)
    assert capsys.readouterr().out == f"no checkpoints in {tmp_path}\n"
