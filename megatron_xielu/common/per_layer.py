"""Initial alphas: one for all layers, one for each, or a file that has them.

A number, numbers with commas between them, or the name of a JSON file that has effective alphas of
every layer, as ``python -m megatron_xielu.convert alphas`` writes it::

    {"alpha_p": [1.3, 0.9, …], "alpha_n": [0.8, 0.7, …], "beta": 0.5}

With another β they make another function: the one they were trained with may stand beside them.

Standard library only, and of Python 3.9: a plan reads them, too.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_xielu.common import schema
from megatron_xielu.common.flags import Limits
from megatron_xielu.common.text import one_line

SIDES = ("alpha_p", "alpha_n")


@dataclass(frozen=True)
class _File:
    alpha_p: list[float]
    alpha_n: list[float]
    beta: Annotated[float, Limits(0, whole=False, above=True)] = 0  # not said


def read(word: Any, flag: str, side: str, layers: int | None, beta: float) -> Any:
    """The number or numbers that a flag's value stands for.

    Args:
        word: the value; numbers where it has been read already.
        flag: it is given for, for messages.
        side: of `SIDES`, for a file.
        layers: of the model; None where that is not known.
        beta: of the model.

    Raises:
        ValueError: it is none of the three, or of another number of layers, or of another β.
    """
    numbers = word
    if isinstance(word, str):
        try:
            numbers = [float(number) for number in word.split(",")]
        except ValueError:
            numbers = _of_file(word, flag, side, beta)
        else:
            numbers = numbers if len(numbers) > 1 else numbers[0]
    if isinstance(numbers, list) and layers not in (None, len(numbers)):
        raise ValueError(f"{flag} {word} has {len(numbers)} layers, and --num-layers is {layers}")
    return numbers


def _of_file(word: str, flag: str, side: str, beta: float) -> list[float]:
    try:
        file = schema.load(_File, Path(word))
    except schema.Malformed as error:
        raise ValueError(f"{flag} {one_line(error)}") from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{flag} {word}: neither a number, nor one for each layer (0.8,1.2), nor a file: "
            f"{one_line(error)}"
        ) from None
    if file.beta and not math.isclose(file.beta, beta, rel_tol=1e-6):  # Hugging Face's is float32
        raise ValueError(
            f"{flag} {word}: its alphas are of a model with β {file.beta}, and --xielu-beta is "
            f"{beta}; give --xielu-beta {file.beta}"
        )
    return getattr(file, side)


def in_words(value: Any) -> str:
    """A setting for people: of one number for each layer the least and the greatest."""
    if isinstance(value, list):
        return f"{min(value):g} to {max(value):g} by layer"
    return f"{value:g}" if not isinstance(value, bool) else ""


def of_layer(value: float | list[float], label: str) -> float:
    """The one of a layer, an expert in it or a prediction layer, which has the last layer's.

    Args:
        value: what `read` returns.
        label: as ``features.layer_names`` has it: ``layer_07.experts.003``.
    """
    if not isinstance(value, list):
        return value
    found = re.match(r"layer_(\d+)", label)
    return value[min(int(found[1]), len(value) - 1) if found else -1]
