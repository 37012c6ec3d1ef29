"""One node's job through a full disk, a NaN and a stop: an intact checkpoint, and the same run."""

import shutil
import subprocess

from launch import load_checkpoint
from namespaces import environment, until
from small_disk import small_disk
from trajectory import PRETRAIN, SETTINGS, assert_same_run, count, events, latest, pretrain

RANKS = {"GPUS_PER_NODE": "2", "PREFLIGHT": "0", "STEP_TIME": "0"}


def test_full_disk_while_saving(reference, tmp_path):
    """Full at the second checkpoint; once there is room, the run goes on from the first."""
    run = tmp_path / "run"
    size = sum(p.stat().st_size for p in (reference / "checkpoints/iter_0000040").iterdir())
    with small_disk(run / "checkpoints", 64) as disk:
        room = shutil.disk_usage(disk).free
        filler = disk / "filler"
        filler.write_bytes(bytes(int(room - 1.5 * size)))
        first = pretrain(run, IN_JOB_RESTARTS="0", **{**RANKS, "STEP_TIME": "0.7"})
        # How the writing rank ends is PyTorch's: with an exception, or with SIGSEGV.
        assert first.returncode not in (0, 2, 4, 75), first.stdout[-3000:]
        assert count(run, "disk-low") == 1 and count(run, "rank-failed") == 2
        assert latest(run) == 10
        load_checkpoint(disk / "iter_0000010")
        filler.unlink()
        second = pretrain(run, **RANKS)
        assert second.returncode == 0, second.stdout[-6000:]
        assert_same_run(run, reference)


def test_nan_in_one_step(reference, tmp_path):
    """A NaN that does not come again: the step is computed again after a restart."""
    run = tmp_path / "run"
    done = pretrain(run, FAULT="nan@15", **RANKS)
    assert done.returncode == 0, done.stdout[-6000:]
    assert any("a loss was rejected" in line for line in events(run))
    assert count(run, "restart") >= 1
    assert_same_run(run, reference)


def test_stopped_when_nobody_reads_its_output(tmp_path):
    """As in ``pretrain.sh | tee log`` when one signal ends both: the ranks still save and end."""
    run = tmp_path / "run"
    settings = {**SETTINGS, "RUN_DIR": str(run), **RANKS, "STEP_TIME": "0.3"}
    reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    job = subprocess.Popen(
        [PRETRAIN], env=environment(settings), stdout=reader.stdin, stderr=subprocess.STDOUT
    )
    reader.stdin.close()
    try:
        until("a checkpoint", lambda: latest(run), timeout=120)
        reader.kill()
        job.terminate()
        assert job.wait(60) == 75
        assert count(run, "stopping") == count(run, "stopped") == 1
    finally:
        job.kill()
        reader.kill()
    assert latest(run) > 10
    left = subprocess.run(["pgrep", "-af", run], capture_output=True, text=True).stdout
    assert not left
