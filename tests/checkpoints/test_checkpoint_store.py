"""The checkpoint folder: what damages it, and what verify, repair and watch make of that."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launch import REPOSITORY, TINY_LLAMA, load_checkpoint, start, train, wait

from megatron_xielu.checkpoints import ledger
from megatron_xielu.checkpoints.check import Damaged, check
from megatron_xielu.checkpoints.folder import TRACKER
from megatron_xielu.checkpoints.ledger import RECORD, lock
from megatron_xielu.checkpoints.repair import NoGoodCheckpoint, repair
from megatron_xielu.checkpoints.watch import Watcher

SAVES = "--xielu --save checkpoints --load checkpoints --save-interval 2"
ASYNC = "--async-save --async-strategy mcore --use-persistent-ckpt-worker"

# The entry with a checkpoint writer that waits for ``WRITER_SLEEPS`` seconds before it writes.
ASYNC_ENTRY = """
import functools, os, time
from megatron_xielu import cpu, pretrain_gpt

def activate(original=cpu.activate):
    original()
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    write = FileSystemWriterAsync.write_preloaded_data

    @functools.wraps(write)
    def write_later(*args, **kwargs):
        time.sleep(float(os.environ.get("WRITER_SLEEPS", 0)))
        return write(*args, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write_later)

cpu.activate = activate
pretrain_gpt.main()
"""


def run(save_dir, *command, expect=0):
    """Run the command line; returns what it printed to standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_xielu.checkpoints", save_dir, *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


def flip(path, position):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def flip_weight(folder):
    """Change one bit of one weight."""
    data = folder / "__0_0.distcp"
    weight = load_checkpoint(folder)["embedding.word_embeddings.weight"]
    flip(data, data.read_bytes().index(weight[0].numpy().tobytes()))


def names(save_dir):
    return sorted(p.name for p in save_dir.iterdir() if p.is_dir())


def assert_same(one, other, iterations=(6,)):
    for iteration in iterations:
        left, right = (load_checkpoint(p / f"iter_{iteration:07d}") for p in (one, other))
        assert left.keys() == right.keys()
        assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run that saved at 2, 4 and 6, with Megatron's own hashes."""
    folder = tmp_path_factory.mktemp("trained")
    return train(folder, f"{SAVES} --verify-integrity"), folder / "checkpoints"


@pytest.fixture
def save_dir(trained, tmp_path):
    """A copy of it to damage, without the hashes, as most checkpoints are."""
    shutil.copytree(trained[1], tmp_path / "copy")
    for manifest in (tmp_path / "copy").glob("*/integrity.json"):
        manifest.unlink()
    return tmp_path / "copy"


@pytest.fixture
def small_disk(tmp_path):
    """A disk for two checkpoints and a part of the third."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    path = tmp_path / "checkpoints"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


# --- verify -------------------------------------------------------------------------------------


def test_good_checkpoints(trained, save_dir):
    for folder in (trained[1], save_dir):
        sizes = {
            i: sum(file.stat().st_size for file in (folder / f"iter_{i:07d}").iterdir())
            for i in (6, 4, 2)
        }
        lines = run(folder, "verify").splitlines()
        assert [re.sub(r"[\d.]+ s$", "", line) for line in lines] == [
            f"iter {i} ok {size / 1000:.1f} kB " for i, size in sizes.items()
        ]
    assert len(run(save_dir, "verify", "--last", "1", "--quick").splitlines()) == 1
    assert "tracker: 6" in run(save_dir, "status")
    run(save_dir / "missing", "verify", expect=2)


def truncate(folder):
    data = folder / "__0_0.distcp"
    os.truncate(data, data.stat().st_size - 100)


def replace_metadata(folder):
    (folder / ".metadata").write_bytes(pickle.dumps({"not": "a checkpoint"}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "__0_0.distcp is 100 bytes short"),
        (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda f: (f / "metadata.json").unlink(), "metadata.json: No such file"),
        (lambda f: (f / "metadata.json").write_text(""), "metadata.json: it is no JSON"),
        (lambda f: (f / ".metadata").unlink(), ".metadata is missing"),
        (lambda f: os.truncate(f / ".metadata", 20000), ".metadata cannot be read"),
        (replace_metadata, ".metadata is not that of a checkpoint"),
        (lambda f: (f / "common.pt").write_bytes(b"PK"), "common.pt: "),
    ],
)
def test_damage_that_a_quick_check_finds(save_dir, damage, reason):
    damage(save_dir / "iter_0000006")
    lines = run(save_dir, "verify", "--quick", expect=1).splitlines()
    assert lines[0].startswith(f"iter 6 DAMAGED: {reason}")
    assert lines[1].startswith("iter 4 ok")


def test_every_flipped_bit_in_the_tensors_is_found(save_dir):
    """The zips of Megatron's writer do carry the CRC of every tensor."""
    folder = save_dir / "iter_0000006"
    data = folder / "__0_0.distcp"
    whole = data.read_bytes()
    for key, values in load_checkpoint(folder).items():
        if values.numel() < 64:
            continue
        # A piece of the tensor as it lies in the file: its first row, whatever the sharding.
        position = whole.find(values.reshape(-1)[:16].numpy().tobytes())
        assert position > 0, key
        flip(data, position)
        check(folder, whole=False)
        with pytest.raises(Damaged, match=r"__0_0.distcp: checksum"):
            check(folder, whole=True)
        flip(data, position)
    check(folder, whole=True)


def test_hashes_of_megatron_cover_the_metadata(trained, tmp_path):
    folder = tmp_path / "iter_0000006"
    shutil.copytree(trained[1] / "iter_0000006", folder)
    check(folder, whole=True)
    flip(folder / ".metadata", (folder / ".metadata").read_bytes().index(b"alpha_p"))
    with pytest.raises(Damaged):
        check(folder, whole=True)
    shutil.copy(trained[1] / "iter_0000006" / ".metadata", folder)
    (folder / "integrity.json").write_text("")
    with pytest.raises(Damaged, match=r"integrity.json: it is no JSON"):
        check(folder, whole=False)


class Hostile:
    """Unpickled by Python's own rules, it leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_nothing_of_a_checkpoint_is_executed(save_dir, tmp_path):
    content = pickle.dumps(Hostile(tmp_path / "executed"))
    (save_dir / "iter_0000006" / ".metadata").write_bytes(content)
    run(save_dir, "verify", expect=1)
    assert not (tmp_path / "executed").exists()
    pickle.loads(content)
    assert (tmp_path / "executed").exists()  # the test can fail


def test_other_formats(tmp_path):
    legacy = tmp_path / "iter_0000001" / "mp_rank_00"
    legacy.mkdir(parents=True)
    with pytest.raises(Damaged, match=r"mp_rank_00/model_optim_rng.pt is missing"):
        check(legacy.parent, whole=False)
    torch.save({"weights": torch.ones(100)}, legacy / "model_optim_rng.pt")
    check(legacy.parent, whole=True)
    os.truncate(legacy / "model_optim_rng.pt", 500)
    with pytest.raises(Damaged, match=r"model_optim_rng.pt: "):
        check(legacy.parent, whole=False)

    # As Megatron's torch_dcp: without metadata.json.
    torch.distributed.checkpoint.save(
        {"weights": torch.ones(100)}, checkpoint_id=tmp_path / "iter_0000002", no_dist=True
    )
    check(tmp_path / "iter_0000002", whole=True)


# --- repair -------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "", "4\0", "12", "4"])
def test_tracker_is_repaired(save_dir, content):
    """Missing, empty, garbled, naming a missing folder, naming an older checkpoint."""
    (save_dir / TRACKER).unlink()
    if content is not None:
        (save_dir / TRACKER).write_text(content)
    output = run(save_dir, "repair").splitlines()
    assert len(output) == 2 and output[-1] == "resume 6"
    assert (save_dir / TRACKER).read_text() == "6"
    assert run(save_dir, "repair") == "resume 6\n"  # once is enough
    run(save_dir, "verify")


def test_damaged_ones_are_set_aside(save_dir):
    for _ in range(2):
        half = save_dir / "iter_0000008"  # as a killed save leaves it
        half.mkdir()
        (half / "__0_0.distcp").write_bytes(b"half")
        run(save_dir, "repair")
    data = save_dir / "iter_0000006" / "__0_0.distcp"
    before = data.stat()
    flip_weight(data.parent)
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    output = run(save_dir, "repair").splitlines()  # though it was verified
    assert output[0].startswith("iter 6 DAMAGED: __0_0.distcp: checksum")
    assert output[1:] == ["tracker was 6, is 4", "resume 4"]
    assert names(save_dir) == [
        *("damaged_iter_0000006", "damaged_iter_0000008", "damaged_iter_0000008.2"),
        *("iter_0000002", "iter_0000004"),
    ]


def test_never_silently_from_scratch(save_dir, tmp_path):
    for folder in save_dir.glob("iter_*"):
        (folder / "metadata.json").unlink()
    (save_dir / TRACKER).unlink()
    for _ in range(2):
        run(save_dir, "repair", expect=3)
    assert len(names(save_dir)) == 3 and not (save_dir / TRACKER).exists()
    with pytest.raises(NoGoodCheckpoint, match="none is good"):
        repair(save_dir)

    # Nothing was ever saved: no folder, an empty one, one that was killed during its first save.
    fresh = tmp_path / "fresh"
    assert run(fresh, "repair") == "resume none\n" and not fresh.exists()
    (fresh / "iter_0000002").mkdir(parents=True)
    (fresh / "iter_0000002" / "__0_0.distcp").write_bytes(b"half")
    for _ in range(2):
        assert run(fresh, "repair").splitlines()[-1] == "resume none"
    assert names(fresh) == ["damaged_iter_0000002"]


def test_release_is_left_alone(save_dir):
    (save_dir / TRACKER).write_text("release")
    (save_dir / "iter_0000006").rename(save_dir / "release")
    assert run(save_dir, "repair") == "resume release\n"
    assert (save_dir / TRACKER).read_text() == "release"
    assert run(save_dir, "verify").startswith("iter release ok ")
    flip_weight(save_dir / "release")
    with pytest.raises(NoGoodCheckpoint, match=r"release: __0_0.distcp: checksum .* convert"):
        repair(save_dir)


def flip_middle(path):
    rest = path.read_bytes()[path.stat().st_size // 2 :]
    unread = len(rest) - len(rest.lstrip(b"Z"))  # PyTorch pads its archives with it
    flip(path, path.stat().st_size // 2 + unread)


def empty(path):
    os.truncate(path, 0)


def flip_tensor(path):
    flip_weight(path.parent)


def flip_attribute(path):
    """What `check` by itself does not notice: only PyTorch needs the attribute."""
    flip(path, path.read_bytes().index(b"storage_meta"))
    check(path.parent, whole=True)


@pytest.mark.parametrize("keep_times", [True, False], ids=["times kept", "new times"])
@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *(
            (name, harm)
            for name in (".metadata", "metadata.json", "__0_0.distcp")
            for harm in (flip_middle, empty, Path.unlink)
        ),
        ("__0_0.distcp", flip_tensor),
        (".metadata", flip_attribute),
    ],
)
def test_damage_after_a_check(save_dir, tmp_path, monkeypatch, name, harm, keep_times):
    """The next start goes on from the one before, and says so in one line."""
    monkeypatch.setenv("MEGATRON_XIELU_EVENTS", str(tmp_path / "events.log"))
    assert repair(save_dir) == 6
    path = save_dir / "iter_0000006" / name
    before = path.stat()
    harm(path)
    if keep_times and path.exists():
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert repair(save_dir) == 4
    assert (save_dir / TRACKER).read_text() == "4"
    (told,) = re.findall("checkpoint-damaged .*", (tmp_path / "events.log").read_text())
    assert told.startswith(f'checkpoint-damaged iteration=6 reason="{name}')
    assert repair(save_dir) == 4


def test_one_written_anew_is_no_damage(save_dir):
    """As a run does that went back; its index need not be the same."""
    assert repair(save_dir) == 6
    shutil.rmtree(save_dir / "iter_0000006")
    shutil.copytree(save_dir / "iter_0000004", save_dir / "iter_0000006", copy_function=shutil.copy)
    with (save_dir / "iter_0000006" / "metadata.json").open("a") as file:
        file.write(" ")
    assert repair(save_dir) == 6


def test_repairs_at_the_same_time(save_dir):
    truncate(save_dir / "iter_0000006")
    (save_dir / TRACKER).write_text("")
    command = [sys.executable, "-m", "megatron_xielu.checkpoints", save_dir, "repair"]
    repairs = [
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in repairs]
    assert [process.returncode for process in repairs] == [0] * 6
    assert {output[-1] for output in outputs} == {"resume 4"}
    assert sorted(map(len, outputs)) == [1, 1, 1, 1, 1, 3]  # one did it all
    assert names(save_dir) == ["damaged_iter_0000006", "iter_0000002", "iter_0000004"]
    assert sorted(p.name for p in save_dir.iterdir() if p.is_file()) == [TRACKER, RECORD]


def test_lock_of_a_dead_process_is_taken_over(save_dir, monkeypatch):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, save_dir], cwd=REPOSITORY)
    assert holder.wait(20) == -signal.SIGKILL
    lock_file = save_dir / ".checkpoints.lock"
    assert json.loads(lock_file.read_text())["pid"] == holder.pid
    begin = time.monotonic()
    assert repair(save_dir) == 6  # the holder was on this node: at once
    assert time.monotonic() - begin < 60 < ledger._STALE_AFTER

    monkeypatch.setattr(ledger, "_STALE_AFTER", 0.3)
    lock_file.write_text(f'{{"node": "n9", "pid": {holder.pid}, "place": "", "since": ""}}')
    begin = time.monotonic()
    assert repair(save_dir) == 6
    assert time.monotonic() - begin > 0.3

    monkeypatch.setattr(ledger, "_RENEW_EVERY", 0.05)
    with lock(save_dir):  # one that is alive is waited for
        waiting = subprocess.Popen(
            [sys.executable, "-c", LOCKED, save_dir], cwd=REPOSITORY, stdout=subprocess.PIPE
        )
        time.sleep(1.5)
        assert waiting.poll() is None
    assert waiting.wait(10) == 0


HOLDER = """
import os, pathlib, signal, sys
from megatron_xielu.checkpoints import ledger
with ledger.lock(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)
"""

LOCKED = """
import pathlib, sys
from megatron_xielu.checkpoints import ledger
ledger._STALE_AFTER = 0.3
with ledger.lock(pathlib.Path(sys.argv[1])): pass
"""


# --- watch --------------------------------------------------------------------------------------


def more_checkpoints(save_dir, *iterations):
    for iteration in iterations:
        shutil.copytree(save_dir / "iter_0000002", save_dir / f"iter_{iteration:07d}")
        (save_dir / TRACKER).write_text(str(iteration))


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_watch(save_dir, tmp_path):
    log = tmp_path / "events.log"
    (save_dir / ".deleting_iter_0000001").mkdir()  # of a watcher that was killed
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "megatron_xielu.checkpoints", save_dir, "watch"),
            *("--keep-last", "2", "--keep-every", "8", "--interval", "0.1", "--events", log),
        ],
        cwd=REPOSITORY,
    )
    until(lambda: names(save_dir) == ["iter_0000004", "iter_0000006"])
    shutil.copytree(save_dir / "iter_0000004", save_dir / "iter_0000002")
    more_checkpoints(save_dir, 8, 10, 12)
    expected = ["iter_0000008", "iter_0000010", "iter_0000012"]
    until(lambda: names(save_dir) == expected)
    table = run(save_dir, "status")
    assert re.search(r" 8 .*T.*Z  a multiple of 8\n +10 .*T.*Z  one of the last 2\n", table)
    assert Path(f"/proc/{process.pid}/stat").read_text().split()[18] == "19"  # nice
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    written = log.read_text()
    for event in ("checkpoint iteration=12", "checkpoint-deleted iteration=6"):
        assert f" event={event} " in written
    assert run(save_dir, "repair") == "resume 12\n"


def test_sigterm_leaves_no_lock(save_dir):
    """Even when it comes between the lock's creation and its first use."""
    done = subprocess.run([sys.executable, "-c", SIGTERM_IN_LOCK, save_dir], cwd=REPOSITORY)
    assert done.returncode == 0
    assert not (save_dir / ".checkpoints.lock").exists()
    assert "iter_0000006" in (save_dir / RECORD).read_text()  # what the lock was for


SIGTERM_IN_LOCK = """
import os, pathlib, signal, sys, threading
from megatron_xielu.checkpoints.watch import watch

def start(thread, original=threading.Thread.start):
    os.kill(os.getpid(), signal.SIGTERM)
    original(thread)

threading.Thread.start = start
watch(pathlib.Path(sys.argv[1]), keep_last=1, keep_every=0, interval=0)
"""


def test_nothing_is_deleted_while_the_newest_is_damaged(save_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_XIELU_EVENTS", str(tmp_path / "events.log"))
    more_checkpoints(save_dir, 8, 10)
    flip_weight(save_dir / "iter_0000010")
    watcher = Watcher(save_dir, keep_last=1, keep_every=0)
    for _ in range(2):
        watcher.step()
    assert len(names(save_dir)) == 5
    assert (tmp_path / "events.log").read_text().count("checkpoint-damaged iteration=10") == 1

    assert repair(save_dir) == 8  # the next start
    watcher.step()
    assert names(save_dir) == ["damaged_iter_0000010", "iter_0000008"]
    # A save in progress is neither read nor deleted.
    (save_dir / "iter_0000012").mkdir()
    watcher.step()
    assert names(save_dir)[1:] == ["iter_0000008", "iter_0000012"]


def test_interrupted_deletion(save_dir, monkeypatch):
    """What a kill between the rename and the end of the removal leaves is no checkpoint."""
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    Watcher(save_dir, keep_last=1, keep_every=0).step()
    monkeypatch.undo()
    assert names(save_dir) == [".deleting_iter_0000002", ".deleting_iter_0000004", "iter_0000006"]
    assert json.loads((save_dir / RECORD).read_text())["checkpoints"].keys() == {"iter_0000006"}
    assert repair(save_dir) == 6
    Watcher(save_dir, keep_last=1, keep_every=0).step()
    assert names(save_dir) == ["iter_0000006"]


# --- real runs ----------------------------------------------------------------------------------


def test_full_disk(trained, small_disk, tmp_path, monkeypatch):
    """The save fails and ends the run; the event came before; the next attempt goes on."""
    run_ = train(tmp_path, SAVES, succeeds=False)
    assert run_.returncodes == [1] and len(run_.losses) == 6
    assert (small_disk / TRACKER).read_text() == "4"
    half = small_disk / "iter_0000006"
    assert [p.name for p in half.iterdir()] == ["__0_0.distcp"]

    monkeypatch.setenv("MEGATRON_XIELU_EVENTS", str(tmp_path / "events.log"))
    shutil.rmtree(half)  # as it was after the save before
    watcher = Watcher(small_disk, keep_last=9, keep_every=0)
    for _ in range(2):
        watcher.step()
    assert (tmp_path / "events.log").read_text().count("event=disk-low iteration=4 reason=") == 1

    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    os.truncate(small_disk / TRACKER, 0)
    # Megatron itself takes an empty tracker for a reason to end, with success.
    refused = train(tmp_path, SAVES, succeeds=False)
    assert refused.losses == [] and "its latest_checkpointed_iteration.txt names" in refused.output
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert repair(small_disk) == 4
    resumed = train(tmp_path, SAVES)
    assert len(resumed.losses) == 2 and resumed.losses[0] == trained[0].losses[4]
    assert_same(small_disk, trained[1])


def test_asynchronous_saves_write_the_same(trained, tmp_path):
    """Though training goes on for two steps while the writer waits."""
    saved = train(
        tmp_path,
        [*SAVES.split(), *ASYNC.split()],
        command=("-c", ASYNC_ENTRY),
        environment={"WRITER_SLEEPS": "0.5"},
    )
    assert saved.losses == trained[0].losses and "scheduled an async" in saved.output
    assert_same(tmp_path / "checkpoints", trained[1], (2, 4, 6))
    run(tmp_path / "checkpoints", "verify")


def test_a_finished_run_started_again_ends(trained, tmp_path):
    """Its writer gets nothing to write, and has Megatron's handler of SIGTERM."""
    asynchronous = f"{SAVES} {ASYNC} --exit-signal-handler"
    train(tmp_path, asynchronous)
    again = train(tmp_path, asynchronous)
    assert again.losses == []


def test_full_disk_in_an_asynchronous_save(small_disk, tmp_path):
    """The failure comes back from the writer process, and the tracker stays where it was.

    The writer waits, so that the trainer has closed iteration 4 before 6 takes the space for it.
    """
    run_ = train(
        tmp_path,
        [*SAVES.split(), *ASYNC.split()],
        succeeds=False,
        command=("-c", ASYNC_ENTRY),
        environment={"WRITER_SLEEPS": "2"},
    )
    assert run_.returncodes == [1] and "Worker failure" in run_.output, run_.output[-3000:]
    assert (small_disk / TRACKER).read_text() == "4"
    assert repair(small_disk) == 4


def test_killed_during_a_save(tmp_path):
    """kill -9 while the writer writes iteration 4: the start goes on from 2."""
    log = tmp_path / "log.txt"
    (trainer,) = start(
        [*TINY_LLAMA, *SAVES.split(), *ASYNC.split()],
        ranks=1,
        log=log,
        command=("-c", ASYNC_ENTRY),
        environment={"WRITER_SLEEPS": "3"},
    )
    save_dir = tmp_path / "checkpoints"
    # Said when the writer has begun with iteration 4.
    until(lambda: "saved checkpoint from iteration       2" in log.read_text(), 90)
    children = subprocess.run(
        ["ps", "--ppid", str(trainer.pid), "-o", "pid="], capture_output=True, text=True, check=True
    ).stdout.split()
    trainer.kill()
    wait([trainer])
    # Megatron's writer outlives its trainer, and never ends.
    assert all(Path(f"/proc/{child}").exists() for child in children)
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    assert names(save_dir)[:2] == ["iter_0000002", "iter_0000004"]
    assert run(save_dir, "repair").splitlines()[-1] == "resume 2"
    assert "damaged_iter_0000004" in names(save_dir) and names(save_dir)[-1] == "iter_0000002"
