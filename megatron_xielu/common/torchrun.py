"""What torchrun tells a process in its environment, checked before anything is started."""

from __future__ import annotations

from collections.abc import Mapping

# The least of each, and which other variable it must be less than.
_NUMBERS = {
    "WORLD_SIZE": (1, ""),
    "RANK": (0, "WORLD_SIZE"),
    "LOCAL_WORLD_SIZE": (1, ""),
    "LOCAL_RANK": (0, "LOCAL_WORLD_SIZE"),
    "MASTER_PORT": (0, ""),
}
_LARGEST = {"MASTER_PORT": 65535}  # others: of 32 bits


def check(environment: Mapping[str, str]) -> None:
    """Check the variables that are there; a process without ``RANK`` is alone.

    Raises:
        ValueError: one line that names the variable.
    """
    numbers = {}
    for name, (least, _) in _NUMBERS.items():
        if name not in environment:
            continue
        word, most = environment[name], _LARGEST.get(name, 2**31 - 1)
        is_whole = word.isascii() and word.isdigit() and len(word) <= 20
        if not (is_whole and least <= int(word) <= most):
            raise ValueError(
                f"{name} must be a whole number from {least} to {most}, not {ascii(word)[:40]}; "
                "start with torchrun"
            )
        numbers[name] = int(word)
    for name, (_, size) in _NUMBERS.items():
        if name in numbers and numbers[name] >= numbers.get(size, numbers[name] + 1):
            raise ValueError(
                f"{name} {numbers[name]} must be less than {size} {numbers[size]}; start with "
                "torchrun"
            )
    missing = [
        name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment
    ]
    if "RANK" in environment and missing:
        raise ValueError(f"RANK is set and {missing[0]} is not; start with torchrun")
