"""What a finished training left: losses by iteration, speed, memory, parameters, alphas over time.

From the event files that Megatron writes, its checkpoint and its log. Alphas are effective ones,
as they stand in the formula.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compare.settings import Settings
from compare.variants import Variant
from megatron_xielu.catalog import INPUTS_TAG
from megatron_xielu.checkpoints.alphas import Alphas, count_parameters, in_order
from megatron_xielu.checkpoints.folder import complete_checkpoints
from megatron_xielu.common import schema
from megatron_xielu.common.text import one_line
from megatron_xielu.report.events import Curve, read_events

TRAIN, VALID = "lm loss", "lm loss validation"
MEMORY = "mem-max-allocated-bytes"
ALPHA_POINTS = 25  # kept of an alpha's history

# Events reach the disk every two minutes only: of a training that was killed, the log knows more.
_IN_LOG = {
    TRAIN: re.compile(r"iteration +(\d+)/.*\| lm loss: ([\d.E+-]+) \|"),
    VALID: re.compile(r"validation loss at iteration (\d+) .*\| lm loss value: ([\d.E+-]+) \|"),
}


@dataclass(frozen=True)
class Record:
    """One finished training. Losses are in nats per token.

    ``memory``: bytes, of the process that takes most, or of the GPU (``memory_of``). Times and
    memory are None where a training that was started elsewhere did not write them. ``input_std`` is
    of the initial weights. It and ``learning_rate`` are None of a training by an older version.
    """

    variant: str
    seed: int
    parameters: int
    tokens: int
    step_seconds: float | None
    tokens_per_second: float | None
    memory: float | None
    memory_of: str
    train: Curve
    valid: Curve
    alphas: Alphas | None
    input_std: list[float] | None = None  # by layer, of what the activation gets at first
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if not self.train or not self.valid:
            raise ValueError("it has no losses")
        if self.input_std is not None and not self.input_std:
            raise ValueError("its input_std is of no layer")
        if (alphas := self.alphas) is not None:
            rows = [len(row) for row in (*alphas.positive, *alphas.negative)]
            if not alphas.iterations or len(rows) != 2 * len(alphas.iterations) or not all(rows):
                raise ValueError("alphas are not known at every iteration")
            if len(alphas.positive) != len(alphas.negative) or len(set(rows)) != 1:
                raise ValueError("alphas are not of the same layers everywhere")

    @property
    def valid_loss(self) -> float:
        """On held-out text after the last iteration."""
        return self.valid[-1][1]

    @property
    def perplexity(self) -> float:
        """Of the same."""
        return math.exp(min(self.valid_loss, 700.0))

    def to_json(self) -> dict[str, Any]:
        """The fields, in plain types; `common.schema` reads them back."""
        return asdict(self)


Records = dict[str, dict[int, Record]]  # by variant and seed


def with_alphas(records: Records, variants: Sequence[Variant]) -> list[Variant]:
    """Those of which alphas are known."""
    return [v for v in variants if any(one.alphas for one in records[v.name].values())]


def read_record(
    folder: Path, settings: Settings, variant: Variant, seed: int, *, peak_rss: int, on_gpu: bool
) -> Record:
    """Collect the record of the training in ``folder``.

    Args:
        folder: holds ``events``, ``checkpoints`` and ``log.txt``.
        settings: what it was trained with.
        variant: the same.
        seed: the same.
        peak_rss: bytes of its largest process; what is reported without a GPU.
        on_gpu: where it ran.

    Raises:
        SystemExit: a file is missing or ends early, or a number is none.
    """
    try:
        record = _read(folder, settings, variant, seed, peak_rss=peak_rss, on_gpu=on_gpu)
        return schema.check(Record, record.to_json(), folder)
    except ValueError as error:
        raise SystemExit(
            f"compare: {one_line(error)}; delete {folder} and run the same command again"
        ) from None


def _read(
    folder: Path, settings: Settings, variant: Variant, seed: int, *, peak_rss: int, on_gpu: bool
) -> Record:
    events, end = read_events(folder / "events"), settings.iterations
    for tag in (TRAIN, VALID):
        if not events.get(tag) or events[tag][-1][0] != end:
            raise ValueError(f"{folder / 'events'} has no '{tag}' at iteration {end}")
    for tag in ("iteration-time", *([MEMORY] if on_gpu else [])):
        if not events.get(tag):
            raise ValueError(f"{folder / 'events'} has no '{tag}'")
    checkpoint = complete_checkpoints(folder / "checkpoints").get(end)
    if checkpoint is None:
        raise ValueError(f"{folder / 'checkpoints'} has no complete checkpoint of iteration {end}")
    # The first iterations of a process are slower (memory, caches); a median does not see them.
    seconds = statistics.median(value for _, value in events["iteration-time"])
    if not seconds > 0:
        raise ValueError(f"{folder / 'events'}: an iteration took {seconds} seconds")
    return Record(
        variant=variant.name,
        seed=seed,
        parameters=count_parameters(checkpoint),
        tokens=end * settings.tokens_per_iteration,
        step_seconds=seconds,
        tokens_per_second=settings.tokens_per_iteration / seconds,
        memory=max(value for _, value in events[MEMORY]) if on_gpu else peak_rss,
        memory_of="GPU, allocated" if on_gpu else "largest process, resident",
        train=complete(events, folder / "log.txt", TRAIN),
        valid=complete(events, folder / "log.txt", VALID),
        alphas=read_alphas(events, variant) if variant.has_alphas else None,
        input_std=read_input_std(events),
        learning_rate=settings.learning_rate,
    )


def read_input_std(events: dict[str, Curve]) -> list[float] | None:
    """By layer, of the initial weights; None where it is not known of all."""
    curves = [dict(events[f"{INPUTS_TAG}/{layer}"]) for layer in _layers(events, INPUTS_TAG)]
    known = [curve[1] for curve in curves if 1 in curve]
    return known if known and len(known) == len(curves) else None


def _layers(events: dict[str, Curve], what: str) -> list[str]:
    """The layers that have a curve, in the order of the model."""
    return in_order(tag.partition("/")[2] for tag in events if tag.startswith(f"{what}/"))


def complete(events: dict[str, Curve], log: Path, tag: str) -> Curve:
    """The curve of ``tag``; iterations that the events lack are as the log has them (7 digits)."""
    with log.open(errors="replace") as lines:
        matches = [match for line in lines if (match := _IN_LOG[tag].search(line))]
    logged = {int(match[1]): float(match[2]) for match in matches}
    return sorted({**logged, **dict(events[tag])}.items())


def read_alphas(events: dict[str, Curve], variant: Variant) -> Alphas:
    """Effective alphas of every layer: where they start, and some of every iteration's.

    Raises:
        ValueError: there are none, or they are not of the same iterations.
    """
    layers = _layers(events, "alpha_p")
    curves = {
        side: [dict(events.get(f"alpha_{side}/{layer}", ())) for layer in layers]
        for side in ("p", "n")
    }
    both = [set(curve) for curve in (*curves["p"], *curves["n"])]
    steps = sorted(set.intersection(*both)) if both else []
    if not steps:
        raise ValueError("at no iteration are all alphas known")
    every = max(1, len(steps) // ALPHA_POINTS)
    steps = [*steps[every - 1 : -1 : every], steps[-1]]
    return Alphas(
        [0, *steps],
        *(
            [[start] * len(layers), *([curve[step] for curve in curves[side]] for step in steps)]
            for side, start in zip(("p", "n"), variant.init, strict=True)
        ),
    )
