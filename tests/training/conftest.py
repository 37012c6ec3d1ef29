"""What several tests of trainings need."""

import sys

import pytest
from event_curves import alpha_curves
from experts import MOE, alphas_of
from launch import TINY_LLAMA, train

from megatron_xielu import arguments


@pytest.fixture
def parse(monkeypatch):
    """Parse a command line (the tiny Llama's flags first) as the entry does."""

    def parse(flags: str):
        from megatron.training.arguments import parse_args

        monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *TINY_LLAMA, *flags.split()])
        return parse_args(extra_args_provider=arguments.add_arguments)

    return parse


@pytest.fixture(scope="session")
def moe_start(tmp_path_factory):
    """Flags to go on from a one-rank checkpoint after iteration 1, without optimizer state."""
    folder = tmp_path_factory.mktemp("moe_start")
    train(folder, f"{MOE} --save checkpoints --save-interval 1 --exit-interval 1")
    return f"{MOE} --no-load-optim --load {folder / 'checkpoints'}"


@pytest.fixture(scope="session")
def moe_one(tmp_path_factory, moe_start):
    """One rank, from iteration 1 to 4: the run, its alphas at the end, and their curves."""
    folder = tmp_path_factory.mktemp("moe_one")
    run = train(folder, f"{moe_start} --save checkpoints --tensorboard-dir events")
    alphas = alphas_of(folder / "checkpoints" / "iter_0000004")
    return run, alphas, alpha_curves(folder / "events")
