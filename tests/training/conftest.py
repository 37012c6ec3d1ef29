"""What several tests of trainings need."""

import sys

import pytest
from launch import TINY_LLAMA

from megatron_xielu import arguments


@pytest.fixture
def parse(monkeypatch):
    """Parse a command line (the tiny Llama's flags first) as the entry does."""

    def parse(flags: str):
        from megatron.training.arguments import parse_args

        monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *TINY_LLAMA, *flags.split()])
        return parse_args(extra_args_provider=arguments.add_arguments)

    return parse
