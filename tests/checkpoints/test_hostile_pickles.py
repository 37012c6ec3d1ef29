"""A checkpoint that would execute something: no check calls it good, and no load executes it.

It is a real checkpoint with one more thing in it that, unpickled by Python's own rules, makes a
folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pickle
import pickletools
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path

import numpy
import pytest
import torch
from launch import REPOSITORY, load_checkpoint, train
from megatron.core.safe_globals import SAFE_GLOBALS
from torch import _weights_only_unpickler
from torch.distributed.checkpoint import default_planner, filesystem, metadata, planner
from torch.distributed.checkpoint.api import CheckpointException

from megatron_xielu.checkpoints import torch_dist
from megatron_xielu.checkpoints.check import Damaged, check
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common import pickled_names
from megatron_xielu.workarounds import checkpoint_pickles

SPEC = "--spec megatron_xielu.layer_specs xielu_layer_spec --use-te-activation-func"
STOCK = ["-m", "megatron_xielu.cpu", str(REPOSITORY / "tests/helpers/stock_script.py")]


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def saved(content: object) -> bytes:
    data = io.BytesIO()
    torch.save(content, data)
    return data.getvalue()


def in_planner_data(folder: Path, marker: Path) -> None:
    content = pickle.loads((folder / ".metadata").read_bytes())
    content.planner_data = {"x": Hostile(marker)}
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def replace_record(folder: Path, key: str, data: bytes) -> None:
    content = pickle.loads((folder / ".metadata").read_bytes())
    index = next(i for i in content.storage_data if i.fqn.startswith(key))
    (folder / "__9_9.distcp").write_bytes(data)
    content.storage_data[index] = dataclasses.replace(
        content.storage_data[index],
        relative_path="__9_9.distcp",
        offset=0,
        length=len(data),
    )
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def in_record(key: str) -> Callable[[Path, Path], None]:
    def add(folder: Path, marker: Path) -> None:
        replace_record(folder, key, saved([{"x": Hostile(marker)}]))

    return add


def in_common(folder: Path, marker: Path) -> None:
    (folder / "common.pt").write_bytes(saved({"args": Hostile(marker)}))


def in_torch_format(folder: Path, marker: Path) -> None:
    (folder / "mp_rank_00").mkdir()
    (folder / "mp_rank_00" / "model_optim_rng.pt").write_bytes(saved({"x": Hostile(marker)}))


WHERE = {
    ".metadata": in_planner_data,
    "common_state": in_record("common_state"),
    "rng_state": in_record("rng_state"),
    "common.pt": in_common,
    "mp_rank": in_torch_format,
}


@pytest.fixture
def hostile(request, start_checkpoint, tmp_path) -> Path:
    """A save folder; its iteration 1 makes ``executed`` in `tmp_path`."""
    shutil.copytree(start_checkpoint, tmp_path / "save")
    WHERE[request.param](tmp_path / "save" / "iter_0000001", tmp_path / "executed")
    return tmp_path / "save"


@pytest.mark.parametrize("hostile", WHERE, indirect=True)
def test_no_check_calls_it_good(hostile):
    with pytest.raises(Damaged, match=r"names posix\.mkdir, which does not belong there; noth"):
        check(hostile / "iter_0000001", whole=True)
    assert not (hostile.parent / "executed").exists()


POSIX_PATH = b"cpathlib\nPosixPath\n"
SHARD = b"ctorch.distributed.checkpoint.planner\nWriteItemType\nK\x02\x85R"
LAYOUT = b"ctorch.serialization\n_get_layout\n"


@pytest.mark.parametrize("named", [POSIX_PATH, SHARD, LAYOUT])
def test_no_metadata_changes_what_it_names(named, tmp_path):
    """Of a class, it would hold for the whole process: a report took its template from there."""
    path = tmp_path / ".metadata"
    path.write_bytes(b"\x80\x02" + named + b"N}U\x06parentK\x07s\x86b.")
    with pytest.raises(Refused, match="it sets parent of what is not its own; that was undone"):
        torch_dist.read_metadata(path)
    assert Path("/a/b").parent == Path("/a") and planner.WriteItemType(2).name == "SHARD"
    assert not hasattr(planner.WriteItemType(2), "parent")
    assert not hasattr(torch.serialization._get_layout, "parent")


@pytest.mark.parametrize(
    "command",
    [["-m", "megatron_xielu.pretrain_gpt"], ["-m", "megatron_xielu.cluster.rank", *STOCK]],
)
def test_no_spec_of_a_checkpoint_is_imported(command, start_checkpoint, tmp_path):
    """Megatron takes it from the checkpoint, and python -m looks into the working directory."""
    save = shutil.copytree(start_checkpoint, tmp_path / "save")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    evil = with_evil_spec(save / "iter_0000001")
    replace_record(save / "iter_0000001", "common_state", evil)
    run = train(
        tmp_path / "run", f"--use-checkpoint-args --load {save}", command=command, succeeds=False
    )
    assert "was trained with --spec evil layers, code that is neither Megatron's" in run.output
    assert not (tmp_path / "executed").exists()


def with_evil_spec(folder: Path) -> bytes:
    content = pickle.loads((folder / ".metadata").read_bytes())
    place = next(p for i, p in content.storage_data.items() if i.fqn.startswith("common_state"))
    record = (folder / place.relative_path).read_bytes()[place.offset :][: place.length]
    state = torch.load(io.BytesIO(record), weights_only=False)
    arguments = state[0]["args"]
    arguments.spec, arguments.xielu = ["evil", "layers"], False
    return saved(state)


@pytest.mark.parametrize("hostile", ["mp_rank"], indirect=True)
def test_what_is_trusted_may_name_anything(hostile):
    """Of `convert --trust-pickle`."""
    check(hostile / "iter_0000001", whole=True, trusts_pickles=True)


@pytest.mark.parametrize("hostile", [".metadata", "rng_state"], indirect=True)
def test_no_load_executes_it(hostile, monkeypatch):
    """Whatever loads: also a script of whose flags nothing is known."""
    folder, executed = hostile / "iter_0000001", hostile.parent / "executed"

    def load() -> None:
        state = {"rng_state/shard_0.0_1.1": io.BytesIO()}
        torch.distributed.checkpoint.load(
            state, checkpoint_id=folder, no_dist=True, planner=_planner()
        )

    monkeypatch.setattr(filesystem, "pickle", pickle)
    load_bytes = default_planner.DefaultLoadPlanner.load_bytes
    monkeypatch.setattr(
        default_planner.DefaultLoadPlanner,
        "load_bytes",
        getattr(load_bytes, "__wrapped__", load_bytes),
    )
    with contextlib.suppress(CheckpointException):  # the folder is there the second time
        load()
    assert executed.exists()  # the test can fail
    executed.rmdir()
    checkpoint_pickles.install.__wrapped__()
    with pytest.raises(BaseException, match=r"names posix\.mkdir, which does not belong there"):
        load()
    assert not executed.exists()


def _planner() -> default_planner.DefaultLoadPlanner:
    return default_planner.DefaultLoadPlanner(flatten_state_dict=False)


@pytest.mark.parametrize(
    ("hostile", "command", "activation"),
    [
        ("rng_state", ["-m", "megatron_xielu.pretrain_gpt"], "--xielu"),
        ("rng_state", STOCK, SPEC),
        (".metadata", ["-m", "megatron_xielu.cluster.rank", *STOCK], ""),
    ],
    indirect=["hostile"],
)
def test_no_training_executes_it(hostile, command, activation, tmp_path):
    """By our entry; by `--spec`; and in a script that the launcher starts, with GELU."""
    run = train(tmp_path / "run", f"{activation} --load {hostile}", command=command, succeeds=False)
    assert "names posix.mkdir, which does not belong there" in run.output and not run.losses
    assert not (tmp_path / "executed").exists()
    if "pretrain_gpt" in command[1]:
        assert "Traceback" not in run.output and f"error: --load {hostile}: iter_" in run.output


def test_an_array_of_older_numpy():
    """It calls its parts by another module's name, which Megatron's list does not have."""
    data, older = saved({"x": numpy.arange(3, dtype=numpy.uint32)}), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(older, "w") as target:
        for member in source.infolist():
            content = source.read(member)
            renamed = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(member.filename, renamed)
            assert member.filename != "archive/data.pkl" or renamed != content
    older.seek(0)
    with torch.serialization.safe_globals([*SAFE_GLOBALS, *checkpoint_pickles._numpys()]):
        assert torch.load(older, weights_only=True)["x"].tolist() == [0, 1, 2]


def test_names_are_those_that_torch_and_megatron_write():
    classes = {
        (found.__module__, name)
        for module in (metadata, planner)
        for name, found in vars(module).items()
        if is_dataclass(found)
    }
    assert classes < pickled_names.METADATA
    for module, name in pickled_names.METADATA:
        if module != "pathlib._local":  # of Python 3.13
            assert pickled_names.metadata_class(module, name) is not None
    dtypes = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}
    ours = {f"{module}.{name}" for module, name in pickled_names.METADATA if module == "torch"}
    assert ours - {"torch.Size"} <= dtypes
    assert {name for name in dtypes - ours if "float" in name} == set()
    for megatrons in SAFE_GLOBALS:
        assert pickled_names.in_state(f"{megatrons.__module__}.{megatrons.__name__}")
    safe = {name for name in _weights_only_unpickler._get_allowed_globals() if "Tensor" in name}
    assert all(map(pickled_names.in_state, safe))


@pytest.mark.parametrize(
    "name",
    [
        *("posix.system", "builtins.eval", "builtins.getattr", "torch.load", "torch.hub.load"),
        *("numpy.testing._private.utils.runstring", "megatron.core.utils.os.system"),
        *("megatron.training.get_args", "torch._utils.eval", "torch.serialization.load"),
    ],
)
def test_names_of_functions_that_do_more(name):
    assert not pickled_names.in_state(name)
    assert not pickled_names.in_metadata(*name.rsplit(".", 1))


def test_a_bit_in_any_name_of_the_index(start_checkpoint, tmp_path):
    """It is damage where before it was read as if nothing were wrong."""
    folder = shutil.copytree(start_checkpoint / "iter_0000001", tmp_path / "iter_0000001")
    content = (folder / ".metadata").read_bytes()
    names = {"float32", "BytesStorageMetadata", "torch.distributed.checkpoint.metadata"}
    places = {
        argument: position
        for opcode, argument, position in pickletools.genops(content)
        if "UNICODE" in opcode.name and argument in names
    }
    assert places.keys() == names
    for name, position in places.items():
        for letter in range(len(name)):
            flipped = bytearray(content)
            flipped[content.index(name.encode(), position) + letter] ^= 1
            (folder / ".metadata").write_bytes(flipped)
            with pytest.raises(Damaged, match=r"^\.metadata cannot be read: "):
                check(folder, whole=False)
    assert load_checkpoint(start_checkpoint / "iter_0000001")
