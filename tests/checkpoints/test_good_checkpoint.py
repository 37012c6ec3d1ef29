"""What makes a checkpoint good beyond whole files: its numbers, its index, and that it loads."""

import pickle
import re
import shutil
from argparse import Namespace
from contextlib import suppress
from importlib import import_module

import launch
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_xielu.checkpoints import before_load, failed_loads
from megatron_xielu.checkpoints.check import Damaged, check
from megatron_xielu.checkpoints.folder import TRACKER, read_tracker
from megatron_xielu.checkpoints.repair import NoGoodCheckpoint, repair
from megatron_xielu.checkpoints.watch import Watcher

NAN, INF = float("nan"), float("inf")
BUCKET = "optimizer.distributed.dp_group_idx_0.gbuf_idx_1.dtype_(a, b).bucket_idx_0.exp_avg"


def save(folder, **tensors):
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)


@pytest.fixture
def save_dir(tmp_path):
    """Three checkpoints, the last of which the tracker names."""
    for iteration in (2, 4, 6):
        save(tmp_path / f"iter_{iteration:07d}", weight=torch.ones(3))
    (tmp_path / TRACKER).write_text("6")
    return tmp_path


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_a_number_that_is_not_finite(tmp_path, dtype, number):
    largest = torch.finfo(dtype).max
    values = torch.tensor([0.0, largest, -largest, torch.finfo(dtype).tiny], dtype=dtype)
    save(tmp_path, moment=values, other=values)
    check(tmp_path, whole=True)
    values[1] = number
    save(tmp_path, moment=values, other=torch.ones(1))
    check(tmp_path, whole=False)
    with pytest.raises(Damaged, match=r"^moment has a number that is NaN or infinite$"):
        check(tmp_path, whole=True)


def test_the_last_number_of_many(tmp_path):
    values = torch.ones((1 << 18) + 3)
    values[-1] = NAN
    save(tmp_path, moment=values)
    with pytest.raises(Damaged, match="moment has a number"):
        check(tmp_path, whole=True)


def test_what_is_no_number(tmp_path):
    """Bytes that would be NaN of another type; and NaN that is no part of a tensor."""
    ones = torch.full((64,), 0xFF, dtype=torch.uint8)
    held = torch.full((8,), NAN)
    held[2:6] = 1
    save(
        tmp_path,
        bytes=ones,
        integers=ones.view(torch.int32),
        fp8=ones.view(torch.float8_e4m3fn),
        view=held[2:6],
        empty=torch.ones(0),
        state={"loss": NAN, "losses": torch.tensor([INF])}["loss"],
    )
    check(tmp_path, whole=True)


def as_one_bucket(folder, sizes):
    """Make an index of one tensor in parts, as ranks and parameters cut up a bucket."""
    path, start, chunks, places = folder / ".metadata", 0, [], {}
    written = pickle.loads(path.read_bytes())
    for number, size in enumerate(sizes):
        chunk = ChunkStorageMetadata(torch.Size([start]), torch.Size([size]))
        (info,) = (i for index, i in written.storage_data.items() if index.fqn == f"part{number}")
        places[MetadataIndex(BUCKET, chunk.offsets, number)] = info
        chunks.append(chunk)
        start += size
    tensor = TensorStorageMetadata(TensorProperties(), torch.Size([start]), chunks)
    path.write_bytes(pickle.dumps(Metadata({BUCKET: tensor}, storage_data=places)))


@pytest.mark.parametrize(
    ("poisoned", "good"),
    [(0, False), (1, True), (2, False), (3, True), (4, False)],
    ids=["parameter", "padding", "alpha", "padding at the end", "second part of a parameter"],
)
def test_padding_between_parameters(tmp_path, poisoned, good):
    """Of stock Megatron it is memory as it was found (`sharded_param_state_dp_reshardable`)."""
    sizes = (100, 28, 1, 63, 70)
    values = {f"part{i}": torch.full((size,), 1.0) for i, size in enumerate(sizes)}
    values[f"part{poisoned}"][-1] = NAN
    save(tmp_path, **values)
    as_one_bucket(tmp_path, sizes)
    if good:
        check(tmp_path, whole=True)
    else:
        with pytest.raises(Damaged, match=r"bucket_idx_0.exp_avg has a number"):
            check(tmp_path, whole=True)


def test_nan_in_a_save_folder(save_dir, tmp_path, monkeypatch):
    """Told at once, never counted among the good ones, and not resumed from."""
    monkeypatch.setenv("MEGATRON_XIELU_EVENTS", str(tmp_path / "events.log"))
    shutil.rmtree(save_dir / "iter_0000006")
    save(save_dir / "iter_0000006", weight=torch.tensor([1, NAN, 1]))
    Watcher(save_dir, keep_last=1, keep_every=0).step()
    told = 'event=checkpoint-damaged iteration=6 reason="weight has a number'
    assert told in (tmp_path / "events.log").read_text()
    assert len(list(save_dir.glob("iter_*"))) == 3
    assert repair(save_dir) == 4


# --- the index ----------------------------------------------------------------------------------


def swap_places(metadata):
    first, second = metadata.storage_data
    metadata.storage_data[first].offset = metadata.storage_data[second].offset
    metadata.storage_data[first].length = metadata.storage_data[second].length


def move_chunk(metadata):
    chunk = metadata.state_dict_metadata["a"].chunks[0]
    object.__setattr__(chunk, "offsets", torch.Size([1, 0]))


def grow(metadata):
    metadata.state_dict_metadata["a"].size = torch.Size([3, 2])


def shrink(metadata):
    metadata.state_dict_metadata["a"].size = torch.Size([1, 2])


def forget(metadata):
    del metadata.storage_data[next(iter(metadata.storage_data))]


def resize_chunk(metadata):
    entry = metadata.state_dict_metadata["a"]
    entry.size = torch.Size([3, 2])
    object.__setattr__(entry.chunks[0], "sizes", torch.Size([3, 2]))


@pytest.mark.parametrize(
    ("harm", "reason", "whole"),
    [
        (swap_places, "two records in one place", False),
        (move_chunk, "another place for a piece of 'a'", False),
        (grow, "another size for 'a' than for its pieces", False),
        (shrink, "another size for 'a' than for its pieces", False),
        (forget, "does not say where 'a' is", False),
        (resize_chunk, "another size for 'a' than its record", True),
    ],
)
def test_an_index_that_does_not_fit(tmp_path, harm, reason, whole):
    """A flipped bit in ``.metadata``, which has no checksum, before anybody has hashed it."""
    save(tmp_path, a=torch.ones(2, 2), b=torch.zeros(2, 2))
    path = tmp_path / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    harm(metadata)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(Damaged, match=reason):
        check(tmp_path, whole=whole)


# --- before a load ------------------------------------------------------------------------------


ONES = torch.ones(2)


def flip(folder, values=ONES):
    """Change a bit of a tensor with these values in a checkpoint."""
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[content.index(values.numpy().tobytes())] ^= 0x10
    path.write_bytes(content)


def loads(load=None, pretrained=None, step=None):
    folders = (folder and str(folder) for folder in (load, pretrained))
    names = ("load", "pretrained_checkpoint", "ckpt_step")
    return Namespace(**dict(zip(names, (*folders, step), strict=True)), use_checkpoint_args=False)


def test_what_is_loaded_is_read(save_dir, tmp_path):
    for harmed in (2, 6):
        flip(save_dir / f"iter_{harmed:07d}")
    empty = tmp_path / "empty"
    for args, flag, iteration in (
        (loads(save_dir), "--load", 6),
        (loads(save_dir, empty), "--load", 6),
        (loads(save_dir, step=2), "--load", 2),
        (loads(empty, save_dir), "--pretrained-checkpoint", 6),
        (loads(None, save_dir, step=2), "--pretrained-checkpoint", 2),
        (loads(empty, save_dir, step=2), "--pretrained-checkpoint", 2),
    ):
        said = f"^{flag} {save_dir}: iter_000000{iteration} is damaged: __0_0.distcp: checksum .*"
        with pytest.raises(ValueError, match=said):
            before_load.read_what_is_loaded(args)
    for args in (
        *(loads(save_dir, step=4), loads(save_dir, step=8), loads(empty), loads()),
        loads("msc://bucket/run"),
    ):
        before_load.read_what_is_loaded(args)
    # Not what repair has read.
    before_load.read_what_is_loaded(loads(save_dir), save_dir / "iter_0000006")


def test_a_read_that_takes_long_is_told(save_dir, monkeypatch, capsys):
    monkeypatch.setattr(before_load, "_WORTH_A_LINE", 0)
    before_load.read_what_is_loaded(loads(save_dir))
    told = capsys.readouterr().out
    assert re.search(r"iter_0000006 \(.* kB\) was read in \d+ s: it is whole", told)


@pytest.mark.parametrize("agents_store", ["True", "False"])
def test_other_ranks_wait_without_a_deadline(tmp_path, agents_store):
    """Longer than the timeout of the process group, with its store on rank 0 or in torchrun.

    On rank 0: nodes that count their restarts for themselves, as after a killed rank.
    """
    code = """
import os, sys, time
from datetime import timedelta
import torch
from megatron_xielu.checkpoints import before_load
is_of_agent = os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
os.environ["TORCHELASTIC_RESTART_COUNT"] = "1" if is_of_agent else os.environ["RANK"]
store = is_of_agent and os.environ["RANK"] == "0"
if store:  # in torchrun's own process
    store = torch.distributed.TCPStore(
        "127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False
    )
before_load.on_rank_0(lambda: time.sleep(3))
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=2))
torch.distributed.barrier()
"""
    environment = {"TORCHELASTIC_USE_AGENT_STORE": agents_store}
    ranks = launch.start(
        [], ranks=2, log=tmp_path / "log", command=("-c", code), environment=environment
    )
    assert launch.wait(ranks) == [0, 0], (tmp_path / "log").read_text()


@pytest.fixture
def flipped(start_checkpoint, tmp_path):
    """A real checkpoint with one wrong bit in a weight."""
    folder = shutil.copytree(start_checkpoint, tmp_path / "flipped") / "iter_0000001"
    flip(folder, launch.load_checkpoint(folder)["embedding.word_embeddings.weight"][0])
    return folder.parent


def test_the_entry_refuses_a_flipped_bit(flipped, tmp_path):
    run = launch.train(tmp_path, f"--xielu --load {flipped}", ranks=2, succeeds=False)
    assert run.losses == [] and run.returncodes[0] == 1 and "Traceback" not in run.output
    said = rf"megatron_xielu: error: --load {flipped}: iter_0000001 is damaged: .*"
    (line,) = re.findall(said, run.output)
    assert line.endswith(
        f"python -m megatron_xielu.checkpoints {flipped} verify says which are whole"
    )


@pytest.mark.parametrize("room", ["convert", "evaluate"])
def test_other_readers_refuse_a_flipped_bit(flipped, tmp_path, room, monkeypatch):
    words = {
        "convert": ["to-hf", str(flipped), str(tmp_path / "out")],
        "evaluate": ["--load", str(flipped), "--data-path", "x"],
    }[room]
    monkeypatch.setattr("sys.argv", [room, *words])
    with pytest.raises(SystemExit, match=r"iter_0000001 is damaged: __0_0.distcp: checksum"):
        import_module(f"megatron_xielu.{room}.__main__").main()
    assert not (tmp_path / "out").exists()


def test_what_reads_the_model_alone_needs_no_optimizer(tmp_path):
    values = {"optimizer.state.exp_avg.a": torch.ones(2), "a": torch.zeros(2)}
    dcp.save(values, checkpoint_id=tmp_path, no_dist=True)
    flip(tmp_path)
    torch.save({}, tmp_path / "common.pt")
    check(tmp_path, whole=True, only_model=True)
    with pytest.raises(Damaged):
        check(tmp_path, whole=True)


def test_files_from_before_zips(tmp_path):
    """They have no checksum; a zip with another beginning is no such file."""
    path = tmp_path / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir()
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    check(tmp_path, whole=True)
    torch.save({"a": torch.ones(2)}, path)
    path.write_bytes(b"\x81" + path.read_bytes()[1:])
    with pytest.raises(Damaged):
        check(tmp_path, whole=True)


# --- loads that fail ----------------------------------------------------------------------------


def start(save_dir, error="", loader="right"):
    """What a start resumes from; it then cannot load that, where there is an error."""
    found = repair(save_dir, loader=loader)
    for _ in range(2 if error else 0):  # two ranks say it
        assert failed_loads.note(save_dir, error, loader)
    return found


def folders(save_dir):
    return sorted(path.name for path in save_dir.iterdir() if path.is_dir())


def test_what_fails_twice_is_set_aside(save_dir):
    assert [start(save_dir, "no key x"), start(save_dir, "no key x"), start(save_dir)] == [6, 6, 4]
    assert folders(save_dir) == ["damaged_iter_0000006", "iter_0000002", "iter_0000004"]
    assert read_tracker(save_dir) == 4
    save(save_dir / "iter_0000006", weight=torch.ones(3))  # trained again
    (save_dir / TRACKER).write_text("6")
    # Newer than the one that worked: a new story.
    assert [start(save_dir, error) for error in ("e", "", "e", "", "")] == [6] * 5
    assert not (save_dir / failed_loads.NOTE).exists()


def test_repair_by_hand_between_two_starts(save_dir):
    start(save_dir, "x")
    assert repair(save_dir) == 6
    assert start(save_dir, "x") == repair(save_dir) == 6
    assert start(save_dir) == 4


def test_flags_do_not_eat_checkpoints(save_dir):
    """What no checkpoint can be loaded with is refused, again and again, and all stay."""
    for _ in range(2):
        assert [start(save_dir, "of six") for _ in range(2)] == [6, 6]
        assert start(save_dir) == 4  # ends before it has loaded
        assert start(save_dir, "of four") == 4
        said = r"neither iter_0000006 \(of six\) nor iter_0000004 \(of four\) can be loaded"
        with pytest.raises(NoGoodCheckpoint, match=said):
            start(save_dir)
        assert folders(save_dir) == ["iter_0000002", "iter_0000004", "iter_0000006"]
        assert read_tracker(save_dir) == 6
    assert start(save_dir) == 6


@pytest.mark.parametrize("failures", [1, 2, 3, 4])
def test_wrong_flags_say_nothing_of_the_right_ones(save_dir, failures):
    """Wherever the wrong ones have got to: counted, set aside, or refused."""
    for _ in range(failures):
        with suppress(NoGoodCheckpoint):
            start(save_dir, "no key x", "wrong")
    assert [start(save_dir, error) for error in ("e", "")] == [6, 6]
    assert folders(save_dir) == ["iter_0000002", "iter_0000004", "iter_0000006"]
    assert read_tracker(save_dir) == 6


def test_what_is_set_aside_stays_so_where_the_run_has_gone_on(save_dir):
    assert [start(save_dir, "x"), start(save_dir, "x"), start(save_dir)] == [6, 6, 4]
    save(save_dir / "iter_0000005", weight=torch.ones(3))
    assert start(save_dir, loader="other") == 5
    assert "damaged_iter_0000006" in folders(save_dir)


def test_what_was_set_aside_and_removed(save_dir):
    assert [start(save_dir, "x"), start(save_dir, "x"), start(save_dir)] == [6, 6, 4]
    shutil.rmtree(save_dir / "damaged_iter_0000006")
    assert start(save_dir, loader="other") == read_tracker(save_dir) == 4


def test_the_only_one_is_not_set_aside(save_dir):
    for iteration in (2, 4):
        shutil.rmtree(save_dir / f"iter_{iteration:07d}")
    start(save_dir, "x"), start(save_dir, "x")
    with pytest.raises(NoGoodCheckpoint, match=r"whole, and cannot be loaded \(x\); there is no"):
        start(save_dir)
    assert folders(save_dir) == ["iter_0000006"]
    assert start(save_dir) == 6


@pytest.mark.parametrize("content", ["", "{", '{"iteration": "six"}', '{"iteration": -1}'])
def test_a_note_that_is_damaged(save_dir, content):
    (save_dir / failed_loads.NOTE).write_text(content)
    assert start(save_dir) == 6
    assert not (save_dir / failed_loads.NOTE).exists()
