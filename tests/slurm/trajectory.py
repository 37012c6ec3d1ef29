"""The training that these tests disturb, and what must come out of it whatever happens to it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
from launch import REPOSITORY, free_port, load_checkpoint
from namespaces import environment

PRETRAIN = REPOSITORY / "examples/pretrain.sh"

# The debug model for 40 steps with a checkpoint every 10. Steps take long enough to be disturbed.
SETTINGS = {
    "MODEL": "debug",
    "DEVICE": "cpu",
    "ENTRY": str(Path(__file__).with_name("entry_with_faults.py")),
    "STEP_TIME": "0.3",
    "TIMEOUT_MINUTES": "1",
    "RENDEZVOUS_TIMEOUT": "120",
    "FAULT_TOLERANCE": "0",
    # Ranks that hang in a collective are given less time than torchrun's 30 s.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
    "OMP_NUM_THREADS": "1",
    # In the environment of every run: none of them may turn up in a file or a process list.
    "WANDB_API_KEY": "wandb-key-which-must-stay-secret",
    "HF_TOKEN": "hf-token-which-must-stay-secret",
}


def pretrain(run: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """One node's job, to its end: pretrain.sh on this machine."""
    return subprocess.run(
        [str(PRETRAIN)],
        env=environment(
            {**SETTINGS, "RUN_DIR": str(run), "MASTER_PORT": str(free_port()), **variables}
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def undisturbed(run: Path, **variables: str) -> Path:
    """The run that nothing disturbs: two ranks on one node."""
    done = pretrain(run, GPUS_PER_NODE="2", PREFLIGHT="0", STEP_TIME="0", **variables)
    assert done.returncode == 0, done.stdout[-6000:]
    return run


def losses(run: Path) -> dict[tuple[str, str, str], str]:
    """Every loss by rank, iteration and micro-batch, to the last bit.

    A step that was computed again after a restart must have come out as before; this asserts it.
    """
    found: dict[tuple[str, str, str], str] = {}
    for path in (run / "losses").iterdir():
        for line in path.read_text().splitlines():
            iteration, micro_batch, loss = line.split()
            key = path.name.split("-")[0], iteration, micro_batch
            assert found.setdefault(key, loss) == loss, f"{path.name}: {key} came out differently"
    return found


def assert_same_run(run: Path, reference: Path) -> None:
    """Every loss and every tensor of the last checkpoint are the reference's, bit for bit."""
    assert losses(run) == losses(reference)
    (last,) = {latest(run), latest(reference)}
    ours, theirs = (load_checkpoint(r / f"checkpoints/iter_{last:07d}") for r in (run, reference))
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different, different


def latest(run: Path) -> int:
    """The iteration that Megatron would resume from; 0 before the first checkpoint."""
    tracker = run / "checkpoints/latest_checkpointed_iteration.txt"
    return int(tracker.read_text() or 0) if tracker.exists() else 0


def reached(run: Path, iteration: int) -> bool:
    """Whether any rank has computed a loss of this iteration."""
    logs = (run / "losses").glob("*") if (run / "losses").exists() else ()
    return any(f"\n{iteration} " in path.read_text() for path in logs)


def events(run: Path) -> list[str]:
    """The event log of all nodes, in order."""
    return sorted(
        line for path in (run / "events").glob("*.log") for line in path.read_text().splitlines()
    )


def count(run: Path, event: str) -> int:
    """How many events of this name the run has had."""
    return sum(f" event={event} " in f"{line} " for line in events(run))


def assert_no_secrets(run: Path, *texts: str, settings: Mapping[str, str] = SETTINGS) -> None:
    """No key that was in the environment is in a file of the run, or in these texts."""
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        secret = settings[name].encode()
        assert not [path for path, content in files.items() if secret in content], name
        assert not any(settings[name] in text for text in texts), name
