"""Types for argparse: numbers within limits. A senseless one is refused in one line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from contextlib import suppress

_DIGITS = 18  # 64 bits


def whole(least: int = 0) -> Callable[[str], int]:
    """A whole number of so much or more."""

    def parse(word: str) -> int:
        if not re.fullmatch(f"[0-9]{{1,{_DIGITS}}}", word) or int(word) < least:
            raise argparse.ArgumentTypeError(f"{word} is no whole number of {least} or more")
        return int(word)

    return parse


def real(least: float, most: float) -> Callable[[str], float]:
    """A number within limits, both allowed."""

    def parse(word: str) -> float:
        with suppress(ValueError):
            if least <= float(word) <= most:
                return float(word)
        raise argparse.ArgumentTypeError(f"{word} is no number from {least:g} to {most:g}")

    return parse
