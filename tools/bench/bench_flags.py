"""What several of these tools ask of their flags and of the machine."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

import torch


def need_cuda(fix: str) -> None:
    """End with one line where there is no GPU; how the tool is used is not the matter then."""
    if not torch.cuda.is_available():
        name = Path(sys.argv[0]).name
        raise SystemExit(f"{name}: error: PyTorch sees no CUDA device here; {fix}")


def joined_sizes(dimensions: int) -> Callable[[str], str]:
    """Positive sizes joined by x, for ``type=``."""

    def check(word: str) -> str:
        if not re.fullmatch("x".join(["[1-9][0-9]{0,8}"] * dimensions), word):
            raise ArgumentTypeError(f"{word[:40]}: give {dimensions} positive sizes joined by x")
        return word

    return check
