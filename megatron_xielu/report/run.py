"""One training run as a report shows it: everything its folder tells, and what it does not.

A run folder holds event files (in ``tensorboard/``, ``events/`` or itself), checkpoints (in
``checkpoints/`` or itself), ``evaluation.json``, or some of them.
"""

from __future__ import annotations

import math
import os
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_xielu.catalog import ACTIVATIONS, ablations_of
from megatron_xielu.plan.model import Model
from megatron_xielu.report.evaluation import Evaluation, MeasuredLayer
from megatron_xielu.report.events import Series
from megatron_xielu.report.experts import Experts
from megatron_xielu.report.nonlinearity import Shape

Array = NDArray[np.float64]

_LOSS, _VALIDATION = "lm loss", "lm loss validation"
_FINAL_SHARE, _FINAL_LEAST = 0.01, 10  # of logged iterations, for the final training loss
_DIVERGED = 2.0  # times its first loss, of 1 nat at least
_LONG = 44  # characters of a name in a legend, or in a table of a terminal


@dataclass(frozen=True)
class History:
    """Numbers of every activation over time: ``values`` [t, n] after ``iterations`` [t]."""

    iterations: NDArray[np.int64]
    values: Array

    def at(self, iterations: NDArray[np.int64]) -> History:
        """The part of it at these iterations."""
        chosen = np.isin(self.iterations, iterations)
        return History(self.iterations[chosen], self.values[chosen])


@dataclass(frozen=True)
class Layer:
    """One trained activation at the end of a run.

    Attributes:
        name: as `megatron_xielu.features.alpha_logging` calls it; of a layer's routed experts
            together ``layer_07.experts``, with the means of their alphas.
        depth: of its layer, from 0; MTP layers follow the last.
        shape: the activation with its final alphas.
        start: effective (αp, αn) at the start; None where that is not known.
        by_normal: nonlinearity on a standard normal.
        by_measured: nonlinearity on the measured pre-activations; None if there are none.
    """

    name: str
    depth: int
    shape: Shape
    start: tuple[float, float] | None
    by_normal: float
    by_measured: float | None


@dataclass
class Run:
    """See the file. Curves are by iteration; `tokens` turns iterations into tokens."""

    folder: Path
    name: str
    arguments: Namespace | None
    scalars: dict[str, Series]
    samples: Series
    model: Model | None  # None where it is not known, or is no dense GPT model
    activation: str | None
    parameters: int | None
    evaluation: Evaluation | None
    bytes_per_token: float | None  # of its text
    alpha_names: list[str] = field(default_factory=list)
    alpha_p: History | None = None
    alpha_n: History | None = None
    alpha_grad_norm: History | None = None
    layers: list[Layer] = field(default_factory=list)
    experts: Experts | None = None
    measured: dict[str, MeasuredLayer] = field(default_factory=dict)  # by layer
    notes: list[str] = field(default_factory=list)  # what is missing, and how to get it
    number: int | None = None  # of several; only where shortened names do not tell them apart

    @property
    def label(self) -> str:
        """The activation and what was changed in it, for people."""
        label = ACTIVATIONS[self.activation].label if self.activation else "unknown"
        return ", ".join([label, *ablations_of(self.arguments)])

    @property
    def short(self) -> str:
        """Its name for a legend, and no other run's."""
        return shortened(self.name) + ("" if self.number is None else f" #{self.number}")

    @property
    def train(self) -> Series | None:
        """Training loss, nats per token."""
        return self.scalars.get(_LOSS)

    @property
    def validation(self) -> dict[str, Series]:
        """Validation loss, nats per token, by the name of the validation set ('' if one)."""
        return {
            tag.removeprefix(_VALIDATION).lstrip("-"): series
            for tag, series in self.scalars.items()
            if tag.startswith(_VALIDATION) and not tag.endswith(" ppl")
        }

    def credible(self, losses: Array) -> NDArray[np.bool_]:
        """Which losses are finite and at most twice the first, of training if there is one."""
        for series in (self.train, *self.validation.values()):
            if series is not None and len(finite := series.values[np.isfinite(series.values)]):
                limit = _DIVERGED * max(1.0, float(finite[0]))
                return np.isfinite(losses) & (losses <= limit)
        return np.isfinite(losses)

    @property
    def diverged(self) -> int | None:
        """The iteration from which on no logged loss was `credible`; None where the last is."""
        if self.train is None or not len(self.train.steps):
            return None
        credible = np.flatnonzero(self.credible(self.train.values))
        bad = self.train.steps[credible[-1] + 1 if len(credible) else 0 :]
        return int(bad[0]) if len(bad) else None

    def believed(self, series: Series) -> Series:
        """What it logged before it `diverged`."""
        before = series.steps < (math.inf if self.diverged is None else self.diverged)
        return Series(series.steps[before], series.values[before], series.times[before])

    @property
    def iterations(self) -> int:
        """The last that is known of."""
        ends = [
            int(s.steps[-1]) for s in (self.train, self.samples) if s is not None and len(s.steps)
        ]
        ends += [int(self.alpha_p.iterations[-1])] if self.alpha_p else []
        return max(ends, default=0)

    @property
    def planned_iterations(self) -> int | None:
        """What the run was started for."""
        return getattr(self.arguments, "train_iters", None)

    @property
    def final_train_loss(self) -> float | None:
        """Mean over the last 1 % of logged iterations, at least 10."""
        if self.train is None:
            return None
        values = self.train.values[-max(_FINAL_LEAST, int(len(self.train.values) * _FINAL_SHARE)) :]
        return float(values.mean())

    @property
    def final_validation_loss(self) -> float | None:
        """The last, of the first validation set."""
        return next((float(series.values[-1]) for series in self.validation.values()), None)

    @property
    def evaluated_loss(self) -> float | None:
        """Of ``megatron_xielu.evaluate``, nats per token."""
        return self.evaluation.loss if self.evaluation else None

    @property
    def bits_per_byte(self) -> float | None:
        """Of the same."""
        return self.evaluation.bits_per_byte if self.evaluation else None

    def tokens(self, iterations: NDArray[np.int64]) -> Array | None:
        """Tokens consumed after ``iterations``; None where nothing says how many."""
        sequence = getattr(self.arguments, "seq_length", None)
        if not sequence:
            return None
        if _some(self.samples):
            steps = np.concatenate([[0], self.samples.steps])
            consumed = np.concatenate([[0.0], self.samples.values])
            rate = consumed[-1] / steps[-1] if steps[-1] else 0.0
            beyond = np.maximum(iterations - steps[-1], 0) * rate
            return (np.interp(iterations, steps, consumed) + beyond) * sequence
        batch = getattr(self.arguments, "global_batch_size", None)
        if not batch or getattr(self.arguments, "rampup_batch_size", None):
            return None
        return iterations.astype(float) * batch * sequence

    @property
    def total_tokens(self) -> float | None:
        """After the last iteration."""
        tokens = self.tokens(np.array([self.iterations]))
        return float(tokens[0]) if tokens is not None and self.iterations else None

    @property
    def total_flops(self) -> float | None:
        """Of training up to the last iteration, as Megatron counts; without recomputation."""
        if self.total_tokens is None or self.model is None:
            return None
        return self.total_tokens * self.model.flops_per_token()

    @property
    def step_time(self) -> Series | None:
        """Seconds per iteration: Megatron's own figure, or between two written losses."""
        if _some(self.scalars.get("iteration-time")):
            return self.scalars["iteration-time"]
        if self.train is None or len(self.train.steps) < 2:
            return None
        seconds = np.diff(self.train.times) / np.diff(self.train.steps)
        return Series(self.train.steps[1:], seconds, self.train.times[1:])

    @property
    def tokens_per_second(self) -> float | None:
        """From the median step time."""
        if self.step_time is None or self.total_tokens is None:
            return None
        median = float(np.median(self.step_time.values))
        return self.total_tokens / self.iterations / median if median > 0 else None


def name_apart(runs: Sequence[Run]) -> None:
    """Lengthen names by parent folders until no two are the same."""
    paths = [Path(readable(run.folder.resolve())).parts for run in runs]
    for run, parts in zip(runs, paths, strict=True):
        for count in range(1, len(parts) + 1):
            run.name = "/".join(parts[-count:])
            if sum(other[-count:] == parts[-count:] for other in paths) == 1:
                break
    short = Counter(run.short for run in runs)
    for number, run in enumerate(runs, 1):
        if short[run.short] > 1:
            run.number = number


def shortened(name: str) -> str:
    """Without the middle, if it is long."""
    return name if len(name) <= _LONG else f"{name[: _LONG // 2 - 1]}…{name[-_LONG // 2 :]}"


def readable(path: Path) -> str:
    """A path that can be printed: names on a disk need not be text."""
    return os.fsencode(path).decode(errors="replace")


def depth(name: str, layers: int) -> int:
    match = re.match(r"(layer|mtp)_([0-9]{1,9})", name)
    if match is None:
        return layers
    return int(match[2]) + (layers if match[1] == "mtp" else 0)


def _some(series: Series | None) -> bool:
    return series is not None and len(series.steps) > 0
