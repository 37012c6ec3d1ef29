"""Flags: their names, the numbers and files that they take. Of Python 3.9, as `catalog` is."""

from __future__ import annotations

import contextlib
import difflib
import math
from argparse import ArgumentTypeError
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xielu.common import files


def flag_of(argument: str) -> str:
    """The flag of an argument, as argparse makes the one of the other."""
    return f"--{argument.replace('_', '-')}"


def argument_of(flag: str) -> str:
    """The argument of a flag, as argparse names it."""
    return flag.removeprefix("--").replace("-", "_")


# What other trainers call it, where the letters are not near Megatron's.
_ELSEWHERE = {
    "--learning-rate": "--lr",
    "--max-steps": "--train-iters",
    "--tp": "--tensor-model-parallel-size",
    "--pp": "--pipeline-model-parallel-size",
}


def unknown_flag(flag: str, known: Collection[str]) -> str:
    """The error for a flag that is not known, with the nearest that is."""
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
    near = [_ELSEWHERE[flag]] if flag in _ELSEWHERE else near
    return f"{flag} is no flag of Megatron's or this package's; " + (
        f"did you mean {near[0]}?" if near else "drop it"
    )


@dataclass(frozen=True)
class Limits:
    """Which numbers a flag takes: from ``least`` to ``most``.

    Attributes:
        whole: no fractions.
        above, below: ``least`` or ``most`` itself is not allowed.
        or_0: 0 is, though less than ``least``: it switches something off.
    """

    least: float
    most: float = math.inf
    whole: bool = True
    above: bool = False
    below: bool = False
    or_0: bool = False

    def fault(self, value: Any) -> str:
        """What a value must be instead; "" if it is within."""
        known = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, known) or value != value:
            return f"must be a {'whole ' * self.whole}number"
        if value < self.least or (self.above and value == self.least):
            if value == 0 and self.or_0:
                return ""
            least = f"above {self.least}" if self.above else f"{self.least} or more"
            return f"must be {least}{', or 0' * self.or_0}"
        if value > self.most or (self.below and value == self.most):
            return f"must be {'below' if self.below else 'at most'} {self.most}"
        return ""

    def read(self, word: str) -> Any:
        """The ``type`` of an option of argparse.

        Raises:
            ArgumentTypeError: not such a number.
        """
        value: Any = word
        with contextlib.suppress(ValueError):
            value = int(word) if self.whole else float(word)
        fault = self.fault(value)
        if fault:
            raise ArgumentTypeError(f"{fault}, not {ascii(word)[:40]}")
        return value


COUNT, POSITIVE = Limits(0, 2**63 - 1), Limits(1, 2**63 - 1)


def output_file(word: str) -> Path:
    """The ``type`` of an option of argparse that names a file to write, after work that takes long.

    Raises:
        ArgumentTypeError: it cannot be written.
    """
    path = Path(word)
    if path.is_dir():
        raise ArgumentTypeError(f"{word} is a folder; name a file in it")
    try:
        files.try_to_write(path)
    except OSError as error:
        raise ArgumentTypeError(f"{word} cannot be written: {error.strerror}") from None
    return path
