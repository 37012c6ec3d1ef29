"""Trainings that several test files compare with: each runs once."""

import pytest
from launch import Run, load_checkpoint, train


@pytest.fixture(scope="session")
def start_checkpoint(tmp_path_factory):
    """A one-rank xIELU checkpoint after iteration 1: the common start of all layouts."""
    folder = tmp_path_factory.mktemp("start")
    train(folder, "--xielu --save checkpoints --save-interval 1 --exit-interval 1")
    return folder / "checkpoints"


@pytest.fixture(scope="session")
def start_checkpoint_distributed(tmp_path_factory):
    """The same start, with the optimizer state in the distributed optimizer's form."""
    folder = tmp_path_factory.mktemp("start_distributed")
    train(
        folder,
        "--xielu --save checkpoints --save-interval 1 --exit-interval 1 "
        "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
    )
    return folder / "checkpoints"


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory, start_checkpoint) -> tuple[Run, dict]:
    """One rank, from iteration 1 to 6: the run, and its checkpoint at the end."""
    folder = tmp_path_factory.mktemp("one_rank")
    run = train(folder, f"--xielu --load {start_checkpoint} --save checkpoints")
    return run, load_checkpoint(folder / "checkpoints" / "iter_0000006")
